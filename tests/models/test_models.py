"""The Llama decoder against a NumPy model, in its variants, scanned and unrolled."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache.models import Llama, LlamaConfig
from kvcache.nn import as_function
from tests.fixtures.model_runs import (
  admit,
  context_for,
  decode,
  dense_logits,
  feed,
  greedy,
  run_step,
)
from tests.fixtures.thorough import more

BASE = LlamaConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  scan_layers=True,
)
VARIANTS = {
  "llama": {},
  "qwen2": {"attention_bias": True, "tie_embeddings": True},
  "qwen3": {"qk_norm": True, "head_dim": 4, "rope_theta": 1e6, "scan_layers": False},
  "others": {
    "num_kv_heads": 4,
    "attention_bias": True,
    "attention_out_bias": True,
    "rope_factors": (1.0, 1.0, 2.0, 8.0),
  },
}
PROMPT = np.random.default_rng(5).integers(0, 40, 30).tolist()


def make(config: LlamaConfig, *, seed: int = 0) -> Llama:
  """A model whose every weight matters: norms and biases are random, too."""
  model = Llama(config, rngs=nnx.Rngs(seed))
  graph, state = nnx.split(model)
  rng = np.random.default_rng(seed)

  def draw(path, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    is_matrix = "scale" not in name and "bias" not in name
    scale = 2 * leaf.shape[-1] ** -0.5 if is_matrix else 0.3
    values = rng.standard_normal(leaf.shape) * scale + (0.0 if is_matrix else 1.0)
    return jnp.asarray(values, leaf.dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def unstacked(model: Llama) -> Llama:
  """The same weights, a block at a time."""
  config = dataclasses.replace(model.config, scan_layers=False)
  twin = Llama(config, rngs=nnx.Rngs(0))
  stacked = nnx.state(model.layers)
  for layer, block in enumerate(twin.layers):
    nnx.update(block, jax.tree.map(lambda leaf, i=layer: leaf[i], stacked))
  twin.embedding[...] = model.embedding[...]
  twin.norm.scale[...] = model.norm.scale[...]
  if model.head is not None and twin.head is not None:
    twin.head[...] = model.head[...]
  return twin


@pytest.mark.parametrize("variant", ["others", *more("llama", "qwen2", "qwen3")])
def test_logits_equal_the_dense_model(variant):
  config = dataclasses.replace(BASE, **VARIANTS[variant])
  model = make(config)
  expected = dense_logits(model, PROMPT)
  function, ctx = as_function(model), context_for(config)
  ctx, row, _ = admit(ctx, PROMPT)
  logits, ctx = feed(function, ctx, row, PROMPT[:28])
  np.testing.assert_allclose(logits, expected[27], rtol=1e-4, atol=1e-4)
  for position in (28, 29):
    logits, ctx = decode(function, ctx, {row: PROMPT[position]})
    np.testing.assert_allclose(logits[row], expected[position], rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_scanned_and_unrolled_layers_compute_the_same():
  scanned = make(BASE)
  both = [as_function(scanned), as_function(unstacked(scanned))]
  outs = []
  for function in both:
    ctx = context_for(BASE)
    ctx, row, _ = admit(ctx, PROMPT)
    logits, ctx = feed(function, ctx, row, PROMPT)
    outs.append((logits, np.asarray(ctx.kv[0].k)))
  np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outs[0][1], outs[1][1], rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_do_not_see_each_other():
  function = as_function(make(BASE))
  other = PROMPT[::-1]
  ctx = context_for(BASE)
  ctx, a, _ = admit(ctx, PROMPT[:9])
  ctx, b, _ = admit(ctx, other[:6])
  lens = jnp.zeros(3, jnp.int32).at[a].set(9).at[b].set(6)
  packed = PROMPT[:9] + other[:6] if a < b else other[:6] + PROMPT[:9]
  tokens = jnp.asarray([*packed, 0], jnp.int32)
  together, ctx, _ = run_step(function, ctx, tokens, lens, num_tokens=16)
  for row, prompt in ((a, PROMPT[:9]), (b, other[:6])):
    alone = context_for(BASE)
    alone, where, _ = admit(alone, prompt)
    logits, _ = feed(function, alone, where, prompt)
    np.testing.assert_array_equal(together[row], logits)


def test_a_prefix_hit_gives_the_bits_of_a_miss():
  function = as_function(make(BASE))
  ctx = context_for(BASE)
  ctx, row, num_cached = admit(ctx, PROMPT)
  assert num_cached == 0
  miss, ctx = feed(function, ctx, row, PROMPT)
  ctx = kvcache.finish(ctx, jnp.arange(3) == row)
  ctx, row, num_cached = admit(ctx, PROMPT)
  assert num_cached == 28
  hit, ctx = feed(function, ctx, row, PROMPT[num_cached:])
  np.testing.assert_array_equal(hit, miss)


def test_padding_tokens_may_be_anything():
  function = as_function(make(BASE))
  outs = []
  for junk in (0, -5, 10**6):
    ctx = context_for(BASE)
    ctx, row, _ = admit(ctx, PROMPT[:3])
    lens = jnp.zeros(3, jnp.int32).at[row].set(3)
    tokens = jnp.asarray([*PROMPT[:3], junk], jnp.int32)
    logits, ctx, _ = run_step(function, ctx, tokens, lens, num_tokens=4)
    assert np.isfinite(np.asarray(logits)).all()
    outs.append((np.asarray(logits[row]), np.asarray(ctx.kv[0].v)))
  for logits, values in outs[1:]:
    np.testing.assert_array_equal(logits, outs[0][0])
    np.testing.assert_array_equal(values, outs[0][1])


@pytest.mark.thorough
def test_generate_equals_the_loop_by_hand():
  config = BASE
  function = as_function(make(config))
  expected = greedy(function, context_for(config), PROMPT[:7], 10)
  _, done = kvcache.generate(
    function, context_for(config), [PROMPT[:7]], max_new_tokens=10
  )
  assert done[0].tokens == expected
  assert len(set(expected)) > 2, "a model that repeats itself tests nothing"


@pytest.mark.thorough
def test_bfloat16_weights_give_float32_logits_close_to_float32():
  wide = make(BASE)
  config = dataclasses.replace(BASE, dtype=jnp.bfloat16)
  graph = nnx.graphdef(Llama(config, rngs=nnx.Rngs(0)))
  state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(wide))
  narrow = nnx.merge(graph, state)
  outs = []
  for model in (wide, narrow):
    ctx = context_for(model.config)
    ctx, row, _ = admit(ctx, PROMPT[:9])
    logits, ctx = feed(as_function(model), ctx, row, PROMPT[:9])
    assert logits.dtype == np.float32
    assert ctx.kv[0].k.dtype == model.config.dtype
    outs.append(logits)
  np.testing.assert_allclose(outs[0], outs[1], atol=0.15)
  assert np.abs(outs[0] - outs[1]).max() > 1e-4  # it was not float32 all along


def test_cache_layers_describe_the_model():
  layers = BASE.cache_layers()
  assert layers == (kvcache.AttentionLayer(num_kv_heads=2, head_dim=8),) * 3
  assert hash(BASE) == hash(dataclasses.replace(BASE))


# --- The shape of the program -------------------------------------------------------


def step_jaxpr(config: LlamaConfig, *, num_tokens: int | None):
  function, ctx = as_function(make(config)), context_for(config, max_seqs=2)
  tokens = jnp.zeros(2 if num_tokens is None else num_tokens, jnp.int32)
  return jax.make_jaxpr(
    lambda *args: run_step.__wrapped__(*args, num_tokens=num_tokens)
  )(function, ctx, tokens, jnp.ones(2, jnp.int32))


def is_jaxpr(value) -> bool:
  return hasattr(value, "eqns")


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
      if is_jaxpr(value):
        yield from equations(getattr(value, "jaxpr", value))


def test_only_last_tokens_reach_the_output_matrix():
  jaxpr = step_jaxpr(BASE, num_tokens=32)
  shapes = {
    variable.aval.shape for eqn in equations(jaxpr.jaxpr) for variable in eqn.outvars
  }
  assert (2, BASE.vocab_size) in shapes
  assert not [s for s in shapes if BASE.vocab_size in s and 32 in s]


def test_keys_and_values_are_carried_never_scanned_over():
  jaxpr = step_jaxpr(BASE, num_tokens=None)
  pool = (3, 64, 2, 4, 8)
  scans = [
    eqn
    for eqn in equations(jaxpr.jaxpr)
    if eqn.primitive.name == "scan"
    and pool in [variable.aval.shape for variable in eqn.invars]
  ]
  assert len(scans) == 1
  (scan,) = scans
  # What a scan goes over loses its first axis in the body; what it carries keeps it.
  body = scan.params["jaxpr"]
  body = getattr(body, "jaxpr", body)
  for outer, inner in ((scan.invars, body.invars), (scan.outvars, body.outvars)):
    pairs = [(x.aval.shape, y.aval.shape) for x, y in zip(outer, inner, strict=True)]
    assert [pair for pair in pairs if pool in pair] == [(pool, pool)] * 2  # k and v


@pytest.mark.parametrize("scan_layers", [False, *more(True)], ids=["unroll", "scan"])
def test_decoding_copies_neither_the_pool_nor_the_weights(scan_layers):
  config = dataclasses.replace(
    BASE, hidden_size=64, intermediate_size=256, vocab_size=512, scan_layers=scan_layers
  )
  function = as_function(Llama(config, rngs=nnx.Rngs(0)))
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
  block_weights = 4 * (64 * 64 + 32 * 64 + 3 * 64 * 256)
  allowed = 100_000 + scan_layers * block_weights
  assert program.memory_analysis().temp_size_in_bytes < allowed
  assert ctx.kv[0].k.nbytes + 3 * block_weights > 2 * allowed  # either copy would show
  for pool in ("f32[3,512,2,4,8]", "f32[1536,2,4,8]", "f32[512,64]"):
    copies = [line for line in program.as_text().splitlines() if f"= {pool}" in line]
    assert not [line for line in copies if " copy(" in line or " transpose(" in line]
