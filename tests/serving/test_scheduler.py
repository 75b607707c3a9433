"""Tests of the scheduler: who computes how many tokens, by example."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import FinishReason, RequestStatus, SchedulerConfig, Status, WaitReason
from kvcache.serving import requests as rq
from kvcache.serving import sampling
from kvcache.serving import scheduler as sch
from kvcache.serving.serve import next_tokens, take_samples
from tests.fixtures import toy_model as toy

Q, S, T, A, WIDTH = 16, 12, 64, 8, 257
ROOMY = toy.config(num_blocks=200, block_size=8, max_seqs=S, max_seq_len=256)
TIGHT = toy.config(num_blocks=9, block_size=4, max_seqs=4, max_seq_len=32)
BUDGET = SchedulerConfig(token_budget=T, max_admissions=A)
FRUGAL = SchedulerConfig(token_budget=8, max_admissions=4, watermark=0)

# The same again in reverse order, with nothing deferred and everything evicted.
CONTRARY = SchedulerConfig(
  token_budget=T,
  max_admissions=A,
  watermark=10_000,
  defer_shared=False,
  admission=lambda ctx, requests: -jnp.arange(requests.num_requests, dtype=jnp.int32),
)


# Compiled once per configuration, which takes seconds: tests share three of them.
@functools.partial(jax.jit, static_argnames="scheduler")
def step(ctx, requests, scheduler):
  """`kvcache.step`, written out to see its plan and what `extend` says to it."""
  ctx, requests, plan = sch.schedule(ctx, requests, scheduler)
  batch = sch.running(ctx, requests)
  budget = scheduler.token_budget
  ctx, status = kvcache.extend(
    ctx, plan.query_lens, num_tokens=budget, order=plan.order
  )
  metadata = kvcache.step_metadata(ctx, plan.query_lens, num_tokens=budget)
  tokens = next_tokens(requests, batch, metadata)
  logits, ctx = toy.model(tokens, metadata, ctx)
  ctx = kvcache.commit(ctx, tokens, metadata)
  requests, batch = take_samples(
    ctx, requests, batch, metadata, logits, sampling.greedy
  )
  seq_ids = requests.seq_ids
  return ctx, rq.store_batch(requests, batch), plan, status, seq_ids


def make(prompts, max_new_tokens=1, *, num=Q, width=WIDTH, **kwargs):
  return toy.make_requests(prompts, max_new_tokens, num=num, width=width, **kwargs)


def prompt_of(length, seed=0):
  return np.random.default_rng([length, seed]).integers(0, toy.VOCAB, length).tolist()


def run(ctx, requests, num_steps, scheduler=BUDGET):
  """Steps, and what each request computed in each: `(ctx, requests, plans)`."""
  plans = []
  for _ in range(num_steps):
    ctx, requests, plan, status, seq_ids = step(ctx, requests, scheduler)
    assert not np.any(status), "there is room for what is planned"
    query_lens, rows = np.asarray(plan.query_lens), np.asarray(seq_ids)
    is_running = np.asarray(requests.status) == RequestStatus.RUNNING
    assert (rows[~is_running] == -1).all() and (rows[is_running] >= 0).all()
    plans.append({i: int(query_lens[row]) for i, row in enumerate(rows) if row >= 0})
    assert query_lens.sum() == sum(plans[-1].values()) <= scheduler.token_budget
  return ctx, requests, plans


def planned(ctx, requests, scheduler=BUDGET):
  """Tokens that each running request computes in the next step, by request id."""
  return run(ctx, requests, 1, scheduler)[2][0]


def assert_as_if_alone(requests, prompts, max_new_tokens, sizes):
  alone = toy.expected(
    prompts, max_new_tokens, max_tokens_per_seq=sizes.max_tokens_per_seq
  )
  assert toy.outputs(requests)[: len(prompts)] == [want.tokens for want in alone]


# Chunks.


def test_a_long_prompt_is_cut_beside_rows_that_decode():
  prompts = [prompt_of(5, 1), prompt_of(5, 2), prompt_of(5, 3), prompt_of(200)]
  news = [8, 8, 8, 3]
  requests = toy.absent(make(prompts, news), [3])
  ctx, requests, plans = run(toy.fresh(ROOMY), requests, 2)
  assert plans == [{0: 5, 1: 5, 2: 5}, {0: 1, 1: 1, 2: 1}]
  ctx, requests, plans = run(ctx, toy.arrive(requests, [3]), 6)
  assert [plan[3] for plan in plans] == [61, 61, 61, 17, 1, 1]
  assert all(plan[i] == 1 for plan in plans for i in range(3))
  _, requests, _ = run(ctx, requests, 1)
  assert_as_if_alone(requests, prompts, news, ROOMY)


def test_several_prompts_share_one_step():
  prompts = [prompt_of(30), prompt_of(20), prompt_of(40)]
  ctx, requests, plans = run(toy.fresh(ROOMY), make(prompts, 2), 3)
  assert plans == [{0: 30, 1: 20, 2: 14}, {0: 1, 1: 1, 2: 26}, {2: 1}]
  assert_as_if_alone(requests, prompts, 2, ROOMY)
  assert int(kvcache.stats(ctx).num_sequences) == 1  # ended, and not yet released


def test_rows_end_and_begin_beside_prompts():
  prompts = [prompt_of(10 + 7 * i) for i in range(Q)]
  news = [1 + i % 5 for i in range(Q)]
  _ctx, requests, plans = run(toy.fresh(ROOMY), make(prompts, news), 30)
  assert (np.asarray(requests.status) == RequestStatus.FINISHED).all()
  assert_as_if_alone(requests, prompts, news, ROOMY)
  # Without a prefix to share, each token is computed once, all but the last.
  computed = [sum(plan.get(i, 0) for plan in plans) for i in range(Q)]
  assert computed == [len(p) + n - 1 for p, n in zip(prompts, news, strict=True)]


def test_a_step_for_nobody_is_empty():
  requests = toy.absent(make([[1]]), [0])
  ctx, requests, plan, _, _ = step(toy.fresh(ROOMY), requests, BUDGET)
  assert not np.any(plan.query_lens) and not plan.has_prefill and not plan.is_stalled
  assert sorted(np.asarray(plan.order).tolist()) == list(range(S))
  assert not np.any(ctx.sequences.is_active)


@pytest.mark.parametrize("budget", [1, S - 1])
def test_a_budget_in_which_decoding_rows_miss_steps_is_an_error(budget):
  with pytest.raises(ValueError, match=f"token_budget={budget} .*max_seqs={S}"):
    sch.check_budget(toy.fresh(ROOMY), SchedulerConfig(token_budget=budget))


@pytest.mark.parametrize(
  "wrong",
  [
    {"token_budget": 0},
    {"token_budget": 2.5},
    {"max_admissions": 0},
    {"watermark": -1},
  ],
)
def test_settings_are_checked(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=name):
    SchedulerConfig(**wrong)


# Order.


def test_higher_priority_goes_first_and_equal_ones_by_index():
  prompts = [prompt_of(30, seed) for seed in range(5)]
  requests = make(prompts, priority=[0, 5, -3, 5, 0])
  _, requests, plans = run(toy.fresh(ROOMY), requests, 3)
  assert plans[0] == {1: 30, 3: 30, 0: 4, 4: 0, 2: 0}
  assert plans[1] == {0: 26, 4: 30, 2: 8}
  assert plans[2] == {2: 22}


def test_priority_decides_who_is_admitted():
  priority = [i % 4 for i in range(Q)]
  _, requests, _ = run(toy.fresh(ROOMY), make([[7]] * Q, priority=priority), 1)
  # The A = 8 of highest priority, in order of their rows.
  rows = np.asarray(requests.seq_ids)
  assert np.flatnonzero(rows >= 0).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
  assert rows[[3, 7, 11, 15, 2, 6, 10, 14]].tolist() == list(range(A))


def stub(num, **fields):
  """As much of `Requests` as a policy looks at."""
  return types.SimpleNamespace(num_requests=num, **fields)


def test_first_come_first_served_reaches_its_limits_without_overflow():
  num, most = 2**20, rq.MAX_PRIORITY
  priority = jnp.asarray(np.repeat([most, 0, -most], [3, 5, num - 8]), jnp.int32)
  priority = priority.at[-1].set(most)
  order = np.asarray(sch.first_come_first_served(None, stub(num, priority=priority)))
  assert (np.diff(order[:-1]) > 0).all() and order.min() == order[0] >= 0
  assert order[2] < order[-1] < order[3]
  assert order.max() < 2**31 - 1


def test_shortest_first_orders_by_tokens_still_to_sample():
  left = np.array([7, 3, 0, 3, 10**9, 2046, 2045])
  fields = {"max_lens": jnp.asarray(left + 20, jnp.int32)}
  fields["lengths"] = jnp.full(left.size, 20, jnp.int32)
  order = np.asarray(sch.shortest_first(None, stub(left.size, **fields)))
  assert np.argsort(order).tolist() == [2, 1, 3, 0, 6, 4, 5]  # 2046 and more are alike
  assert order.min() >= 0 and order.max() < 2**31 - 1


def test_rows_follow_the_order_of_their_requests_and_the_others_come_last():
  batch = types.SimpleNamespace(request_ids=jnp.array([2, 0, 3, 1]))
  mask = jnp.array([True, True, False, True])
  rows = sch._row_order(jnp.array([5, 3, 9]), batch, mask)
  assert rows.tolist() == [3, 1, 0, 2]


@pytest.mark.thorough
def test_a_policy_of_ones_own_is_followed():
  requests = make([prompt_of(60, seed) for seed in range(3)])
  assert planned(toy.fresh(ROOMY), requests, CONTRARY) == {2: 60, 1: 4, 0: 0}


# Admission.


def test_no_more_than_max_admissions_are_admitted_in_a_step():
  requests = make([[i] for i in range(Q)], 30)
  _, _, plans = run(toy.fresh(ROOMY), requests, 2)
  assert [len(plan) for plan in plans] == [A, S]


@pytest.mark.thorough
def test_what_can_never_fit_is_refused_and_does_not_block_the_others():
  too_long = [1] * (TIGHT.max_tokens_per_seq + 1)
  requests = make([[], too_long, [5, 6], too_long], 2, num=4, width=40)
  _, requests, plans = run(toy.fresh(TIGHT), requests, 2, FRUGAL)
  assert plans == [{2: 2}, {2: 1}]  # the last one waited for its equal
  refused = [Status(code) for code in np.asarray(requests.refusals)]
  assert refused == [Status.EMPTY, Status.TOO_LONG, Status.OK, Status.TOO_LONG]
  reasons = [FinishReason(code).name for code in np.asarray(requests.finish_reason)]
  assert reasons == ["REFUSED", "REFUSED", "LENGTH", "REFUSED"]
  finished = np.asarray(requests.status) == RequestStatus.FINISHED
  assert finished.tolist() == [True, True, False, True]


def test_a_prompt_without_blocks_waits_and_stalls_later_ones():
  # 8 blocks. The first holds 4; the second would need 5, the third only 1.
  prompts = [prompt_of(16), prompt_of(20), prompt_of(3)]
  requests = toy.absent(make(prompts, 9, num=4, width=40), [1, 2])
  ctx, requests, _ = run(toy.fresh(TIGHT), requests, 2, FRUGAL)
  _, after, plan, _, _ = step(ctx, toy.arrive(requests, [1, 2]), FRUGAL)
  assert plan.is_stalled
  running, waiting = RequestStatus.RUNNING, RequestStatus.WAITING
  assert np.asarray(after.status).tolist()[:3] == [running, waiting, waiting]


@pytest.mark.thorough
def test_prompts_wait_for_blocks_of_a_window_in_their_order():
  # A prompt of 20 tokens holds 5 of 11 blocks while it is computed.
  sizes = toy.config(
    sliding_window=18,
    num_blocks=60,
    block_size=4,
    max_seqs=4,
    max_seq_len=32,
    num_window_blocks=12,
  )
  first, *others = (prompt_of(20, seed) for seed in range(3))
  requests = make([first, first, *others], num=4, width=40)
  schedule = jax.jit(sch.schedule, static_argnames="scheduler")
  _, requests, _ = schedule(toy.fresh(sizes), requests, FRUGAL)
  # One that waits for another's prefix takes nothing from those behind it.
  running, waiting = RequestStatus.RUNNING, RequestStatus.WAITING
  assert requests.status.tolist() == [running, waiting, running, waiting]
  assert requests.wait_reason[1] == WaitReason.SHARED
  assert requests.wait_reason[3] == WaitReason.NO_WINDOW_BLOCKS


def test_without_states_no_snapshot_is_lacking():
  assert sch.num_snapshots_lacking(toy.fresh(TIGHT), jnp.full(4, 8)) == 0


def test_the_watermark_is_kept_free_by_eviction():
  prompts = [prompt_of(90 + i) for i in range(Q)]
  ctx, requests, _ = run(toy.fresh(ROOMY), make(prompts), 26)
  ctx, requests, _ = run(ctx, requests, 1)
  stats = kvcache.stats(ctx)
  assert not stats.num_in_use and stats.num_evictable == 199 - S
  assert stats.num_free == S  # the default
  ctx, _, _ = run(ctx, requests, 1, CONTRARY)
  stats = kvcache.stats(ctx)
  assert (stats.num_free, stats.num_evictable) == (199, 0)


def test_without_a_watermark_nothing_is_evicted_before_it_is_needed():
  requests = make([prompt_of(28), prompt_of(3)], 5, num=4, width=40)
  ctx, requests, _ = run(toy.fresh(TIGHT), toy.absent(requests, [1]), 9, FRUGAL)
  stats = kvcache.stats(ctx)
  assert (stats.num_free, stats.num_evictable) == (0, 8)
  ctx, _, _ = run(ctx, toy.arrive(requests, [1]), 1, FRUGAL)
  stats = kvcache.stats(ctx)
  assert (stats.num_free, stats.num_evictable, stats.num_in_use) == (0, 7, 1)


# Deferral: a prompt waits for blocks that another one is about to compute.


def test_of_ten_equal_prompts_only_the_first_computes_what_they_share():
  prompts = [prompt_of(24)] * 10
  ctx, requests, plans = run(toy.fresh(ROOMY), make(prompts, 3), 3)
  assert plans[0] == {0: 24}
  # A = 8 prompts are looked at in one step: another one follows.
  assert plans[1] == {0: 1} | dict.fromkeys(range(1, 8), 8) | {8: 7}
  assert plans[2] == dict.fromkeys(range(9), 1) | {9: 8}
  assert np.asarray(requests.num_cached)[:10].tolist() == [0] + [16] * 9
  ctx, requests, _ = run(ctx, requests, 2)
  stats = kvcache.stats(ctx)
  assert (stats.num_sequences, stats.num_in_use, stats.num_references) == (2, 5, 8)
  assert_as_if_alone(requests, prompts, 3, ROOMY)


def test_without_deferral_all_compute_everything():
  requests = make([prompt_of(12)] * 5)
  plan = planned(toy.fresh(ROOMY), requests, CONTRARY)
  assert plan == dict.fromkeys(range(5), 12)


def test_only_shared_full_blocks_of_one_namespace_are_waited_for():
  base = prompt_of(16)
  other = [(token + 1) % toy.VOCAB for token in base]
  prompts = [
    [*base, 1],  # computes
    base[:8] + other[8:],  # shares a block: waits
    base[:7] + other[7:],  # shares 7 tokens: goes
    base[:8],  # shares a block, but must compute its last token: goes
    [*base[:8], 3],  # waits
    [*base, 1],  # another namespace: goes
    [*base, 2],  # that namespace too: waits
  ]
  requests = make(prompts, namespace=[0, 0, 0, 0, 0, 1, 1])
  assert set(planned(toy.fresh(ROOMY), requests)) == {0, 2, 3, 5}
  _, requests, plans = run(toy.fresh(ROOMY), requests, 2)
  assert {i: plans[1][i] for i in (1, 4, 6)} == {1: 8, 4: 1, 6: 1}


def test_what_is_cached_already_is_not_waited_for():
  base = prompt_of(17)
  ctx, _, _ = run(toy.fresh(ROOMY), make([base]), 2)
  requests = make([base, base, base])
  assert planned(ctx, requests) == {0: 1, 1: 1, 2: 1}


def test_a_deferred_prompt_waits_for_the_shared_part_and_no_longer():
  long = prompt_of(250)
  prompts = [long, [*long[:100], 0, 1, 2]]
  _, requests, plans = run(toy.fresh(ROOMY), make(prompts, 2), 6)
  # 96 tokens are shared, of which 64 are computed after one step and 128 after two.
  assert [plan[0] for plan in plans[:4]] == [64, 64, 64, 58]
  assert [plan.get(1) for plan in plans] == [None, None, 0, 6, 1, 1]
  assert int(requests.num_cached[1]) == 96
  assert_as_if_alone(requests, prompts, 2, ROOMY)


def test_a_prompt_deferred_for_a_refused_one_is_next():
  long = [1] * (TIGHT.max_tokens_per_seq + 1)
  requests = make([long, long[:9]], num=4, width=40)
  _, _, plans = run(toy.fresh(TIGHT), requests, 2, FRUGAL)
  assert sum(plan.get(1, 0) for plan in plans) >= 8


# Too little memory.


def test_a_chunk_shrinks_to_the_free_blocks():
  # 8 blocks of 4. Two rows decode; the prompt beside them would take 6 tokens a step.
  prompts, news = [prompt_of(3, 1), prompt_of(3, 2), prompt_of(18)], [5, 5, 1]
  requests = make(prompts, news, num=4, width=40)
  ctx, requests, plans = run(toy.fresh(TIGHT), requests, 5, FRUGAL)
  assert [plan[2] for plan in plans] == [2, 6, 6, 2, 0]  # 4 left, room for 2
  assert all(plan[i] == 1 for plan in plans[1:] for i in (0, 1))
  assert not ctx.pool.num_free
  ctx, requests, plans = run(ctx, requests, 1, FRUGAL)
  assert plans == [{2: 2}]
  assert not np.any(requests.num_preemptions)
  assert_as_if_alone(requests, prompts, news, TIGHT)


def test_the_latest_are_preempted_and_restart_from_their_cached_prefix():
  # 8 blocks of 4. Four rows hold two each and come to their ends one after another.
  prompts = [prompt_of(5, seed) for seed in range(4)]
  requests = make(prompts, 6, num=4, width=40)
  ctx, requests, plans = run(toy.fresh(TIGHT), requests, 4, FRUGAL)
  assert plans[-1] == dict.fromkeys(range(4), 1)
  assert not np.any(requests.num_preemptions) and not ctx.pool.num_free
  ctx, requests, plans = run(ctx, requests, 2, FRUGAL)
  assert plans == [dict.fromkeys(range(3), 1), dict.fromkeys(range(2), 1)]
  assert np.asarray(requests.num_preemptions).tolist() == [0, 0, 1, 1]
  running, waiting = RequestStatus.RUNNING, RequestStatus.WAITING
  assert np.asarray(requests.status).tolist() == [running, running, waiting, waiting]
  kvcache.check_invariants(ctx)
  # The first has ended. Request 2 has 9 tokens, of which 8 are still cached.
  ctx, requests, plans = run(ctx, requests, 1, FRUGAL)
  assert plans == [{1: 1, 2: 1}]
  ctx, requests, plans = run(ctx, requests, 6, FRUGAL)
  assert_as_if_alone(requests, prompts, 6, TIGHT)
  assert np.asarray(requests.num_preemptions).tolist() == [0, 0, 1, 1]
  assert not np.any(requests.num_cached)  # when first admitted


@pytest.mark.thorough
def test_prompts_among_themselves_give_way_only_to_the_first():
  # 8 blocks of 4, 7 of them full: the first can go on, the three others cannot.
  prompts = [prompt_of(20, seed) for seed in range(4)]
  requests = make(prompts, 1, num=4, width=40)
  tokens = jnp.array(prompts)
  ctx, admission = jax.jit(kvcache.admit)(toy.fresh(TIGHT), tokens, requests.lengths)
  requests = requests.replace(
    status=jnp.full_like(requests.status, int(RequestStatus.RUNNING)),
    seq_ids=admission.seq_ids,
  )
  lens = jnp.array([8, 8, 8, 4])
  ctx, status = kvcache.extend(ctx, lens, num_tokens=28)
  metadata = kvcache.step_metadata(ctx, lens, num_tokens=28)
  ctx = kvcache.commit(ctx, tokens[metadata.seq_ids, metadata.positions], metadata)
  assert not np.any(status) and ctx.pool.num_free == 1
  schedule = jax.jit(sch.schedule, static_argnums=2)
  _, requests, plan = schedule(ctx, requests, FRUGAL)
  assert not np.any(requests.num_preemptions)
  assert plan.query_lens.tolist() == [4, 0, 0, 0]


def test_low_priority_is_preempted_first():
  prompts = [prompt_of(5, seed) for seed in range(4)]
  requests = make(prompts, 6, num=4, width=40, priority=[-1, 0, 2, 1])
  _, requests, _ = run(toy.fresh(TIGHT), requests, 20, FRUGAL)
  assert np.asarray(requests.num_preemptions).tolist() == [1, 1, 0, 0]
  assert_as_if_alone(requests, prompts, 6, TIGHT)
