"""A real model through the real cache: the tokens that transformers generates.

Greedy tokens must be equal, whatever the cache does in between: batches, chunked
prompts, shared prefixes, preemption. No token won by less than `MARGIN` logits, far
above what another order of sums can change.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, SchedulerConfig
from kvcache.models import load
from kvcache.nn import as_function
from tests.fixtures.model_runs import run_step
from tests.fixtures.places import GOLDENS

GOLDEN = json.loads((GOLDENS / "smollm2_greedy.json").read_text("utf-8"))["runs"]
NAMES = list(GOLDEN)
PROMPTS = [GOLDEN[name]["prompt"] for name in NAMES]
MARGIN = 1e-3
SCHEDULER = SchedulerConfig(token_budget=128)
MAX_SEQS = 8
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def loaded():
  return load(scan_layers=True)


@pytest.fixture(scope="module")
def model(loaded):
  return as_function(loaded.model)


def make_context(loaded, *, num_blocks: int) -> kvcache.Context:
  config = CacheConfig(
    layers=loaded.config.cache_layers(),
    num_blocks=num_blocks,
    block_size=BLOCK_SIZE,
    max_seqs=MAX_SEQS,
    max_seq_len=384,
  )
  return kvcache.init(config)


def generate(model, ctx, names: list[str], **kwargs):
  """Serves the prompts and compares every token."""
  ctx, done = kvcache.generate(
    model,
    ctx,
    [GOLDEN[name]["prompt"] for name in names],
    max_new_tokens=[len(GOLDEN[name]["tokens"]) for name in names],
    scheduler=SCHEDULER,
    **kwargs,
  )
  kvcache.check_invariants(ctx)
  for name, completion in zip(names, done, strict=True):
    assert completion.tokens == GOLDEN[name]["tokens"], name
    assert completion.finish_reason == "length"
  return ctx, done


def test_the_goldens_are_worth_comparing_with():
  lengths = [len(prompt) for prompt in PROMPTS]
  assert min(lengths) == 1 and max(lengths) > 300 and len(lengths) >= 12
  assert all(len(run["tokens"]) == 48 for run in GOLDEN.values())
  assert min(min(run["margins"]) for run in GOLDEN.values()) > MARGIN
  starts = [tuple(prompt[:80]) for prompt in PROMPTS if len(prompt) > 80]
  assert len(starts) - len(set(starts)) >= 3  # long shared prefixes


@pytest.mark.thorough
def test_a_batch_and_then_prefix_hits(model, loaded):
  ctx = make_context(loaded, num_blocks=161)
  ctx, first = generate(model, ctx, NAMES)
  by_name = dict(zip(NAMES, first, strict=True))
  # Within the batch: the family of one prefix, and a text that repeats another one.
  assert by_name["facts"].num_cached == 0
  for name in ("facts_question", "facts_other_question", "facts_list", "story_twice"):
    assert by_name[name].num_cached >= 80, name
  assert not any(completion.num_preemptions for completion in first)
  # Once more, now that everything is cached: all but the last token of whole blocks.
  ctx, second = generate(model, ctx, NAMES)
  for name, completion in zip(NAMES, second, strict=True):
    whole_blocks = (len(GOLDEN[name]["prompt"]) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert completion.num_cached == whole_blocks, name


@pytest.mark.thorough
def test_preemption_changes_no_token(model, loaded):
  # The longest request alone needs 24 blocks; eight at once need far more than 30.
  ctx = make_context(loaded, num_blocks=31)
  _, done = generate(model, ctx, NAMES)
  assert sum(completion.num_preemptions for completion in done) >= 2


@pytest.mark.slow
def test_speculation_changes_no_token(model, loaded):
  slices = []
  names = ["counting", "facts_list", "story_twice", "code"]
  options = {"drafter": kvcache.PromptLookup(), "on_slice": slices.append}
  generate(model, make_context(loaded, num_blocks=161), names, **options)
  last = slices[-1]
  assert 0 < last.num_accepted < last.num_drafts
  # As many as a lookup by hand in the golden texts finds right.
  assert last.num_accepted == 44
  assert last.num_steps < 46  # 51 without drafts


@pytest.mark.slow
def test_alone(model, loaded):
  ctx = make_context(loaded, num_blocks=161)
  for name in ("one_token", "facts_list"):
    ctx, _ = generate(model, kvcache.reset(ctx), [name])


def test_logits_after_a_prompt_equal_those_of_transformers(model, loaded):
  names = ["capital", "code", "whitespace", "chat_system"]
  ctx = make_context(loaded, num_blocks=161)
  rows = [GOLDEN[name]["prompt"] for name in names]
  lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
  padded = np.zeros((4, 32), np.int32)
  for index, row in enumerate(rows):
    padded[index, : len(row)] = row
  ctx, admission = jax.jit(kvcache.admit)(ctx, jnp.asarray(padded), lengths)
  assert admission.seq_ids.tolist() == [0, 1, 2, 3]
  query_lens = jnp.zeros(MAX_SEQS, jnp.int32).at[:4].set(lengths)
  packed = np.zeros(SCHEDULER.token_budget, np.int32)
  packed[: sum(map(len, rows))] = np.concatenate(rows)
  logits, _, _ = run_step(
    model, ctx, jnp.asarray(packed), query_lens, num_tokens=SCHEDULER.token_budget
  )
  for index, name in enumerate(names):
    expected = GOLDEN[name]["first_logits"]
    got = np.asarray(logits[index])
    np.testing.assert_allclose(got[expected["ids"]], expected["values"], atol=2e-4)
    assert np.argsort(-got)[:5].tolist() == expected["ids"][:5]
