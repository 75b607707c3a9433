"""KVStore: the key and value arrays; write, gather, copy.

One buffer holds all layers, so that a layer is an offset: block `b` of layer `l` is row
`l * N + b` of the flat view. Layers can be scanned with the store as loop carry, and no
layer is ever sliced out, which would copy it.
"""

import flax.struct
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from kvcache import ragged

_COPY_BATCH = 4


class KVStore(flax.struct.PyTreeNode, kw_only=True):
  """Keys and values of all blocks of all layers.

  Attributes:
    k: `[L, N, K, block_size, D]`. One (block, head) tile is contiguous.
    v: `[L, N, K, block_size, D]`.
  """

  k: Array
  v: Array

  @property
  def num_layers(self) -> int:
    """`L`."""
    return self.k.shape[-5]

  @property
  def num_blocks(self) -> int:
    """`N`."""
    return self.k.shape[-4]

  @property
  def block_size(self) -> int:
    """Token positions in one block."""
    return self.k.shape[-2]

  def flat(self) -> tuple[Array, Array]:
    """`k, v [L * N, K, block_size, D]`: the view that `layer * N + block` indexes."""
    return self.k.reshape(-1, *self.k.shape[-3:]), self.v.reshape(
      -1, *self.v.shape[-3:]
    )


def init(
  *,
  num_layers: int,
  num_blocks: int,
  num_kv_heads: int,
  block_size: int,
  head_dim: int,
  dtype: DTypeLike,
) -> KVStore:
  """Makes a store of zeros."""
  shape = (num_layers, num_blocks, num_kv_heads, block_size, head_dim)
  return KVStore(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write(
  store: KVStore, layer: ArrayLike, k: Array, v: Array, slots: Array
) -> KVStore:
  """Writes the keys and values of `T` tokens of one layer.

  Args:
    store: The store.
    layer: `[]` int32.
    k: `[T, K, D]`.
    v: `[T, K, D]`.
    slots: `[T]` int32 flat addresses `block * block_size + offset`; `N * block_size`
      drops.
  """
  block, offset = slots // store.block_size, slots % store.block_size
  first = jnp.asarray(layer, jnp.int32) * store.num_blocks
  rows = store.num_layers * store.num_blocks
  row = ragged.masked(first + block, block < store.num_blocks, rows)

  def put(pool: Array, value: Array) -> Array:
    flat = pool.reshape(-1, *pool.shape[-3:])
    flat = flat.at[row, :, offset].set(value.astype(pool.dtype), mode="drop")
    return flat.reshape(pool.shape)

  return KVStore(k=put(store.k, k), v=put(store.v, v))


def copy_blocks(store: KVStore, source: Array, target: Array) -> KVStore:
  """Copies whole blocks in all layers.

  Costs what is copied: a few blocks at a time, so that a list that is mostly dropped
    entries
  moves nothing.

  Args:
    store: The store.
    source: `[F]` int32.
    target: `[F]` int32, distinct, and none of them a source; `N` drops the entry.
  """
  size = source.shape[0]
  mask = target < store.num_blocks
  to = ragged.masked(ragged.ranks(mask), mask, size)
  source = jnp.zeros(size, jnp.int32).at[to].set(source, mode="drop")
  target = jnp.full(size, store.num_blocks).at[to].set(target, mode="drop")
  num = ragged.sum_int(mask)

  def copy(state: tuple[KVStore, Array]) -> tuple[KVStore, Array]:
    store, start = state
    at = start + jnp.arange(min(size, _COPY_BATCH), dtype=jnp.int32)
    at = jnp.minimum(at, size - 1)  # Copying the last one twice is harmless.

    def put(pool: Array) -> Array:
      blocks = ragged.hold(pool[:, source[at]])
      return pool.at[:, target[at]].set(blocks, mode="drop")

    return KVStore(k=put(store.k), v=put(store.v)), start + at.shape[0]

  # Ends because `start` grows to `num`.
  store, _ = lax.while_loop(lambda state: state[1] < num, copy, (store, jnp.int32(0)))
  return store
