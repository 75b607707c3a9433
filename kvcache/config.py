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
_QUANTISED = (np.dtype(jnp.int8), np.dtype(jnp.float8_e4m3fn))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
  """What one attention layer keeps per token.

  Attributes:
    num_kv_heads: `K`, key/value heads.
    head_dim: `D`, elements of one key head.
    v_head_dim: `Dv`, elements of one value head; `D` if None.
    is_latent: Whether the values are the first `Dv` elements of the keys and are stored
      once, as in multi-head latent attention.
    dtype: Element type, or None for the cache's. `int8` and `float8_e4m3fn` are
      quantised, with one float32 scale per token and head for keys and for values.
  """

  num_kv_heads: int
  head_dim: int
  v_head_dim: int | None = None
  is_latent: bool = False
  dtype: DTypeLike | None = None

  def __post_init__(self):
    if self.v_head_dim is None:
      object.__setattr__(self, "v_head_dim", self.head_dim)
    if self.dtype is not None:
      object.__setattr__(self, "dtype", _kv_dtype(self.dtype))
    _check_positive(self, "num_kv_heads", "head_dim", "v_head_dim")
    if self.is_latent and self.v_dim > self.head_dim:
      raise ValueError(
        f"v_head_dim must be at most head_dim={self.head_dim} where values are the"
        f" first part of the keys, got {self.v_dim}"
      )

  @property
  def v_dim(self) -> int:
    """`Dv`, elements of one value head."""
    return self.head_dim if self.v_head_dim is None else self.v_head_dim


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
    dtype: Element type of keys and values of layers that do not name one. Any floating
      type, or `int8`; see `AttentionLayer.dtype` for quantised ones.
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
    object.__setattr__(self, "dtype", _kv_dtype(self.dtype))
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
  def layer(self) -> AttentionLayer:
    """What each of the layers keeps, its dtype resolved."""
    layer = self.layers[0]
    return dataclasses.replace(
      layer, dtype=self.dtype if layer.dtype is None else layer.dtype
    )

  @property
  def num_kv_heads(self) -> int:
    """`K`."""
    return self.layer.num_kv_heads

  @property
  def head_dim(self) -> int:
    """`D`."""
    return self.layer.head_dim

  @property
  def v_head_dim(self) -> int:
    """`Dv`."""
    return self.layer.v_dim

  @property
  def is_latent(self) -> bool:
    """Whether values are the first part of the keys."""
    return self.layer.is_latent

  @property
  def kv_dtype(self) -> np.dtype:
    """Element type of the keys and values."""
    return np.dtype(self.layer.dtype)

  @property
  def is_quantised(self) -> bool:
    """Whether keys and values have scales beside them."""
    return self.kv_dtype in _QUANTISED

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
    """Bytes of keys, values and scales in one block, all layers."""
    scale_bytes = 4 if self.is_quantised else 0
    heads = (self.head_dim,) if self.is_latent else (self.head_dim, self.v_head_dim)
    per_head = sum(dim * self.kv_dtype.itemsize + scale_bytes for dim in heads)
    return self.num_layers * self.num_kv_heads * self.block_size * per_head

  @property
  def num_bytes(self) -> int:
    """Bytes of the key, value and scale arrays that `init` makes."""
    return self.num_blocks * self.bytes_per_block


def _kv_dtype(dtype: DTypeLike) -> np.dtype:
  """The dtype, if keys and values can be stored in it."""
  dtype = np.dtype(dtype)
  if dtype in _QUANTISED:
    return dtype
  if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
    raise ValueError(
      "dtype must be a floating type of at least 16 bits, int8 or float8_e4m3fn, got"
      f" {dtype}"
    )
  return dtype


def _check_positive(config: object, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a positive int, got {value!r}")
