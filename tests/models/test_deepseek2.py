"""DeepSeek-V2 equals transformers, and a token keeps one latent for all heads."""

import dataclasses
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
from kvcache.models import DeepSeek2, LoadError
from kvcache.nn import as_function
from tests.fixtures.model_runs import admit, context_for, decode, feed, greedy, run_step
from tests.fixtures.places import GOLDENS
from tests.fixtures.thorough import more

NAMES = ("tiny_deepseek2", "tiny_deepseek2_lite")


@functools.cache
def runs(name):
  return json.loads((GOLDENS / name / "expected.json").read_text("utf-8"))["runs"]


LONG = runs(NAMES[0])[-1]


@functools.cache
def loaded(name=NAMES[0]):
  return models.load(GOLDENS / name)


@functools.cache
def function(name=NAMES[0]):
  return as_function(loaded(name).model)


def context(name=NAMES[0]):
  return context_for(loaded(name).config)


def test_the_folders_say_what_the_models_are():
  full, lite = loaded().config, loaded(NAMES[1]).config
  assert (full.q_lora_rank, lite.q_lora_rank) == (14, None)
  assert (full.num_groups, full.groups_per_token) == (3, 2)
  assert full.rope_factors is not None and len(set(full.rope_factors)) == 4
  assert full.rope_scale > 1 and (lite.rope_factors, lite.rope_scale) == (None, 1)
  # Logits are scaled besides: the root mean square of a query is part of YaRN.
  assert full.attention_multiplier == pytest.approx(
    14**-0.5 * (1 + 0.07 * np.log(8)) ** 2
  )
  assert lite.attention_multiplier == pytest.approx(14**-0.5)


def test_a_token_keeps_one_latent_and_one_rotated_key():
  config, sizes = loaded().config, context().config
  (group,) = sizes.groups
  assert group.layer == dataclasses.replace(
    loaded().model.layers[0].attention.cache_layer(), dtype=sizes.dtype
  )
  assert sizes.bytes_per_block == 4 * 3 * sizes.block_size * (12 + 8)  # float32, layers
  assert context().kv[0].v is None
  # All heads' keys and values would take more than 4 times as much.
  of_a_head = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
  assert config.num_heads * of_a_head > 4 * (12 + 8)


@pytest.mark.parametrize("name", [NAMES[0], *more(NAMES[1])])
def test_logits_equal_those_of_transformers(name):
  for run in runs(name):
    ctx, row, _ = admit(context(name), run["prompt"])
    logits, _ = feed(function(name), ctx, row, run["prompt"])
    np.testing.assert_allclose(logits, run["logits"], atol=1e-4)
  assert greedy(function(name), context(name), run["prompt"], 12) == run["tokens"]


def test_decoding_a_whole_prompt_equals_prefill():
  ctx, row, _ = admit(context(), LONG["prompt"])
  for token in LONG["prompt"]:
    logits, ctx = decode(function(), ctx, {row: token})
  np.testing.assert_allclose(logits[row], LONG["logits"], atol=1e-4)


def test_a_prefix_hit_gives_the_bits_of_a_miss():
  ctx, row, _ = admit(context(), LONG["prompt"])
  miss, ctx = feed(function(), ctx, row, LONG["prompt"])
  ctx, row, num_cached = admit(ctx, LONG["prompt"])
  assert num_cached == 56
  hit, ctx = feed(function(), ctx, row, LONG["prompt"][56:])
  np.testing.assert_array_equal(hit, miss)
  np.testing.assert_allclose(hit, LONG["logits"], atol=1e-4)


@pytest.mark.thorough
def test_rows_side_by_side_are_served_as_alone():
  prompts = [run["prompt"] for run in runs(NAMES[0])]
  ctx, out = kvcache.generate(
    function(),
    context(),
    prompts * 2,
    max_new_tokens=12,
    scheduler=kvcache.SchedulerConfig(token_budget=16),
  )
  for completion, run in zip(out, runs(NAMES[0]) * 2, strict=True):
    assert completion.tokens == run["tokens"]
  assert out[-1].num_cached > 0
  kvcache.check_invariants(ctx)


def test_padding_tokens_may_be_anything():
  prompt, outs = LONG["prompt"][:7], []
  for junk in (0, -7, 1 << 20):
    ctx, row, _ = admit(context(), prompt)
    query_lens = jnp.zeros(3, jnp.int32).at[row].set(7)
    tokens = jnp.asarray([*prompt, *[junk] * 9], jnp.int32)
    logits, ctx, _ = run_step(function(), ctx, tokens, query_lens, num_tokens=16)
    outs.append((logits[row], ctx.kv))
  for other in outs[1:]:
    jax.tree.map(np.testing.assert_array_equal, outs[0], other)


def test_narrow_weights_keep_a_wide_router():
  config = dataclasses.replace(loaded().config, dtype=jnp.bfloat16)
  model = nnx.eval_shape(lambda: DeepSeek2(config, rngs=nnx.Rngs(0)))
  dtypes = {
    jax.tree_util.keystr(path): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
  }
  wide = [name for name, dtype in dtypes.items() if dtype == jnp.float32]
  assert len(wide) == 2 and all("router" in name for name in wide)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"attention_bias": True}, "attention_bias True is not supported"),
    ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
    ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
    ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling 'linear'"),
    ({"n_routed_experts": 9}, r"misses tensors \(18\): model.layers.1.mlp.experts.6"),
    ({"n_routed_experts": 3}, r"no place for \(18\): model.layers.1.mlp.experts.3"),
    ({"q_lora_rank": None}, r"misses tensors \(3\): .*self_attn.q_proj.weight"),
    ({"moe_intermediate_size": 8}, "expert_down.weight has shape"),
    ({"kv_lora_rank": 13}, "has shape"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_loaded_is_named(tmp_path, settings, message):
  folder = Path(shutil.copytree(GOLDENS / NAMES[0], tmp_path / "model"))
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  with pytest.raises(LoadError, match=message):
    models.load(folder)


def test_settings_as_published_checkpoints_spell_them(tmp_path):
  folder = Path(shutil.copytree(GOLDENS / NAMES[0], tmp_path / "model"))
  path = folder / "config.json"
  settings = json.loads(path.read_text())
  rope = settings.pop("rope_parameters")
  theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
  old = {"rope_scaling": rope | {"type": kind}, "rope_theta": theta}
  path.write_text(json.dumps(settings | old | {"norm_topk_prob": True}))
  config = dataclasses.replace(loaded().config, normalise_scores=True)
  assert models.load(folder).config == config
  path.write_text(json.dumps(settings | {"rope_scaling": None, "rope_theta": theta}))
  config = models.load(folder).config
  assert (config.rope_theta, config.rope_factors, config.rope_scale) == (100, None, 1)


@pytest.mark.thorough
@pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="XLA:CPU of jax 0.11 copies a pool of one kv head into an equal layout",
)
def test_decoding_copies_neither_the_pool_nor_the_weights():
  config = dataclasses.replace(
    loaded(NAMES[1]).config, hidden_size=64, expert_size=128, kv_lora_rank=24
  )
  function = as_function(DeepSeek2(config, rngs=nnx.Rngs(0)))
  ctx = context_for(config, max_seqs=4, num_blocks=512)

  def loop(function, ctx, tokens):
    def body(_, state):
      ctx, tokens = state
      logits, ctx, _ = run_step.__wrapped__(
        function, ctx, tokens, jnp.ones(4, jnp.int32), num_tokens=None
      )
      return ctx, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, 5, body, (ctx, tokens))

  program = (
    jax.jit(loop, donate_argnums=1)
    .lower(function, ctx, jnp.zeros(4, jnp.int32))
    .compile()
  )
  allowed, experts = 200_000, 4 * 3 * 64 * 128 * 6
  assert program.memory_analysis().temp_size_in_bytes < allowed
  assert min(ctx.kv[0].k.nbytes, experts) > 2 * allowed  # either copy would show
  for pool in ("f32[2,512,1,4,32]", "f32[1024,1,4,32]"):
    copies = [line for line in program.as_text().splitlines() if f"= {pool}" in line]
    assert not [line for line in copies if " copy(" in line or " transpose(" in line]
