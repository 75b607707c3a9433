"""KVStore: the key and value arrays, and their scales; write, quantise, copy.

One buffer holds all layers, so that a layer is an offset: block `b` of layer `l` is row
`l * N + b` of the flat view. Layers can be scanned with the store as loop carry, and no
layer is ever sliced out, which would copy it.
"""

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
import numpy as np

from kvcache.config import AttentionLayer
from kvcache.parts import ragged
from kvcache.printing import Node

_FP8 = np.dtype(jnp.float8_e4m3fn)
_LARGEST = {np.dtype(jnp.int8): 127.0, _FP8: 448.0}
"""Largest magnitude of each quantised type: what a head's largest element becomes."""


class KVStore(Node, kw_only=True):
  """Keys and values of all blocks of all layers.

  Attributes:
    k: `[L, N, K, block_size, D]`. One (block, head) tile is contiguous. `float8_e4m3fn`
      is stored as its bits, in uint8: XLA would rewrite a whole float8 pool on CPU to
      write one row of it.
    v: `[L, N, K, block_size, Dv]`, or None where values are the first part of the keys.
    k_scale: `[L, N, K, block_size]` float32, what the elements of a quantised key are
      multiplied with; None if `k` is not quantised.
    v_scale: `[L, N, K, block_size]` float32 of the values, or None.
  """

  k: Array
  v: Array | None
  k_scale: Array | None = None
  v_scale: Array | None = None

  @property
  def num_layers(self) -> int:
    """`L`."""
    return self.k.shape[-5]

  @property
  def num_blocks(self) -> int:
    """`N`."""
    return self.k.shape[-4]

  @property
  def num_heads(self) -> int:
    """`K`, of one device within `shard_map`."""
    return self.k.shape[-3]

  @property
  def block_size(self) -> int:
    """Token positions in one block."""
    return self.k.shape[-2]

  def flat(self) -> "KVStore":
    """The view that `layer * N + block` indexes: every array `[L * N, ...]`."""
    return jax.tree.map(lambda pool: pool.reshape(-1, *pool.shape[2:]), self)


def init(
  layer: AttentionLayer, *, num_layers: int, num_blocks: int, block_size: int
) -> KVStore:
  """Makes a store of zeros for layers like `layer`, whose dtype is given."""
  dtype = np.dtype(layer.dtype)
  shape = (num_layers, num_blocks, layer.num_kv_heads, block_size)
  stored = np.dtype(jnp.uint8) if dtype == _FP8 else dtype

  def scales() -> Array | None:
    return jnp.zeros(shape, jnp.float32) if dtype in _LARGEST else None

  has_values = not layer.is_latent
  return KVStore(
    k=jnp.zeros((*shape, layer.head_dim), stored),
    v=jnp.zeros((*shape, layer.v_dim), stored) if has_values else None,
    k_scale=scales(),
    v_scale=scales() if has_values else None,
  )


def quantise(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
  """Quantises each vector with a scale of its own.

  Args:
    x: `[..., D]` floating.
    dtype: `int8` or `float8_e4m3fn`.

  Returns:
    Elements `[..., D]` as they are stored (uint8 bits for `float8_e4m3fn`), and
    float32 scales `[...]`; elements times scale are close to `x`. The largest element
    of a vector is exact up to rounding. What is not finite makes the whole vector NaN.
  """
  dtype = np.dtype(dtype)
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST[dtype]
  scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
  scaled = x / jnp.where(scale == 0.0, 1.0, scale)[..., None]
  if dtype == _FP8:
    return lax.bitcast_convert_type(scaled.astype(dtype), jnp.uint8), scale
  return jnp.round(scaled).astype(dtype), scale


def dequantise(elements: Array, scale: Array) -> Array:
  """Returns float32 `[..., D]` of what `quantise` returned."""
  if elements.dtype == jnp.uint8:
    elements = lax.bitcast_convert_type(elements, _FP8)
  return elements.astype(jnp.float32) * scale[..., None]


def write(
  store: KVStore, layer: ArrayLike, k: Array, v: Array | None, slots: Array
) -> KVStore:
  """Writes the keys and values of `T` tokens of one layer, quantised if the store is.

  As compiled for an H100, this is one kernel per array, in place, into which XLA fuses
  what computed the values: 2 in a plain store, and in a quantised one 4 and one for
  the scales. For 256 rows of 8 heads of 128 they write 1 MB in bfloat16, some 0.5
  microseconds of bandwidth, so what counts is launches. A kernel of ours would need
  the values in memory first and so save none in a plain store, and in a quantised one
  3, or some 5 microseconds of a layer: it is left to XLA.

  Args:
    store: The store.
    layer: `[]` int32.
    k: `[T, K, D]`.
    v: `[T, K, Dv]`, or None if the store keeps no values.
    slots: `[T]` int32 flat addresses `block * block_size + offset`; `N * block_size`
      drops.
  """
  block, offset = slots // store.block_size, slots % store.block_size
  first = jnp.asarray(layer, jnp.int32) * store.num_blocks
  rows = store.num_layers * store.num_blocks
  row = ragged.masked(first + block, block < store.num_blocks, rows)

  def put(pool: Array, value: Array) -> Array:
    flat = pool.reshape(-1, *pool.shape[2:])
    flat = flat.at[row, :, offset].set(value.astype(pool.dtype), mode="drop")
    return flat.reshape(pool.shape)

  def put_all(
    pool: Array, scales: Array | None, value: Array
  ) -> tuple[Array, Array | None]:
    if scales is None:
      return put(pool, value), None
    dtype = _FP8 if pool.dtype == jnp.uint8 else pool.dtype
    elements, scale = quantise(value, dtype)
    return put(pool, elements), put(scales, scale)

  new_k, k_scale = put_all(store.k, store.k_scale, k)
  new_v, v_scale = None, None
  if store.v is not None and v is not None:
    new_v, v_scale = put_all(store.v, store.v_scale, v)
  return KVStore(k=new_k, v=new_v, k_scale=k_scale, v_scale=v_scale)


def read_tokens(store: KVStore, slots: Array) -> KVStore:
  """Copies tokens out of the store, as they are stored.

  Args:
    store: The store.
    slots: `[T]` int32 flat addresses, in range.

  Returns:
    Every array as `[T, L, K, ...]`.
  """
  block, offset = slots // store.block_size, slots % store.block_size
  return jax.tree.map(lambda pool: pool[:, block, :, offset], store)


def write_tokens(store: KVStore, tokens: KVStore, slots: Array) -> KVStore:
  """Writes what `read_tokens` returned; `N * block_size` drops."""
  block, offset = slots // store.block_size, slots % store.block_size

  def put(pool: Array, values: Array) -> Array:
    return pool.at[:, block, :, offset].set(values, mode="drop")

  return jax.tree.map(put, store, tokens)


def clear_blocks(store: KVStore, block_ids: Array) -> KVStore:
  """Zeroes whole blocks in all layers: `block_ids [E]` int32; `N` drops the entry."""
  return jax.tree.map(lambda pool: pool.at[:, block_ids].set(0, mode="drop"), store)


def copy_blocks(store: KVStore, source: Array, target: Array) -> KVStore:
  """Copies whole blocks in all layers; see `ragged.copy_rows`.

  Args:
    store: The store.
    source: `[F]` int32.
    target: `[F]` int32, distinct, and none of them a source; `N` drops the entry.
  """
  return ragged.copy_rows(store, source, target, num_rows=store.num_blocks)
