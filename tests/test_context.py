"""A step's verbs and the prefix index's, by example; see `small` for the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import Status
from tests.fixtures import small
from tests.fixtures.small import (
  append,
  cached,
  evict,
  extend,
  free,
  publish,
  queue,
  rows,
  start,
  tables,
  text,
)

T = small.NUM_TOKENS
OK, NO_BLOCKS, OVER_BUDGET = Status.OK, Status.NO_BLOCKS, Status.OVER_BUDGET
A = list(range(1, 17))  # prompts that share nothing
B = list(range(101, 117))
C = list(range(201, 217))
D = list(range(301, 317))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def extended(ctx, query_lens, **kwargs):
  """The context after, and the rows' status; a refused row must be as it was."""
  after, status = extend(ctx, rows(query_lens), **kwargs)
  small.check(after)
  before, now = tables(ctx), tables(after)
  for s, code in enumerate(status.tolist()):
    assert now[s][: len(before[s])] == before[s]
    assert code == OK or now[s] == before[s]
  assert_same(after.sequences.seq_lens, ctx.sequences.seq_lens)
  assert_same(after.kv, ctx.kv)
  return after, status.tolist()


def test_an_empty_context_has_everything_free():
  ctx = small.empty()
  small.check(ctx)
  assert free(ctx) == list(range(1, 12))
  assert tables(ctx) == [[]] * 4
  assert not any(leaf.any() for leaf in jax.tree.leaves((ctx.kv, ctx.counters)))


def test_bytes_are_those_of_the_arrays():
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(small.empty())]
  kept = small.CONFIG.num_bytes
  assert kvcache.bookkeeping_bytes(small.CONFIG) + kept == sum(sizes)


def test_the_salt_may_be_traced():
  make = jax.jit(lambda salt: kvcache.init(small.CONFIG, salt=salt))
  one, two, other = make(1), make(2), make(jnp.uint32(2**32 - 1))
  assert len({tuple(c.prefix.salt.tolist()) for c in (one, two, other)}) == 3
  eager = kvcache.init(small.CONFIG, salt=1)
  assert_same(one, eager)


def test_each_lane_of_a_hash_has_a_salt_of_its_own():
  salts = [kvcache.init(small.CONFIG, salt=i).prefix.salt.tolist() for i in range(4)]
  assert all(first != second for first, second in salts)
  assert all(len(set(lane)) == 4 for lane in zip(*salts, strict=True))
  assert small.empty().prefix.salt.tolist() == salts[0]


# extend


def test_a_block_is_taken_only_when_the_last_one_is_full():
  ctx = start(small.empty(), A[:5])
  assert tables(ctx) == [[1, 2], [], [], []]
  for num, blocks in ((0, [1, 2]), (3, [1, 2]), (4, [1, 2, 3]), (11, [1, 2, 3, 4])):
    after, status = extended(ctx, {0: num}, num_tokens=T)
    assert status == [OK] * 4
    assert tables(after)[0] == blocks


def test_blocks_owned_already_are_not_taken_again():
  ctx = start(small.empty(), A[:5])
  ctx, _ = extended(ctx, {0: 8}, num_tokens=T)
  assert tables(ctx)[0] == [1, 2, 3, 4]
  for again in (1, 8, 11):
    after, status = extended(ctx, {0: again}, num_tokens=T)
    assert status == [OK] * 4
    assert_same(after, ctx)


def test_rows_get_their_blocks_in_row_order():
  ctx = start(start(small.empty(), A[:4], B[:4]), C[:1])
  assert tables(ctx) == [[1], [2], [3], []]
  ctx, status = extended(ctx, {0: 5, 1: 1, 2: 4}, num_tokens=T)
  assert status == [OK] * 4
  assert tables(ctx) == [[1, 4, 5], [2, 6], [3, 7], []]


def test_past_the_budget_everyone_waits():
  ctx = start(start(small.empty(), A[:1], B[:1]), C[:1], D[:1])
  _, status = extended(ctx, {0: 9, 1: 8, 2: 1, 3: 0}, num_tokens=T)
  assert status == [OK, OVER_BUDGET, OVER_BUDGET, OK]
  _, status = extended(ctx, {0: 9, 1: 7, 2: 1, 3: 0}, num_tokens=T)
  assert status == [OK, OK, OVER_BUDGET, OK]


def test_a_decode_step_has_one_token_for_each_row():
  ctx = start(start(small.empty(), A[:4], B[:3]), C[:4])
  after, status = extended(ctx, {0: 2, 1: 1, 2: 1})
  assert status == [OVER_BUDGET, OK, OK, OK]
  assert tables(after) == [[1], [2], [3, 4], []]


def test_hopeless_rows_take_nothing_from_others():
  ctx = start(start(small.empty(), A), B[:1], C[:3])
  after, status = extended(ctx, {0: 1, 1: -1, 2: 13, 3: 5}, num_tokens=T)
  assert status == [Status.TOO_LONG, Status.INVALID, OK, Status.INACTIVE]
  assert tables(after)[2] == [6, 7, 8, 9]
  _, status = extended(ctx, {0: 1, 1: -1, 2: 14, 3: 5}, num_tokens=T)
  assert status == [Status.TOO_LONG, Status.INVALID, Status.TOO_LONG, Status.INACTIVE]


@pytest.mark.parametrize("num_tokens", [None, T])
def test_no_number_is_too_odd(num_tokens):
  ctx = start(small.empty(), A[:4])
  big = 2**31 - 1
  query_lens = {0: big, 1: -big - 1, 2: big, 3: 0}
  after, status = extended(ctx, query_lens, num_tokens=num_tokens)
  assert status == [Status.TOO_LONG, Status.INVALID, Status.INACTIVE, OK]
  assert_same(after, ctx)


@pytest.fixture(scope="module")
def crowded():
  """One block is free. Row 0 is full, the others stand at the end of a block."""
  ctx = start(start(start(small.empty(), A), B[:12]), C[:8], D[:4])
  assert free(ctx) == [11]
  return ctx


@pytest.mark.parametrize("num_tokens", [None, T])
def test_without_blocks_everyone_who_needs_one_waits(crowded, num_tokens):
  query_lens = {1: 1, 2: 1, 3: 1}
  after, status = extended(crowded, query_lens, num_tokens=num_tokens)
  assert status == [OK, OK, NO_BLOCKS, NO_BLOCKS]
  assert tables(after)[1][-1] == 11 and free(after) == []
  # A row with room in its own blocks is served all the same.
  _, status = extended(after, {1: 1, 2: 1}, num_tokens=num_tokens)
  assert status == [OK, OK, NO_BLOCKS, OK]


def test_a_later_row_does_not_overtake(crowded):
  """Row 2 needs two blocks; row 3 would fit, but comes later."""
  _, status = extended(crowded, {2: 5, 3: 1}, num_tokens=T)
  assert status == [OK, OK, NO_BLOCKS, NO_BLOCKS]


@pytest.mark.parametrize(
  ("order", "first"), [([3, 2, 1, 0], 3), ([0, 2, 1, 3], 2), ([1, 3, 2, 0], 1)]
)
def test_order_says_who_is_served_first(crowded, order, first):
  query_lens = {1: 1, 2: 1, 3: 1}
  order = small.ints(order)
  after, status = extended(crowded, query_lens, num_tokens=T, order=order)
  want = [OK if s in (0, first) else NO_BLOCKS for s in range(4)]
  assert status == want and tables(after)[first][-1] == 11


def test_order_holds_for_the_budget_too(crowded):
  order = small.ints([3, 1, 2, 0])
  _, status = extended(crowded, {1: 4, 2: 9, 3: 4}, num_tokens=T, order=order)
  assert status == [OK, NO_BLOCKS, Status.TOO_LONG, OK]
  _, status = extended(crowded, {1: 1, 2: 1, 3: 16}, num_tokens=T, order=order)
  assert status == [OK, OK, NO_BLOCKS, Status.TOO_LONG]


@pytest.mark.parametrize(
  ("num_tokens", "refusal"), [(None, NO_BLOCKS), (T, Status.OVER_BUDGET)]
)
def test_an_order_that_names_a_row_twice_gives_no_block_twice(num_tokens, refusal):
  ctx = small.start(small.empty(), [1, 2, 3, 4], [5, 6, 7, 8])
  ctx = small.append(small.start(ctx, [9]), {2: [9, 9, 9]})
  order = small.ints([1, 1, 0, 0])
  after, status = extended(ctx, {0: 1, 1: 1, 2: 1}, num_tokens=num_tokens, order=order)
  assert status == [OK, OK, refusal, OK]
  small.check(after)


# write_kv and commit


def test_a_step_stores_tokens_and_their_keys_and_values():
  ctx = start(start(small.empty(), A[:5], B[:6]), C[:1])
  ctx = append(ctx, {0: A[5:9], 2: C[1:3]})
  assert [text(ctx, s) for s in range(4)] == [A[:9], B[:6], C[:3], []]
  small.check(ctx)


def test_a_decode_step_stores_one_token_for_each_row_that_decodes():
  ctx = start(start(small.empty(), A[:4], B[:6]), C[:1])
  tokens = small.ints([A[4], -1, C[1], -1])
  ctx, status, _ = small.step(ctx, tokens, rows({0: 1, 2: 1}), num_tokens=None)
  assert status.tolist() == [OK] * 4
  assert [text(ctx, s) for s in range(4)] == [A[:5], B[:6], C[:2], []]
  small.check(ctx)


def test_padding_is_written_nowhere():
  ctx = start(small.empty(), A[:5])

  @jax.jit
  def write(ctx):
    metadata = kvcache.step_metadata(ctx, rows({0: 2}), num_tokens=T)
    k = jnp.where(metadata.is_padding, jnp.nan, 7.0)[:, None, None]
    k = jnp.broadcast_to(k, (T, 1, 2))
    return kvcache.write_kv(ctx, 1, k, k, metadata)

  after = write(ctx)
  want = np.array(ctx.kv[0].k)
  want[1, 2, 0, 1:3] = 7.0
  np.testing.assert_array_equal(after.kv[0].k, want)


def test_the_layer_may_be_traced():
  ctx = start(small.empty(), A[:5])

  @jax.jit
  def write_all(ctx):
    metadata = kvcache.step_metadata(ctx, rows({0: 1}), num_tokens=None)

    def layer(ctx, index):
      k = jnp.full((4, 1, 2), 0.5) + index.astype(jnp.float32)
      return kvcache.write_kv(ctx, index, k, -k, metadata), None

    return jax.lax.scan(layer, ctx, jnp.arange(2))[0]

  after = write_all(ctx)
  assert after.kv[0].k[:, 2, 0, 1, 0].tolist() == [0.5, 1.5]
  assert after.kv[0].v[:, 2, 0, 1, 1].tolist() == [-0.5, -1.5]
  assert np.count_nonzero(after.kv[0].k != ctx.kv[0].k) == 4


@pytest.mark.parametrize(
  ("accepted", "lengths"),
  [
    ([3, 3, 0, 0], [8, 4, 0, 0]),  # no more than the step computed
    ([2, 0, 9, 9], [7, 3, 0, 0]),
    ([-1, 2**31 - 1, -(2**31), 1], [5, 4, 0, 0]),
  ],
)
def test_only_accepted_tokens_stay(accepted, lengths):
  ctx = start(small.empty(), A[:5], B[:3])
  query_lens = rows({0: 3, 1: 1})
  ctx, _ = extend(ctx, query_lens, num_tokens=T)

  @jax.jit
  def commit(ctx, accepted):
    metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=T)
    tokens = small.ints(A[5:8] + B[3:4] + [-1] * 12)
    k, v = small.contents(tokens)
    ctx = kvcache.write_kv(ctx, 0, k, v, metadata)
    ctx = kvcache.write_kv(ctx, 1, 10 * k, 10 * v, metadata)
    return kvcache.commit(ctx, tokens, metadata, accepted=accepted)

  ctx = commit(ctx, small.ints(accepted))
  assert ctx.sequences.seq_lens.tolist() == lengths
  assert text(ctx, 0) == A[: lengths[0]] and text(ctx, 1) == B[: lengths[1]]
  small.check(ctx)
  # The next step goes on behind the accepted ones.
  ctx = append(ctx, {0: D[:2]})
  assert text(ctx, 0) == A[: lengths[0]] + D[:2]


# publish


def test_full_blocks_are_published_and_partial_ones_are_not():
  ctx = start(small.empty(), A[:9], B[:3])
  assert cached(ctx) == []
  ctx = publish(ctx)
  assert cached(ctx) == [1, 2] and queue(ctx) == []
  assert ctx.sequences.num_published.tolist() == [2, 0, 0, 0]
  small.check(ctx)
  assert_same(publish(ctx), ctx)
  ctx = publish(append(ctx, {0: A[9:12], 1: B[3:5]}))
  assert ctx.sequences.num_published.tolist() == [3, 1, 0, 0]
  small.check(ctx)


def test_generated_tokens_are_published_like_prompts():
  ctx = append(start(small.empty(), A[:2]), {0: [7, 8, 9]})
  found, num_hits = small.find(publish(ctx), *small.prompts([*A[:2], 7, 8, 9]))
  assert num_hits.tolist() == [1, 0] and found[0, 0] == 1


def test_equal_rows_converge_to_one_copy():
  """More blocks than one chunk holds; both rows go on with their own last block."""
  ctx = start(start(small.empty(), A[:14], A[:1]), C[:1])
  ctx = append(append(ctx, {1: A[1:14]}), {2: B[:4]})
  before = [text(ctx, s) for s in range(3)]
  assert len(free(ctx)) == 1
  ctx = publish(ctx)
  small.check(ctx)
  ours, theirs = tables(ctx)[:2]
  assert ours[:3] == theirs[:3] and ours[3] != theirs[3]
  assert ctx.pool.ref_counts[jnp.array(ours)].tolist() == [2, 2, 2, 1]
  assert len(free(ctx)) == 4
  assert [text(ctx, s) for s in range(3)] == before
  ctx = append(ctx, {0: [5], 1: [6]})
  assert text(ctx, 0) == [*A[:14], 5] and text(ctx, 1) == [*A[:14], 6]


def test_publishing_into_the_ring_takes_the_block_out_of_it():
  ctx = small.finish(start(small.empty(), A[:9]), small.mask(0))
  assert queue(ctx) == [2, 1]
  # A row that never asked for the prefix computes its first block again.
  ctx, _ = small.admit(ctx, *small.prompts(A[:1]))
  ctx = publish(append(ctx, {0: A[:5]}))
  small.check(ctx)
  assert queue(ctx) == [2]
  assert tables(ctx)[0][0] == 1 and text(ctx, 0) == A[:5]


# evict


@pytest.fixture(scope="module")
def finished():
  """The ring holds A's three full blocks, then B's two; C is alive."""
  ctx = start(start(small.empty(), A[:13], C[:1]), B[:8])
  ctx = small.finish(small.finish(ctx, small.mask(0)), small.mask(2))
  assert tables(ctx) == [[], [5], [], []]
  assert queue(ctx) == [3, 2, 1, 7, 6]
  return ctx


@pytest.mark.parametrize("count", [-(2**31), -1, 0])
def test_nothing_is_evicted_if_nothing_is_wanted(finished, count):
  after, num = evict(finished, count)
  assert num == 0
  assert_same(after, finished)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 2**31 - 1])
def test_the_longest_unused_leaves_are_evicted_first(finished, count):
  after, num = evict(finished, count)
  small.check(after)
  assert num == min(count, 5)
  assert queue(after) == [3, 2, 1, 7, 6][count:]
  assert sorted(free(after)) == sorted(free(finished) + [3, 2, 1, 7, 6][:count])
  assert after.counters.num_evicted.item() == num
  assert tables(after) == tables(finished)


def test_what_is_left_of_an_evicted_prefix_is_still_found(finished):
  ctx, _ = evict(finished, 1)
  ctx, admission = small.admit(ctx, *small.prompts(A[:14], B[:9]))
  assert admission.num_cached.tolist() == [8, 8]
  small.check(ctx)


def test_blocks_in_use_are_never_evicted(finished):
  ctx, _ = small.admit(finished, *small.prompts(A[:9], B[:5]))
  ctx, num = evict(ctx, 10)
  assert num == 2
  small.check(ctx)
  assert [text(ctx, s) for s in range(3)] == [A[:8], C[:1], B[:4]]
