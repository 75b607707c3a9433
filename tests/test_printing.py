"""What `print` shows of the values that people meet first."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, printing, RecurrentLayer

FULL = AttentionLayer(num_kv_heads=2, head_dim=4)
LOCAL = dataclasses.replace(FULL, sliding_window=8)


def requests():
  return kvcache.make_requests([[1, 2, 3], [4]], max_new_tokens=2)


@pytest.mark.parametrize(
  ("letters", "shown"),
  [
    ("", "()"),
    ("a", "('a',)"),
    ("aab", "('a',) * 2 + ('b',)"),
    ("abcabcd", "('a', 'b', 'c') * 2 + ('d',)"),
    ("aaaabaaaab", "(('a',) * 4 + ('b',)) * 2"),
    ("abcdeaab", "('a', 'b', 'c', 'd', 'e') + ('a',) * 2 + ('b',)"),
  ],
)
def test_a_tuple_prints_what_repeats_in_it(letters, shown):
  assert printing.show_runs(tuple(letters)) == shown
  assert eval(shown) == tuple(letters)


def test_a_configuration_prints_what_was_set_and_can_be_pasted():
  assert repr(LOCAL) == "AttentionLayer(num_kv_heads=2, head_dim=4, sliding_window=8)"
  config = CacheConfig(
    layers=(LOCAL, LOCAL, FULL) * 20 + (LOCAL,),
    num_blocks=64,
    dtype=jnp.int8,
    head_axes="tensor",
  )
  assert "* 20 + (" in repr(config) and "block_size" not in repr(config)
  assert eval(repr(config)) == config
  values = dataclasses.replace(FULL, v_head_dim=2)
  assert eval(repr(values)) == values


def test_a_recurrent_layer_prints_its_arrays():
  layer = RecurrentLayer(state={"ssm": jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)})
  assert repr(layer) == "RecurrentLayer(state={'ssm': bfloat16[2, 4]})"


def test_snapshots_that_follow_from_the_rows_are_not_printed():
  layers = (FULL, RecurrentLayer.mamba1(num_channels=2, state_size=2))
  assert "num_snap" not in repr(CacheConfig(layers=layers, num_blocks=9, max_seqs=3))
  config = CacheConfig(layers=layers, num_blocks=9, max_seqs=3, num_snapshots=2)
  assert repr(config).endswith("max_seqs=3, num_snapshots=2)")


def test_requests_print_in_a_line():
  text = "Requests(2 requests of up to 5 tokens"
  assert repr(requests()) == f"{text}; 2 waiting; 4 prompt tokens, 0 new; 0 steps)"
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), requests())
  assert repr(batch) == f"{text}; a batch of (2,))"
  seen = []
  jax.eval_shape(lambda x: seen.append(repr(x)), requests())
  assert seen == [f"{text}; traced)"]
  donated = requests()
  jax.jit(lambda x: x, donate_argnums=0)(donated)
  assert repr(donated) == f"{text}; donated)"
  assert "tokens=(2, 5)" in repr(jax.tree.map(jnp.shape, requests()))


@pytest.mark.thorough
def test_requests_print_how_they_ended():
  config = CacheConfig(layers=(FULL,), num_blocks=4, max_seqs=1, max_seq_len=32)

  def model(tokens, metadata, ctx):
    x = jnp.zeros((tokens.size, 2, 4))
    ctx = kvcache.write_kv(ctx, 0, x, x, metadata)
    return jnp.zeros((metadata.seq_lens.size, 8)), ctx

  asked = kvcache.make_requests([[1, 2, 3], [4] * 99], max_new_tokens=2)
  _, done = kvcache.serve(model, kvcache.init(config), asked)
  assert "; 2 finished (1 length, 1 refused); " in repr(done)
  assert repr(done).endswith("2 new; 2 steps)")


def test_nodes_print_numbers_and_the_types_of_long_arrays():
  ctx = kvcache.init(CacheConfig(layers=(FULL,), num_blocks=64))
  assert "num_free=63," in repr(kvcache.stats(ctx))
  assert repr(kvcache.events(ctx, ctx)) == (
    "Events(stored=bool[64] (0 true), removed=bool[64] (0 true))"
  )
  _, admission = kvcache.admit(ctx, [[1, 2, 3]], [3])
  assert repr(admission) == "Admission(seq_ids=[0], num_cached=[0], status=[OK])"
  seen = []
  jax.eval_shape(lambda x: seen.append(repr(x)), admission)
  assert seen[0].startswith("Admission(seq_ids=int32[1] (traced), ")


def test_maps_of_blocks_print_in_a_line():
  ctx = kvcache.init(CacheConfig(layers=(FULL,), num_blocks=64, max_seqs=2))
  ctx, _ = kvcache.admit(ctx, [[1, 2, 3]], [3])
  ctx, _ = kvcache.extend(ctx, jnp.array([3, 0]), num_tokens=4)
  found = kvcache.map_blocks(ctx)
  assert repr(found) == "BlockMap(1 of 2 rows; blocks: 1 exclusive, 62 free)"
  assert repr(found.blocks) == "PoolMap(blocks: 1 exclusive, 62 free)"


def test_exported_states_print_their_types():
  layers = (FULL, RecurrentLayer(state={"sum": (5, 4)}))
  ctx = kvcache.init(CacheConfig(layers=layers, num_blocks=8))
  shown = repr(kvcache.export_sequences(ctx, jnp.array([0]), max_len=8))
  assert shown.endswith("states={'sum': float32[1, 1, 5, 4]})") and "\n" not in shown


def test_keys_of_random_numbers_print_as_their_type():
  assert printing.show(jax.random.key(0)) == "key<fry>[]"
