"""Ten thousand requests arrive at once, and none is lost.

They share 64 rows and a pool that holds about half of what the rows want, so that
requests are preempted all the time. Among them are one that never stops, one that is
longer than everything beside it, and one that no context of this size can hold.
"""

import collections
import functools

import jax
import numpy as np
import pytest

import kvcache
from kvcache import FinishReason, RequestStatus, SchedulerConfig, Status
from kvcache.serving import sampling
from tests.fixtures import toy_model as toy

pytestmark = pytest.mark.thorough
NUM = 10_000
SIZES = toy.config(num_blocks=385, block_size=2, max_seqs=64, max_seq_len=96)
HYBRID = toy.config(
  is_hybrid=True,
  num_blocks=385,
  block_size=2,
  max_seqs=64,
  max_seq_len=96,
  num_snapshots=48,
  snapshot_interval=4,
)
SCHEDULER = SchedulerConfig(token_budget=192, max_admissions=16, watermark=8)
STOP = 5
ENDLESS, LONGEST, TOO_LONG = 77, 5_000, 9_000


def make_prompts():
  """Short prompts; half of them begin like others."""
  rng = np.random.default_rng(0)
  bases = rng.integers(0, toy.VOCAB, (20, 24)).tolist()
  prompts = []
  for _ in range(NUM):
    shared = rng.integers(0, 25) if rng.random() < 0.5 else 0
    tail = rng.integers(0, toy.VOCAB, rng.integers(1, 13)).tolist()
    prompts.append(bases[rng.integers(20)][:shared] + tail)
  prompts[LONGEST] = rng.integers(0, toy.VOCAB, SIZES.max_tokens_per_seq - 4).tolist()
  prompts[TOO_LONG] = rng.integers(0, toy.VOCAB, SIZES.max_tokens_per_seq + 1).tolist()
  news = rng.integers(1, 49, NUM).tolist()
  news[ENDLESS] = toy.NEVER
  stops = [[STOP] for _ in range(NUM)]
  stops[ENDLESS] = []
  return prompts, news, stops


@pytest.fixture(scope="module", params=[SIZES, HYBRID], ids=["attention", "hybrid"])
def burst(request):
  prompts, news, stops = make_prompts()
  requests = kvcache.make_requests(
    prompts,
    max_new_tokens=news,
    stop_tokens=stops,
    capacity=SIZES.max_tokens_per_seq + 1,
  )
  serve = jax.jit(
    functools.partial(
      kvcache.serve, toy.model, scheduler=SCHEDULER, sampler=sampling.greedy
    ),
    donate_argnums=(0, 1),
  )
  ctx, requests = serve(toy.fresh(request.param), requests)
  want = toy.expected(
    prompts, news, max_tokens_per_seq=SIZES.max_tokens_per_seq, stop_tokens=stops
  )
  return ctx, jax.device_get(requests), toy.outputs(requests), want


def test_every_request_gets_the_tokens_it_gets_alone(burst):
  _, requests, outputs, want = burst
  assert (requests.status == RequestStatus.FINISHED).all()
  wrong = [i for i in range(NUM) if outputs[i] != want[i].tokens]
  assert not wrong, f"{len(wrong)} requests, first {wrong[0]}"
  reasons = [FinishReason(code).name.lower() for code in requests.finish_reason]
  assert reasons == [one.finish_reason for one in want]
  assert collections.Counter(reasons).keys() == {
    "stop",
    "length",
    "capacity",
    "refused",
  }


def test_the_odd_ones_end_as_they_should(burst):
  _, requests, outputs, _ = burst
  most = SIZES.max_tokens_per_seq
  assert requests.finish_reason[ENDLESS] == FinishReason.CAPACITY
  assert requests.lengths[ENDLESS] == most + 1
  assert outputs[LONGEST]
  assert requests.refusals[TOO_LONG] == Status.TOO_LONG
  assert np.count_nonzero(requests.refusals) == 1


def test_memory_was_short_and_prefixes_were_shared(burst):
  _, requests, _, _ = burst
  assert np.count_nonzero(requests.num_preemptions) > 100
  assert np.count_nonzero(requests.num_cached) > NUM // 20


def test_the_pool_is_full_again(burst):
  ctx = burst[0]
  kvcache.check_invariants(ctx)
  assert int(ctx.pool.num_free + ctx.prefix.num_evictable) == SIZES.num_blocks - 1
  assert not np.any(ctx.sequences.is_active)
  ctx = kvcache.reset(ctx)
  assert int(ctx.pool.num_free) == SIZES.num_blocks - 1
