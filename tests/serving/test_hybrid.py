"""Hybrids in the loop: recurrent states, and snapshots that prefix hits start from.

The toy model's tokens depend on the state and on every token read back, so a state
that is stale, lost, shared or at another token than the K/V changes what follows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import SchedulerConfig, Status
from kvcache.serving import scheduler as sch
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more
from tests.serving.test_serve import (
  assert_all_given_back,
  Case,
  check,
  CROWDED,
  mixture,
  random_prompts,
)

SIZE = 4
HYBRID = dataclasses.replace(
  CROWDED,
  sizes=toy.config(
    is_hybrid=True,
    num_blocks=25,
    block_size=SIZE,
    max_seqs=6,
    max_seq_len=64,
    num_snapshots=5,
    snapshot_interval=3,
  ),
)
ROOMY = Case(
  sizes=toy.config(
    is_hybrid=True,
    num_blocks=64,
    block_size=SIZE,
    max_seqs=3,
    max_seq_len=64,
    snapshot_interval=8,
  ),
  scheduler=SchedulerConfig(token_budget=64),
  num=3,
  width=65,
)

admit, evict, finish = map(jax.jit, (kvcache.admit, kvcache.evict, kvcache.finish))
fork, publish, rewind = map(jax.jit, (kvcache.fork, kvcache.publish, kvcache.rewind))
evict_snapshots, stats = map(jax.jit, (kvcache.evict_snapshots, kvcache.stats))
fresh = jax.jit(toy.fresh, static_argnums=0)


@functools.cache
def with_sizes(**sizes):
  return dataclasses.replace(ROOMY, sizes=dataclasses.replace(ROOMY.sizes, **sizes))


@pytest.mark.parametrize("seed", [0, *more(1, 2, 3)])
def test_a_crowd_gets_what_each_gets_alone(seed):
  rng, num = np.random.default_rng(seed), HYBRID.num
  prompts = random_prompts(rng, num, longest=24)
  ctx, requests = check(HYBRID, prompts, rng.integers(1, 30, num), **mixture(seed, num))
  assert int(requests.num_preemptions.sum()) > 0
  assert int(ctx.counters.hit_tokens) > 0
  assert int(ctx.counters.lost_tokens) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("num_snapshots", [0, 1])
def test_few_snapshots_or_none_cost_hits_only(num_snapshots):
  case = dataclasses.replace(
    HYBRID, sizes=dataclasses.replace(HYBRID.sizes, num_snapshots=num_snapshots)
  )
  rng, num = np.random.default_rng(0), HYBRID.num
  prompts = random_prompts(rng, num, longest=24)
  ctx, _ = check(case, prompts, rng.integers(1, 30, num), **mixture(0, num))
  assert num_snapshots or not int(ctx.counters.hit_tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 1, 30])
@pytest.mark.parametrize("loss", ["nothing", "blocks", "snapshots"])
def test_a_prompt_asked_again_gets_the_same(length, loss):
  """To the last bit of its log-probabilities, evicted in between or not."""
  case = dataclasses.replace(ROOMY, logprobs=True)
  prompt = np.random.default_rng(length).integers(0, toy.VOCAB, length).tolist()
  ctx, first = check(case, [prompt], 9)
  if loss == "blocks":
    ctx, num = evict(ctx, 1 << 20)
    assert int(num) == (length + 8) // SIZE
  elif loss == "snapshots":
    ctx, num = evict_snapshots(ctx, 1 << 20)
    assert (int(num) > 0) == (length > SIZE)
  ctx, second = check(case, [prompt], 9, ctx=ctx)
  hit = (length - 1) // SIZE * SIZE if loss == "nothing" else 0
  assert second.num_cached[0].item() == hit
  np.testing.assert_array_equal(first.logprobs, second.logprobs)


def start(ctx, prompt, *, ends):
  """Admits a prompt and computes it in chunks that end at these lengths."""
  tokens = jnp.asarray([prompt], jnp.int32)
  ctx, admission = admit(ctx, tokens, jnp.asarray([len(prompt)]))
  row = admission.seq_ids[0].item()
  length = admission.num_cached[0].item()
  for end in ends:
    if end > length:
      ctx = step(ctx, row, prompt[length:end])
      length = end
  return ctx, row, admission.num_cached[0].item()


@functools.partial(jax.jit, static_argnames="num_tokens")
def _step(ctx, tokens, query_lens, *, num_tokens):
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = toy.model(tokens, metadata, ctx)
  return kvcache.commit(ctx, tokens, metadata), status, logits


def step(ctx, row, tokens, num_tokens=64):
  padded = jnp.asarray(tokens + [0] * (num_tokens - len(tokens)), jnp.int32)
  query_lens = jnp.zeros(ctx.config.max_seqs, jnp.int32).at[row].set(len(tokens))
  ctx, status, _ = _step(ctx, padded, query_lens, num_tokens=num_tokens)
  kvcache.raise_for_status(status)
  kvcache.check_invariants(ctx)
  return ctx


PROMPT = list(range(25))


def test_a_hit_is_cut_back_to_the_last_snapshot():
  """A snapshot stands after one block only, though two are cached."""
  ctx = fresh(with_sizes(snapshot_interval=1).sizes)
  ctx, _, _ = start(ctx, PROMPT[:12], ends=[4, 11, 12])
  ctx, _, num_cached = start(ctx, PROMPT[:12], ends=[])
  assert num_cached == 4
  assert ctx.counters.lost_tokens.item() == 4
  assert stats(ctx).num_snapshots.item() == 2  # after 4, and after 12


@pytest.mark.thorough
def test_snapshots_are_lacking_only_where_a_step_comes_to_one():
  ctx = fresh(with_sizes(num_snapshots=2, snapshot_interval=1).sizes)
  lacking = jax.jit(sch.num_snapshots_lacking)
  ctx, row, _ = start(ctx, PROMPT, ends=[4])
  for end, num_tokens, want in ((4, 0, 0), (4, 4, 0), (8, 0, 0), (8, 3, 0), (8, 4, 1)):
    if end > ctx.sequences.seq_lens[row]:
      ctx = step(ctx, row, PROMPT[4:end])
    query_lens = jnp.zeros(3, jnp.int32).at[row].set(num_tokens)
    assert lacking(ctx, query_lens) == want, (end, num_tokens)


@pytest.mark.thorough
def test_without_snapshots_a_prompt_starts_from_nothing():
  ctx = fresh(with_sizes(num_snapshots=0).sizes)
  ctx, _, _ = start(ctx, PROMPT, ends=[24, 25])
  ctx, _, num_cached = start(ctx, PROMPT, ends=[])
  assert num_cached == 0
  assert ctx.counters.lost_tokens.item() == 24


@pytest.mark.thorough
def test_a_snapshot_outlives_the_sequence_that_made_it():
  ctx = fresh(ROOMY.sizes)
  ctx, row, _ = start(ctx, PROMPT, ends=[24, 25])
  before = stats(ctx)
  ctx = finish(ctx, jnp.arange(3) == row)
  after = stats(ctx)
  assert before.num_snapshots.item() == after.num_snapshots.item() == 1
  assert after.num_free_states.item() == before.num_free_states.item() + 1
  ctx, _, num_cached = start(ctx, PROMPT, ends=[25])
  assert num_cached == 24
  kvcache.check_invariants(ctx)


def test_a_snapshot_goes_with_a_block_that_was_never_published():
  ctx = fresh(ROOMY.sizes)
  ctx, row, _ = start(ctx, PROMPT, ends=[24, 25])
  assert stats(ctx).num_snapshots.item() == 1 and not ctx.sequences.num_published.any()
  ctx = jax.jit(kvcache.finish, static_argnames="keep_prefix")(
    ctx, jnp.arange(3) == row, keep_prefix=False
  )
  kvcache.check_invariants(ctx)
  assert stats(ctx).num_snapshots.item() == 0


@pytest.mark.thorough
def test_equal_prompts_side_by_side_keep_one_snapshot():
  tokens = jnp.asarray([PROMPT] * 2, jnp.int32)
  ctx = fresh(ROOMY.sizes)
  ctx, admission = admit(ctx, tokens, jnp.asarray([25, 25]))
  assert admission.num_cached.tolist() == [0, 0]
  for row in (0, 1):
    ctx = step(ctx, row, PROMPT[:24])
  assert stats(ctx).num_snapshots.item() == 2
  ctx = publish(ctx)
  kvcache.check_invariants(ctx)
  assert stats(ctx).num_snapshots.item() == 1
  sources = ctx.state_rows.source_ids[:2].tolist()
  assert sources[0] == sources[1] > 0


def test_a_rewind_needs_a_state():
  ctx = fresh(with_sizes(snapshot_interval=2).sizes)
  ctx, row, _ = start(ctx, PROMPT, ends=[8, 15])
  drop = jnp.zeros(3, jnp.int32).at[row]
  after, status = rewind(ctx, drop.set(3))
  assert Status(status[row].item()) is Status.NO_STATE
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), ctx.tables, after.tables)
  )
  with pytest.raises(kvcache.StateError):
    kvcache.raise_for_status(status)
  after, status = rewind(ctx, drop.set(7))
  kvcache.raise_for_status(status)
  kvcache.check_invariants(after)
  held = after.states.arrays["sum"][0, after.state_rows.source_ids[row]]
  again = kvcache.read_state(after, 0, metadata_of(after, row))["sum"][row]
  assert held == again != 0
  empty, status = rewind(ctx, drop.set(15))
  kvcache.raise_for_status(status)
  assert kvcache.read_state(empty, 0, metadata_of(empty, row))["sum"][row] == 0


def metadata_of(ctx, row):
  query_lens = jnp.zeros(3, jnp.int32).at[row].set(1)
  ctx, _ = kvcache.extend(ctx, query_lens)
  return kvcache.step_metadata(ctx, query_lens)


def test_a_fork_has_a_state_of_its_own():
  ctx = fresh(ROOMY.sizes)
  ctx, row, _ = start(ctx, PROMPT[:10], ends=[8, 10])
  ctx, seq_ids, _ = fork(ctx, jnp.asarray([row]))
  other = seq_ids[0].item()
  state = ctx.states.arrays["sum"][0]
  one, two = (state[ctx.state_rows.source_ids[s]] for s in (row, other))
  assert one == two
  ctx = step(ctx, other, [7])
  assert ctx.states.arrays["sum"][0, ctx.state_rows.source_ids[row]] == one
  assert ctx.states.arrays["sum"][0, ctx.state_rows.source_ids[other]] != one


def test_misuse_is_refused():
  ctx = fresh(ROOMY.sizes)
  metadata = kvcache.step_metadata(ctx, jnp.zeros(3, jnp.int32))
  wrong = {"sum": jnp.zeros(2, jnp.uint32)}
  with pytest.raises(ValueError, match=r"state must have shapes \{'sum': \(3,\)\}"):
    kvcache.write_state(ctx, 0, wrong, metadata)
  with pytest.raises(ValueError, match="state must have shapes"):
    kvcache.write_state(ctx, 0, {"total": jnp.zeros(3)}, metadata)
  tokens = jnp.zeros(3, jnp.int32)
  with pytest.raises(ValueError, match="accepted needs a draft step"):
    kvcache.commit(ctx, tokens, metadata, accepted=tokens)
  plain = fresh(CROWDED.sizes)
  with pytest.raises(ValueError, match="no recurrent layer"):
    kvcache.read_state(plain, 0, metadata)
  with pytest.raises(ValueError, match="no recurrent layer"):
    evict_snapshots(plain, 1)


def test_reset_frees_every_state():
  ctx = fresh(ROOMY.sizes)
  ctx, _, _ = start(ctx, PROMPT, ends=[24, 25])
  for keep_prefix in (True, False):
    ctx = kvcache.reset(ctx, keep_prefix=keep_prefix)
    kvcache.check_invariants(ctx)
    assert stats(ctx).num_snapshots.item() == keep_prefix
  assert_all_given_back(ctx)
