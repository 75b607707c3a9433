"""Text to token ids and back, whole or as a stream, and chat templates."""

from collections.abc import Mapping, Sequence
import datetime
import json
import pathlib
from typing import Any

from kvcache.models.errors import LoadError, require

_GPT2_SPLIT = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST

_SPLITS: dict[str, tuple[str, ...]] = {
  "gpt-2": (_GPT2_SPLIT,),
  **dict.fromkeys(("smollm", "starcoder", "refact"), (r"\p{N}", _GPT2_SPLIT)),
  **dict.fromkeys(
    ("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "dbrx"), (_LLAMA3_SPLIT,)
  ),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2_SPLIT,)),
}
"""`tokenizer.ggml.pre` -> patterns that cut text into words, one after another."""

_MERGES_IGNORED = ("llama3", "llama-v3", "llama-bpe")
"""Here a word that is a token is that token, whatever the merges would make of it."""

_CONTROL, _USER_DEFINED = 3, 4
_REPLACEMENT = "\ufffd"


class Tokenizer:
  """Byte-level BPE (or whatever a `tokenizer.json` says) with a chat template.

  Attributes:
    chat_template: Jinja source, or None.
    special_tokens: Spelling of the tokens that templates may name: `bos_token`, ...
  """

  def __init__(
    self,
    backend: Any,
    *,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str] | None = None,
  ):
    """Wraps a `tokenizers.Tokenizer`."""
    self._backend = backend
    self.chat_template = chat_template
    self.special_tokens = dict(special_tokens or {})

  @classmethod
  def from_gguf(cls, metadata: Mapping[str, Any], *, source: str) -> "Tokenizer":
    """Builds the tokenizer that a GGUF file's metadata describes.

    Raises:
      LoadError: The vocabulary is not byte-level BPE, or is cut into words in an
        unknown way.
    """
    tokenizers = require("tokenizers")

    def get(key: str, default: Any = None) -> Any:
      return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre = get("model"), get("pre", "default")
    if kind != "gpt2":
      raise LoadError(
        f"{source}: tokenizer {kind!r} is not supported, only byte-level BPE ('gpt2')"
      )
    if pre not in _SPLITS:
      raise LoadError(f"{source}: pre-tokenizer {pre!r} is not supported")
    tokens, merges = get("tokens"), get("merges")
    if tokens is None or merges is None:
      raise LoadError(f"{source} has no vocabulary or no merges in its metadata")
    try:
      backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
          vocab={token: index for index, token in enumerate(tokens)},
          merges=[tuple(merge.split(" ", 1)) for merge in merges],
          ignore_merges=pre in _MERGES_IGNORED,
        )
      )
    except Exception as error:  # The Rust side raises bare Exception.
      raise LoadError(f"{source} has a damaged vocabulary: {error}") from error
    cuts = tokenizers.pre_tokenizers
    backend.pre_tokenizer = cuts.Sequence(
      [cuts.Split(tokenizers.Regex(split), "isolated") for split in _SPLITS[pre]]
      + [cuts.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    if _SPLITS[pre] == (_QWEN2_SPLIT,):
      backend.normalizer = tokenizers.normalizers.NFC()
    types = get("token_type", [1] * len(tokens))
    added = [
      tokenizers.AddedToken(token, normalized=False, special=int(kind) == _CONTROL)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    named = {
      f"{name}_token": tokens[int(index)]
      for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))
      if (index := get(f"{key}_token_id")) is not None
    }
    if get("add_bos_token", pre in _MERGES_IGNORED) and "bos_token" in named:
      bos = named["bos_token"]
      backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
      )
    template = metadata.get("tokenizer.chat_template")
    return cls(backend, chat_template=template, special_tokens=named)

  @classmethod
  def from_folder(cls, folder: str | pathlib.Path) -> "Tokenizer":
    """Reads `tokenizer.json` and `tokenizer_config.json` of a Hugging Face folder.

    Raises:
      LoadError: There is no `tokenizer.json`, or a file cannot be read.
    """
    tokenizers = require("tokenizers")
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
      raise LoadError(f"{folder} has no tokenizer.json")
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The Rust side raises bare Exception.
      raise LoadError(f"{path} cannot be read: {error}") from error
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    named = {}
    for key, value in config.items():
      if key.endswith("_token") and isinstance(value, (str, dict)):
        named[key] = value if isinstance(value, str) else value["content"]
    template = config.get("chat_template")
    if isinstance(template, list):
      templates = {entry["name"]: entry["template"] for entry in template}
      template = templates.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
      template = file.read_text()
    return cls(backend, chat_template=template, special_tokens=named)

  @property
  def vocab_size(self) -> int:
    """Number of tokens, special ones included."""
    return self._backend.get_vocab_size(with_added_tokens=True)

  def token_id(self, token: str) -> int | None:
    """Returns the id of a token's exact spelling, or None."""
    return self._backend.token_to_id(token)

  def encode(self, text: str, *, add_special: bool = True) -> list[int]:
    """Returns the ids of a text.

    Special tokens spelled out in the text become their ids, so text of others that must
    not contain them has to be cleaned before.

    Args:
      text: Any text.
      add_special: Whether to add what the model wants around a text, such as a first
        token.
    """
    return self._backend.encode(text, add_special_tokens=add_special).ids

  def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
    """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
    ids = [int(token) for token in tokens]
    return self._backend.decode(ids, skip_special_tokens=skip_special)

  def stream(self, *, skip_special: bool = True) -> "TextStream":
    """Returns a decoder that takes one token at a time."""
    return TextStream(self, skip_special=skip_special)

  def apply_chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """Renders messages in the model's chat format, in a sandbox.

    Args:
      messages: Each with `role` ("system", "user", "assistant") and `content`.
      add_generation_prompt: Whether to end with the opening of the assistant's answer.
      **variables: Others that the template knows, such as `tools`.

    Returns:
      Text for `encode(..., add_special=False)`: a template writes special tokens
      itself.

    Raises:
      ValueError: There is no template, or it refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError("this model has no chat template")
    jinja2 = require("jinja2")
    require("jinja2.sandbox")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: (
      datetime.datetime.now().strftime(format)
    )
    try:
      return environment.from_string(self.chat_template).render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        **{**self.special_tokens, **variables},
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template failed: {error}") from error

  def encode_chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> list[int]:
    """Returns the ids of `apply_chat`'s text."""
    text = self.apply_chat(
      messages, add_generation_prompt=add_generation_prompt, **variables
    )
    return self.encode(text, add_special=False)


class TextStream:
  """Decodes a growing list of tokens into pieces that join to the whole text.

  A character can be split over tokens; its bytes wait until they are complete.
  """

  def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
    """Starts before the first token."""
    self._tokenizer = tokenizer
    self._skip_special = skip_special
    self._tokens: list[int] = []
    self._shown = ""

  def push(self, token: int) -> str:
    """Takes one token and returns the text that became certain, often none."""
    self._tokens.append(int(token))
    text = self._decode()
    if text.endswith(_REPLACEMENT):
      return ""
    piece, self._shown = text[len(self._shown) :], text
    # One complete token stays as context: some decoders treat the first token
    # differently.
    self._tokens = self._tokens[-1:]
    self._shown = self._decode()
    return piece

  def flush(self) -> str:
    """Returns what still waits, at the end; incomplete bytes become U+FFFD."""
    piece = self._decode()[len(self._shown) :]
    self._tokens, self._shown = [], ""
    return piece

  def _decode(self) -> str:
    return self._tokenizer.decode(self._tokens, skip_special=self._skip_special)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
  """Jinja's own `tojson` escapes HTML, which would change the prompt."""
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
  jinja2 = require("jinja2")
  raise jinja2.TemplateError(message)
