"""Every static size and dtype of a cache, checked once.

A `CacheConfig` is hashable, so it can be a static argument of a jitted function, and it
is the static field of `Context`. It is made from the model's layers in model order.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

NULL_BLOCK = 0
"""Block that pads block tables: never allocated, never written, always safe to read."""

_INDEX_SLOTS_PER_BLOCK = 4
_QUEUE_SLOTS_PER_BLOCK = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
  """What one attention layer keeps per token.

  Attributes:
    num_kv_heads: `K`, key/value heads.
    head_dim: `D`, elements of one key or value head.
  """

  num_kv_heads: int
  head_dim: int

  def __post_init__(self):
    _check_positive(self, "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
  """The static description of a `Context`.

  Attributes:
    layers: The model's layers that keep something, in model order. All must be alike
      for now: layers that keep different things form groups, which are still to come.
    num_blocks: `N`, blocks in the pool, the null block included.
    block_size: Token positions in one block.
    max_seqs: `S`, rows of the sequence table.
    max_seq_len: Longest sequence a row can hold, in tokens. Rounded up to whole blocks.
    dtype: Element type of keys and values.
    chunk_size: Entries handled by one iteration of the bulk loops (publish, release,
      evict).
    index_ways: Blocks that one bucket of the prefix index can hold.
  """

  layers: tuple[AttentionLayer, ...]
  num_blocks: int
  block_size: int = 16
  max_seqs: int = 16
  max_seq_len: int = 2048
  dtype: DTypeLike = jnp.float32
  chunk_size: int = 256
  index_ways: int = 16

  def __post_init__(self):
    object.__setattr__(self, "layers", tuple(self.layers))
    object.__setattr__(self, "dtype", np.dtype(self.dtype))
    _check_positive(
      self, "block_size", "max_seqs", "max_seq_len", "chunk_size", "index_ways"
    )
    if not self.layers:
      raise ValueError("layers must name at least one attention layer")
    for layer in self.layers:
      if not isinstance(layer, AttentionLayer):
        raise ValueError(f"layers holds {layer!r}, which is not an AttentionLayer")
    if len(set(self.layers)) > 1:
      raise ValueError(
        f"all layers must be alike, got {sorted(map(str, set(self.layers)))}"
      )
    if not isinstance(self.num_blocks, int) or self.num_blocks < 2:
      raise ValueError(
        f"num_blocks must be at least 2 (block {NULL_BLOCK} is reserved),"
        f" got {self.num_blocks!r}"
      )
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype must be a floating type, got {self.dtype}")
    if self.num_blocks * max(self.block_size, 2 * _INDEX_SLOTS_PER_BLOCK) >= 2**31:
      raise ValueError(
        f"num_blocks * block_size must stay below 2**31 to be addressed in int32,"
        f" got {self.num_blocks} * {self.block_size}"
      )

  @classmethod
  def from_memory(
    cls, num_bytes: float, *, layers: Sequence[AttentionLayer], **sizes: Any
  ) -> "CacheConfig":
    """Returns the largest configuration whose K/V pools fit a budget.

    Args:
      num_bytes: Bytes for keys and values. The tables, lists and hashes beside them are
        not counted: `kvcache.bookkeeping_bytes(config)`, commonly below 1 % of the
        pools.
      layers: As in `CacheConfig`.
      **sizes: Any other field of `CacheConfig` except `num_blocks`.

    Raises:
      ValueError: The budget cannot hold the null block and one usable block.
    """
    if "num_blocks" in sizes:
      raise ValueError("from_memory computes num_blocks; pass num_bytes only")
    smallest = cls(layers=tuple(layers), num_blocks=2, **sizes)
    num_blocks = int(num_bytes // smallest.bytes_per_block)
    if num_blocks < 2:
      raise ValueError(
        f"num_bytes={num_bytes:.0f} cannot hold the null block and one usable block of"
        f" {smallest.bytes_per_block} bytes each"
      )
    return dataclasses.replace(smallest, num_blocks=num_blocks)

  @property
  def num_layers(self) -> int:
    """`L`, attention layers in the group."""
    return len(self.layers)

  @property
  def num_kv_heads(self) -> int:
    """`K`."""
    return self.layers[0].num_kv_heads

  @property
  def head_dim(self) -> int:
    """`D`."""
    return self.layers[0].head_dim

  @property
  def max_blocks_per_seq(self) -> int:
    """`P`, columns of the block tables."""
    return -(-self.max_seq_len // self.block_size)

  @property
  def max_tokens_per_seq(self) -> int:
    """Longest sequence that can live: bounded by a row's table and by the pool."""
    return min(self.max_blocks_per_seq, self.num_blocks - 1) * self.block_size

  @property
  def num_buckets(self) -> int:
    """Buckets of the prefix index, a power of two."""
    wanted = -(-_INDEX_SLOTS_PER_BLOCK * self.num_blocks // self.index_ways)
    return 1 << (wanted - 1).bit_length()

  @property
  def queue_size(self) -> int:
    """Slots of the eviction ring. The factor makes its compaction amortised O(1)."""
    return _QUEUE_SLOTS_PER_BLOCK * self.num_blocks

  @property
  def bytes_per_block(self) -> int:
    """Bytes of keys and values in one block, all layers."""
    elements = self.num_layers * self.num_kv_heads * self.block_size * self.head_dim
    return 2 * elements * np.dtype(self.dtype).itemsize

  @property
  def num_bytes(self) -> int:
    """Bytes of the key and value arrays that `init` makes."""
    return self.num_blocks * self.bytes_per_block


def _check_positive(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a positive int, got {value!r}")
