"""The Granite 4 hybrid equals transformers, however a text is cut into steps."""

import functools
import json
from pathlib import Path
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import models
from kvcache.models import GraniteHybridConfig, LoadError
from kvcache.nn import as_function, Mamba2
from tests.fixtures.model_runs import admit, decode, feed, greedy
from tests.fixtures.places import GOLDENS
from tests.fixtures.thorough import more

FOLDER = GOLDENS / "tiny_granite_hybrid"
RUNS = json.loads((FOLDER / "expected.json").read_text("utf-8"))["runs"]
LONG = RUNS[-1]


@functools.cache
def loaded():
  return models.load(FOLDER)


def context(**sizes):
  fields = {"num_blocks": 64, "block_size": 4, "max_seqs": 3, "max_seq_len": 128}
  layers = loaded().config.cache_layers()
  return kvcache.init(kvcache.CacheConfig(layers=layers, **fields | sizes))


@functools.cache
def function():
  return as_function(loaded().model)


def test_the_folder_says_what_the_model_is():
  config = loaded().config
  assert config.layer_types == ("mamba", "attention", "mamba", "mamba")
  assert config.dt_limit == (0.0, np.inf) and config.mamba_groups == 2
  sizes = context().config
  assert (sizes.num_layers, sizes.num_recurrent_layers) == (1, 3)
  assert sizes.recurrent_layer == loaded().model.layers[0].mixer.cache_layer()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{len(run['prompt'])} tokens")
@pytest.mark.parametrize("num_tokens", [16, *more(64, 5)])
def test_logits_equal_those_of_transformers(run, num_tokens):
  ctx, row, _ = admit(context(), run["prompt"])
  logits, ctx = feed(function(), ctx, row, run["prompt"], num_tokens=num_tokens)
  np.testing.assert_allclose(logits, run["logits"], atol=1e-4)


def test_decoding_equals_transformers():
  assert greedy(function(), context(), LONG["prompt"], 12) == LONG["tokens"]


def test_decoding_a_whole_prompt_equals_prefill():
  ctx, row, _ = admit(context(), LONG["prompt"])
  for token in LONG["prompt"]:
    logits, ctx = decode(function(), ctx, {row: token})
  np.testing.assert_allclose(logits[row], LONG["logits"], atol=1e-4)


@pytest.mark.thorough
def test_logits_after_a_prefix_hit_are_the_same():
  """The state is restored where the K/V are, between chunks of any size."""
  ctx = context(snapshot_interval=1, num_snapshots=16)
  ctx, row, _ = admit(ctx, LONG["prompt"])
  first, ctx = feed(function(), ctx, row, LONG["prompt"], num_tokens=4)
  ctx, row, num_cached = admit(ctx, LONG["prompt"])
  assert num_cached == 56
  second, ctx = feed(function(), ctx, row, LONG["prompt"][56:], num_tokens=4)
  np.testing.assert_array_equal(second, first)
  np.testing.assert_allclose(second, LONG["logits"], atol=1e-4)
  kvcache.check_invariants(ctx)


@pytest.mark.thorough
def test_rows_side_by_side_are_served_as_alone():
  prompts = [run["prompt"] for run in RUNS]
  ctx, out = kvcache.generate(
    function(),
    context(num_snapshots=8),
    prompts * 3,
    max_new_tokens=12,
    scheduler=kvcache.SchedulerConfig(token_budget=16),
  )
  for completion, run in zip(out, RUNS * 3, strict=True):
    assert completion.tokens == run["tokens"]
  assert out[-1].num_cached > 0
  kvcache.check_invariants(ctx)


@pytest.mark.thorough
def test_speculation_changes_no_token():
  """Drafts that were right and wrong, in texts that repeat themselves."""
  prompts, slices = [run["prompt"] for run in RUNS], []
  ctx, out = kvcache.generate(
    function(),
    context(max_drafts=3, num_snapshots=16),
    prompts * 2,
    max_new_tokens=12,
    scheduler=kvcache.SchedulerConfig(token_budget=16),
    drafter=kvcache.PromptLookup(num_drafts=3, ngram=1),
    on_slice=slices.append,
  )
  for completion, run in zip(out, RUNS * 2, strict=True):
    assert completion.tokens == run["tokens"]
  assert slices[-1].num_drafts > slices[-1].num_accepted > 0
  kvcache.check_invariants(ctx)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_local_experts": 4}, "mixtures of experts are not supported"),
    ({"attention_bias": True}, "biases of a hybrid's attention are not supported"),
    ({"mamba_d_state": 13}, "conv_bias has shape"),
    ({"layer_types": ["mamba"] * 4}, "misses tensors"),
  ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, settings, message):
  folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  with pytest.raises(LoadError, match=message):
    models.load(folder)


def test_layer_types_are_checked():
  fields = loaded().config.__dict__ | {"layer_types": ("mamba", "rwkv")}
  with pytest.raises(ValueError, match=r"'mamba' or 'attention', got \{'rwkv'\}"):
    GraniteHybridConfig(**fields)
  with pytest.raises(ValueError, match="num_heads must be a multiple of num_groups"):
    Mamba2(8, num_heads=3, head_dim=2, state_size=2, num_groups=2, rngs=nnx.Rngs(0))


def test_junk_in_padding_has_no_influence():
  ctx, row, _ = admit(context(), LONG["prompt"][:7])
  query_lens = jnp.zeros(3, jnp.int32).at[row].set(7)
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=16)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=16)
  run = jax.jit(function())
  results = []
  for junk in (0, 95, -7, 1 << 20):
    tokens = jnp.full(16, junk, jnp.int32).at[:7].set(jnp.asarray(LONG["prompt"][:7]))
    logits, after = run(tokens, metadata, ctx)
    results.append((logits[row], after.states, after.kv))
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, results[0], other)
