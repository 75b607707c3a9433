"""What `paged_attention` is called with, as every implementation takes it."""

import dataclasses

import jax
from jax import Array

_STATIC = {"static": True}
type Shaped = Array | jax.ShapeDtypeStruct
"""Of which shape and dtype alone may count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
  """What is known of a call ahead of its rows: how these are cut depends on it alone.

  Attributes:
    q: `[T, H, D]`, or None where it is not known yet.
    k: `[N, K, block_size, D]`.
    v: `[N, K, block_size, Dv]`, or None for latent keys.
    num_tokens: `T`.
    max_len: Tokens that a row of the block table can hold.
    max_query_len, sliding_window: As in `paged_attention`.
  """

  q: Shaped | None
  k: Shaped
  v: Shaped | None
  num_tokens: int
  max_len: int
  max_query_len: int | None = None
  sliding_window: int | None = None

  @property
  def num_kv_heads(self) -> int:
    """`K`."""
    return self.k.shape[1]

  @property
  def group(self) -> int:
    """Query heads per kv head; 1 where queries are not known."""
    return 1 if self.q is None else self.q.shape[1] // self.num_kv_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
  """The arguments of `paged_attention`, which says what each is.

  Settled are `sm_scale`, which is never None, and that all fit. What implementations
  are specialised for, and could not trace, is no leaf of the tree.
  """

  q: Array
  k: Array
  v: Array | None
  block_tables: Array
  seq_lens: Array
  cu_seqlens: Array
  _: dataclasses.KW_ONLY
  sm_scale: float
  max_query_len: int | None = dataclasses.field(default=None, metadata=_STATIC)
  is_causal: bool = dataclasses.field(default=True, metadata=_STATIC)
  sliding_window: int | None = dataclasses.field(default=None, metadata=_STATIC)
  logits_soft_cap: float | None = None
  sinks: Array | None = None
  k_scale: Array | None = None
  v_scale: Array | None = None
  v_head_dim: int | None = dataclasses.field(default=None, metadata=_STATIC)

  @property
  def num_tokens(self) -> int:
    """`T`."""
    return self.q.shape[0]

  @property
  def num_heads(self) -> int:
    """`H`."""
    return self.q.shape[1]

  @property
  def head_dim(self) -> int:
    """`D`."""
    return self.q.shape[2]

  @property
  def value_dim(self) -> int:
    """`Dv`, whether or not values are the first elements of keys."""
    if self.v is not None:
      return self.v.shape[-1]
    assert self.v_head_dim is not None
    return self.v_head_dim

  @property
  def num_kv_heads(self) -> int:
    """`K`."""
    return self.k.shape[1]

  @property
  def group(self) -> int:
    """Query heads per kv head."""
    return self.num_heads // self.num_kv_heads

  @property
  def block_size(self) -> int:
    """Tokens per block."""
    return self.k.shape[2]

  @property
  def outline(self) -> Outline:
    """What its rows are cut by."""
    return Outline(
      q=self.q,
      k=self.k,
      v=self.v,
      num_tokens=self.num_tokens,
      max_len=self.block_tables.shape[1] * self.block_size,
      max_query_len=self.max_query_len,
      sliding_window=self.sliding_window,
    )
