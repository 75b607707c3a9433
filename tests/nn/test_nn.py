"""The layers: norms, rotary embedding, products, paged attention, and `as_function`."""

import copy
import pickle

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache.models import LlamaConfig
from kvcache.nn import (
  apply_rotary,
  as_function,
  functional,
  Linear,
  llama3_factors,
  PagedAttention,
  RMSNorm,
  Rotary,
  yarn_factors,
  yarn_scale,
)
from kvcache.nn.linear import multiply
from tests.fixtures.model_runs import admit, context_for, run_step

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
  return jnp.asarray(RNG.standard_normal(shape, dtype=np.float32))


def test_functions_of_modules_can_be_pickled_and_copied():
  run = as_function(Linear(3, 2, rngs=nnx.Rngs(0)))
  x, twin = jnp.ones((1, 3)), pickle.loads(pickle.dumps(run))
  np.testing.assert_array_equal(twin(x), run(x))
  assert jax.tree.structure(twin) == jax.tree.structure(run)
  assert jax.tree.structure(copy.deepcopy(run)) == jax.tree.structure(run)
  assert repr(run) == "Partial(call_module, 1 array of 6 elements)"
  with pytest.raises(ValueError, match=r"must be an nnx\.Module, got function"):
    as_function(lambda x: x)


def test_layers_can_be_scanned_where_there_are_several_groups():
  sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "rngs": nnx.Rngs(0)}
  layer = PagedAttention(8, **sizes)
  kept = [
    kvcache.AttentionLayer(num_kv_heads=1, head_dim=4, sliding_window=window)
    for window in (None, 4)
  ]
  config = kvcache.CacheConfig(layers=(*kept, *kept), num_blocks=8, max_seqs=2)
  ctx, _ = kvcache.extend(kvcache.init(config), jnp.zeros(2, jnp.int32))
  metadata = kvcache.step_metadata(ctx, jnp.zeros(2, jnp.int32))

  def call(at, group):
    return layer(normal(2, 8), at, metadata, ctx, group=group)[0]

  run = jax.jit(call, static_argnums=1)
  for at in range(4):
    assert run(jnp.int32(at), at % 2).shape == (2, 8)
  with pytest.raises(ValueError, match="group must be given with a traced layer"):
    run(jnp.int32(0), None)


def test_rms_norm_divides_by_the_root_mean_square():
  norm = RMSNorm(4, epsilon=0.0)
  norm.scale[...] = jnp.asarray([1.0, 2.0, 3.0, 4.0])
  x = jnp.asarray([[3.0, -3.0, 3.0, -3.0], [0.0, 0.0, 2.0, 0.0]])
  expected = [[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 6.0, 0.0]]
  np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


def test_rms_norm_keeps_the_dtype_and_averages_in_float32():
  x = jnp.full((1, 512), 300.0, jnp.float16)  # 300 ** 2 overflows float16
  out = RMSNorm(512, dtype=jnp.float16)(x)
  assert out.dtype == jnp.float16
  np.testing.assert_allclose(out, 1.0, rtol=1e-3)


def test_rotary_turns_each_plane_by_position_times_frequency():
  rotary = Rotary(head_dim=4, theta=100.0)
  np.testing.assert_allclose(rotary.frequencies, [1.0, 0.1], rtol=1e-6)
  x = jnp.asarray([[[1.0, 0.0, 0.0, 1.0]]])  # planes (1, 0) and (0, 1)
  out = apply_rotary(x, rotary(jnp.asarray([2])))
  expected = [np.cos(2.0), -np.sin(0.2), np.sin(2.0), np.cos(0.2)]
  np.testing.assert_allclose(out[0, 0], expected, rtol=1e-6)


def test_rotated_products_depend_on_the_distance_alone():
  rotary = Rotary(head_dim=16)
  q, k = normal(1, 1, 16), normal(1, 1, 16)

  def score(q_position: int, k_position: int) -> float:
    turned_q = apply_rotary(q, rotary(jnp.asarray([q_position])))
    turned_k = apply_rotary(k, rotary(jnp.asarray([k_position])))
    return float(jnp.sum(turned_q * turned_k))

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
  assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_rotary_factors_divide_the_frequencies():
  plain = Rotary(head_dim=4, theta=100.0).frequencies
  scaled = Rotary(head_dim=4, theta=100.0, factors=(1.0, 8.0)).frequencies
  np.testing.assert_allclose(scaled, plain / np.asarray([1.0, 8.0]), rtol=1e-6)
  with pytest.raises(ValueError, match="head_dim // 2 = 2"):
    Rotary(head_dim=4, factors=(1.0,))
  with pytest.raises(ValueError, match="even"):
    Rotary(head_dim=3)


def test_llama3_scaling_keeps_fast_planes_and_slows_slow_ones():
  factors = np.asarray(
    llama3_factors(
      head_dim=64,
      theta=500000.0,
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position=8192,
    )
  )
  turns = 8192 * Rotary(head_dim=64, theta=500000.0).frequencies / (2 * np.pi)
  np.testing.assert_allclose(factors[turns > 4.0], 1.0, rtol=1e-6)
  np.testing.assert_allclose(factors[turns < 1.0], 8.0, rtol=1e-6)
  between = factors[(turns > 1.0) & (turns < 4.0)]
  assert between.size and (between > 1.0).all() and (between < 8.0).all()


def test_yarn_blends_from_kept_planes_to_divided_ones():
  sizes = {"head_dim": 64, "theta": 10000.0, "factor": 40.0}
  factors = np.asarray(yarn_factors(**sizes, original_max_position=4096))
  turns = 4096 * Rotary(head_dim=64).frequencies / (2 * np.pi)
  np.testing.assert_allclose(factors[turns > 32 * 1.4], 1.0, rtol=1e-6)
  np.testing.assert_allclose(factors[turns < 1 / 1.4], 40.0, rtol=1e-6)
  assert (np.diff(factors) >= 0).all() and len(set(factors)) > 10
  # Without whole planes the blend begins at exactly `beta_fast` turns.
  exact = yarn_factors(**sizes, original_max_position=4096, truncate=False)
  assert ((np.asarray(exact) > 1.0) == (turns < 32)).all()
  # Nothing to blend between: a step.
  ends = {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}
  step = yarn_factors(**sizes, original_max_position=4096, **ends)
  np.testing.assert_allclose(step, np.where(turns < 4, 40.0, 1.0), rtol=1e-6)


def test_yarn_lengthens_what_is_turned():
  assert yarn_scale(1.0) == yarn_scale(0.5) == 1.0
  assert yarn_scale(np.e) == pytest.approx(1.1)
  assert yarn_scale(np.e, 0.5) == pytest.approx(1.05)
  x, at = normal(1, 1, 4), jnp.asarray([3])
  long = apply_rotary(x, Rotary(head_dim=4, scale=1.5)(at))
  plain = apply_rotary(x, Rotary(head_dim=4)(at))
  np.testing.assert_allclose(long, 1.5 * plain, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 40])
def test_multiply_is_a_product_with_the_transposed_weight(rows):
  x, weight = normal(rows, 24), normal(40, 24)
  exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
  np.testing.assert_allclose(jax.jit(multiply)(x, weight), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 16, 64])
def test_a_row_has_the_same_bits_wherever_it_stands(rows):
  x, weight, row = normal(rows, 96), normal(160, 96), normal(96)
  product = jax.jit(multiply)
  outs = [product(x.at[i].set(row), weight)[i] for i in (0, rows // 2, rows - 1)]
  outs.append(product(jnp.zeros_like(x).at[0].set(row), weight)[0])
  for out in outs[1:]:
    np.testing.assert_array_equal(out, outs[0])


def test_linear_adds_its_bias_and_keeps_the_dtype():
  linear = Linear(8, 3, use_bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert linear.bias is not None
  linear.bias[...] = jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16)
  out = linear(jnp.zeros((2, 8), jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out.astype(jnp.float32), [[1.0, 2.0, 3.0]] * 2)


# --- Paged attention ----------------------------------------------------------------

ATTENTION = LlamaConfig(
  vocab_size=1,
  hidden_size=12,
  intermediate_size=1,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)


def make_attention(**kwargs) -> PagedAttention:
  return PagedAttention(
    12, num_heads=4, num_kv_heads=2, head_dim=8, rngs=nnx.Rngs(1), **kwargs
  )


def attend_step(module: PagedAttention, inputs: jax.Array, layer: int):
  """A model whose tokens index rows of `inputs`, to reuse the steps of models."""
  function = as_function(module)

  def model(function, inputs, tokens, metadata, ctx):
    return function(inputs[tokens], layer, metadata, ctx)

  return jax.tree_util.Partial(model, function, inputs)


def dense_attention(module: PagedAttention, x: np.ndarray) -> np.ndarray:
  """One causal sequence without cache, `[tokens, features]`."""
  length = x.shape[0]
  qkv = module.qkv(jnp.asarray(x)).reshape(length, -1, 8)
  q, k, v = jnp.split(qkv, (4, 6), axis=1)
  if module.q_norm is not None and module.k_norm is not None:
    q, k = module.q_norm(q), module.k_norm(k)
  if module.rotary is not None:
    rotation = module.rotary(jnp.arange(length))
    q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
  q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
  out = np.zeros((length, 4, 8))
  for t in range(length):
    for head in range(4):
      scores = k[: t + 1, head // 2] @ q[t, head] / np.sqrt(8)
      weights = np.exp(scores - scores.max())
      out[t, head] = weights @ v[: t + 1, head // 2] / weights.sum()
  flat = jnp.asarray(out.reshape(length, -1), jnp.float32)
  return np.asarray(module.out(flat))


@pytest.mark.parametrize(
  "kwargs",
  [
    {},
    {"rotary": Rotary(head_dim=8)},
    {"rotary": Rotary(head_dim=8), "use_bias": True, "qk_norm": True},
  ],
  ids=["plain", "rotary", "qwen"],
)
def test_paged_attention_equals_dense_attention(kwargs):
  module = make_attention(**kwargs)
  if module.qkv.bias is not None:
    module.qkv.bias[...] = normal(64)
  inputs = normal(30, 12)
  model = attend_step(module, inputs, layer=1)
  first, second = list(range(11)), list(range(20, 30))
  ctx = context_for(ATTENTION)
  ctx, a, _ = admit(ctx, first)
  ctx, b, _ = admit(ctx, second)
  # Both rows in one packed step, then the rest of each, one token a row and step.
  lens = jnp.zeros(3, jnp.int32).at[a].set(9).at[b].set(6)
  tokens = jnp.asarray([*first[:9], *second[:6], 0], jnp.int32)
  out, ctx, _ = run_step(model, ctx, tokens, lens, num_tokens=16)
  got = {a: list(np.asarray(out[:9])), b: list(np.asarray(out[9:15]))}
  for step in range(4):
    rest = {
      row: r[step] for row, r in ((a, first[9:]), (b, second[6:])) if step < len(r)
    }
    lens = jnp.zeros(3, jnp.int32).at[jnp.asarray(list(rest))].set(1)
    tokens = (
      jnp.zeros(3, jnp.int32)
      .at[jnp.asarray(list(rest))]
      .set(jnp.asarray(list(rest.values()), jnp.int32))
    )
    out, ctx, _ = run_step(model, ctx, tokens, lens, num_tokens=None)
    for row in rest:
      got[row].append(np.asarray(out[row]))
  for row, ids in ((a, first), (b, second)):
    expected = dense_attention(module, np.asarray(inputs)[ids])
    np.testing.assert_allclose(np.stack(got[row]), expected, rtol=2e-5, atol=2e-5)


def test_paged_attention_writes_its_own_layer_only():
  ctx = context_for(ATTENTION)
  ctx, row, _ = admit(ctx, [1, 2, 3])
  lens = jnp.zeros(3, jnp.int32).at[row].set(3)
  model = attend_step(make_attention(), normal(5, 12), layer=1)
  _, ctx, _ = run_step(
    model, ctx, jnp.arange(16, dtype=jnp.int32) % 5, lens, num_tokens=16
  )
  written = [
    np.count_nonzero(np.asarray(ctx.kv[0].k[layer]).any(-1)) for layer in (0, 1)
  ]
  assert written == [0, 3 * 2]  # tokens times kv heads


def test_paged_attention_takes_a_traced_layer_and_a_shared_rotation():
  module = make_attention(rotary=Rotary(head_dim=8))
  ctx = context_for(ATTENTION)
  ctx, row, _ = admit(ctx, [1, 2, 3])
  lens = jnp.zeros(3, jnp.int32).at[row].set(3)
  x, function = normal(4, 12), as_function(module)

  @jax.jit
  def both(function, ctx, layer):
    room, _ = kvcache.extend(ctx, lens, num_tokens=4)
    metadata = kvcache.step_metadata(room, lens, num_tokens=4)
    rotation = Rotary(head_dim=8)(metadata.positions)
    return (
      function(x, 1, metadata, room),
      function(x, layer, metadata, room, rotation=rotation),
    )

  (out, after), (traced, traced_after) = both(function, ctx, jnp.int32(1))
  np.testing.assert_allclose(traced, out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(traced_after.kv[0].k, after.kv[0].k, rtol=1e-5, atol=1e-6)


def test_query_heads_must_be_a_multiple_of_kv_heads():
  with pytest.raises(ValueError, match="multiple of num_kv_heads, got 3 and 2"):
    PagedAttention(12, num_heads=3, num_kv_heads=2, head_dim=8, rngs=nnx.Rngs(0))


# --- as_function --------------------------------------------------------------------


def test_as_function_does_what_the_module_does():
  module = Linear(4, 5, use_bias=True, rngs=nnx.Rngs(0))
  x = normal(3, 4)
  np.testing.assert_array_equal(as_function(module)(x), module(x))


def test_as_function_holds_exactly_the_arrays_as_leaves():
  module = Linear(4, 5, use_bias=True, rngs=nnx.Rngs(0))
  leaves = jax.tree.leaves(as_function(module))
  assert sorted(leaf.shape for leaf in leaves) == [(5,), (5, 4)]
  doubled = jax.tree.map(lambda leaf: 2 * leaf, as_function(module))
  x = normal(3, 4)
  np.testing.assert_allclose(doubled(x), 2 * module(x), rtol=1e-6)


def test_as_function_bakes_no_array_into_the_program():
  function = as_function(Linear(4, 5, rngs=nnx.Rngs(0)))
  jaxpr = jax.make_jaxpr(lambda function, x: function(x))(function, normal(3, 4))
  assert not jaxpr.consts
  assert len(jaxpr.jaxpr.invars) == 2


def test_one_trace_serves_every_call_and_every_set_of_weights():
  modules = [Linear(4, 5, rngs=nnx.Rngs(seed)) for seed in (0, 1)]

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(function, x):
    return function(x)

  x = normal(3, 4)
  for module in modules + modules:
    np.testing.assert_allclose(run(as_function(module), x), module(x), rtol=1e-6)
  with pytest.raises(AssertionError, match="traced"):
    run(as_function(Linear(4, 5, use_bias=True, rngs=nnx.Rngs(0))), x)


def test_a_loop_of_calls_rebuilds_the_module_only_when_traced(monkeypatch):
  merges = []
  merge = nnx.merge
  monkeypatch.setattr(
    functional.nnx, "merge", lambda *args: merges.append(1) or merge(*args)
  )
  function = as_function(Linear(6, 6, rngs=nnx.Rngs(3)))

  @jax.jit
  def loop(function, x):
    return jax.lax.fori_loop(0, 10, lambda _, x: jnp.tanh(function(x)), x)

  loop(function, normal(3, 6))
  num_traced = len(merges)
  assert 1 <= num_traced <= 2  # `fori_loop` may look at its body twice
  for _ in range(5):
    loop(function, normal(3, 6))
  assert len(merges) == num_traced
