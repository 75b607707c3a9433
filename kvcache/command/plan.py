"""How much fits into a memory: weights, blocks, windows, states and sequences.

Everything is computed from shapes; no array is made, and no weight is read.
"""

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.config import CacheConfig
from kvcache.context import bookkeeping_bytes
from kvcache.models.errors import LoadError
from kvcache.models.loading import load_config
from kvcache.models.presets import PRESETS
from kvcache.models.weights import ModelConfig, weight_shapes
from kvcache.observe import text

_UNITS = {"": 1} | {
  f"{prefix}{suffix}": base**power
  for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
  for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_UNITS["B"] = 1
_LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
  """What a memory holds when a model's weights lie in it.

  Attributes:
    name: Of the model.
    num_bytes: The memory.
    reserved_bytes: Left for activations, the compiler's temporaries and the runtime.
    num_weights: Elements of all weights.
    weight_bytes: Bytes of the arrays that the loaded model has.
    weights_dtype: Of most of them.
    bookkeeping_bytes: Tables, lists and hashes of the context.
    config: The cache: `config.num_bytes` are its keys, values and states.
  """

  name: str
  num_bytes: int
  reserved_bytes: int
  num_weights: int
  weight_bytes: int
  weights_dtype: str
  bookkeeping_bytes: int
  config: CacheConfig

  @property
  def unused_bytes(self) -> int:
    """What is left because it is less than a block."""
    used = self.weight_bytes + self.config.num_bytes + self.bookkeeping_bytes
    return self.num_bytes - self.reserved_bytes - used

  @property
  def bytes_per_token(self) -> int:
    """Bytes that each token takes for as long as its sequence lives."""
    return self.config.bytes_per_block // self.config.block_size

  @property
  def num_tokens(self) -> int:
    """Tokens that the blocks hold, of all sequences together."""
    return (self.config.num_blocks - 1) * self.config.block_size

  def num_sequences(self, length: int) -> int:
    """Sequences of `length` tokens that can live at a time, sharing nothing."""
    config = self.config
    if length > config.max_tokens_per_seq:
      return 0
    columns = -(-length // config.block_size)
    most = min(config.max_seqs, (config.num_blocks - 1) // columns)
    for window in config.windows:
      held = min(columns, config.blocks_per_window(window))
      most = min(most, (config.window_pool_size(window) - 1) // held)
    return most

  @property
  def lengths(self) -> tuple[int, ...]:
    """Lengths worth asking `num_sequences` about."""
    longest = self.config.max_tokens_per_seq
    return (*(length for length in _LENGTHS if length < longest), longest)

  def to_dict(self) -> dict[str, Any]:
    """Returns the plan as what JSON can say."""
    config = self.config
    return {
      "model": self.name,
      "memory_bytes": self.num_bytes,
      "reserved_bytes": self.reserved_bytes,
      "num_weights": self.num_weights,
      "weight_bytes": self.weight_bytes,
      "weights_dtype": self.weights_dtype,
      "cache_bytes": config.num_bytes,
      "bookkeeping_bytes": self.bookkeeping_bytes,
      "unused_bytes": self.unused_bytes,
      "kv_dtype": np.dtype(config.dtype).name,
      "bytes_per_token": self.bytes_per_token,
      "block_size": config.block_size,
      "bytes_per_block": config.bytes_per_block,
      "num_blocks": config.num_blocks,
      "num_tokens": self.num_tokens,
      "max_seqs": config.max_seqs,
      "max_seq_len": config.max_seq_len,
      "windows": [
        {
          "sliding_window": window,
          "num_blocks": config.window_pool_size(window),
          "bytes_per_block": config.bytes_per_window_block(window),
          "blocks_per_sequence": config.blocks_per_window(window),
        }
        for window in config.windows
      ],
      "states": {
        "num_states": config.num_states,
        "num_snapshots": config.num_snapshots,
        "bytes_per_state": config.bytes_per_state,
      },
      "sequences": {str(n): self.num_sequences(n) for n in self.lengths},
    }

  def render(self) -> str:
    """Returns the plan as lines of text."""
    config = self.config
    lines = [
      f"{self.name}: {_weights(self.num_weights)} in"
      f" {self.weights_dtype}, keys and values in {np.dtype(config.dtype).name}",
      "",
      _row("memory", self.num_bytes),
      _row("weights", self.weight_bytes),
      _row("reserved for activations", self.reserved_bytes),
      _row("keys, values and states", config.num_bytes),
      _row("tables, lists and hashes", self.bookkeeping_bytes),
      _row("unused", self.unused_bytes),
      "",
    ]
    facts = []
    if config.bytes_per_block:
      facts.append(("bytes per token", self.bytes_per_token, ""))
    facts += [
      ("blocks", config.num_blocks, f"of {config.block_size} tokens, one reserved"),
      ("tokens in them", self.num_tokens, ""),
      ("rows (max_seqs)", config.max_seqs, f"of up to {config.max_seq_len:,} tokens"),
    ]
    for window in config.windows:
      num, most = config.window_pool_size(window), config.blocks_per_window(window)
      facts.append((f"blocks of window {window}", num, f"up to {most} for a sequence"))
    if config.num_states:
      what = f"{config.num_snapshots} for snapshots, {config.bytes_per_state:,} bytes"
      facts.append(("recurrent states", config.num_states, f"{what} each"))
    lines += [
      f"  {name:<26}{number:>16,}  {note}".rstrip() for name, number, note in facts
    ]
    lines += ["", "  sequences that can live at a time, sharing nothing:"]
    for length in self.lengths:
      name = f"  of {length:,} tokens"
      lines.append(f"  {name:<26}{self.num_sequences(length):>16,}")
    return "\n".join(lines)


def parse_bytes(text: str) -> int:
  """Returns the number of bytes in `"80GB"`, `"64 GiB"`, `"1.5e9"`.

  Raises:
    ValueError: It is no positive number with a unit of bytes.

  Example:
    >>> from kvcache.command.plan import parse_bytes
    >>> parse_bytes("80GB"), parse_bytes("1 GiB")
    (80000000000, 1073741824)
  """
  match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
  try:
    assert match is not None
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    assert num_bytes > 0
  except (AssertionError, KeyError, ValueError, OverflowError):
    raise ValueError(
      f"memory must be a number of bytes such as 80GB or 64GiB, got {text!r}"
    ) from None
  return num_bytes


def make_plan(
  name: str,
  num_bytes: int,
  *,
  weights_dtype: DTypeLike = jnp.bfloat16,
  kv_dtype: DTypeLike | None = None,
  reserve: float = 0.1,
  block_size: int = 16,
  max_seqs: int = 64,
  max_seq_len: int | None = None,
) -> MemoryPlan:
  """Plans a cache for a model in a memory of one device.

  Args:
    name: One of `kvcache.models.PRESETS`, a `.gguf` file, a Hugging Face folder (its
      `config.json` is enough) or a name on the Hub.
    num_bytes: The memory.
    weights_dtype: Of the weights.
    kv_dtype: Of keys and values; `weights_dtype` if omitted.
    reserve: Share of the memory that is left alone.
    block_size: Tokens of a block.
    max_seqs: `S`.
    max_seq_len: Longest sequence; the model's context if omitted.

  Raises:
    LoadError: There is no such model, or it is not supported.
    ValueError: The memory does not hold the weights and a usable cache, or an argument
      is out of range.
  """
  if not 0 <= reserve < 1:
    raise ValueError(f"reserve must be at least 0 and below 1, got {reserve}")
  model = _find_model(name)
  model = dataclasses.replace(model, dtype=np.dtype(weights_dtype))
  shapes = weight_shapes(model)
  weight_bytes = sum(x.size * x.dtype.itemsize for x in shapes)
  reserved = int(num_bytes * reserve)
  room = num_bytes - reserved - weight_bytes
  if room <= 0:
    weights, memory, kept = map(text.num_bytes, (weight_bytes, num_bytes, reserved))
    raise ValueError(
      f"{name}: weights take {weights} of {memory}, {kept} of which are reserved:"
      " nothing is left for a cache"
    )
  sizes = dict(
    block_size=block_size,
    max_seqs=max_seqs,
    max_seq_len=min(max_seq_len or model.max_position, model.max_position),
    dtype=model.dtype if kv_dtype is None else kv_dtype,
  )
  # The tables beside a smaller cache are smaller, so once is enough.
  beside = bookkeeping_bytes(_fit(model, room, sizes))
  config = _fit(model, room - beside, sizes)
  return MemoryPlan(
    name=name,
    num_bytes=num_bytes,
    reserved_bytes=reserved,
    num_weights=sum(x.size for x in shapes),
    weight_bytes=weight_bytes,
    weights_dtype=np.dtype(weights_dtype).name,
    bookkeeping_bytes=bookkeeping_bytes(config),
    config=config,
  )


def _find_model(name: str) -> ModelConfig:
  if name in PRESETS and not pathlib.Path(name).exists():
    return PRESETS[name]
  try:
    return load_config(name)
  except LoadError as error:
    if pathlib.Path(name).exists() or "/" in name:
      raise
    raise LoadError(f"{error}; presets are {', '.join(sorted(PRESETS))}") from error


def _fit(model: ModelConfig, room: int, sizes: dict[str, Any]) -> CacheConfig:
  """The largest cache in `room`, where every layer may have a window too."""
  layers = model.cache_layers()
  smallest = CacheConfig(layers=layers, num_blocks=2, **sizes)
  if smallest.bytes_per_block or not smallest.windows:
    return CacheConfig.from_memory(room, layers=layers, **sizes)
  # Blocks that no layer keeps cost bookkeeping only: there are enough for all rows.
  num_blocks = 1 + smallest.max_seqs * smallest.max_blocks_per_seq
  per_block = sum(map(smallest.bytes_per_window_block, smallest.windows))
  num_window_blocks = min(int(room // per_block), num_blocks)
  return dataclasses.replace(
    smallest, num_blocks=num_blocks, num_window_blocks=num_window_blocks
  )


def _row(name: str, size: int) -> str:
  return f"  {name:<26}{size:>16,}  {text.num_bytes(size):>12}"


def _weights(num: int) -> str:
  for word, unit in (("billion", 1e9), ("million", 1e6)):
    if num >= unit:
      return f"{num / unit:.2f} {word} weights"
  return f"{num:,} weights"
