"""Layers that keep different things: pools of their own, one index, the same tokens.

The toy model hashes what it reads back through every group, so a block that a window
let go too early, or that a hit found without it, changes the tokens that follow.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, context, SchedulerConfig
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more
from tests.serving import test_speculation
from tests.serving.test_serve import (
  assert_all_given_back,
  Case,
  check,
  CROWDED,
  mixture,
  random_prompts,
)


def windowed(case, sliding_window, *, is_hybrid=False, **fields):
  """The same case with a sliding window, and pools of its own for it."""
  old = case.sizes
  sizes = toy.config(
    is_hybrid=is_hybrid,
    sliding_window=sliding_window,
    num_blocks=old.num_blocks,
    block_size=old.block_size,
    max_seqs=old.max_seqs,
    max_seq_len=old.max_seq_len,
    **fields,
  )
  return dataclasses.replace(case, sizes=sizes)


# Windows of two to four blocks; pools for six rows and a little, or hardly for three.
ROOMY = windowed(CROWDED, 10, num_window_blocks=40)
CRAMPED = windowed(CROWDED, 7, num_window_blocks=13)
THREE_GROUPS = windowed(CROWDED, 10, is_hybrid=True, num_window_blocks=24, max_drafts=3)


@pytest.mark.parametrize("seed", [0, *more(1)])
@pytest.mark.parametrize(
  "case",
  [THREE_GROUPS, *more(ROOMY, CRAMPED)],
  ids=["three_groups", "roomy", "cramped"],
)
def test_a_crowd_gets_what_each_gets_alone(case, seed):
  rng, num = np.random.default_rng(seed), case.num
  prompts = random_prompts(rng, num, longest=24)
  news = rng.integers(1, 30, num)
  ctx, requests = check(case, prompts, news, **mixture(seed, num))
  assert int(requests.num_preemptions.sum()) > 0
  assert int(requests.num_cached.sum()) > 0
  (window,) = ctx.windows
  assert int(window.pool.num_free + window.ring.num_waiting) == window.num_blocks - 1


@pytest.mark.thorough
@pytest.mark.parametrize("case", [CRAMPED, THREE_GROUPS], ids=["window", "three"])
def test_drafts_change_how_many_steps_it_takes_and_nothing_else(case):
  rng, num = np.random.default_rng(7), case.num
  prompts = random_prompts(rng, num, longest=24)
  requests = test_speculation.check(
    case, prompts, rng.integers(1, 30, num), **mixture(7, num)
  )
  assert 0 < requests.num_accepted < requests.num_drafts


@pytest.mark.thorough
@pytest.mark.parametrize("window", [1, 2, 4, 5])
def test_the_smallest_pool_serves_one_row_after_the_other(window):
  least = CacheConfig.blocks_per_window(CROWDED.sizes, window) + 1
  case = windowed(CROWDED, window, num_window_blocks=least)
  case = dataclasses.replace(case, num=8)
  rng = np.random.default_rng(window)
  prompts = random_prompts(rng, 8, longest=24)
  check(case, prompts, rng.integers(1, 12, 8), **mixture(window, 8))


LONG = Case(
  sizes=toy.config(
    sliding_window=6,
    num_blocks=310,
    block_size=4,
    max_seqs=2,
    max_seq_len=640,
    num_window_blocks=8,
  ),
  scheduler=SchedulerConfig(token_budget=8),
  num=2,
  width=620,
)


@pytest.mark.thorough
def test_a_window_holds_no_more_after_a_hundred_times_its_length():
  """Two rows of over 600 tokens on seven blocks of four tokens."""
  prompts = [[1, 2, 3], list(range(20))]
  ctx, _ = check(LONG, prompts, [600, 590])
  assert_all_given_back(ctx)


@pytest.mark.thorough
def test_a_loop_of_one_s_own_may_decode_on_without_ever_publishing():
  sizes = dataclasses.replace(LONG.sizes, num_window_blocks=7)
  ctx = toy.fresh(sizes)
  ctx, _ = kvcache.admit(ctx, jnp.array([[1], [2]]), jnp.array([1, 1]))
  ones = jnp.ones(2, jnp.int32)

  def step(_, carry):
    ctx, tokens, is_good = carry
    ctx, status = kvcache.extend(ctx, ones)
    metadata = kvcache.step_metadata(ctx, ones)
    logits, ctx = toy.model(tokens, metadata, ctx)
    ctx = kvcache.commit(ctx, tokens, metadata)
    most = jnp.max(ctx.sequences.num_blocks - ctx.windows[0].first_blocks)
    is_good &= jnp.all(status == 0) & (most <= 3)
    return ctx, jnp.argmax(logits, axis=-1).astype(jnp.int32), is_good

  run = jax.jit(lambda carry: jax.lax.fori_loop(0, 600, step, carry))
  ctx, last, is_good = run((ctx, jnp.array([1, 2], jnp.int32), jnp.array(True)))
  assert is_good
  kvcache.check_invariants(ctx)
  want = toy.expected([[1], [2]], 600, max_tokens_per_seq=640, sliding_window=6)
  assert last.tolist() == [one.tokens[-1] for one in want]


# Prefix hits.

admit, publish, finish, fork, rewind = map(
  jax.jit,
  (kvcache.admit, kvcache.publish, kvcache.finish, kvcache.fork, kvcache.rewind),
)
extend = jax.jit(kvcache.extend, static_argnames="num_tokens")
evict, evict_window_blocks = map(jax.jit, (kvcache.evict, kvcache.evict_window_blocks))
TEXT = np.random.default_rng(5).integers(0, toy.VOCAB, 40).tolist()
SMALL = toy.config(
  sliding_window=7,
  num_blocks=40,
  block_size=4,
  max_seqs=4,
  max_seq_len=48,
  num_window_blocks=30,
)


@functools.partial(jax.jit, static_argnames="num_tokens")
def _step(ctx, tokens, query_lens, *, num_tokens):
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = toy.model(tokens, metadata, ctx)
  return kvcache.commit(ctx, tokens, metadata), status, logits


def feed(ctx, row, tokens):
  padded = jnp.asarray(tokens + [0] * (48 - len(tokens)), jnp.int32)
  query_lens = jnp.zeros(4, jnp.int32).at[row].set(len(tokens))
  ctx, status, logits = _step(ctx, padded, query_lens, num_tokens=48)
  kvcache.raise_for_status(status)
  kvcache.check_invariants(ctx)
  return ctx, np.asarray(logits[row])


def start(ctx, text):
  """Admits a text and computes what is not cached: `(ctx, row, hit, logits)`."""
  tokens = jnp.asarray([text + [0] * (48 - len(text))], jnp.int32)
  ctx, admission = admit(ctx, tokens, jnp.asarray([len(text)]))
  kvcache.raise_for_status(admission.status)
  row, hit = admission.seq_ids[0].item(), admission.num_cached[0].item()
  ctx, logits = feed(ctx, row, text[hit:])
  return ctx, row, hit, logits


def logits_of(text):
  return toy.next_logits(text, sliding_window=7)


def held(ctx, row):
  """Columns of the window that a row holds."""
  return np.flatnonzero(ctx.windows[0].block_tables[row]).tolist()


def mask(row):
  return jnp.arange(4) == row


def drop(row, count):
  return jnp.where(mask(row), count, 0)


@pytest.mark.parametrize("length", [4, 25, *more(1, 3, 5, 8, 9, 24, 40)])
def test_a_hit_needs_the_window_s_blocks_only(length):
  text = TEXT[:length]
  ctx, row, hit, logits = start(toy.fresh(SMALL), text)
  np.testing.assert_array_equal(logits, logits_of(text))
  assert hit == 0
  ctx = finish(ctx, mask(row))
  kvcache.check_invariants(ctx)
  ctx, row, hit, logits = start(ctx, text)
  assert hit == (length - 1) // 4 * 4
  np.testing.assert_array_equal(logits, logits_of(text))
  first = max(hit - 6, 0) // 4
  assert held(ctx, row) == list(range(first, -(-length // 4)))


def test_a_hit_ends_where_a_window_is_whole():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT)
  ctx = finish(ctx, mask(row))
  assert int(ctx.windows[0].ring.num_waiting) == 10
  # The oldest go first: of columns 0 to 8 only 6, 7 and 8 are left, and of 9.
  ctx, num = evict_window_blocks(ctx, jnp.array([6]))
  assert num.tolist() == [6]
  kvcache.check_invariants(ctx)
  ctx, row, hit, logits = start(ctx, TEXT)
  assert hit == 36 and held(ctx, row) == [7, 8, 9]
  np.testing.assert_array_equal(logits, logits_of(TEXT))
  ctx = finish(ctx, mask(row))
  # A prompt that leaves after 28 tokens would need columns 5 and 6.
  other = TEXT[:28] + TEXT[:8]
  ctx, row, hit, logits = start(ctx, other)
  assert hit == 0
  assert int(ctx.counters.lost_tokens) == 28
  np.testing.assert_array_equal(logits, logits_of(other))


def test_blocks_of_a_window_go_with_those_they_are_attached_to():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT)
  ctx = finish(ctx, mask(row))
  ctx, num = evict(ctx, jnp.int32(3))
  assert num == 3 and int(ctx.windows[0].ring.num_waiting) == 7
  kvcache.check_invariants(ctx)
  ctx = kvcache.finish(start(ctx, TEXT)[0], jnp.ones(4, bool), keep_prefix=False)
  kvcache.check_invariants(ctx)
  ctx, num = evict(ctx, jnp.int32(100))
  assert ctx.windows[0].pool.num_free == 29 and ctx.pool.num_free == 39


def test_room_is_made_where_it_is_missing_and_nowhere_else():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT)
  ctx = finish(ctx, mask(row))
  # Ten cached blocks leave 29 of 39, and 19 of the window's 29.
  assert (ctx.pool.num_free, ctx.windows[0].pool.num_free) == (29, 19)
  make_room = jax.jit(context.make_room)
  same = make_room(ctx, 19)
  assert (same.pool.num_free, same.windows[0].pool.num_free) == (29, 19)
  more = make_room(ctx, 22)
  assert (more.pool.num_free, more.windows[0].pool.num_free) == (29, 22)
  kvcache.check_invariants(more)


def test_rows_let_go_of_what_is_behind_their_window_when_published():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:30])
  assert held(ctx, row) == list(range(8))
  ctx = publish(ctx)
  assert held(ctx, row) == [6, 7]  # 30 - 6 = 24
  assert int(ctx.windows[0].ring.num_waiting) == 6
  kvcache.check_invariants(ctx)
  _, logits = feed(ctx, row, TEXT[30:31])
  np.testing.assert_array_equal(logits, logits_of(TEXT[:31]))


def test_forks_share_the_window_and_write_their_own():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:30])
  ctx, rows, status = fork(ctx, jnp.array([row, row]))
  kvcache.raise_for_status(status)
  kvcache.check_invariants(ctx)
  assert held(ctx, int(rows[0])) == held(ctx, row) == [6, 7]
  refs = ctx.windows[0].pool.ref_counts[ctx.windows[0].block_tables[row]]
  assert refs[6] == 3 and refs[7] == 1
  for branch, token in zip([row, *rows.tolist()], (1, 2, 3), strict=True):
    ctx, logits = feed(ctx, branch, [token])
    np.testing.assert_array_equal(logits, logits_of([*TEXT[:30], token]))


@pytest.mark.thorough
def test_no_row_writes_over_what_a_fork_still_sees():
  """Of two equal rows the second keeps blocks of its own, and a fork shares them."""
  tokens = jnp.asarray([TEXT[:30] + [0] * 18] * 2, jnp.int32)
  ctx, _ = admit(toy.fresh(SMALL), tokens, jnp.asarray([30, 30]))
  for row in (0, 1):
    ctx, _ = feed(ctx, row, TEXT[:30])
  ctx, rows, _ = fork(ctx, jnp.array([1]))
  window = ctx.windows[0]
  shared = window.block_tables[1, 6]
  assert window.pool.ref_counts[shared] == 2 and window.owner_ids[shared] == 0
  text = TEXT[:30]
  for token in range(12):  # three blocks further: column 6 is long behind
    ones = mask(1).astype(jnp.int32)
    tokens = jnp.full(4, token, jnp.int32)
    ctx, status, logits = _step(ctx, tokens, ones, num_tokens=None)
    kvcache.raise_for_status(status)
    text = [*text, token]
  np.testing.assert_array_equal(logits[1], logits_of(text))
  kvcache.check_invariants(ctx)
  ctx, logits = feed(ctx, int(rows[0]), [3])
  np.testing.assert_array_equal(logits, logits_of([*TEXT[:30], 3]))


@pytest.mark.parametrize(
  ("sizes", "want"),
  [
    ({"num_window_blocks": 9}, kvcache.Status.NO_WINDOW_BLOCKS),
    *more(
      ({"num_blocks": 9}, kvcache.Status.NO_BLOCKS),
      ({"num_blocks": 9, "num_window_blocks": 9}, kvcache.Status.NO_BLOCKS),
    ),
  ],
  ids=["window", "context", "both"],
)
def test_the_pool_that_lacks_blocks_is_named(sizes, want):
  """The first row takes eight blocks of each pool; the second one needs two more."""
  sizes = dataclasses.replace(SMALL, **sizes)
  ctx, _ = admit(
    toy.fresh(sizes), jnp.zeros((2, 30), jnp.int32), jnp.asarray([30, 6], jnp.int32)
  )
  lens = jnp.asarray([30, 6, 0, 0], jnp.int32)
  ctx, status = extend(ctx, lens, num_tokens=36)
  assert [kvcache.Status(code) for code in status.tolist()[:2]] == [0, want]
  is_window = want == kvcache.Status.NO_WINDOW_BLOCKS
  with pytest.raises(kvcache.BlockOverflowError, match=f"1: {want.name}") as raised:
    kvcache.raise_for_status(status)
  assert isinstance(raised.value, kvcache.WindowOverflowError) == is_window


def test_room_in_a_window_is_made_by_evicting_there():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT)
  ctx = finish(ctx, mask(row))
  ctx, other, *_ = start(ctx, TEXT[::-1][:38])
  free = int(ctx.windows[0].pool.num_free)
  # What is left of the pool goes to rows of their own, so that a fork finds no block.
  ctx, admission = admit(
    ctx, jnp.zeros((1, 48), jnp.int32), jnp.asarray([48], jnp.int32)
  )
  lens = jnp.zeros(4, jnp.int32).at[admission.seq_ids[0]].set(4 * free)
  ctx, status = extend(ctx, lens, num_tokens=48)
  kvcache.raise_for_status(status)
  same, _, status = fork(ctx, jnp.array([other]))
  assert kvcache.Status(status.item()) == kvcache.Status.NO_WINDOW_BLOCKS
  same, _ = evict_window_blocks(same, jnp.array([1]))
  _, _, status = fork(same, jnp.array([other]))
  kvcache.raise_for_status(status)


@pytest.mark.parametrize("length", [0, 13, 24, *more(3, 4, 16, 23, 27, 29)])
def test_rows_return_to_where_their_window_is_cached(length):
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:30])
  ctx = publish(ctx)
  ctx, status = rewind(ctx, drop(row, 30 - length))
  kvcache.raise_for_status(status)
  kvcache.check_invariants(ctx)
  text = TEXT[:length] + TEXT[:6]
  ctx, logits = feed(ctx, row, TEXT[:6])
  np.testing.assert_array_equal(logits, logits_of(text))


def test_rows_cannot_return_to_where_their_window_is_gone():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:30])
  ctx, _ = evict_window_blocks(publish(ctx), jnp.array([5]))
  after, status = rewind(ctx, drop(row, 8))  # to 22, needs columns 4 and 5
  assert kvcache.Status(status[row].item()) == kvcache.Status.NO_STATE
  for a, b in zip(jax.tree.leaves(ctx), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)
  ctx, status = rewind(ctx, drop(row, 4))  # to 26, needs column 5
  kvcache.raise_for_status(status)
  _, logits = feed(ctx, row, [3])
  np.testing.assert_array_equal(logits, logits_of([*TEXT[:26], 3]))


@pytest.mark.thorough
def test_sequences_move_to_other_block_sizes():
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:30])
  state = kvcache.export_sequences(ctx, jnp.array([row, 3]), max_len=32)
  assert state.kv[1].k.shape[0] == 2 * 6
  other = dataclasses.replace(SMALL, block_size=3, num_window_blocks=9)
  there, rows, status = jax.jit(kvcache.import_sequences)(toy.fresh(other), state)
  assert status.tolist() == [kvcache.Status.OK, kvcache.Status.INVALID]
  kvcache.check_invariants(there)
  _, logits = feed(there, int(rows[0]), TEXT[30:33])
  np.testing.assert_array_equal(logits, logits_of(TEXT[:33]))


@pytest.mark.thorough
def test_what_was_not_brought_along_is_never_found():
  """Of column 5 the imported row has its last token only, 23: it needs no more."""
  ctx, row, *_ = start(toy.fresh(SMALL), TEXT[:29])
  state = kvcache.export_sequences(ctx, jnp.array([row]), max_len=32)
  there, rows, _ = jax.jit(kvcache.import_sequences)(toy.fresh(SMALL), state)
  assert held(there, int(rows[0])) == [5, 6, 7]
  there, status = rewind(there, drop(0, 1))  # would have to see 22
  assert kvcache.Status(status[0].item()) == kvcache.Status.NO_STATE
  _, logits = feed(there, 0, TEXT[29:30])
  np.testing.assert_array_equal(logits, logits_of(TEXT[:30]))
  there = finish(there, mask(0))
  kvcache.check_invariants(there)
  there, _, hit, logits = start(there, TEXT[:29])  # a hit of 28 tokens needs 22
  assert hit == 0
  np.testing.assert_array_equal(logits, logits_of(TEXT[:29]))


# Layers that share, and layers of different shapes.

FULL = AttentionLayer(num_kv_heads=2, head_dim=4)
MIXED = CacheConfig(
  layers=(
    FULL,
    AttentionLayer(num_kv_heads=1, head_dim=8, dtype="int8"),
    dataclasses.replace(FULL, sliding_window=5),
    dataclasses.replace(FULL, shared_with=0),
    FULL,
    dataclasses.replace(FULL, sliding_window=5, shared_with=2),
  ),
  num_blocks=10,
  block_size=4,
  max_seqs=2,
  max_seq_len=32,
)


def test_alike_layers_form_groups():
  assert [group.members for group in MIXED.groups] == [(0, 4), (1,), (2,)]
  assert MIXED.places == ((0, 0), (1, 0), (2, 0), (0, 0), (0, 1), (2, 0))
  assert MIXED.windows == (5,)
  ctx = kvcache.init(MIXED)
  assert [store.k.shape[0] for store in ctx.kv] == [2, 1, 1]
  assert MIXED.num_bytes == sum(x.nbytes for x in jax.tree.leaves(ctx.kv))


def test_layers_that_share_read_what_the_other_wrote():
  ctx, _ = admit(kvcache.init(MIXED), jnp.ones((1, 9), jnp.int32), jnp.array([9]))
  lens = jnp.array([9, 0])
  ctx, _ = extend(ctx, lens, num_tokens=9)
  metadata = kvcache.step_metadata(ctx, lens, num_tokens=9)
  k = jax.random.normal(jax.random.key(0), (9, 2, 4))
  q = jax.random.normal(jax.random.key(1), (9, 2, 4))
  with pytest.raises(ValueError, match="layer 3 reads the keys and values of layer 0"):
    kvcache.write_kv(ctx, 3, k, k, metadata)
  with pytest.raises(ValueError, match="layer must be the index of one of 6"):
    kvcache.attend(ctx, 6, q, metadata)
  with pytest.raises(ValueError, match="group must be given with a traced layer"):
    jax.eval_shape(lambda layer: kvcache.attend(ctx, layer, q, metadata), jnp.int32(0))
  with pytest.raises(ValueError, match="layer 2 is in group 2, got group=0"):
    kvcache.attend(ctx, 2, q, metadata, group=0)
  with pytest.raises(ValueError, match="sliding_window=6 is wider than"):
    kvcache.attend(ctx, 2, q, metadata, sliding_window=6)
  for layer in (0, 2, 4):
    ctx = kvcache.write_kv(ctx, layer, k + layer, k - layer, metadata)
  attend = functools.partial(kvcache.attend, ctx)
  for layer, owner in ((3, 0), (5, 2)):
    np.testing.assert_array_equal(
      attend(layer, q, metadata), attend(owner, q, metadata)
    )
  traced = jax.jit(lambda layer: kvcache.attend(ctx, layer, q, metadata, group=0))
  for layer in (0, 3, 4):
    np.testing.assert_allclose(
      traced(jnp.int32(layer)), attend(layer, q, metadata), rtol=1e-6
    )
  alone = kvcache.attend(ctx, 0, q, metadata, sliding_window=5)
  assert np.abs(alone - attend(2, q, metadata)).max() > 1e-3  # other keys
