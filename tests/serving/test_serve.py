"""Tests of the loop: each request gets the tokens that it would get alone.

What that is, the oracle of `tests.fixtures.toy_model` computes from the request by
itself. A configuration takes seconds to compile, so tests share few and pad their
requests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import (
  CacheConfig,
  FinishReason,
  RequestStatus,
  SamplingParams,
  SchedulerConfig,
  Status,
)
from kvcache.serving import sampling
from kvcache.serving import scheduler as sch
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more

FOREVER = 2**31 - 1
draw = functools.partial(sampling.sample, use_top_k=False, use_top_p=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A context, a loop, and the sizes of its requests."""

  sizes: CacheConfig
  scheduler: SchedulerConfig
  num: int
  width: int
  sampler: sampling.Sampler = sampling.greedy
  logprobs: bool = False

  def requests(self, prompts, max_new_tokens=1, **kwargs):
    kwargs |= {"num": self.num, "width": self.width, "logprobs": self.logprobs}
    return toy.make_requests(prompts, max_new_tokens, **kwargs)

  def serve(self, ctx, requests, max_steps=FOREVER):
    return _serve(ctx, requests, jnp.int32(max_steps), case=self)

  def expected(self, prompts, max_new_tokens, **kwargs):
    limit = min(self.sizes.max_tokens_per_seq, self.width - 1)
    (window,) = self.sizes.windows or (None,)
    return toy.expected(
      prompts,
      max_new_tokens,
      max_tokens_per_seq=limit,
      sliding_window=window,
      **kwargs,
    )


@functools.partial(jax.jit, static_argnames="case", donate_argnums=(0, 1))
def _serve(ctx, requests, max_steps, *, case):
  return kvcache.serve(
    toy.model,
    ctx,
    requests,
    scheduler=case.scheduler,
    sampler=case.sampler,
    max_steps=max_steps,
  )


# 24 blocks of 4 tokens for 6 rows of up to 64: never enough.
CROWDED = Case(
  sizes=toy.config(num_blocks=25, block_size=4, max_seqs=6, max_seq_len=64),
  scheduler=SchedulerConfig(token_budget=24, max_admissions=4, watermark=2),
  num=40,
  width=65,
  sampler=sampling.sample,
  logprobs=True,
)
# The same with other orders of service.
REORDERED = dataclasses.replace(
  CROWDED,
  scheduler=SchedulerConfig(
    token_budget=13,
    max_admissions=3,
    defer_shared=False,
    admission=sch.shortest_first,
    preemption=lambda ctx, requests: (requests.max_lens * 7919) % 1009,
  ),
  sampler=sampling.greedy,
  logprobs=False,
)
# Three requests in a roomy table of eight rows, for hundreds of steps.
LONG = Case(
  sizes=toy.config(num_blocks=200, block_size=8, max_seqs=8, max_seq_len=400),
  scheduler=SchedulerConfig(token_budget=32),
  num=3,
  width=401,
  sampler=draw,
)
# A block is a token, and the buffer is shorter than a row.
SINGLES = Case(
  sizes=toy.config(num_blocks=30, block_size=1, max_seqs=4, max_seq_len=24),
  scheduler=SchedulerConfig(token_budget=6, max_admissions=3),
  num=12,
  width=16,
)
# Pools in which two sequences hardly fit beside each other, or not at all.
TINY = {
  num_blocks: Case(
    sizes=toy.config(
      num_blocks=num_blocks,
      block_size=block_size,
      max_seqs=max_seqs,
      max_seq_len=4 * block_size,
    ),
    scheduler=SchedulerConfig(token_budget=5, max_admissions=2),
    num=8,
    width=40,
  )
  for num_blocks, block_size, max_seqs in [(2, 8, 3), (3, 16, 1), (4, 1, 2)]
}


def random_prompts(rng, num, *, longest):
  """Prompts of which most begin like others."""
  bases = rng.integers(0, toy.VOCAB, (3, longest // 2)).tolist()
  prompts = []
  for _ in range(num):
    base = bases[rng.integers(3)][: rng.integers(0, longest // 2 + 1)]
    tail = rng.integers(0, toy.VOCAB, rng.integers(1, longest // 2 + 1)).tolist()
    prompts.append(base + tail if rng.random() < 0.7 else tail)
  return prompts


def assert_results(requests, expected):
  """Everything ended, with the tokens, log-probabilities and reasons expected."""
  host = jax.device_get(requests)
  assert (host.status == RequestStatus.FINISHED).all() and (host.seq_ids == -1).all()
  outputs = toy.outputs(requests)
  for i, want in enumerate(expected):
    assert outputs[i] == want.tokens, i
    assert FinishReason(host.finish_reason[i]).name.lower() == want.finish_reason, i
    assert (host.refusals[i] != Status.OK) == (want.finish_reason == "refused"), i
    if requests.logprobs is not None:
      begin, end = host.prompt_lens[i], host.lengths[i]
      np.testing.assert_allclose(
        host.logprobs[i, begin:end], want.logprobs, rtol=1e-5, atol=1e-5
      )


def assert_all_given_back(ctx):
  kvcache.check_invariants(ctx)
  assert int(ctx.pool.num_free + ctx.prefix.num_evictable) == ctx.config.num_blocks - 1
  table = ctx.sequences
  for field in (table.block_tables, table.num_blocks, table.seq_lens, table.is_active):
    assert not np.any(field)


def check(case, prompts, max_new_tokens, *, ctx=None, **kwargs):
  """Serves requests in one call and compares with the oracle: `(ctx, requests)`."""
  told = {k: v for k, v in kwargs.items() if k in ("stop_tokens",)}
  if "namespace" in kwargs:
    told["namespaces"] = kwargs["namespace"]
  if "sampling_params" in kwargs:
    told["params"] = kwargs["sampling_params"]
  requests = case.requests(prompts, max_new_tokens, **kwargs)
  ctx, requests = case.serve(toy.fresh(case.sizes) if ctx is None else ctx, requests)
  assert_results(requests, case.expected(prompts, max_new_tokens, **told))
  assert_all_given_back(ctx)
  return ctx, requests


def mixture(seed, num):
  """Settings of requests that have nothing in common."""
  rng = np.random.default_rng([seed, num])
  params = [
    SamplingParams(
      temperature=float(rng.choice([0.0, 0.5, 1.0, 3.0])),
      top_k=int(rng.choice([0, 3, 20])),
      top_p=float(rng.choice([1.0, 0.9, 0.3])),
      min_p=float(rng.choice([0.0, 0.1])),
      seed=int(rng.integers(2**32)),
    )
    for _ in range(num)
  ]
  return {
    "sampling_params": params,
    "priority": rng.integers(-3, 4, num).tolist(),
    "namespace": rng.integers(0, 3, num).tolist(),
    "stop_tokens": [rng.integers(0, 32, rng.integers(0, 3)).tolist() for _ in params],
  }


@pytest.mark.parametrize("seed", [0, 1, *more(2, 3, 4, 5)])
def test_a_crowd_gets_what_each_gets_alone(seed):
  rng, num = np.random.default_rng(seed), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news = rng.integers(1, 30, num)
  _, requests = check(CROWDED, prompts, news, **mixture(seed, num))
  assert int(requests.num_preemptions.sum()) > 0
  assert int(requests.num_cached.sum()) > 0


def test_constant_preemption():
  # Sequences begin in one block and grow to the longest that a row can hold.
  prompts = [[token] for token in range(30)]
  _, requests = check(CROWDED, prompts, 60)
  assert int(requests.num_preemptions.sum()) > 30


@pytest.mark.parametrize("seed", [0, *more(1, 2, 3)])
def test_other_policies_serve_the_same_tokens(seed):
  rng, num = np.random.default_rng(seed), REORDERED.num
  prompts = random_prompts(rng, num, longest=24)
  _, requests = check(REORDERED, prompts, rng.integers(1, 30, num))
  assert int(requests.num_preemptions.sum()) > 0


@pytest.mark.thorough
def test_few_rows_decode_for_hundreds_of_steps():
  prompts = random_prompts(np.random.default_rng(0), 3, longest=60)
  params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
  _, requests = check(LONG, prompts, [330, 10, 250], sampling_params=params)
  assert not np.any(requests.num_preemptions)
  assert 330 <= int(requests.num_steps) <= 335  # a prompt chunk or two, and no detours


@pytest.mark.thorough
@pytest.mark.parametrize("num", [2, *more(1, 3)])
def test_fewer_requests_than_rows(num):
  prompts = random_prompts(np.random.default_rng(num), num, longest=100)
  ctx, _ = check(LONG, prompts, 5)
  _, requests = check(LONG, prompts, 5, ctx=ctx)  # again, from what is cached
  cached = [(len(prompt) - 1) // 8 * 8 for prompt in prompts]
  assert requests.num_cached[:num].tolist() == cached


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_one_token(seed):
  rng = np.random.default_rng(seed)
  base = rng.integers(0, toy.VOCAB, 6).tolist()
  prompts = [[*base[: 3 + i % 4], i] for i in range(SINGLES.num)]
  _, requests = check(SINGLES, prompts, rng.integers(1, 5, SINGLES.num))
  assert int(requests.num_cached.sum()) >= SINGLES.num


@pytest.mark.thorough
def test_policies_may_be_negative():
  def last_come_first_served(ctx, requests):
    return -1 - jnp.arange(requests.num_requests, dtype=jnp.int32)

  scheduler = SchedulerConfig(
    token_budget=8, max_admissions=4, admission=last_come_first_served
  )
  sizes = toy.config(num_blocks=7, block_size=4, max_seqs=4, max_seq_len=24)
  case = Case(sizes=sizes, scheduler=scheduler, num=3, width=25)
  prompts = [[first, 2, 3, 4, 5] for first in range(3)]
  _, requests = check(case, prompts, 16)
  assert int(requests.num_preemptions.sum()) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("num_blocks", TINY)
def test_tiny_pools(num_blocks):
  case = TINY[num_blocks]
  most = case.sizes.max_tokens_per_seq
  rng = np.random.default_rng(num_blocks)
  lengths = [1, most, most + 1, 0, 1, max(1, most // 2), most, 2]
  prompts = [rng.integers(0, toy.VOCAB, length).tolist() for length in lengths]
  news = [1, 1, 1, 1, toy.NEVER, most, 9, 2]
  _, requests = check(case, prompts, news)
  refusals = [Status(code) for code in requests.refusals.tolist()]
  assert refusals[2:4] == [Status.TOO_LONG, Status.EMPTY]
  assert int(requests.lengths[4]) == most + 1


# Ends.


def test_stop_tokens_end_a_request_and_belong_to_it():
  prompts = [[i, i] for i in range(32)]
  stops = [[i, (i + 9) % 32] for i in range(32)]
  _, requests = check(CROWDED, prompts, 60, stop_tokens=stops)
  ends = [output[-1] for output in toy.outputs(requests)[:32]]
  reasons = requests.finish_reason[:32].tolist()
  hits = [reason == FinishReason.STOP for reason in reasons]
  assert sum(hits) > 20
  assert hits == [end in stop for end, stop in zip(ends, stops, strict=True)]


def test_one_new_token():
  prompts = random_prompts(np.random.default_rng(1), CROWDED.num, longest=40)
  _, requests = check(CROWDED, prompts, 1)
  assert (requests.finish_reason == FinishReason.LENGTH).all()
  assert (requests.lengths == requests.prompt_lens + 1).all()


def test_a_request_that_never_stops_ends_where_its_row_does():
  prompts = random_prompts(np.random.default_rng(2), 12, longest=20)
  news = [toy.NEVER if i in (0, 7) else 6 for i in range(12)]
  _, requests = check(CROWDED, prompts, news)
  for i in (0, 7):
    assert int(requests.finish_reason[i]) == FinishReason.CAPACITY
    assert int(requests.lengths[i]) == CROWDED.sizes.max_tokens_per_seq + 1


@pytest.mark.parametrize(
  ("case", "length", "status"),
  [
    (CROWDED, 65, Status.TOO_LONG),  # a row has 64
    (CROWDED, 0, Status.EMPTY),
    *more(
      (SINGLES, 17, Status.INVALID),  # the buffer has 16, a row 24
      (CROWDED, 1000, Status.TOO_LONG),
      (SINGLES, 25, Status.TOO_LONG),
      (TINY[2], 9, Status.TOO_LONG),  # the pool has 8, a row 32
    ),
  ],
)
def test_what_can_never_fit_is_refused_for_good(case, length, status):
  rng = np.random.default_rng(length)
  hopeless = rng.integers(0, toy.VOCAB, length).tolist()
  prompts = [hopeless[:3] or [1], hopeless, hopeless[:2] or [2], [3], hopeless]
  _, requests = check(case, prompts, 3)
  refusals = [Status(code) for code in requests.refusals[:5].tolist()]
  assert refusals == [Status.OK, status, Status.OK, Status.OK, status]
  assert status.is_permanent
  assert not np.any(requests.num_cached[jnp.array([1, 4])])


# Neighbours.


def test_a_request_alone_in_the_loop_is_the_same_as_in_the_crowd():
  rng, num = np.random.default_rng(5), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news, kwargs = rng.integers(1, 30, num), mixture(5, num)
  requests = CROWDED.requests(prompts, news, **kwargs)
  for i in (0, 11, 39):
    others = [other for other in range(num) if other != i]
    ctx = toy.fresh(CROWDED.sizes)
    _, alone = CROWDED.serve(ctx, toy.absent(requests, others))
    if i == 0:
      _, crowd = CROWDED.serve(
        toy.fresh(CROWDED.sizes), CROWDED.requests(prompts, news, **kwargs)
      )
    requests = CROWDED.requests(prompts, news, **kwargs)  # the others were donated
    end = int(crowd.lengths[i])
    assert end == int(alone.lengths[i])
    np.testing.assert_array_equal(alone.tokens[i, :end], crowd.tokens[i, :end])
    np.testing.assert_array_equal(alone.logprobs[i, :end], crowd.logprobs[i, :end])


def test_equal_requests_get_equal_tokens_and_other_seeds_others():
  num = CROWDED.num
  params = [SamplingParams(temperature=1.0, seed=i % 4) for i in range(num)]
  prompt = list(range(9))
  _, requests = check(CROWDED, [prompt] * num, 20, sampling_params=params)
  outputs = toy.outputs(requests)
  assert all(outputs[i] == outputs[i % 4] for i in range(num))
  assert len(set(map(tuple, outputs))) == 4


def test_nothing_is_shared_across_namespaces():
  prompts = [list(range(9))] * 12
  namespace = [i % 4 for i in range(12)]
  ctx, requests = check(CROWDED, prompts, 3, namespace=namespace)
  cached = np.asarray(requests.num_cached)[:12]
  assert cached.tolist() == [0] * 4 + [8] * 8
  ctx, requests = check(CROWDED, prompts[:2], 3, namespace=[3, 4], ctx=ctx)
  assert requests.num_cached[:2].tolist() == [8, 0]


def test_higher_priority_ends_first():
  prompts = [[i, i] for i in range(12)]
  priority = [i % 3 for i in range(12)]
  ctx, requests = (
    toy.fresh(CROWDED.sizes),
    CROWDED.requests(prompts, 8, priority=priority),
  )
  ends = np.full(12, FOREVER)
  while (np.asarray(requests.status) != RequestStatus.FINISHED).any():
    ctx, requests = CROWDED.serve(ctx, requests, 1)
    done = np.asarray(requests.finish_reason[:12]) != FinishReason.NONE
    ends = np.where(done, np.minimum(ends, int(requests.num_steps)), ends)
  first, second, third = (ends[rank::3] for rank in (2, 1, 0))
  assert first.max() <= second.min() and second.max() <= third.min()
  assert first.max() < third.min()


@pytest.mark.thorough
def test_logprobs_are_recorded_only_if_asked_for():
  _, requests = check(LONG, [[1, 2, 3]], 3)
  assert requests.logprobs is None
  _, requests = check(CROWDED, [[1, 2, 3]], 3)
  assert np.all(requests.logprobs[0, 3:6] < 0)
  assert not np.any(requests.logprobs[0, :3]) and not np.any(requests.logprobs[0, 6:])


# Slices and steps.


def by_slices(case, slices, requests):
  ctx = toy.fresh(case.sizes)
  for max_steps in slices:
    before = int(requests.num_steps)
    ctx, requests = case.serve(ctx, requests, max_steps)
    if (np.asarray(requests.status) == RequestStatus.FINISHED).all():
      break
    assert int(requests.num_steps) == before + max_steps
  kvcache.check_invariants(ctx)
  return ctx, requests


@pytest.mark.parametrize("length", [2, *more(1, 7)])
def test_slices_of_any_length_give_the_same(length):
  rng, num = np.random.default_rng(8), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news, kwargs = rng.integers(1, 20, num), mixture(8, num)

  def requests():
    return CROWDED.requests(prompts, news, **kwargs)

  _, whole = CROWDED.serve(toy.fresh(CROWDED.sizes), requests())
  ctx, sliced = by_slices(CROWDED, [length] * 10_000, requests())
  assert toy.outputs(sliced) == toy.outputs(whole)
  np.testing.assert_array_equal(sliced.finish_reason, whole.finish_reason)
  np.testing.assert_array_equal(sliced.logprobs, whole.logprobs)
  assert_all_given_back(ctx)


def test_no_steps_change_nothing():
  ctx, requests = toy.fresh(CROWDED.sizes), CROWDED.requests([[1, 2]], 5)
  for max_steps in (0, -3):
    ctx, requests = CROWDED.serve(ctx, requests, max_steps)
    assert int(requests.num_steps) == 0
    assert requests.status[:1].tolist() == [RequestStatus.WAITING]
    assert not np.any(ctx.sequences.is_active)


def test_requests_that_arrive_later_are_served():
  prompts, params = [[i, 1, 2, 3, 4, 5] for i in range(8)], [SamplingParams()] * 8
  requests = toy.absent(CROWDED.requests(prompts, 12), range(3, 8))
  ctx, requests = CROWDED.serve(toy.fresh(CROWDED.sizes), requests, 5)
  ctx, requests = CROWDED.serve(ctx, toy.arrive(requests, range(3, 8)))
  assert_results(requests, CROWDED.expected(prompts, 12, params=params))
  assert_all_given_back(ctx)


@pytest.mark.thorough
def test_steps_in_a_loop_give_the_same_as_serve():
  rng, num = np.random.default_rng(9), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news, kwargs = rng.integers(1, 20, num), mixture(9, num)
  step = functools.partial(kvcache.step, toy.model, sampler=sampling.sample)
  step = jax.jit(functools.partial(step, scheduler=CROWDED.scheduler))
  ctx, requests = toy.fresh(CROWDED.sizes), CROWDED.requests(prompts, news, **kwargs)
  for count in range(1, 2000):
    ctx, requests = step(ctx, requests)
    if (np.asarray(requests.status) == RequestStatus.FINISHED).all():
      break
    assert int(requests.num_steps) == count
  assert int(requests.num_steps) == count - 1  # the last one only released rows
  assert_all_given_back(ctx)
  _, served = CROWDED.serve(
    toy.fresh(CROWDED.sizes), CROWDED.requests(prompts, news, **kwargs)
  )
  assert toy.outputs(requests) == toy.outputs(served)
  np.testing.assert_array_equal(requests.finish_reason, served.finish_reason)
  np.testing.assert_allclose(requests.logprobs, served.logprobs, rtol=1e-5)


def test_a_budget_below_the_number_of_rows_is_an_error():
  scheduler = SchedulerConfig(token_budget=5)
  ctx, requests = toy.fresh(CROWDED.sizes), CROWDED.requests([[1]])
  for run in (kvcache.serve, kvcache.step):
    with pytest.raises(ValueError, match=r"token_budget=5 .*max_seqs=6"):
      run(toy.model, ctx, requests, scheduler=scheduler)


# On the host.

PROMPTS = [*([i, 1, 2, 3, 4] for i in range(8)), [], [1] * 70]
NEWS = [3, 50, 1, 60, toy.NEVER, 40, 2, 30, 4, 4]


@pytest.fixture(scope="module")
def traced():
  """Counts how often the model is traced."""
  count = []

  def model(tokens, metadata, ctx):
    count.append(metadata.num_tokens)
    return toy.model(tokens, metadata, ctx)

  return model, count


def generate(model, **kwargs):
  kwargs = {"slice_steps": 4, "scheduler": CROWDED.scheduler} | kwargs
  ctx = toy.fresh(CROWDED.sizes)
  return kvcache.generate(model, ctx, PROMPTS, max_new_tokens=NEWS, **kwargs)


def test_generate_returns_completions_in_order(traced):
  ctx, completions = generate(traced[0])
  assert_all_given_back(ctx)
  assert [c.request_id for c in completions] == list(range(10))
  assert [c.prompt_tokens for c in completions] == PROMPTS
  want = CROWDED.expected(PROMPTS, NEWS)
  assert [c.tokens for c in completions] == [w.tokens for w in want]
  assert [c.finish_reason for c in completions] == [w.finish_reason for w in want]
  assert completions[4].finish_reason == "capacity"
  statuses = [Status.OK] * 8 + [Status.EMPTY, Status.TOO_LONG]
  assert [c.status for c in completions] == statuses
  assert all(c.logprobs is None for c in completions)
  assert sum(c.num_preemptions for c in completions) > 0
  assert all(type(token) is int for c in completions for token in c.tokens)


def test_generate_tells_how_far_it_is(traced):
  model, count = traced
  slices = []
  num_traces = []

  def on_slice(news):
    slices.append(news)
    num_traces.append(len(count))

  _, completions = generate(model, on_slice=on_slice)
  assert len(set(num_traces)) == 1  # compiled once
  steps = [one.num_steps for one in slices]
  assert steps[:-1] == list(range(4, steps[-2] + 1, 4)) and steps[-1] - steps[-2] <= 4
  told = [completion for one in slices for completion in one.finished]
  assert sorted(told, key=lambda c: c.request_id) == completions  # once each
  counts = np.cumsum([len(one.finished) for one in slices])
  assert [one.num_finished for one in slices] == counts.tolist()
  assert all(one.num_requests == 10 for one in slices)
  outputs = {}
  for one in slices:
    assert 0 <= int(one.stats.num_in_use) <= 24
    outputs |= one.running | {c.request_id: c.tokens for c in one.finished}
    # A preempted request shows its latest tokens when it runs again.
    assert one.num_tokens >= sum(map(len, outputs.values()))
    for i, tokens in one.running.items():
      assert tokens == completions[i].tokens[: len(tokens)]
  assert slices[-1].num_tokens == sum(map(len, outputs.values()))
  seconds = [one.seconds for one in slices]
  assert seconds[0] > 0 and seconds == sorted(seconds)
  last = slices[-1]
  assert last.num_finished == 10 and not last.running and not last.stats.num_sequences


def test_generate_is_the_same_in_slices_of_any_length(traced):
  whole = generate(traced[0])[1]
  for length in (1, 3, 10**6):
    sliced = generate(traced[0], slice_steps=length)[1]
    assert [c.tokens for c in sliced] == [c.tokens for c in whole]


def test_an_exception_in_on_slice_stops_generate(traced):
  seen = []

  def on_slice(news):
    seen.append(news.num_steps)
    if len(seen) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    generate(traced[0], on_slice=on_slice)
  assert seen == [4, 8, 12]


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"slice_steps": 0}, "slice_steps must be at least 1, got 0"),
    ({"priority": [1]}, "priority has 1 entries"),
    ({"sampling_params": [SamplingParams()]}, "sampling_params has 1 entries"),
  ],
)
def test_wrong_arguments_of_generate_are_named(wrong, message):
  with pytest.raises(ValueError, match=message):
    generate(toy.model, **wrong)
