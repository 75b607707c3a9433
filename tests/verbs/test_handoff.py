"""Sequences move between contexts and go on there as if they had never moved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, Status
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more

TEXT = np.random.default_rng(0).integers(0, toy.VOCAB, 40).tolist()
SIZES = {
  "attention": toy.config(num_blocks=24, block_size=4, max_seqs=4, max_seq_len=48),
  "hybrid": toy.config(
    is_hybrid=True, num_blocks=24, block_size=4, max_seqs=4, max_seq_len=48
  ),
}
admit, finish, evict = map(jax.jit, (kvcache.admit, kvcache.finish, kvcache.evict))
import_sequences = jax.jit(kvcache.import_sequences)
export_sequences = jax.jit(kvcache.export_sequences, static_argnames="max_len")
fresh = jax.jit(toy.fresh, static_argnums=0)


@functools.partial(jax.jit, static_argnames="num_tokens")
def _step(ctx, tokens, query_lens, *, num_tokens):
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = toy.model(tokens, metadata, ctx)
  return kvcache.commit(ctx, tokens, metadata), status, logits


def feed(ctx, row, tokens):
  """Computes tokens of a row; returns the context and the logits after the last."""
  padded = jnp.asarray(tokens + [0] * (48 - len(tokens)), jnp.int32)
  query_lens = jnp.zeros(ctx.config.max_seqs, jnp.int32).at[row].set(len(tokens))
  ctx, status, logits = _step(ctx, padded, query_lens, num_tokens=48)
  kvcache.raise_for_status(status)
  return ctx, np.asarray(logits[row])


def start(ctx, text, *, namespace=0):
  tokens = jnp.asarray([text + [0] * (48 - len(text))], jnp.int32)
  ctx, admission = admit(ctx, tokens, jnp.asarray([len(text)]), namespace=namespace)
  kvcache.raise_for_status(admission.status)
  row, num_cached = admission.seq_ids[0].item(), admission.num_cached[0].item()
  ctx, _ = feed(ctx, row, text[num_cached:])
  return ctx, row


def go_on(ctx, row, num=6):
  """The next tokens of a row, greedily: they depend on all that is stored of it."""
  out, token = [], 1
  for _ in range(num):
    ctx, logits = feed(ctx, row, [token])
    token = int(logits.argmax())
    out.append(token)
  kvcache.check_invariants(ctx)
  return out


@pytest.mark.parametrize(
  ("kind", "block_size"), [("attention", 1), *more(("hybrid", 8))]
)
@pytest.mark.parametrize("length", [7, 33, *more(1, 4, 8)])
def test_a_sequence_goes_on_in_another_context(kind, length, block_size):
  source, row = start(fresh(SIZES[kind]), TEXT[:length], namespace=3)
  sizes = dataclasses.replace(
    SIZES[kind], block_size=block_size, num_blocks=70, max_seqs=2
  )
  target, _ = start(fresh(sizes), TEXT[10:15])
  state = export_sequences(source, jnp.asarray([row]), max_len=40)
  target, seq_ids, status = import_sequences(target, state)
  kvcache.raise_for_status(status)
  kvcache.check_invariants(target)
  assert target.sequences.seq_lens[seq_ids[0]] == length
  assert target.sequences.namespaces[seq_ids[0]] == 3
  assert go_on(target, seq_ids[0].item()) == go_on(source, row)


@pytest.mark.parametrize("kind", ["hybrid", *more("attention")])
def test_blocks_that_are_cached_are_adopted(kind):
  ctx, row = start(fresh(SIZES[kind]), TEXT[:22])
  state = export_sequences(ctx, jnp.asarray([row]))
  free = ctx.pool.num_free.item()
  ctx, seq_ids, status = import_sequences(ctx, state)
  kvcache.raise_for_status(status)
  kvcache.check_invariants(ctx)
  assert ctx.pool.num_free.item() == free - 1  # the last block is partial
  tables = ctx.sequences.block_tables
  assert (tables[row, :5] == tables[seq_ids[0], :5]).all()
  assert tables[row, 5] != tables[seq_ids[0], 5]
  assert go_on(ctx, seq_ids[0].item()) == go_on(ctx, row)


@pytest.mark.parametrize("kind", ["hybrid", *more("attention")])
def test_offloaded_sequences_come_back(kind):
  ctx, first = start(fresh(SIZES[kind]), TEXT[:22])
  ctx, second = start(ctx, TEXT[5:38])
  want = go_on(ctx, first), go_on(ctx, second)
  ctx, state = kvcache.offload(ctx, [first, second])
  kvcache.check_invariants(ctx)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
  assert state.tokens.shape[1] == 48  # 33 tokens, rounded up, and no row is longer
  assert not ctx.sequences.is_active.any()
  ctx, _ = evict(ctx, 100)
  assert ctx.pool.num_free.item() == 23
  ctx, other = start(ctx, TEXT[20:40])  # somebody else uses the memory meanwhile
  ctx, seq_ids, status = import_sequences(ctx, state)
  kvcache.raise_for_status(status)
  got = tuple(go_on(ctx, row) for row in seq_ids.tolist())
  assert got == want and other not in seq_ids.tolist()


@pytest.mark.thorough
def test_refusals_change_nothing():
  sizes = SIZES["hybrid"]
  ctx, row = start(fresh(sizes), TEXT[:22])
  state = export_sequences(ctx, jnp.asarray([row, -1, 3, 99, row]))
  assert state.is_valid.tolist() == [True, False, False, False, True]
  assert state.lengths.tolist() == [22, 0, 0, 0, 22]

  small = fresh(dataclasses.replace(sizes, max_seq_len=20))
  after, seq_ids, status = import_sequences(small, state)
  assert status.tolist() == [Status.TOO_LONG, *[Status.INVALID] * 3, Status.TOO_LONG]
  assert seq_ids.tolist() == [-1] * 5
  jax.tree.map(np.testing.assert_array_equal, small, after)

  few = fresh(dataclasses.replace(sizes, num_blocks=12))
  after, seq_ids, status = import_sequences(few, state)
  assert status.tolist()[::4] == [Status.OK, Status.NO_BLOCKS]
  kvcache.check_invariants(after)

  narrow = fresh(dataclasses.replace(sizes, max_seqs=1, num_snapshots=0))
  after, seq_ids, status = import_sequences(narrow, state)
  assert status.tolist()[::4] == [Status.OK, Status.NO_ROW]
  kvcache.check_invariants(after)


def test_longer_sequences_than_asked_for_are_not_exported():
  ctx, row = start(fresh(SIZES["attention"]), TEXT[:22])
  assert not export_sequences(ctx, jnp.asarray([row]), max_len=21).is_valid[0]
  with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
    kvcache.export_sequences(ctx, jnp.asarray([row]), max_len=0)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_values_travel_with_their_scales(dtype):
  layer = AttentionLayer(num_kv_heads=2, head_dim=4)
  config = kvcache.CacheConfig(
    layers=(layer,) * 2,
    num_blocks=9,
    block_size=4,
    max_seqs=2,
    max_seq_len=16,
    dtype=dtype,
  )
  ctx = kvcache.init(config)
  tokens = jnp.asarray([TEXT[:16]], jnp.int32)
  ctx, _ = admit(ctx, tokens, jnp.asarray([7]))
  query_lens = jnp.asarray([7, 0], jnp.int32)
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=8)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=8)
  k = jax.random.normal(jax.random.key(0), (8, 2, 4))
  for layer in range(2):
    ctx = kvcache.write_kv(ctx, layer, k + layer, 3 * k, metadata)
  ctx = kvcache.commit(ctx, tokens[0, :8], metadata)
  state = export_sequences(ctx, jnp.asarray([0]), max_len=8)
  other = kvcache.init(dataclasses.replace(config, block_size=2, num_blocks=12))
  other, seq_ids, _ = import_sequences(other, state)
  again = export_sequences(other, seq_ids, max_len=8)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[:7], b[:7]), state.kv, again.kv
  )


def test_layers_that_keep_other_things_are_refused():
  ctx, row = start(fresh(SIZES["attention"]), TEXT[:9])
  state = export_sequences(ctx, jnp.asarray([row]), max_len=9)
  with pytest.raises(ValueError, match=r"keep other things: .*kv.* not .*states"):
    kvcache.import_sequences(fresh(SIZES["hybrid"]), state)
  narrow = dataclasses.replace(SIZES["attention"], dtype="bfloat16")
  with pytest.raises(ValueError, match=r"float32\[9, 2, 1, 1\].* not .*bfloat16"):
    kvcache.import_sequences(fresh(narrow), state)
