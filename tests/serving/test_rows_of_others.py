"""Rows of a context that belong to no request: `serve` leaves them alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import RequestStatus, SamplingParams, Status
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more
from tests.serving.test_serve import assert_results, CROWDED, random_prompts


@functools.partial(jax.jit, static_argnums=0)
def _with_others(sizes, num, lengths):
  """As many rows as `num`, of up to 64 tokens each: `(ctx, status)`."""
  ctx, rows = kvcache.init(sizes), jnp.arange(sizes.max_seqs, dtype=jnp.int32)
  prompts = jnp.broadcast_to(7 + rows[:, None], (sizes.max_seqs, 64))
  ctx, _ = kvcache.admit(ctx, prompts, lengths)
  lengths = jnp.where(rows < num, lengths, 0)
  ctx, status = kvcache.extend(ctx, lengths, num_tokens=96)
  metadata = kvcache.step_metadata(ctx, lengths, num_tokens=96)
  tokens = 7 + metadata.seq_ids
  _, ctx = toy.model(tokens, metadata, ctx)
  return kvcache.commit(ctx, tokens, metadata), status


def with_others(case, lengths):
  """A context with rows that belong to no request, every token computed."""
  padded = np.zeros(case.sizes.max_seqs, np.int32)
  padded[: len(lengths)] = lengths
  ctx, status = _with_others(case.sizes, len(lengths), padded)
  assert (status == Status.OK).all()
  return ctx


def assert_alone_and_as_before(ctx, before, num, *more):
  """The first rows are as in a table before, and no other one is left."""
  for name in ("seq_lens", "num_blocks", "is_active", *more):
    was, now = (np.asarray(getattr(x, name)) for x in (before, ctx.sequences))
    np.testing.assert_array_equal(now[:num], was[:num])
    assert not now[num:].any()  # also of requests that could not go on


@pytest.mark.parametrize("lengths", [[9, 3], *more([1], [64, 10])])
def test_rows_of_others_stay_as_they_are(lengths):
  ctx = with_others(CROWDED, lengths)
  before = jax.device_get(ctx.sequences)
  rng = np.random.default_rng(5)
  prompts = random_prompts(rng, 12, longest=16)
  asked = CROWDED.requests(prompts, 6)
  ctx, requests = CROWDED.serve(ctx, asked)
  params = [SamplingParams()] * len(prompts)
  want = CROWDED.expected(prompts, 6, params=params)
  kvcache.check_invariants(ctx)
  assert_results(requests, want)
  assert_alone_and_as_before(ctx, before, len(lengths), "block_tables")


@pytest.mark.parametrize(
  ("lengths", "wait_reason"), [([3] * 6, "NO_ROW"), ([60, 36], "NO_BLOCKS")]
)
def test_serve_ends_where_others_are_in_the_way_for_good(lengths, wait_reason):
  before = with_others(CROWDED, lengths)
  asked = CROWDED.requests([[1, 2, 3], [5] * 4], 3)
  ctx, requests = CROWDED.serve(before, asked)
  assert requests.status[:2].tolist() == [RequestStatus.WAITING] * 2
  reasons = {kvcache.WaitReason(int(x)).name for x in requests.wait_reason[:1]}
  assert reasons == {wait_reason} and int(requests.num_steps) == 0
  kvcache.check_invariants(ctx)
  # Once they are gone, the same requests are served.
  ctx = kvcache.finish(ctx, ctx.sequences.is_active)
  ctx, requests = CROWDED.serve(ctx, requests)
  params = [SamplingParams()] * 2
  assert_results(requests, CROWDED.expected([[1, 2, 3], [5] * 4], 3, params=params))


def generate_among(lengths, prompts, max_new_tokens):
  before = with_others(CROWDED, lengths)
  was = jax.device_get(before.sequences)
  ctx, done = kvcache.generate(
    toy.model,
    before,
    prompts,
    max_new_tokens=max_new_tokens,
    scheduler=CROWDED.scheduler,
  )
  kvcache.check_invariants(ctx)
  assert_alone_and_as_before(ctx, was, len(lengths))
  return ctx, done


@pytest.mark.thorough
def test_generate_serves_beside_rows_of_others():
  """A pinned row: what begins as it does finds its blocks."""
  prompt = [7] * 16 + [1, 2]
  ctx, (done,) = generate_among([16], [prompt], 3)
  (want,) = toy.expected([prompt], 3, max_tokens_per_seq=64)
  assert done.tokens == want.tokens and done.num_cached == 16
  kvcache.check_invariants(ctx)


@pytest.mark.thorough
@pytest.mark.parametrize(
  ("lengths", "status"), [([3] * 6, Status.NO_ROW), ([60, 36], Status.NO_BLOCKS)]
)
def test_generate_refuses_what_others_are_in_the_way_of(lengths, status):
  _, done = generate_among(lengths, [[1, 2, 3], [5] * 4], 3)
  assert [one.finish_reason for one in done] == ["refused"] * 2
  assert [one.status for one in done] == [status] * 2
  assert status.is_transient


@pytest.mark.thorough
def test_only_who_is_in_the_way_is_refused():
  """The first in the queue is too long; those behind it are not."""
  prompts = [list(range(1, 25)), [9, 8, 7], [5] * 4]
  _, (long, *short) = generate_among([60], prompts, [30, 4, 4])
  want = toy.expected(prompts[1:], [4, 4], max_tokens_per_seq=64)
  assert long.finish_reason == "refused" and long.status == Status.NO_BLOCKS
  assert [one.tokens for one in short] == [one.tokens for one in want]


@pytest.mark.thorough
def test_each_is_told_what_it_lacks_itself():
  """One row is left: a request lacks blocks in it, and the other one the row."""
  prompts = [list(range(1, 17)), [9, 8, 7]]
  _, (long, short) = generate_among([3, 3, 3, 3, 40], prompts, [48, 2])
  assert (long.finish_reason, long.status) == ("refused", Status.NO_BLOCKS)
  assert (short.finish_reason, len(short.tokens)) == ("length", 2)


def test_a_row_that_somebody_else_has_got_is_not_taken_for_ones_own():
  prompts = [[1, 2, 3], [5] * 9]
  asked = CROWDED.requests(prompts, 6)
  ctx, requests = CROWDED.serve(kvcache.init(CROWDED.sizes), asked, 3)
  rows = requests.seq_ids[:2].tolist()
  assert rows == [0, 1] and (requests.status[:2] == RequestStatus.RUNNING).all()
  before = with_others(CROWDED, [5, 40, 4])
  ctx, requests = CROWDED.serve(before, requests)
  kvcache.check_invariants(ctx)
  assert ctx.sequences.seq_lens.tolist()[:4] == [5, 40, 4, 0]
  params = [SamplingParams()] * 2
  assert_results(requests, CROWDED.expected(prompts, 6, params=params))


@pytest.mark.thorough
def test_generate_keeps_what_a_request_had_before_it_could_not_go_on():
  prompt = [1, 2, 3]
  _, (done,) = generate_among([60, 27], [prompt], 30)
  (want,) = toy.expected([prompt], 30, max_tokens_per_seq=64)
  assert done.finish_reason == "refused" and done.status == Status.NO_BLOCKS
  assert 0 < len(done.tokens) < 30 and done.tokens == want.tokens[: len(done.tokens)]


@pytest.mark.parametrize("num_steps", [4, *more(1)])
def test_requests_whose_rows_are_gone_are_computed_again(num_steps):
  prompts = [[1, 2, 3], [5] * 9, [4]]
  asked = CROWDED.requests(prompts, 6)
  ctx, requests = CROWDED.serve(kvcache.init(CROWDED.sizes), asked, num_steps)
  assert (requests.status[:3] == RequestStatus.RUNNING).any()
  one = kvcache.reset(ctx, keep_prefix=num_steps == 4)
  ctx, requests = CROWDED.serve(one, requests)
  kvcache.check_invariants(ctx)
  params = [SamplingParams()] * 3
  assert_results(requests, CROWDED.expected(prompts, 6, params=params))


def test_serve_ends_where_a_running_request_cannot_go_on():
  before = with_others(CROWDED, [60, 27])
  asked = CROWDED.requests([[1, 2, 3]], 30)
  ctx, requests = CROWDED.serve(before, asked)
  kvcache.check_invariants(ctx)
  assert requests.status[0] != RequestStatus.FINISHED
  assert 0 < int(requests.lengths[0]) - 3 < 30
  ctx = kvcache.finish(ctx, np.arange(6) < 2)
  ctx, requests = CROWDED.serve(ctx, requests)
  assert_results(requests, CROWDED.expected([[1, 2, 3]], 30, params=[SamplingParams()]))
