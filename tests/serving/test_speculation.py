"""Drafts change how many steps it takes and nothing else."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import PromptLookup, SamplingParams
from kvcache.serving import sampling
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more
from tests.serving.test_serve import (
  assert_all_given_back,
  assert_results,
  CROWDED,
  mixture,
  random_prompts,
  TINY,
)


class Prophet(flax.struct.PyTreeNode):
  """Knows what comes, and is wrong now and then."""

  table: jax.Array  # [Q, C + num_drafts]
  num_drafts: int = flax.struct.field(pytree_node=False, default=3)

  @classmethod
  def of(cls, texts, capacity, *, error_rate):
    table = np.zeros((len(texts), capacity + 3), np.int32)
    for row, text in zip(table, texts, strict=True):
      row[: len(text)] = text
    rng = np.random.default_rng(0)
    # Nobody ever samples this token.
    wrong = rng.random(table.shape) < error_rate
    return cls(table=jnp.asarray(np.where(wrong, toy.VOCAB, table)))

  def init(self):
    return ()

  def propose(self, state, requests, batch, sampler):
    ids = jnp.minimum(batch.request_ids, requests.num_requests - 1)
    place = jnp.arange(self.num_drafts, dtype=jnp.int32)[None]
    at = jnp.minimum(batch.lengths[:, None] + place, self.table.shape[1] - 1)
    drafts = self.table[ids[:, None], at]
    # Now and then few, none, or an odd number.
    num = (batch.lengths * 7) % (self.num_drafts + 3) - 1
    return state, drafts, num


@functools.partial(jax.jit, static_argnames="case")
def serve(ctx, requests, drafter, *, case):
  return kvcache.serve(
    toy.model,
    ctx,
    requests,
    scheduler=case.scheduler,
    sampler=case.sampler,
    drafter=drafter,
  )


def check(case, prompts, news, *, drafter=None, error_rate=0.3, **kwargs):
  """Serves with a prophet, or another drafter; returns the requests."""
  told = {
    "stop_tokens": kwargs.get("stop_tokens", ()),
    "namespaces": kwargs.get("namespace"),
    "params": kwargs.get("sampling_params"),
  }
  want = case.expected(prompts, news, **told)
  texts = [[*p, *one.tokens] for p, one in zip(prompts, want, strict=True)]
  texts += [[]] * (case.num - len(prompts))
  drafter = drafter or Prophet.of(texts, case.width, error_rate=error_rate)
  requests = case.requests(prompts, news, **kwargs)
  ctx, requests, state = serve(toy.fresh(case.sizes), requests, drafter, case=case)
  assert_results(requests, want)
  assert_all_given_back(ctx)
  if isinstance(state, kvcache.Context):
    kvcache.check_invariants(state)
  return requests


@pytest.mark.parametrize("seed", [0, *more(1)])
def test_a_crowd_gets_the_same_tokens_in_fewer_steps(seed):
  rng, num = np.random.default_rng(seed), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news, settings = rng.integers(1, 30, num), mixture(seed, num)
  requests = check(CROWDED, prompts, news, **settings)
  assert 0 < requests.num_accepted < requests.num_drafts
  assert int(requests.num_preemptions.sum()) > 0
  plain = CROWDED.requests(prompts, news, **settings)
  _, plain = CROWDED.serve(toy.fresh(CROWDED.sizes), plain)
  assert requests.num_steps < plain.num_steps
  assert plain.num_drafts == plain.num_accepted == 0


@pytest.mark.parametrize("error_rate", [0.0, 1.0])
def test_all_right_and_all_wrong(error_rate):
  prompts = [[1, 2, 3], [4, 5]]
  requests = check(CROWDED, prompts, [29, 24], error_rate=error_rate)
  assert (requests.num_accepted > 0) == (error_rate == 0)


@pytest.mark.thorough
@pytest.mark.parametrize("num_blocks", TINY)
def test_tiny_pools(num_blocks):
  """Without blocks for the drafts there are none, and the loop goes on."""
  case, rng = TINY[num_blocks], np.random.default_rng(num_blocks)
  prompts = [rng.integers(0, toy.VOCAB, n).tolist() for n in rng.integers(1, 9, 6)]
  check(case, prompts, rng.integers(1, 20, 6).tolist())


def test_prompt_lookup_proposes_what_followed_before():
  rng = np.random.default_rng(0)
  drafter = PromptLookup(num_drafts=3, ngram=2)
  texts = [rng.integers(0, 3, n).tolist() for n in (1, 2, 3, 4, 5, 9, 17, 30)]
  requests = kvcache.make_requests(texts, max_new_tokens=5)
  batch = kvcache.serving.requests.load_batch(
    requests.replace(seq_ids=jnp.arange(8, dtype=jnp.int32)),
    max_seqs=8,
    max_tokens_per_seq=64,
  )
  state, drafts, num = drafter.propose((), requests, batch, sampling.greedy)
  assert state == drafter.init()
  has_any = False
  for text, row, count in zip(texts, drafts.tolist(), num.tolist(), strict=True):
    places = [i for i in range(len(text) - 2) if text[i : i + 2] == text[-2:]]
    want = text[places[-1] + 2 :][:3] if places else []
    assert row[:count] == want
    has_any |= bool(want)
  assert has_any


@pytest.mark.thorough
def test_a_text_that_repeats_itself_is_guessed():
  """The toy model's text is noise, but a stop-free one of few rows has repetitions."""
  prompts = [[1, 2] * 10, [7] * 20]
  requests = CROWDED.requests(
    prompts, 30, sampling_params=[SamplingParams(temperature=0.0)] * 2
  )
  ctx, requests, _ = serve(
    toy.fresh(CROWDED.sizes), requests, PromptLookup(ngram=1), case=CROWDED
  )
  assert_results(requests, CROWDED.expected(prompts, 30))
  assert requests.num_drafts > 0
  assert_all_given_back(ctx)


@pytest.mark.thorough
def test_generate_takes_a_drafter():
  ctx, out = kvcache.generate(
    toy.model,
    toy.fresh(CROWDED.sizes),
    [[1, 2, 1, 2, 1]],
    max_new_tokens=8,
    drafter=PromptLookup(),
  )
  assert out[0].tokens == CROWDED.expected([[1, 2, 1, 2, 1]], 8)[0].tokens
  kvcache.check_invariants(ctx)


@pytest.mark.parametrize("fields", [{"num_drafts": 0}, {"ngram": 0}, {"ngram": 1.5}])
def test_bad_drafters_are_named(fields):
  (name,) = fields
  with pytest.raises(ValueError, match=f"{name} must be a positive int"):
    PromptLookup(**fields)


# Recurrent layers: a state after each draft.

HYBRID = dataclasses.replace(
  CROWDED,
  sizes=toy.config(
    is_hybrid=True,
    num_blocks=33,
    block_size=4,
    max_seqs=6,
    max_seq_len=64,
    num_snapshots=8,
    snapshot_interval=2,
    max_drafts=3,
  ),
)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, *more(1)])
def test_hybrids_get_the_same_tokens_in_fewer_steps(seed):
  rng, num = np.random.default_rng(seed), HYBRID.num
  prompts = random_prompts(rng, num, longest=24)
  requests = check(HYBRID, prompts, rng.integers(1, 30, num), **mixture(seed, num))
  assert 0 < requests.num_accepted < requests.num_drafts
  assert int(requests.num_preemptions.sum()) > 0
  assert int(requests.num_cached.sum()) > 0


def test_what_cannot_be_speculated_is_refused():
  requests = CROWDED.requests([[1]], 1)
  ctx = toy.fresh(HYBRID.sizes)
  with pytest.raises(ValueError, match=r"guesses 4 tokens, .* max_drafts=3"):
    kvcache.serve(toy.model, ctx, requests, drafter=PromptLookup(num_drafts=4))
  ones = jnp.ones(6, jnp.int32)
  with pytest.raises(
    ValueError, match=r"num_logits must be at most 1 \+ max_drafts = 4"
  ):
    kvcache.step_metadata(ctx, ones, num_tokens=6, num_logits=5)
  ctx = toy.fresh(CROWDED.sizes)
  for options in ({"num_logits": 2}, {"num_logits": 0, "num_tokens": 6}):
    with pytest.raises(ValueError, match="num_logits must be 1 in a decode step"):
      kvcache.step_metadata(ctx, ones, **options)
