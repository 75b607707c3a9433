"""Rows of a context that belong to no request: `serve` leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import RequestStatus, SamplingParams, Status
from tests import toy_model as toy
from tests.test_serve import assert_results, CROWDED, random_prompts


def with_others(case, lengths):
  """A context with rows that belong to no request, every token computed."""
  ctx = kvcache.init(case.sizes)
  prompts = np.full((len(lengths), max(lengths)), 7) + np.arange(len(lengths))[:, None]
  ctx, _ = kvcache.admit(ctx, prompts, np.array(lengths))
  wanted = np.zeros(case.sizes.max_seqs, np.int32)
  wanted[: len(lengths)] = lengths
  num = int(wanted.sum())
  ctx, status = kvcache.extend(ctx, wanted, num_tokens=num)
  assert (status == Status.OK).all()
  metadata = kvcache.step_metadata(ctx, wanted, num_tokens=num)
  tokens = jnp.concatenate([jnp.full(n, 7 + row) for row, n in enumerate(lengths)])
  _, ctx = toy.model(tokens, metadata, ctx)
  return kvcache.commit(ctx, tokens, metadata)


@pytest.mark.parametrize("lengths", [[9, 3], [1], [64, 10]])
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
  num = len(lengths)
  for name in ("seq_lens", "num_blocks", "is_active", "block_tables"):
    was, now = (np.asarray(getattr(x, name)) for x in (before, ctx.sequences))
    np.testing.assert_array_equal(now[:num], was[:num])
    assert not now[num:].any()


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
