"""CacheConfig: sizes follow from fields, bytes are true, bad fields are named."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, RecurrentLayer

LAYER = AttentionLayer(num_kv_heads=2, head_dim=8)
WINDOW = dataclasses.replace(LAYER, sliding_window=9)


def shared(layer, **fields):
  return dataclasses.replace(LAYER, shared_with=layer, **fields)


def short_conv(num_channels):
  return RecurrentLayer.short_conv(num_channels=num_channels, conv_width=2)


def make(**fields):
  return CacheConfig(**({"layers": (LAYER,) * 3, "num_blocks": 10} | fields))


def test_sizes_come_from_the_fields():
  config = make(block_size=4, max_seqs=5, max_seq_len=30)
  assert config.num_layers == 3
  (group,) = config.groups
  assert (group.layer.num_kv_heads, group.layer.head_dim) == (2, 8)
  assert config.max_blocks_per_seq == 8  # 30 tokens need 7.5 blocks
  # 2 (K and V) * 3 layers * 2 heads * 4 tokens * 8 elements * 4 bytes
  assert config.bytes_per_block == 1536
  assert config.num_bytes == 10 * 1536


@pytest.mark.parametrize(
  ("num_blocks", "max_seq_len", "tokens"),
  [(10, 30, 32), (10, 32, 32), (10, 33, 36), (9, 33, 32), (3, 64, 8), (2, 4, 4)],
)
def test_the_longest_sequence_fits_its_row_and_the_pool(
  num_blocks, max_seq_len, tokens
):
  config = make(num_blocks=num_blocks, block_size=4, max_seq_len=max_seq_len)
  assert config.max_tokens_per_seq == tokens


@pytest.mark.parametrize("fields", [{}, {"v_head_dim": 5}, {"is_latent": True}])
@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn]
)
def test_bytes_are_those_of_the_arrays(dtype, fields):
  layer = dataclasses.replace(LAYER, **fields)
  config = make(
    layers=[layer] * 3, block_size=4, max_seqs=3, max_seq_len=20, dtype=dtype
  )
  shapes = jax.eval_shape(lambda: kvcache.init(config))
  assert shapes.kv[0].k.shape == (3, 10, 2, 4, 8)
  assert shapes.kv[0].k.dtype.itemsize == config.groups[0].layer.kv_dtype.itemsize
  in_kv, total = (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for tree in (shapes.kv, shapes)
  )
  assert config.num_bytes == in_kv
  assert kvcache.bookkeeping_bytes(config) == total - in_kv > 0


@pytest.mark.parametrize("index_ways", [1, 3, 16])
@pytest.mark.parametrize("num_blocks", [2, 16, 17, 1000])
def test_the_index_has_room_for_every_block(num_blocks, index_ways):
  config = make(num_blocks=num_blocks, index_ways=index_ways)
  buckets = config.num_buckets
  assert buckets & (buckets - 1) == 0
  assert buckets * index_ways >= 4 * num_blocks > buckets // 2 * index_ways


def test_configs_are_values():
  config = make(dtype=jnp.bfloat16)
  assert config.dtype == np.dtype(ml_dtypes.bfloat16)
  assert config == make(dtype="bfloat16")
  assert hash(config) == hash(make(dtype="bfloat16"))
  assert config != make()
  assert make(layers=[LAYER, LAYER]).layers == (LAYER, LAYER)
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.num_blocks = 3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layers": ()}, "layers must name at least one"),
    ({"layers": (LAYER, "mamba")}, "layers holds 'mamba'"),
    (
      {"layers": (LAYER, short_conv(1), short_conv(2))},
      "all recurrent layers must be alike",
    ),
    ({"layers": (LAYER, shared(1))}, "shared_with=1 of attention layer 1 must name an"),
    ({"layers": (LAYER, shared(0), shared(1))}, "shared_with=1 of attention layer 2"),
    (
      {"layers": (LAYER, shared(0, head_dim=4))},
      "attention layer 1 is shared with 0 and must be like it.*head_dim=4.*head_dim=8",
    ),
    ({"num_window_blocks": 4}, "num_window_blocks is given, but no layer"),
    (
      {"layers": (LAYER, WINDOW), "block_size": 4, "num_window_blocks": 3},
      "num_window_blocks must be at least 4 for .* one sliding_window=9",
    ),
    ({"num_blocks": 1}, "num_blocks must be at least 2.* got 1"),
    ({"num_blocks": 4.0}, "num_blocks .* got 4.0"),
    ({"block_size": 0}, "block_size must be a positive int, got 0"),
    ({"max_seqs": -1}, "max_seqs must be a positive int, got -1"),
    ({"max_seq_len": 2.5}, "max_seq_len must be a positive int, got 2.5"),
    ({"chunk_size": True}, "chunk_size must be a positive int, got True"),
    ({"index_ways": None}, "index_ways must be a positive int, got None"),
    ({"dtype": jnp.int32}, "dtype must be a floating type .*, got int32"),
    ({"dtype": jnp.float8_e5m2}, "dtype must be .* or float8_e4m3fn, got float8_e5m2"),
    (
      {"num_blocks": 2**27, "block_size": 16},
      r"num_blocks \* block_size .*2\*\*31.*134217728 \* 16",
    ),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim"])
def test_bad_layers_are_named(name):
  with pytest.raises(ValueError, match=f"{name} must be a positive int, got 0"):
    AttentionLayer(**({"num_kv_heads": 1, "head_dim": 1} | {name: 0}))


def test_a_latent_layer_has_no_more_values_than_keys():
  with pytest.raises(
    ValueError, match=r"v_head_dim must be at most head_dim=8.* got 9"
  ):
    AttentionLayer(num_kv_heads=1, head_dim=8, v_head_dim=9, is_latent=True)


def test_a_layer_may_name_its_own_dtype():
  layer = AttentionLayer(num_kv_heads=2, head_dim=8, dtype="int8")
  config = make(layers=[layer])
  assert config.attention_layers[0].is_quantised
  assert config.attention_layers[0].kv_dtype == np.int8
  (plain,) = make(layers=[LAYER]).attention_layers
  assert plain.kv_dtype == np.float32 and not plain.is_quantised
  with pytest.raises(ValueError, match="got int16"):
    AttentionLayer(num_kv_heads=2, head_dim=8, dtype="int16")


def test_the_largest_addressable_pool_is_accepted():
  assert make(num_blocks=2**27 - 1, block_size=16).num_blocks == 2**27 - 1


# `from_memory`. A block of `SIZES` is 192 bytes.

SIZES = {"layers": [LAYER], "block_size": 3, "dtype": jnp.bfloat16}


def test_from_memory_passes_the_other_fields_on():
  config = CacheConfig.from_memory(2000, max_seqs=7, **SIZES)
  assert config == CacheConfig(
    layers=(LAYER,), num_blocks=10, block_size=3, max_seqs=7, dtype=jnp.bfloat16
  )


@given(num_bytes=st.integers(2 * 192, 10**9) | st.floats(2 * 192, 1e9))
def test_from_memory_takes_all_it_can_and_never_overshoots(num_bytes):
  config = CacheConfig.from_memory(num_bytes, **SIZES)
  assert config.num_bytes <= num_bytes < config.num_bytes + config.bytes_per_block


@pytest.mark.parametrize("num_bytes", [-1, 0, 191, 2 * 192 - 1])
def test_from_memory_needs_the_null_block_and_one_more(num_bytes):
  with pytest.raises(ValueError, match=f"num_bytes={num_bytes} .* 192 bytes"):
    CacheConfig.from_memory(num_bytes, **SIZES)
  assert CacheConfig.from_memory(2 * 192, **SIZES).num_blocks == 2


def test_from_memory_computes_num_blocks():
  with pytest.raises(ValueError, match="num_blocks"):
    CacheConfig.from_memory(10**6, num_blocks=5, **SIZES)


def test_a_sequence_owns_a_state_for_each_length_that_a_draft_step_may_end_at():
  state = RecurrentLayer(state={"sum": (3,)})  # 12 bytes
  config = make(layers=[LAYER, state], max_seqs=4, num_snapshots=5, max_drafts=2)
  assert config.num_states == 1 + 4 * 3 + 5
  assert make(layers=[LAYER], max_drafts=2).num_states == 0
  options = {"layers": [LAYER, state], "state_fraction": 0.5, "block_size": 1}
  config = CacheConfig.from_memory(12 * 2 * 41, max_drafts=2, **options)
  assert (config.max_seqs, config.num_snapshots) == (10, 10)
  assert config.num_states == 41
  with pytest.raises(ValueError, match="max_drafts must be a non-negative int, got -1"):
    make(max_drafts=-1)
