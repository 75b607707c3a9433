"""A program is traced once, means the same however it is run, and stays on the device.

What a verb returns has the types it was given, so that a loop of any kind may carry it:
Python's, `lax.scan`'s, or that of `generate` from slice to slice.
"""

import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, SchedulerConfig
from kvcache.serving import sampling
from tests.aot import programs
from tests.fixtures import toy_model

CONFIG = toy_model.config(
  num_blocks=16, block_size=4, max_seqs=3, max_seq_len=32, chunk_size=4
)
SCHEDULER = SchedulerConfig(token_budget=8, max_admissions=2)
VERBS = programs.verbs(CONFIG, num_tokens=SCHEDULER.token_budget)
NUM_CONTEXTS = 3


@pytest.fixture(autouse=True)
def count_traces_anew():
  chex.clear_trace_counter()


def fresh(config: CacheConfig = CONFIG, **kwargs):
  return jax.jit(functools.partial(toy_model.fresh, config))(**kwargs)


# --- Verbs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_traced_once(name):
  verb = VERBS[name]

  @jax.jit
  @chex.assert_max_traces(n=1)
  def traced(ctx, *arguments):
    return verb.run(ctx, *arguments)

  ctx = fresh()
  for value in range(3):
    arguments = [jnp.full(a.shape, value, a.dtype) for a in verb.arguments]
    result = traced(ctx, *arguments)
    ctx = result if isinstance(result, kvcache.Context) else result[0]


def session(ctx, tokens, lengths):
  """Each verb once, in an order in which it has something to do."""
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)

  def decode(ctx, token):
    ones = ctx.sequences.is_active.astype(jnp.int32)
    return programs.decode_step(ctx, ones, jnp.full_like(rows, token)), None

  def prefill(ctx, lengths):
    order = rows[::-1]
    chunk = jnp.pad(lengths, (0, rows.size - lengths.size))
    return programs.mixed_step(ctx, chunk, order, jnp.arange(16, dtype=jnp.int32))

  ctx, first = kvcache.admit(ctx, tokens, lengths)
  ctx, positions = prefill(ctx, lengths)
  ctx, branch, status = kvcache.fork(ctx, first.seq_ids[:1])
  ctx, _ = lax.scan(decode, ctx, jnp.arange(4, dtype=jnp.int32))
  ctx, rewound = kvcache.rewind(ctx, jnp.where(rows == branch[0], 3, 0))
  ctx = kvcache.finish(ctx, rows != branch[0])
  ctx, num_evicted = kvcache.evict(ctx, 2)
  return ctx, (first, positions, branch, status, rewound, num_evicted)


def script():
  tokens = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
  return tokens, jnp.array([9, 6], jnp.int32)


def test_a_session_is_the_same_eager_and_compiled():
  tokens, lengths = script()
  compiled = jax.jit(session)(fresh(), tokens, lengths)
  chex.assert_trees_all_equal(compiled, session(fresh(), tokens, lengths))
  ctx, (first, _, branch, status, rewound, num_evicted) = compiled
  kvcache.check_invariants(ctx)
  assert not first.status.any() and not status.any() and not rewound.any()
  assert branch[0] == 2 and num_evicted > 0


def test_steps_are_the_same_in_python_and_in_scan():
  """Decode steps, with rows that run out of blocks on the way."""
  tokens, lengths = script()
  ctx, _ = jax.jit(kvcache.admit)(fresh(), tokens, lengths)
  rows = ctx.sequences.is_active.astype(jnp.int32)

  def body(ctx, token):
    ctx = programs.decode_step(ctx, rows, jnp.full_like(rows, token))
    return ctx, ctx.sequences.seq_lens

  inputs = jnp.arange(40, dtype=jnp.int32)
  scanned, lens = jax.jit(lambda ctx: lax.scan(body, ctx, inputs))(ctx)
  step = jax.jit(chex.assert_max_traces(body, n=1))
  for token in inputs:
    ctx, _ = step(ctx, token)
  chex.assert_trees_all_equal(scanned, ctx)
  assert lens[-1, 0] == CONFIG.max_seq_len


# --- The loop -------------------------------------------------------------------------


def make_requests(seed=0):
  """More than fit at once, with prefixes in common."""
  rng = np.random.default_rng(seed)
  prefix = rng.integers(toy_model.VOCAB, size=9).tolist()
  ends = [rng.integers(toy_model.VOCAB, size=n).tolist() for n in (1, 7, 3, 5)]
  prompts = [prefix + ends[0], ends[1], prefix + ends[2], prefix + ends[3]]
  return kvcache.make_requests(
    [*prompts, prompts[0]],
    max_new_tokens=[20, 18 - 4 * seed, 6, 16, 4],
    capacity=CONFIG.max_seq_len + 1,
  )


def run_serve(ctx, requests, max_steps):
  return kvcache.serve(
    toy_model.model,
    ctx,
    requests,
    scheduler=SCHEDULER,
    sampler=sampling.greedy,
    max_steps=max_steps,
  )


@functools.cache
def serve():
  """One program for all tests here."""
  return jax.jit(run_serve)


@functools.cache
def served(seed):
  ctx, requests = serve()(fresh(salt=seed), make_requests(seed), jnp.int32(1000))
  assert (requests.status == kvcache.RequestStatus.FINISHED).all()
  return ctx, requests


def test_serve_is_traced_once_from_slice_to_slice():
  ctx, requests = fresh(salt=0), make_requests()
  ctx, requests = serve()(ctx, requests, jnp.int32(1000))
  num_traces = serve()._cache_size()
  ctx, requests = fresh(salt=1), make_requests()
  while (requests.status != kvcache.RequestStatus.FINISHED).any():
    ctx, requests = serve()(ctx, requests, jnp.int32(3))
  assert serve()._cache_size() == num_traces


@pytest.mark.thorough
def test_generate_is_traced_once_from_slice_to_slice_and_call_to_call():
  traces = []

  def model(tokens, metadata, ctx):
    traces.append(tokens.shape[0])
    return toy_model.model(tokens, metadata, ctx)

  slices = []

  def generate(prompts):
    kwargs = {"scheduler": SCHEDULER, "slice_steps": 4, "on_slice": slices.append}
    ctx, _ = kvcache.generate(model, fresh(), prompts, max_new_tokens=9, **kwargs)
    return ctx

  generate([[1, 2, 3, 4, 5], [6]])
  num_traces, num_slices = len(traces), len(slices)
  assert set(traces) == {SCHEDULER.token_budget, CONFIG.max_seqs}
  assert num_slices > 1
  generate([[7, 8, 9], [1, 1, 2, 3, 5]])
  assert len(slices) > num_slices
  assert len(traces) == num_traces


def test_serve_needs_no_transfer():
  ctx, requests, limit = fresh(salt=2), make_requests(2), jnp.int32(1000)
  expected = served(2)
  with jax.transfer_guard("disallow"):
    result = serve()(ctx, requests, limit)
    jax.block_until_ready(result)
  chex.assert_trees_all_equal(result, expected)


def test_the_transfer_guard_sees_what_is_not_on_the_device():
  ctx, requests = fresh(salt=2), make_requests(2)
  served(2)
  with (
    jax.transfer_guard("disallow"),
    pytest.raises(Exception, match="Disallowed host-to-device"),
  ):
    serve()(ctx, requests, np.int32(1000))


@pytest.mark.thorough
def test_serve_under_vmap_equals_single_runs():
  """A fleet of contexts on one device, each with its own requests."""
  singles = [served(seed) for seed in range(NUM_CONTEXTS)]
  assert len({int(requests.num_steps) for _, requests in singles}) > 1
  assert any(requests.num_preemptions.any() for _, requests in singles)

  def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  contexts = stack([fresh(salt=seed) for seed in range(NUM_CONTEXTS)])
  requests = stack([make_requests(seed) for seed in range(NUM_CONTEXTS)])
  fleet = jax.jit(jax.vmap(run_serve, in_axes=(0, 0, None)))
  result = fleet(contexts, requests, jnp.int32(1000))
  chex.assert_trees_all_equal(result, stack(singles))
