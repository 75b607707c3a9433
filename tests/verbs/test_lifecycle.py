"""Sequences come and go, by example; see `small` for the sizes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import Status
from kvcache.parts import hashing
from tests.fixtures import small
from tests.fixtures.small import (
  admit,
  append,
  cached,
  finish,
  fork,
  free,
  ints,
  mask,
  prompts,
  queue,
  reset,
  rewind,
  rows,
  start,
  tables,
  text,
)

OK, NO_ROW, NO_BLOCKS = Status.OK, Status.NO_ROW, Status.NO_BLOCKS
A = list(range(1, 17))  # prompts that share nothing
B = list(range(101, 117))
C = list(range(201, 217))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def texts(ctx):
  return [text(ctx, s) for s in range(4)]


def counters(ctx):
  return {
    field.name: getattr(ctx.counters, field.name).item()
    for field in dataclasses.fields(ctx.counters)
  }


# admit


def test_prompts_get_the_lowest_rows_in_order():
  ctx, admission = admit(small.empty(), *prompts(A[:15], B[:15]))
  assert admission.seq_ids.tolist() == [0, 1]
  assert admission.num_cached.tolist() == [0, 0]
  assert admission.status.tolist() == [OK, OK]
  assert ctx.sequences.is_active.tolist() == [True, True, False, False]
  assert tables(ctx) == [[]] * 4 and len(free(ctx)) == 11
  small.check(ctx)
  ctx, admission = admit(finish(ctx, mask(0)), *prompts(A[:15], B[:15]))
  assert admission.seq_ids.tolist() == [0, 2]


@pytest.mark.parametrize(
  ("lengths", "status", "seq_ids"),
  [
    ([0, 5], [Status.EMPTY, OK], [-1, 0]),
    ([-(2**31), 5], [Status.EMPTY, OK], [-1, 0]),
    ([15, 17], [OK, Status.TOO_LONG], [0, -1]),
    ([16, 5], [Status.INVALID, OK], [-1, 0]),  # longer than the tokens given
    ([2**31 - 1, 15], [Status.TOO_LONG, OK], [-1, 0]),
  ],
)
def test_prompts_that_can_never_fit_are_refused(lengths, status, seq_ids):
  ctx, admission = admit(small.empty(), prompts(A, B)[0], ints(lengths))
  assert admission.status.tolist() == status
  assert admission.seq_ids.tolist() == seq_ids
  small.check(ctx)


def test_without_rows_prompts_are_refused():
  ctx = start(start(small.empty(), A[:1], B[:1]), C[:1])
  after, admission = admit(ctx, *prompts(A[:3], B[:3]))
  assert admission.status.tolist() == [OK, NO_ROW]
  assert admission.seq_ids.tolist() == [3, -1]
  small.check(after)
  # A prompt that can never fit takes no row from the next one.
  _, admission = admit(ctx, prompts(A, B)[0], ints([17, 3]))
  assert admission.seq_ids.tolist() == [-1, 3]


@pytest.mark.parametrize(
  ("prompt", "blocks", "num_cached"),
  [
    (A[:8], [1], 4),  # the last token must be computed
    (A[:9], [1, 2], 8),
    (A[:15], [1, 2, 3], 12),  # the partial block of the other row is not cached
    (A[:4] + B[:8], [1], 4),
    (B[:4] + A[4:8], [], 0),
    (A[:4], [], 0),
    (A[:1], [], 0),
  ],
)
def test_a_prompt_adopts_its_longest_cached_prefix(prompt, blocks, num_cached):
  ctx = start(small.empty(), A[:14])
  ctx, admission = admit(ctx, *prompts(prompt))
  small.check(ctx)
  assert admission.num_cached.tolist() == [num_cached, 0]
  assert tables(ctx) == [[1, 2, 3, 4], blocks, [], []]
  assert texts(ctx)[:2] == [A[:14], prompt[:num_cached]]
  ctx = append(ctx, {1: prompt[num_cached:]})
  assert texts(ctx)[:2] == [A[:14], prompt]
  small.check(ctx)


def test_prompts_of_one_call_do_not_see_each_other():
  ctx, admission = admit(small.empty(), *prompts(A[:13], A[:13]))
  assert admission.num_cached.tolist() == [0, 0]
  ctx = append(append(ctx, {0: A[:12]}), {1: A[:4]})
  _, admission = admit(ctx, *prompts(A[:13], A[:9]))
  assert admission.num_cached.tolist() == [12, 8]


def test_namespaces_share_nothing():
  tokens, lengths = prompts(A[:9], A[:9])
  ctx, _ = admit(small.empty(), tokens, lengths, namespace=[0, 7])
  ctx = append(append(ctx, {0: A[:9]}), {1: A[:9]})
  after, admission = admit(ctx, tokens, lengths, namespace=[7, -1])
  assert admission.num_cached.tolist() == [8, 0]
  assert tables(after)[2] == tables(after)[1][:2]
  small.check(after)
  _, num_hits = small.find(after, tokens, lengths, namespace=[0, 7])
  assert num_hits.tolist() == [2, 2]


def test_adopted_blocks_leave_the_ring():
  ctx = finish(start(small.empty(), A[:13]), mask(0))
  assert queue(ctx) == [3, 2, 1]
  ctx, admission = admit(ctx, *prompts(A[:9], A[:5]))
  assert admission.num_cached.tolist() == [8, 4]
  assert queue(ctx) == [3]
  assert ctx.pool.ref_counts[:4].tolist() == [0, 2, 1, 0]
  small.check(ctx)


@pytest.mark.parametrize(
  ("budget", "status"),
  [
    # A needs 4 blocks of which B's row holds none; B needs 2, of which it holds 1.
    (5, [OK, OK]),
    (4, [OK, NO_BLOCKS]),
    (3, [NO_BLOCKS, NO_BLOCKS]),  # first come, first served
    (-1, [NO_BLOCKS, NO_BLOCKS]),
  ],
)
def test_prompts_are_admitted_within_a_budget_of_blocks(budget, status):
  ctx = start(small.empty(), B[:5])
  ctx, admission = admit(ctx, *prompts(A[:13], B[:7]), block_budget=budget)
  assert admission.status.tolist() == status
  assert (admission.seq_ids >= 0).tolist() == [code == OK for code in status]
  small.check(ctx)


def test_evictable_blocks_count_against_the_budget():
  ctx = finish(start(small.empty(), A[:9]), mask(0))
  for budget, status in ((3, OK), (2, NO_BLOCKS)):
    _, admission = admit(ctx, *prompts(A[:9]), block_budget=budget)
    assert admission.status.tolist() == [status, Status.EMPTY]


def test_counters_tell_why_hits_ended():
  ctx = start(small.empty(), A[:9])
  ctx, _ = admit(ctx, *prompts(A[:9], A[:4] + B[:8]))
  ctx, _ = admit(ctx, *prompts([], A[:1]))
  ctx, _ = admit(ctx, *prompts(A[:1]))  # no row is left
  assert counters(ctx) == {
    "num_admitted": 4,
    "prompt_tokens": 9 + 9 + 12 + 1,
    "hit_tokens": 8 + 4,
    "num_complete": 2,  # all of the second prompt, and the one without a full block
    "num_cut": 2,
    "num_evicted": 0,
    "lost_tokens": 0,  # there is no recurrent layer
  }


def test_find_tells_what_admit_would_adopt():
  ctx = start(small.empty(), A[:13])
  assert small.find(ctx, *prompts(A[:13]))[1].tolist() == [0, 0]  # not published yet
  ctx = small.publish(ctx)
  block_ids, num_hits = small.find(ctx, *prompts(A[:12], A[:8] + B[:7]))
  assert num_hits.tolist() == [2, 2]
  assert block_ids[:, :3].tolist() == [[1, 2, 0], [1, 2, 0]]


# fork


def test_a_fork_shares_full_blocks_and_copies_the_partial_one():
  ctx = start(small.empty(), A[:10])
  ctx, seq_ids, status = fork(ctx, ints([0, 0]))
  assert seq_ids.tolist() == [1, 2] and status.tolist() == [OK, OK]
  assert tables(ctx) == [[1, 2, 3], [1, 2, 4], [1, 2, 5], []]
  assert ctx.pool.ref_counts[:7].tolist() == [0, 3, 3, 1, 1, 1, 0]
  assert texts(ctx)[:3] == [A[:10]] * 3
  small.check(ctx)
  ctx = append(ctx, {0: [50, 51], 1: [60], 2: [70, 71, 72]})
  assert texts(ctx)[:3] == [[*A[:10], 50, 51], [*A[:10], 60], [*A[:10], 70, 71, 72]]
  small.check(ctx)


def test_a_source_that_ends_with_a_block_is_shared_whole():
  ctx = start(small.empty(), A[:8])
  ctx, seq_ids, _ = fork(ctx, ints([0, 0]))
  assert seq_ids.tolist() == [1, 2]
  assert tables(ctx) == [[1, 2], [1, 2], [1, 2], []]
  small.check(ctx)


def test_reserved_blocks_are_not_shared():
  ctx = start(small.empty(), A[:5])
  ctx, _ = small.extend(ctx, rows({0: 11}), num_tokens=small.NUM_TOKENS)
  ctx, _, _ = fork(ctx, ints([0, 0]))
  assert tables(ctx) == [[1, 2, 3, 4], [1, 5], [1, 6], []]
  small.check(ctx)


def test_a_fork_keeps_its_namespace():
  ctx, _ = admit(small.empty(), *prompts(A[:5]), namespace=[7, 0])
  ctx, _, _ = fork(append(ctx, {0: A[:5]}), ints([0, 0]))
  assert ctx.sequences.namespaces.tolist() == [7, 7, 7, 0]
  small.check(ctx)


def test_there_is_nothing_to_fork_in_a_row_without_a_sequence():
  ctx = start(small.empty(), A[:5])
  for src in ([1, 0], [-1, 0], [4, 0], [2**31 - 1, 0], [-(2**31), 0]):
    after, seq_ids, status = fork(ctx, ints(src))
    assert seq_ids.tolist() == [-1, 1] and status.tolist() == [Status.INACTIVE, OK]
    small.check(after)


def test_forks_need_rows():
  ctx = start(start(small.empty(), A[:5], B[:5]), C[:5])
  after, seq_ids, status = fork(ctx, ints([1, 0]))
  assert seq_ids.tolist() == [3, -1] and status.tolist() == [OK, NO_ROW]
  assert tables(after)[:3] == tables(ctx)[:3]
  small.check(after)


def test_forks_need_a_block_for_the_partial_one():
  ctx = start(start(small.empty(), A[:16]), B[:14])
  ctx, _ = small.extend(ctx, rows({1: 1}), num_tokens=None)
  ctx = start(ctx, C[:5])
  assert len(free(ctx)) == 1
  ctx = small.append(ctx, {2: C[5:9]})
  assert free(ctx) == []
  # The last one needs no block; but the first one's row stays unused.
  after, seq_ids, status = fork(ctx, ints([1, 0]))
  assert seq_ids.tolist() == [-1, -1] and status.tolist() == [NO_BLOCKS, NO_ROW]
  small.check(after)
  after, seq_ids, status = fork(ctx, ints([0, 1]))
  assert seq_ids.tolist() == [3, -1] and status.tolist() == [OK, NO_ROW]
  assert tables(after)[3] == tables(after)[0]
  small.check(after)


# rewind


@pytest.mark.parametrize(
  ("num", "blocks"), [(0, 3), (1, 3), (2, 2), (3, 2), (5, 2), (6, 1), (10, 0)]
)
def test_rewinding_gives_back_the_blocks_behind(num, blocks):
  ctx = start(small.empty(), A[:10], B[:6])
  after, status = rewind(ctx, rows({0: num}))
  assert status.tolist() == [OK] * 4
  assert tables(after)[0] == [1, 2, 3][:blocks] and tables(after)[1] == [4, 5]
  assert len(free(after)) == len(free(ctx)) + 3 - blocks
  assert texts(after)[:2] == [A[: 10 - num], B[:6]]
  assert after.sequences.is_active.tolist() == [True, True, False, False]
  small.check(after)
  after = append(after, {0: C[:5]})
  assert texts(after)[:2] == [A[: 10 - num] + C[:5], B[:6]]
  small.check(after)


def test_reserved_blocks_are_given_back_too():
  ctx = start(small.empty(), A[:6])
  reserved, _ = small.extend(ctx, rows({0: 10}), num_tokens=small.NUM_TOKENS)
  assert len(tables(reserved)[0]) == 4
  after, _ = rewind(reserved, rows({0: 1}))
  assert tables(after)[0] == [1, 2]
  same, _ = rewind(reserved, rows({}))
  assert_same(same, reserved)


def test_a_cached_block_is_copied_before_it_is_written_again():
  ctx = small.publish(start(small.empty(), A[:9]))
  assert tables(ctx)[0] == [1, 2, 3] and cached(ctx) == [1, 2]
  ctx, status = rewind(ctx, rows({0: 2}))
  assert status.tolist() == [OK] * 4
  assert tables(ctx)[0] == [1, 4] and queue(ctx) == [2] and 3 in free(ctx)
  assert ctx.sequences.num_published.tolist() == [1, 0, 0, 0]
  small.check(ctx)
  ctx = append(ctx, {0: [50]})
  assert text(ctx, 0) == [*A[:7], 50]
  # The old text is still in the cache, and is as it was.
  ctx, admission = admit(ctx, *prompts(A[:9]))
  assert admission.num_cached[0] == 8
  assert texts(ctx)[:2] == [[*A[:7], 50], A[:8]]
  small.check(ctx)


def test_a_shared_block_is_copied_for_the_row_that_rewinds():
  ctx = start(small.empty(), A[:8])
  ctx, _, _ = fork(ctx, ints([0, 0]))
  ctx, status = rewind(ctx, rows({0: 1, 2: 5}))
  assert status.tolist() == [OK] * 4
  assert tables(ctx) == [[1, 3], [1, 2], [4], []]
  assert texts(ctx)[:3] == [A[:7], A[:8], A[:3]]
  small.check(ctx)
  ctx = append(ctx, {0: [50], 1: [60], 2: [70]})
  assert texts(ctx)[:3] == [[*A[:7], 50], [*A[:8], 60], [*A[:3], 70]]


def test_dropped_blocks_enter_the_ring_deepest_first():
  ctx = small.publish(start(start(small.empty(), A[:12]), B[:8]))
  ctx, _ = rewind(ctx, rows({0: 11, 1: 8}))
  assert tables(ctx) == [[6], [], [], []]
  assert queue(ctx) == [3, 2, 1, 5, 4]
  small.check(ctx)


def test_rows_that_cannot_rewind_are_left_alone():
  ctx = start(small.empty(), A[:6], B[:6])
  for num, code in (
    (-1, Status.INVALID),
    (7, Status.INVALID),
    (2**31 - 1, Status.INVALID),
    (-(2**31), Status.INVALID),
  ):
    after, status = rewind(ctx, rows({0: num, 1: 1, 2: 0, 3: 1}))
    assert status.tolist() == [code, OK, OK, Status.INACTIVE]
    assert texts(after) == [A[:6], B[:5], [], []]
    small.check(after)


def test_copies_need_free_blocks():
  ctx = start(start(small.empty(), A[:16]), B[:16])
  ctx = start(ctx, C[:8])
  ctx = small.publish(ctx)
  assert free(ctx) == [11]
  after, status = rewind(ctx, rows({0: 1, 1: 1, 2: 4}))
  # One free block: the second copy finds none, though row 2's block is let go.
  assert status.tolist() == [OK, NO_BLOCKS, OK, OK]
  assert texts(after)[:3] == [A[:15], B[:16], C[:4]]
  assert tables(after)[1] == tables(ctx)[1]
  small.check(after)


# finish and reset


def test_full_blocks_stay_cached_and_partial_ones_are_free():
  ctx = start(small.empty(), A[:10], B[:5])
  after = finish(ctx, mask(0))
  assert tables(after) == [[], [4, 5], [], []]
  assert queue(after) == [2, 1] and cached(after) == [1, 2, 4]
  assert sorted(free(after)) == [3, 6, 7, 8, 9, 10, 11]
  assert after.sequences.is_active.tolist() == [False, True, False, False]
  assert text(after, 1) == B[:5]
  small.check(after)


def test_rows_finish_in_order_and_deepest_first():
  ctx = start(start(small.empty(), A[:13]), B[:9])
  ctx = finish(ctx, mask(0, 1, 2))
  assert queue(ctx) == [3, 2, 1, 6, 5]
  assert len(free(ctx)) == 6
  small.check(ctx)


def test_a_shared_block_waits_for_its_last_holder():
  ctx = start(small.empty(), A[:9])
  ctx, _, _ = fork(ctx, ints([0, 0]))
  ctx = finish(ctx, mask(0, 2))
  assert queue(ctx) == [] and tables(ctx)[1] == [1, 2, 4]
  assert text(ctx, 1) == A[:9]
  small.check(ctx)
  ctx = finish(ctx, mask(1))
  assert queue(ctx) == [2, 1]
  small.check(ctx)


@pytest.mark.parametrize("keep_prefix", [True, False])
def test_inactive_rows_cannot_be_finished(keep_prefix):
  ctx = small.publish(start(small.empty(), A[:9]))
  assert_same(finish(ctx, mask(1, 2, 3), keep_prefix=keep_prefix), ctx)


def test_a_sequence_can_leave_nothing_behind():
  ctx = start(small.empty(), A[:13])
  for published in (ctx, small.publish(ctx)):
    after = finish(published, mask(0), keep_prefix=False)
    assert sorted(free(after)) == list(range(1, 12))
    assert cached(after) == [] and not after.prefix.way_ids.any()
    small.check(after)


def test_what_others_hold_or_continue_stays():
  ctx = start(start(small.empty(), A[:13]), B[:5])
  ctx = start(ctx, A[:8] + C[:4])  # holds A's first two blocks
  ctx = append(ctx, {1: B[5:8]})
  ctx = finish(ctx, mask(0), keep_prefix=False)
  assert cached(ctx)[:2] == [1, 2] and 3 not in cached(ctx)
  assert texts(ctx) == [[], B[:8], A[:8] + C[:4], []]
  # The other rows' full blocks were not published on the way.
  assert ctx.sequences.num_published.tolist() == [0, 1, 2, 0]
  small.check(ctx)
  ctx = finish(ctx, mask(2))  # leaves a cached child behind A's blocks
  ctx, _ = admit(ctx, *prompts(A[:9]))
  ctx = finish(ctx, mask(0), keep_prefix=False)
  assert len(queue(ctx)) == 3 and queue(ctx)[1:] == [2, 1]
  small.check(ctx)


def test_reset_can_keep_what_is_cached():
  ctx = start(small.empty(), A[:10], B[:5])
  after = reset(ctx, keep_prefix=True)
  assert not after.sequences.is_active.any()
  assert queue(after) == [2, 1, 4]
  assert counters(after) == counters(ctx)
  assert_same(after.kv, ctx.kv)
  small.check(after)


def test_reset_forgets_everything_but_the_salt():
  salted = jax.jit(lambda: kvcache.init(small.CONFIG, salt=9))()
  ctx = start(salted, A[:10], B[:5])
  after = reset(finish(ctx, mask(1)))
  assert_same(after.replace(kv=salted.kv), salted)
  assert_same(after.kv, ctx.kv)


# Calls with nothing in them, and rows that found no place in the index.


def test_calls_may_be_empty():
  ctx, none = small.empty(), ints([])
  tokens = jnp.zeros((0, 8), jnp.int32)
  after, admission = jax.eval_shape(kvcache.admit, ctx, tokens, none)
  assert admission.seq_ids.shape == (0,)
  after, seq_ids, status = jax.eval_shape(kvcache.fork, ctx, none)
  assert seq_ids.shape == status.shape == (0,)
  assert jax.tree.structure(after) == jax.tree.structure(ctx)


def bucket(index, tokens):
  """The bucket that the last block of a prompt belongs to."""
  digests = hashing.digest(ints(tokens).reshape(1, -1, 4))
  hashes = hashing.chain_from_root(digests, hashing.root(index.salt, ints([0])))
  return hashing.mix(hashes[0, -1, 0]).item() % index.way_ids.shape[0]


@pytest.fixture(scope="module")
def sealed():
  """Row 0 has three full blocks, of which the second one finds its bucket full."""
  ctx = small.empty()
  one = (
    block for x in itertools.count(1000) if bucket(ctx.prefix, block := [x] * 4) == 0
  )
  fillers = list(itertools.islice(one, 4))
  two = (A[:4] + [x] * 4 for x in itertools.count(2000))
  prompt = next(tokens for tokens in two if bucket(ctx.prefix, tokens) == 0) + C[:4]
  for pair in (fillers[:2], fillers[2:]):
    ctx = finish(start(ctx, *pair), mask(0, 1))
  ctx = small.publish(start(ctx, prompt))
  assert ctx.sequences.num_published.tolist() == [1, 0, 0, 0]
  assert ctx.sequences.is_sealed.tolist() == [True, False, False, False]
  assert tables(ctx)[0] == [5, 6, 7] and cached(ctx) == [1, 2, 3, 4, 5]
  return ctx, prompt


def test_a_sealed_row_goes_on_unpublished(sealed):
  ctx, prompt = sealed
  small.check(ctx)
  ctx = append(ctx, {0: B[:4]})
  assert text(ctx, 0) == prompt + B[:4]
  ctx, admission = admit(ctx, *prompts(prompt))
  assert admission.num_cached[0] == 4
  small.check(ctx)
  ctx = finish(ctx, mask(0, 1))
  assert cached(ctx) == [1, 2, 3, 4, 5] and len(free(ctx)) == 6
  small.check(ctx)


def test_a_sealed_row_can_be_forked(sealed):
  ctx, prompt = sealed
  ctx, _, status = fork(append(ctx, {0: [50]}), ints([0, 0]))
  assert status.tolist() == [OK, OK]
  assert tables(ctx) == [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 10], []]
  small.check(ctx)
  ctx = finish(append(ctx, {1: [60], 2: [70]}), mask(0))
  assert texts(ctx)[1:3] == [[*prompt, 50, 60], [*prompt, 50, 70]]
  small.check(ctx)


def test_a_sealed_row_publishes_again_once_it_is_rewound(sealed):
  ctx, prompt = sealed
  ctx, _ = rewind(ctx, rows({0: 8}))
  assert not ctx.sequences.is_sealed.any()
  small.check(ctx)
  ctx = small.publish(append(ctx, {0: B[:4]}))
  assert ctx.sequences.num_published[0] == 2
  assert text(ctx, 0) == prompt[:4] + B[:4]
  small.check(ctx)


def test_a_sealed_row_that_was_forked_can_be_rewound(sealed):
  ctx, prompt = sealed
  ctx, _, _ = fork(ctx, ints([0, 0]))
  ctx, _ = rewind(ctx, rows({0: 1}))
  assert texts(ctx)[:3] == [prompt[:11], prompt, prompt]
  small.check(ctx)
