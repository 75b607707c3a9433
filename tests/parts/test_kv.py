"""KVStore: what is written where, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache import AttentionLayer
from kvcache.parts import kv
from tests.fixtures.small import ints

L, N, K, BLOCK, D = 2, 7, 2, 4, 3

write = jax.jit(kv.write)
copy_blocks = jax.jit(kv.copy_blocks)


@pytest.fixture
def store():
  """Every element says where it is."""
  k = jnp.arange(L * N * K * BLOCK * D, dtype=jnp.float32).reshape(L, N, K, BLOCK, D)
  return kv.KVStore(k=k, v=-k)


def fresh(dtype, **fields):
  layer = AttentionLayer(num_kv_heads=K, head_dim=D, dtype=dtype, **fields)
  return kv.init(layer, num_layers=L, num_blocks=N, block_size=BLOCK)


def test_a_new_store_is_zeros():
  store = fresh("f4")
  assert store.k.shape == store.v.shape == (L, N, K, BLOCK, D)
  assert not store.k.any() and not store.v.any()
  assert (store.num_layers, store.num_blocks, store.block_size) == (L, N, BLOCK)


def test_a_layer_is_an_offset_into_the_flat_view(store):
  k, v = store.flat().k, store.flat().v
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


# Quantised.

QUANTISED = pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])


@QUANTISED
def test_float8_is_stored_as_bits_and_scales_stand_beside(dtype):
  store = fresh(dtype, v_head_dim=5)
  assert (
    store.k.dtype == store.v.dtype == (jnp.int8 if dtype == jnp.int8 else jnp.uint8)
  )
  assert store.k.shape == (L, N, K, BLOCK, D)
  assert store.v.shape == (L, N, K, BLOCK, 5)
  assert store.k_scale.shape == store.v_scale.shape == (L, N, K, BLOCK)
  assert store.k_scale.dtype == jnp.float32


@QUANTISED
def test_a_latent_store_keeps_no_values(dtype):
  store = fresh(dtype, v_head_dim=2, is_latent=True)
  assert store.v is None and store.v_scale is None
  after = write(store, 1, jnp.ones((1, K, D)), None, ints([9]))
  assert after.k_scale[1, 2, 0, 1] > 0 and np.count_nonzero(after.k_scale) == K


@QUANTISED
def test_each_vector_is_close_and_its_largest_element_exact(dtype):
  x = (
    jax.random.normal(jax.random.key(0), (50, K, 64))
    * jnp.logspace(-20, 20, 50)[:, None, None]
  )
  back = np.asarray(kv.dequantise(*jax.jit(kv.quantise, static_argnums=1)(x, dtype)))
  largest = np.abs(x).max(axis=-1)
  error = np.abs(back - x)
  # int8: half a step of a 127th; e4m3: half a unit of a 4 bit significand.
  bound = largest / 254 if dtype == jnp.int8 else np.abs(x).max(axis=-1) / 28
  assert (error.max(axis=-1) <= bound * 1.001).all()
  assert error.max() > 0
  np.testing.assert_allclose(np.abs(back).max(axis=-1), largest, rtol=1e-6)


@QUANTISED
def test_zeros_stay_zeros_and_nan_is_seen(dtype):
  x = jnp.array([[0.0, 0.0], [1.0, jnp.nan], [jnp.inf, 1.0], [-1.0, 1.0]])
  back = np.asarray(kv.dequantise(*kv.quantise(x, dtype)))
  np.testing.assert_array_equal(back[0], 0)
  assert np.isnan(back[1:3]).all()
  np.testing.assert_allclose(back[3], [-1, 1], rtol=1e-6)


@QUANTISED
def test_scales_are_written_and_copied_with_their_elements(dtype):
  k = jax.random.normal(jax.random.key(1), (4, K, D))
  slots = ints([5, N * BLOCK, 27, 20])
  after = copy_blocks(write(fresh(dtype), 1, k, 3 * k, slots), ints([1]), ints([4]))
  for block, token, offset in ((1, 0, 1), (4, 0, 1), (6, 2, 3), (5, 3, 0)):
    for pool, scale, x in (
      (after.k, after.k_scale, k),
      (after.v, after.v_scale, 3 * k),
    ):
      back = kv.dequantise(pool[1, block, :, offset], scale[1, block, :, offset])
      elements, own = kv.quantise(x[token], dtype)
      np.testing.assert_allclose(back, kv.dequantise(elements, own), rtol=1e-6)
  assert np.count_nonzero(after.k_scale) == np.count_nonzero(after.v_scale) == 4 * K
