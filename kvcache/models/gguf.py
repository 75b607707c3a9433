"""Models from GGUF files, the single-file format of llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read
  here
(the `gguf` package needs seconds for a vocabulary); blocks of quantised weights are
decoded by `gguf.dequantize`.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.models.errors import LoadError, require
from kvcache.models.llama import LlamaConfig
from kvcache.models.loaded import Loaded
from kvcache.models.tokenizer import Tokenizer
from kvcache.models.weights import build_model, check_names, Place

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALARS = {
  0: "u1",
  1: "i1",
  2: "u2",
  3: "i2",
  4: "u4",
  5: "i4",
  6: "f4",
  7: "?",
  10: "u8",
  11: "i8",
  12: "f8",
}
_STRING, _ARRAY = 8, 9
_NAMES = {
  "embedding": "token_embd.weight",
  "norm": "output_norm.weight",
  "head": "output.weight",
  "attention_norm": "blk.{layer}.attn_norm.weight",
  "q": "blk.{layer}.attn_q.weight",
  "k": "blk.{layer}.attn_k.weight",
  "v": "blk.{layer}.attn_v.weight",
  "q_bias": "blk.{layer}.attn_q.bias",
  "k_bias": "blk.{layer}.attn_k.bias",
  "v_bias": "blk.{layer}.attn_v.bias",
  "out": "blk.{layer}.attn_output.weight",
  "out_bias": "blk.{layer}.attn_output.bias",
  "q_norm": "blk.{layer}.attn_q_norm.weight",
  "k_norm": "blk.{layer}.attn_k_norm.weight",
  "mlp_norm": "blk.{layer}.ffn_norm.weight",
  "gate": "blk.{layer}.ffn_gate.weight",
  "up": "blk.{layer}.ffn_up.weight",
  "down": "blk.{layer}.ffn_down.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
  """Where one tensor lies: its shape (outermost first), its encoding and its bytes."""

  shape: tuple[int, ...]
  encoding: int
  offset: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
  """The header of a file, and its bytes mapped into memory.

  Attributes:
    path: Where it is.
    metadata: Keys and values; arrays of numbers are NumPy arrays, of strings lists.
    tensors: By name.
    data: `[bytes]` uint8, the file from the start of its tensor data.
  """

  path: pathlib.Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, GGUFTensor]
  data: np.ndarray

  @property
  def architecture(self) -> str:
    """llama.cpp's name of the model family."""
    return str(self.metadata.get("general.architecture", "unnamed"))

  def setting(self, key: str, default: Any = None) -> Any:
    """Returns the metadata of this architecture, `<architecture>.<key>`."""
    value = self.metadata.get(f"{self.architecture}.{key}", default)
    if value is None:
      raise LoadError(f"{self.path} has no {self.architecture}.{key} in its metadata")
    return value

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as float32, outermost axis first."""
    gguf = require("gguf")
    tensor = self.tensors[name]
    try:
      encoding = gguf.GGMLQuantizationType(tensor.encoding)
      block, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
      row_bytes = tensor.shape[-1] // block * block_bytes
      size = math.prod(tensor.shape[:-1]) * row_bytes
      raw = self.data[tensor.offset : tensor.offset + size]
      if raw.size < size:
        raise LoadError(f"{self.path} is truncated: it ends inside tensor {name}")
      values = gguf.dequantize(raw.reshape(*tensor.shape[:-1], row_bytes), encoding)
    except (NotImplementedError, KeyError) as error:
      raise LoadError(f"{self.path}: cannot decode {name}: {error}") from error
    return values.reshape(tensor.shape).astype(np.float32, copy=False)


def read_gguf(path: str | pathlib.Path) -> GGUFFile:
  """Reads the header of a GGUF file and maps its tensors; decodes none of them.

  Raises:
    LoadError: The file is missing, is not a GGUF file, or ends too early.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise LoadError(f"{path} is not a file")
  if path.stat().st_size < 24:
    raise LoadError(f"{path} is too short to be a GGUF file")
  blob = np.memmap(path, np.uint8, mode="r")
  if blob[:4].tobytes() != _MAGIC:
    raise LoadError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
  cursor = _Cursor(memoryview(blob), offset=4)
  try:
    version = cursor.scalar("u4")
    if version not in _VERSIONS:
      raise LoadError(f"{path} is GGUF version {version}; versions 2 and 3 are read")
    num_tensors, num_metadata = cursor.scalar("u8"), cursor.scalar("u8")
    metadata = {}
    for _ in range(num_metadata):
      key = cursor.string()
      metadata[key] = cursor.value(cursor.scalar("u4"))
    tensors = {}
    for _ in range(num_tensors):
      name = cursor.string()
      rank = cursor.scalar("u4")
      shape = tuple(cursor.scalar("u8") for _ in range(rank))[::-1]
      encoding, offset = cursor.scalar("u4"), cursor.scalar("u8")
      tensors[name] = GGUFTensor(shape=shape, encoding=encoding, offset=offset)
  except EOFError:
    raise LoadError(f"{path} is truncated: its header is incomplete") from None
  except (UnicodeDecodeError, KeyError) as error:
    raise LoadError(f"{path} has a damaged header: {error!r}") from error
  alignment = int(metadata.get("general.alignment", 32))
  start = -(-cursor.offset // alignment) * alignment
  return GGUFFile(path=path, metadata=metadata, tensors=tensors, data=blob[start:])


def load_gguf(
  path: str | pathlib.Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
) -> Loaded:
  """Loads a model of the Llama family and its tokenizer from a GGUF file.

  Quantised weights are decoded to `dtype`: the model computes what the file says, at
  the memory and speed of `dtype`.

  Args:
    path: The file.
    dtype: Of weights and activations.
    scan_layers: As in `LlamaConfig`.

  Raises:
    LoadError: See `kvcache.models.load`.
  """
  require("gguf")
  file = read_gguf(path)
  config = dataclasses.replace(
    config_from_gguf(file),
    dtype=dtype,
    scan_layers=scan_layers,
  )
  check_names(
    config,
    _NAMES,
    set(file.tensors),
    source=str(file.path),
    ignored=lambda name: name == _ROPE_FACTORS,
  )

  def read(role: str, place: Place) -> np.ndarray:
    tensor = file.read(_NAMES[role].format(**place))
    if file.architecture == "llama" and role in ("q", "k", "q_bias", "k_bias"):
      return _unpermute(tensor, config.head_dim)
    return tensor

  model = build_model(config, read, source=str(file.path))
  metadata = file.metadata
  ends = ("eos_token_id", "eot_token_id", "eom_token_id")
  stops = {int(metadata[k]) for e in ends if (k := f"tokenizer.ggml.{e}") in metadata}
  return Loaded(
    model=model,
    config=config,
    tokenizer=Tokenizer.from_gguf(metadata, source=str(file.path)),
    stop_tokens=tuple(sorted(stops)),
    source=str(file.path),
  )


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
  """Returns the shape of the model in a file.

  Raises:
    LoadError: The architecture, or something it uses, is not supported.
  """
  if file.architecture not in _ARCHITECTURES:
    raise LoadError(
      f"{file.path}: architecture {file.architecture!r} is not supported;"
      f" supported are {', '.join(_ARCHITECTURES)}"
    )
  if file.setting("expert_count", 0):
    raise LoadError(f"{file.path}: mixtures of experts are not supported")
  hidden, heads = file.setting("embedding_length"), file.setting("attention.head_count")
  head_dim = int(file.setting("attention.key_length", hidden // heads))
  if file.setting("rope.dimension_count", head_dim) != head_dim:
    raise LoadError(f"{file.path}: rotating a part of each head is not supported")
  embedding = file.tensors.get(_NAMES["embedding"])
  if embedding is None:
    raise LoadError(f"{file.path} misses tensors (1): {_NAMES['embedding']}")
  return LlamaConfig(
    vocab_size=embedding.shape[0],
    hidden_size=int(hidden),
    intermediate_size=int(file.setting("feed_forward_length")),
    num_layers=int(file.setting("block_count")),
    num_heads=int(heads),
    num_kv_heads=int(file.setting("attention.head_count_kv", heads)),
    head_dim=head_dim,
    rope_theta=float(file.setting("rope.freq_base", 10000.0)),
    rope_factors=_rope_factors(file, head_dim),
    norm_epsilon=float(file.setting("attention.layer_norm_rms_epsilon")),
    tie_embeddings=_NAMES["head"] not in file.tensors,
    attention_bias=_NAMES["q_bias"].format(layer=0) in file.tensors,
    attention_out_bias=_NAMES["out_bias"].format(layer=0) in file.tensors,
    qk_norm=_NAMES["q_norm"].format(layer=0) in file.tensors,
    max_position=int(file.setting("context_length")),
  )


def _rope_factors(file: GGUFFile, head_dim: int) -> tuple[float, ...] | None:
  if _ROPE_FACTORS in file.tensors:
    return tuple(file.read(_ROPE_FACTORS).tolist())
  scaling = file.setting("rope.scaling.type", "none")
  if scaling == "linear":
    return (float(file.setting("rope.scaling.factor")),) * (head_dim // 2)
  if scaling != "none":
    raise LoadError(f"{file.path}: rope scaling {scaling!r} is not supported")
  return None


def _unpermute(tensor: np.ndarray, head_dim: int) -> np.ndarray:
  """Undoes llama.cpp's order of a rotated head, which pairs neighbours, not halves."""
  pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
  return pairs.swapaxes(1, 2).reshape(tensor.shape)


class _Cursor:
  """Reads little-endian values one after another; raises EOFError past the end."""

  def __init__(self, view: memoryview, *, offset: int):
    self.view = view
    self.offset = offset

  def take(self, size: int) -> memoryview:
    end = self.offset + size
    if end > len(self.view):
      raise EOFError
    taken = self.view[self.offset : end]
    self.offset = end
    return taken

  def scalar(self, code: str) -> Any:
    return self.numbers(code, 1)[0].item()

  def numbers(self, code: str, count: int) -> np.ndarray:
    dtype = np.dtype(code).newbyteorder("<")
    return np.frombuffer(self.take(dtype.itemsize * count), dtype)

  def string(self) -> str:
    (size,) = struct.unpack("<Q", self.take(8))
    return str(self.take(size), "utf-8")

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.scalar(_SCALARS[kind])
    item, count = self.scalar("u4"), self.scalar("u8")
    if item in _SCALARS:
      return self.numbers(_SCALARS[item], count)
    return [self.value(item) for _ in range(count)]
