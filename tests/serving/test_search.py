"""Beam search and best-of-n in one program, against a search over plain lists."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import SamplingParams, Status
from kvcache.serving import sampling
from kvcache.serving.requests import NO_TOKEN
from tests.fixtures import toy_model as toy
from tests.fixtures.thorough import more

PROMPT = np.random.default_rng(1).integers(0, toy.VOCAB, 21).tolist()
SIZES = {
  "attention": toy.config(num_blocks=60, block_size=4, max_seqs=5, max_seq_len=48),
  "hybrid": toy.config(
    is_hybrid=True, num_blocks=60, block_size=4, max_seqs=5, max_seq_len=48
  ),
  "window": toy.config(
    sliding_window=6,
    num_blocks=60,
    block_size=4,
    max_seqs=5,
    max_seq_len=48,
    num_window_blocks=20,
  ),
}
NUM_NEW = 9
fresh = jax.jit(toy.fresh, static_argnums=0)


@functools.partial(jax.jit, static_argnames="num_beams")
def _beam_search(ctx, prompt, length, *, num_beams, **options):
  return kvcache.beam_search(
    toy.model,
    ctx,
    prompt,
    length,
    num_beams=num_beams,
    max_new_tokens=NUM_NEW,
    chunk_size=8,
    **options,
  )


def beam_search(ctx, prompt, length, *, num_beams, stop_token=-1, length_penalty=1.0):
  options = jnp.int32(stop_token), jnp.float32(length_penalty)
  options = dict(zip(("stop_token", "length_penalty"), options, strict=True))
  return _beam_search(ctx, prompt, length, num_beams=num_beams, **options)


@jax.jit
def best_of(ctx, prompt, length, settings):
  return kvcache.best_of(
    toy.model, ctx, prompt, length, settings, max_new_tokens=NUM_NEW, stop_token=3
  )


def padded(text):
  return jnp.asarray(text + [-5] * (40 - len(text)), jnp.int32), jnp.int32(len(text))


def logprobs(text, sliding_window=None):
  logits = toy.next_logits(text, sliding_window=sliding_window).astype(np.float64)
  return logits - np.log(np.exp(logits).sum())


def search_plainly(
  prompt, *, num_beams, stop_token, length_penalty, sliding_window=None
):
  """Beams as `(score, tokens, has ended)`, best first."""
  beams = [(0.0, [], False)]
  for _ in range(NUM_NEW):
    candidates = []
    for score, tokens, has_ended in beams:
      if has_ended:
        candidates.append((score, tokens, True))
        continue
      for token, gain in enumerate(logprobs(prompt + tokens, sliding_window)):
        candidates.append((score + gain, [*tokens, token], token == stop_token))
    beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
  return sorted(beams, key=lambda beam: -beam[0] / len(beam[1]) ** length_penalty)


def assert_all_given_back(ctx):
  kvcache.check_invariants(ctx)
  assert not ctx.sequences.is_active.any()
  assert ctx.pool.num_free + ctx.prefix.num_evictable == ctx.config.num_blocks - 1


@pytest.mark.parametrize(
  ("kind", "num_beams", "penalty"),
  [
    ("attention", 4, 1.0),
    ("attention", 4, 0.0),
    *more(("attention", 1, 1.0), ("hybrid", 4, 0.5), ("window", 4, 1.0)),
  ],
)
def test_beams_are_those_of_a_plain_search(kind, num_beams, penalty):
  (window,) = SIZES[kind].windows or (None,)
  plainly = functools.partial(search_plainly, PROMPT, sliding_window=window)
  first = plainly(num_beams=4, stop_token=-1, length_penalty=1.0)
  stop_token = first[1][1][3]  # one that beams come to
  options = {"num_beams": num_beams, "stop_token": stop_token}
  ctx = fresh(SIZES[kind])
  ctx, result = beam_search(ctx, *padded(PROMPT), length_penalty=penalty, **options)
  want = plainly(length_penalty=penalty, **options)
  assert num_beams == 1 or any(has_ended for *_, has_ended in want)
  assert result.status == Status.OK
  for i, (score, tokens, _) in enumerate(want):
    assert result.tokens[i, : len(tokens)].tolist() == tokens
    assert set(result.tokens[i, len(tokens) :].tolist()) <= {NO_TOKEN}
    assert result.lengths[i] == len(tokens)
    np.testing.assert_allclose(result.scores[i], score, rtol=1e-5)
  assert_all_given_back(ctx)
  # Asked again, the prompt is cached.
  ctx, again = beam_search(ctx, *padded(PROMPT), length_penalty=penalty, **options)
  assert again.num_cached == 20
  assert again.tokens.tolist() == result.tokens.tolist()
  assert_all_given_back(ctx)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["hybrid"])
def test_samples_are_those_of_single_requests(kind):
  params = [SamplingParams(temperature=2.0, seed=seed) for seed in range(4)]
  ctx, result = best_of(
    fresh(SIZES[kind]), *padded(PROMPT), sampling.make_settings(params)
  )
  want = toy.expected(
    [PROMPT] * 4, NUM_NEW, max_tokens_per_seq=48, stop_tokens=[3], params=params
  )
  want.sort(key=lambda one: -np.mean(one.logprobs))
  for i, one in enumerate(want):
    assert result.tokens[i, : result.lengths[i]].tolist() == one.tokens
    np.testing.assert_allclose(result.scores[i], sum(one.logprobs), rtol=1e-5)
  assert (np.diff(result.ranks) <= 0).all()
  assert_all_given_back(ctx)


@pytest.mark.thorough
def test_short_memory_loses_branches_and_says_so():
  """One of four beams finds blocks to the end; in less, the prompt does not fit."""
  sizes = toy.config(num_blocks=9, block_size=4, max_seqs=5, max_seq_len=48)
  ctx, result = beam_search(fresh(sizes), *padded(PROMPT), num_beams=4)
  assert result.status == Status.NO_BLOCKS
  assert np.isfinite(result.ranks).tolist() == [True, False, False, False]
  assert result.lengths[0] == NUM_NEW
  assert_all_given_back(ctx)
  sizes = toy.config(num_blocks=5, block_size=4, max_seqs=5, max_seq_len=48)
  ctx, result = beam_search(fresh(sizes), *padded(PROMPT), num_beams=4)
  assert result.status == Status.TOO_LONG
  assert not result.lengths.any() and (np.asarray(result.ranks) == -np.inf).all()
  assert_all_given_back(ctx)


@pytest.mark.thorough
def test_what_branches_lacked_is_told():
  """Blocks of a window, though the context has many; or rows that others hold."""
  sizes = dataclasses.replace(SIZES["window"], num_window_blocks=7)
  ctx, result = beam_search(fresh(sizes), *padded(PROMPT), num_beams=4)
  assert result.status == Status.NO_WINDOW_BLOCKS
  assert 0 < np.isfinite(result.ranks).sum() < 4 and result.lengths[0] == NUM_NEW
  assert_all_given_back(ctx)
  ctx = fresh(SIZES["attention"])
  others = jnp.ones((2, 40), jnp.int32)
  ctx, _ = jax.jit(kvcache.admit)(ctx, others, jnp.ones(2, jnp.int32))
  _, result = beam_search(ctx, *padded(PROMPT), num_beams=4)
  assert result.status == Status.NO_ROW
  assert 0 < np.isfinite(result.ranks).sum() < 4 and result.lengths[0] == NUM_NEW


def test_other_rows_are_left_alone():
  ctx = fresh(SIZES["attention"])
  ctx, admission = jax.jit(kvcache.admit)(
    ctx, padded(PROMPT)[0][None], jnp.ones(1, int)
  )
  row = admission.seq_ids[0]
  ctx, result = beam_search(ctx, *padded(PROMPT), num_beams=4)
  assert result.status == Status.OK
  assert ctx.sequences.is_active.tolist() == [s == row for s in range(5)]
  kvcache.check_invariants(ctx)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_beams": 6}, "6 branches need more than the context's rows"),
    ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"prompt": [[1, 2]]}, "prompt must have 1 dimensions"),
    ({"length": [2]}, r"length must have shape \(\)"),
  ],
)
def test_misuse_is_refused(change, message):
  arguments = {"prompt": [1, 2], "length": 2, "num_beams": 2, "max_new_tokens": 3}
  arguments |= change
  prompt, length = jnp.asarray(arguments.pop("prompt")), arguments.pop("length")
  with pytest.raises(ValueError, match=message):
    kvcache.beam_search(
      toy.model, fresh(SIZES["attention"]), prompt, jnp.asarray(length), **arguments
    )
