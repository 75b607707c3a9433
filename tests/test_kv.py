"""KVStore: what is written where, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache import kv
from tests.small import ints

L, N, K, BLOCK, D = 2, 7, 2, 4, 3

write = jax.jit(kv.write)
copy_blocks = jax.jit(kv.copy_blocks)


@pytest.fixture
def store():
  """Every element says where it is."""
  k = jnp.arange(L * N * K * BLOCK * D, dtype=jnp.float32).reshape(L, N, K, BLOCK, D)
  return kv.KVStore(k=k, v=-k)


def test_a_new_store_is_zeros():
  store = kv.init(
    num_layers=L, num_blocks=N, num_kv_heads=K, block_size=BLOCK, head_dim=D, dtype="f4"
  )
  assert store.k.shape == store.v.shape == (L, N, K, BLOCK, D)
  assert not store.k.any() and not store.v.any()
  assert (store.num_layers, store.num_blocks, store.block_size) == (L, N, BLOCK)


def test_a_layer_is_an_offset_into_the_flat_view(store):
  k, v = store.flat()
  assert k.shape == (L * N, K, BLOCK, D)
  for layer, block in ((0, 3), (1, 0), (1, 6)):
    np.testing.assert_array_equal(k[layer * N + block], store.k[layer, block])
    np.testing.assert_array_equal(v[layer * N + block], store.v[layer, block])


@pytest.mark.parametrize("layer", [0, 1])
def test_tokens_go_to_their_slots_and_nowhere_else(store, layer):
  slots = ints([5, N * BLOCK, 27, 20])  # block 1 offset 1, dropped, the last one, 5.0
  k = -1000.0 - jnp.arange(4 * K * D, dtype=jnp.float32).reshape(4, K, D)
  after = write(store, layer, k, k - 500, slots)
  want_k, want_v = np.array(store.k), np.array(store.v)
  for token, block, offset in ((0, 1, 1), (2, 6, 3), (3, 5, 0)):
    want_k[layer, block, :, offset] = k[token]
    want_v[layer, block, :, offset] = k[token] - 500
  np.testing.assert_array_equal(after.k, want_k)
  np.testing.assert_array_equal(after.v, want_v)


def test_padding_writes_nothing_in_any_layer(store):
  """One past the end of layer 0 would be the first block of layer 1."""
  k = jnp.full((4, K, D), jnp.nan)
  after = write(store, 0, k, k, jnp.full(4, N * BLOCK, jnp.int32))
  np.testing.assert_array_equal(after.k, store.k)
  np.testing.assert_array_equal(after.v, store.v)


def test_values_are_cast_to_the_stores_type(store):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), store)
  k = jnp.full((4, K, D), 1 / 3)
  after = write(half, 1, k, -k, ints([4, 5, 6, 7]))
  assert after.k.dtype == after.v.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    after.k[1, 1], jnp.full((K, BLOCK, D), 1 / 3, jnp.bfloat16)
  )
  np.testing.assert_array_equal(
    after.v[1, 1], jnp.full((K, BLOCK, D), -1 / 3, jnp.bfloat16)
  )


@pytest.mark.parametrize(
  ("source", "target"),
  [
    ([1, 2, 3, 1, 2], [N, N, N, N, N]),
    ([1, 2, 3, 1, 2], [N, N, 6, N, N]),
    ([1, 1, 3, 1, 2], [4, N, N, 5, 6]),
    ([1, 1, 1, 2, 2], [3, 4, 5, 6, 0]),  # five: more than one round copies
  ],
)
def test_whole_blocks_are_copied_in_all_layers(store, source, target):
  after = copy_blocks(store, ints(source), ints(target))
  want_k, want_v = np.array(store.k), np.array(store.v)
  for a, b in zip(source, target, strict=True):
    if b < N:
      want_k[:, b] = store.k[:, a]
      want_v[:, b] = store.v[:, a]
  np.testing.assert_array_equal(after.k, want_k)
  np.testing.assert_array_equal(after.v, want_v)
