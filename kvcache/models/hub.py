"""Checkpoints from the Hugging Face Hub, by name.

Only what a model needs is downloaded, and it stays in the Hub's own cache: a name that
was loaded once loads again without a network.
"""

from collections.abc import Sequence
import pathlib
import re

from kvcache.models.errors import LoadError, require

CONFIG_FILES = ("config.json", "model.safetensors.index.json")
"""What says how big a model is."""
MODEL_FILES = (
  "*.json",  # configuration, index of the shards, tokenizer
  "chat_template.jinja",
  "model*.safetensors",
)
"""What a model and its tokenizer are made from."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str) -> bool:
  """Whether a string can name a repository: `owner/name`."""
  return _NAME.fullmatch(name) is not None and not name.endswith(".gguf")


def fetch(name: str, *, files: Sequence[str] = MODEL_FILES) -> pathlib.Path:
  """Returns the folder that holds a repository's files, downloaded where missing.

  Args:
    name: `owner/name`.
    files: Patterns of the files wanted.

  Raises:
    LoadError: `huggingface_hub` is not installed, the Hub cannot be reached and nothing
      is cached, or the repository does not exist or may not be read.
  """
  hub = require("huggingface_hub")
  errors = require("huggingface_hub.errors")
  try:
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=list(files)))
  except errors.GatedRepoError as error:  # before the error it is a kind of
    raise LoadError(
      f"{name} is gated: accept its terms at https://huggingface.co/{name} and log in"
      " with `hf auth login`"
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise LoadError(
      f"{name} is no folder here, and the Hub has no such model, or a private one"
    ) from error
  except (errors.LocalEntryNotFoundError, ConnectionError) as error:
    raise LoadError(
      f"{name} is no folder here and not in the Hub's cache, and the Hub cannot be"
      " reached: download it where there is a network, or pass a folder"
    ) from error
  except (OSError, ValueError) as error:
    reason = str(error).partition("\n")[0] or type(error).__name__
    raise LoadError(f"{name} cannot be downloaded: {reason}") from error
