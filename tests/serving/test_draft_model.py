"""A small model drafts for a large one: the tokens are those of the large one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, DraftModel, SamplingParams
from kvcache.nn import as_function
from tests.fixtures import toy_model as toy
from tests.fixtures.model_runs import greedy
from tests.fixtures.thorough import more
from tests.models.test_models import BASE, PROMPT
from tests.models.test_models import make as make_llama
from tests.serving.test_serve import CROWDED, mixture, random_prompts, TINY
from tests.serving.test_speculation import check, HYBRID, serve

SIZES = toy.config(num_blocks=6 * 16 + 1, block_size=4, max_seqs=6, max_seq_len=64)
ROOMY = dataclasses.replace(CROWDED, sizes=SIZES, logprobs=False)


def mostly_right(tokens, metadata, ctx):
  """The model itself, but at every third position its logits are shuffled."""
  logits, ctx = toy.model(tokens, metadata, ctx)
  is_wrong = metadata.positions[metadata.logits_indices] % 3 == 0
  return jnp.where(is_wrong[:, None], jnp.roll(logits, 7, axis=1), logits), ctx


def drafter(model=mostly_right, config=SIZES, **kwargs):
  return DraftModel(model=model, config=config, **{"num_drafts": 3} | kwargs)


@pytest.fixture(scope="module")
def crowd():
  return drafter()


@pytest.mark.parametrize("seed", [0, *more(1)])
def test_a_crowd_gets_the_same_tokens(crowd, seed):
  rng, num = np.random.default_rng(seed), CROWDED.num
  prompts = random_prompts(rng, num, longest=24)
  news, settings = rng.integers(1, 30, num), mixture(seed, num)
  requests = check(CROWDED, prompts, news, drafter=crowd, **settings)
  assert 0 < requests.num_accepted < requests.num_drafts
  assert int(requests.num_preemptions.sum()) > 0


@pytest.mark.thorough
def test_the_model_itself_is_always_right():
  """Also where the model it drafts for is a hybrid, and it is not."""
  prompts = random_prompts(np.random.default_rng(3), 3, longest=8)
  params = [SamplingParams(temperature=i % 2, seed=i) for i in range(3)]
  itself = drafter(toy.model, chunk_size=12)
  requests = check(HYBRID, prompts, [40, 20, 9], drafter=itself, sampling_params=params)
  assert requests.num_accepted == requests.num_drafts > 40


@pytest.mark.thorough
def test_a_tiny_pool():
  case, rng = TINY[2], np.random.default_rng(2)
  prompts = [rng.integers(0, toy.VOCAB, n).tolist() for n in rng.integers(1, 9, 6)]
  one = drafter(config=case.sizes, chunk_size=6)
  check(case, prompts, rng.integers(1, 20, 6).tolist(), drafter=one)


@pytest.mark.thorough
def test_where_the_draft_context_ends_there_are_no_drafts():
  """It has blocks for some rows, and columns for the first tokens of each."""
  config = dataclasses.replace(SIZES, num_blocks=9, max_seq_len=24)
  prompts = random_prompts(np.random.default_rng(6), 12, longest=24)
  requests = check(CROWDED, prompts, [20] * 12, drafter=drafter(config=config))
  assert requests.num_drafts > 0


def test_rows_go_back_and_catch_up():
  """Step by step: what the rows of the draft context hold, and what they propose."""
  config = toy.config(num_blocks=33, block_size=4, max_seqs=2, max_seq_len=64)
  one = drafter(toy.model, config=config, chunk_size=6)
  propose = jax.jit(one.propose, static_argnames="sampler")
  texts = [list(range(20)), [7] * 3]

  def call(state, texts, namespace=0):
    requests = toy.make_requests(
      [texts[0], texts[1]], 30, num=2, width=64, namespace=[namespace, 0]
    )
    requests = requests.replace(seq_ids=jnp.arange(2, dtype=jnp.int32))
    batch = kvcache.serving.requests.load_batch(
      requests, max_seqs=2, max_tokens_per_seq=64
    )
    state, drafts, num = propose(
      state, requests, batch, sampler=kvcache.sampling.greedy
    )
    kvcache.check_invariants(state)
    want = toy.expected(texts, 3, max_tokens_per_seq=64, namespaces=[namespace, 0])
    for one, row, count in zip(want, drafts.tolist(), num.tolist(), strict=True):
      assert row[:count] == one.tokens[:count]
    return state, num.tolist(), state.sequences.seq_lens.tolist()

  state = one.init()
  state, num, lens = call(state, texts)  # 2 tokens each, and 2 more of the first one
  assert (num, lens) == ([0, 0], [4, 2])
  state, num, lens = call(state, texts)
  assert (num, lens) == ([0, 3], [9, 5])
  for _ in range(2):
    state, num, lens = call(state, texts)
  assert (num, lens) == ([0, 3], [19, 5])
  state, num, lens = call(state, texts)
  assert (num, lens) == ([3, 3], [22, 5])
  held = state.sequences.block_tables
  texts[0] = [*texts[0][:8], *[31] * 6]  # another request, which begins alike
  state, num, lens = call(state, texts)
  assert (num, lens) == ([0, 3], [13, 5])
  state, num, lens = call(state, texts)
  assert (num, lens) == ([3, 3], [16, 5])
  np.testing.assert_array_equal(state.sequences.block_tables, held)
  state, num, lens = call(state, texts, namespace=5)  # nothing in common
  assert (num, lens) == ([0, 3], [5, 5])


@pytest.mark.thorough
def test_slices_keep_the_draft_context_and_the_weights():
  """A drafter with arrays of its own serves again, in slices of any length."""
  target, small = (as_function(make_llama(BASE, seed=seed)) for seed in (0, 1))
  sizes = CacheConfig(
    layers=BASE.cache_layers(), num_blocks=33, block_size=4, max_seqs=2, max_seq_len=64
  )
  shared = {"config": sizes, "num_drafts": 2, "chunk_size": 8}
  drafters = [DraftModel(model=model, **shared) for model in (small, target)]
  prompts, outputs, counts = [PROMPT[:9], PROMPT[9:14]], [], []
  for one, length in ((drafters[0], 2), (drafters[1], 4), (drafters[0], 1000)):
    last = []
    _, out = kvcache.generate(
      target,
      kvcache.init(sizes),
      prompts,
      max_new_tokens=12,
      drafter=one,
      slice_steps=length,
      scheduler=kvcache.SchedulerConfig(token_budget=16),
      on_slice=last.append,
    )
    outputs.append([completion.tokens for completion in out])
    counts.append((last[-1].num_accepted, last[-1].num_drafts))
  want = [greedy(target, kvcache.init(sizes), p, 12) for p in prompts]
  assert outputs == [want] * 3
  assert counts[0] == counts[2] and counts[0][0] < counts[0][1]
  assert counts[1][0] == counts[1][1] > 10


@pytest.mark.thorough
def test_sampled_tokens_have_the_distribution_of_the_model(crowd):
  """A test of its own kind: it knows nothing of noise, only of probabilities.

  The tokens of each position are ordered by the model's probabilities; where in the
  cumulated ones the token stands that came, spread over its own share, is uniform.
  """
  num, rng = ROOMY.num, np.random.default_rng(0)
  places = []
  for start in (0, 1000):
    prompts = [[1, 2, 3]] * num
    params = [SamplingParams(temperature=1.0, seed=start + i) for i in range(num)]
    requests = ROOMY.requests(prompts, 14, sampling_params=params)
    _, requests, _ = serve(toy.fresh(ROOMY.sizes), requests, crowd, case=ROOMY)
    assert requests.num_accepted > 100
    for prompt, output in zip(prompts, toy.outputs(requests), strict=True):
      for i, token in enumerate(output):
        logits = toy.next_logits([*prompt, *output[:i]]).astype(np.float64)
        odds = np.exp(logits) / np.exp(logits).sum()
        above = (
          odds[odds > odds[token]].sum()
          + odds[:token][odds[:token] == odds[token]].sum()
        )
        places.append(above + rng.random() * odds[token])
  counts, _ = np.histogram(places, bins=20, range=(0, 1))
  expected = len(places) / 20
  chi_square = ((counts - expected) ** 2 / expected).sum()
  assert len(places) == 2 * num * 14
  assert chi_square < 50.8, counts  # 19 degrees of freedom: exceeded by 1 in 10,000


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"num_drafts": 0}, "num_drafts must be a positive int, got 0"),
    ({"chunk_size": 11}, r"chunk_size must be at least 2 \* max_seqs = 12, got 11"),
  ],
)
def test_bad_drafters_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    drafter(**kwargs)


def test_contexts_that_do_not_fit_are_refused():
  hybrid = toy.config(is_hybrid=True, num_blocks=9, max_seqs=6)
  (layer, _) = CROWDED.sizes.layers
  window = dataclasses.replace(layer, sliding_window=4)
  sizes = dataclasses.replace(CROWDED.sizes, layers=(window,))
  with pytest.raises(ValueError, match="config has sliding windows"):
    drafter(config=sizes)
  with pytest.raises(ValueError, match="config has recurrent layers"):
    drafter(config=hybrid)
  other = drafter(config=dataclasses.replace(SIZES, max_seqs=5))
  ctx, requests = toy.fresh(CROWDED.sizes), CROWDED.requests([[1]], 1)
  with pytest.raises(ValueError, match=r"must have the 6 rows .* got 5"):
    kvcache.serve(toy.model, ctx, requests, scheduler=CROWDED.scheduler, drafter=other)
