"""Tests of the samplers: exact filters, right frequencies, and no neighbours."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kvcache.serving import sampling
from kvcache.serving.sampling import SamplingParams

NAN, INF = math.nan, math.inf
FULL = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, seed=3)


@pytest.fixture(autouse=True)
def strict():
  """Nothing here may lean on implicit promotion, of dtypes or of ranks."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


# A sampler with both searches takes a second to compile, so tests share two programs.
ROWS, VOCAB = 8, 1001
SAMPLE = jax.jit(sampling.sample)
FILTER = jax.jit(sampling.filter_logits)
DRAW = jax.jit(functools.partial(sampling.sample, use_top_k=False, use_top_p=False))


def settings_of(*params):
  return sampling.make_settings(params)


def padded(logits, rows):
  """Fills up with forbidden tokens and with rows that nobody reads."""
  logits = np.asarray(logits, np.float32)
  padding = [(0, rows - logits.shape[0]), (0, VOCAB - logits.shape[1])]
  return jnp.asarray(np.pad(logits, padding, constant_values=-INF))


def run_sample(logits, *params, positions=0):
  count = len(params)
  settings = settings_of(*params, *[SamplingParams()] * (ROWS - count))
  positions = np.pad(np.broadcast_to(positions, count), (0, ROWS - count))
  tokens = SAMPLE(padded(logits, ROWS), settings, jnp.asarray(positions, jnp.int32))
  return np.asarray(tokens)[:count]


def kept(logits, params):
  """Tokens that the filters keep, for one row."""
  filtered = FILTER(padded(np.asarray(logits)[None], 1), settings_of(params))
  return np.flatnonzero(np.asarray(filtered[0]) > -INF)


def reference_kept(logits, params):
  """The same by sorting, in float64: (kept tokens, distance of top-p from a tie)."""
  x = np.asarray(logits, np.float32).astype(np.float64)
  x = np.where(np.isnan(x), -INF, x)
  order = np.argsort(-x, kind="stable")
  if params.top_k:
    order = order[x[order] >= x[order[min(params.top_k, len(order)) - 1]]]
  weights = np.exp((x[order] - x.max()) / params.temperature)
  before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
  margin = 1.0
  if params.top_p < 1:
    top_p = float(np.float32(params.top_p))
    margin = np.abs(before - top_p).min()
    last = order[np.flatnonzero(before < top_p)[-1]]
    order = order[x[order] >= x[last]]
  weights = np.exp((x[order] - x.max()) / params.temperature)
  margin = min(margin, np.abs(weights - params.min_p).min())
  return np.sort(order[weights >= params.min_p]), margin


def random_params(rng):
  return SamplingParams(
    temperature=float(rng.choice([0.05, 0.3, 0.7, 1.0, 1.5, 20.0])),
    top_k=int(rng.choice([0, 1, 2, 5, 40, 999, 1000, 5000])),
    top_p=float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0])),
    min_p=float(rng.choice([0.0, 0.0, 0.01, 0.2, 1.0])),
    seed=int(rng.integers(2**32)),
  )


def logits_like(kind, rng, vocab_size=VOCAB):
  normal = rng.normal(size=vocab_size).astype(np.float32)
  match kind:
    case "normal":
      return normal * 3
    case "huge":  # overflows when divided by a small temperature
      return normal * np.float32(1e37)
    case "tiny":  # all nearly equal, signs mixed
      return normal * np.float32(1e-30)
    case "adjacent":  # neighbours among the float32 numbers
      bits = np.float32(7.0).view(np.uint32) + np.arange(vocab_size, dtype=np.uint32)
      return rng.permutation(bits).view(np.float32)
    case "ties":
      return rng.integers(-3, 3, vocab_size).astype(np.float32)
    case "peaked":
      return np.where(np.arange(vocab_size) == 7, np.float32(50), normal)
    case "masked":  # a grammar, say, forbids most tokens
      return np.where(rng.random(vocab_size) < 0.9, np.float32(-INF), normal)
    case "poisoned":
      return np.where(rng.random(vocab_size) < 0.5, np.float32(NAN), normal)
  raise ValueError(kind)


@pytest.mark.parametrize(
  "kind",
  ["normal", "huge", "tiny", "adjacent", "ties", "peaked", "masked", "poisoned"],
)
def test_filters_keep_what_sorting_keeps(kind):
  rng = np.random.default_rng(len(kind))
  num_compared = 0
  for _ in range(60):
    logits, params = logits_like(kind, rng), random_params(rng)
    expected, margin = reference_kept(logits, params)
    if margin < 3e-6:  # float32 cannot tell: too near a tie with top_p or min_p
      continue
    num_compared += 1
    got = kept(logits, params)
    # A token of the reference may be forbidden altogether: -inf is never kept.
    expected = expected[np.asarray(logits)[expected] > -INF]
    np.testing.assert_array_equal(got, expected, err_msg=str(params))
  assert num_compared >= 20


def test_top_k_is_exact_at_the_size_of_a_real_vocabulary():
  logits = np.random.default_rng(0).normal(size=49152).astype(np.float32)
  ranked = np.argsort(-logits)
  run = jax.jit(functools.partial(sampling.filter_logits, use_top_p=False))
  for top_k in (1, 3, 1000, 49151):
    params = SamplingParams(temperature=1.0, top_k=top_k)
    filtered = run(jnp.asarray(logits[None]), settings_of(params))[0]
    assert set(np.flatnonzero(filtered > -INF)) == set(ranked[:top_k])


def test_top_p_is_exact_at_the_size_of_a_real_vocabulary():
  # Flat logits are the hard case: thousands of tokens of nearly the same mass.
  logits = np.random.default_rng(1).normal(size=49152).astype(np.float32) * 0.1
  run = jax.jit(functools.partial(sampling.filter_logits, use_top_k=False))
  for top_p in (0.5, 0.9, 0.999):
    params = SamplingParams(temperature=1.0, top_p=top_p)
    expected, _ = reference_kept(logits, params)
    filtered = run(jnp.asarray(logits[None]), settings_of(params))[0]
    assert abs(int((filtered > -INF).sum()) - len(expected)) <= 1


def test_filters_by_hand():
  logits = np.log([0.5, 0.25, 0.125, 0.125]).astype(np.float32)

  def tokens(**kwargs):
    return list(kept(logits, SamplingParams(temperature=1.0, **kwargs)))

  assert tokens() == [0, 1, 2, 3]
  assert tokens(top_k=2) == [0, 1]
  assert tokens(top_k=3) == [0, 1, 2, 3]  # token 3 ties with token 2
  assert tokens(top_p=0.4) == [0]  # the token that reaches top_p is kept
  assert tokens(top_p=0.6) == [0, 1]
  assert tokens(top_p=0.8) == [0, 1, 2, 3]  # the tie again
  assert tokens(min_p=0.4) == [0, 1]
  assert tokens(min_p=1.0) == [0]
  # Top-p counts mass among what top-k left: 2/3 of it is token 0.
  assert tokens(top_k=2, top_p=0.66) == [0]
  assert tokens(top_p=0.66) == [0, 1]
  # Temperature comes first: it makes token 0 rarer, so top-p needs more tokens.
  assert list(kept(logits, SamplingParams(temperature=4.0, top_p=0.6))) == [0, 1, 2, 3]


def test_filtered_logits_are_tempered_and_relative_to_the_likeliest():
  params = SamplingParams(temperature=2.0, top_k=2)
  got = FILTER(padded([[3.0, 1.0, -2.0]], 1), settings_of(params))
  np.testing.assert_array_equal(np.asarray(got)[:, :3], [[0.0, -1.0, -INF]])


@pytest.mark.parametrize("vocab_size", [1, 2, 128, 49152])
def test_mass_in_fixed_point_nearly_fills_int32(vocab_size):
  weights = np.random.default_rng(0).random((6, vocab_size)).astype(np.float32) ** 8
  weights[0], weights[1] = 1.0, 1e-20
  weights[:, 0] = 1.0
  masses = np.asarray(jax.jit(sampling._fixed_point)(weights)).astype(np.int64)
  assert (masses >= 0).all()
  assert (masses.sum(axis=1) < 2**31).all()
  assert (masses.sum(axis=1) > 2**31 * 0.999).all()
  weights = weights.astype(np.float64)
  expected = weights / weights.sum(axis=1, keepdims=True)
  got = masses / masses.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2.0**-31)


@pytest.mark.parametrize("shape", [(3, 50), (1, 1)])
def test_gpus_count_what_the_cpu_counts(shape):
  """The two forms of one search; a program has one of them, by its platform."""
  rng = np.random.default_rng(11)
  keys = jnp.asarray(rng.integers(2**32, size=(3, 50), dtype=np.uint32))
  amounts = jnp.asarray(rng.integers(1, 99, size=shape), jnp.int32)
  candidates = jnp.sort(keys[:, [4, 8, 15]], axis=1)
  at_once = sampling._sums_at_once(keys, amounts, candidates)
  by_row = sampling._sums_by_row(keys, amounts, candidates)
  np.testing.assert_array_equal(np.asarray(at_once), np.asarray(by_row))
  assert (np.asarray(by_row) > 0).all() and len(np.unique(by_row)) > 3
  scores = jnp.asarray(rng.integers(5, size=(9, 50)), jnp.float32).at[0].set(-INF)
  by_pairs, by_two = sampling._argmax_by_pairs(scores), sampling._argmax_by_two(scores)
  np.testing.assert_array_equal(np.asarray(by_pairs), np.asarray(by_two))
  np.testing.assert_array_equal(by_pairs, np.argmax(scores, axis=1))
  assert by_pairs.dtype == by_two.dtype == jnp.int32


def test_sortable_keeps_order_and_has_one_zero():
  values = np.array(
    [-INF, -3e38, -2.0, -1.5, -1e-37, -0.0, 0.0, 1e-37, 1.5, 2.0, 3e38, INF], np.float32
  )
  images = np.asarray(sampling._sortable(jnp.asarray(values))).astype(np.int64)
  assert images[5] == images[6]
  assert (np.diff(np.delete(images, 5)) > 0).all()
  assert images[0] > 0


@pytest.mark.parametrize(
  "params",
  [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=0.5, top_k=6),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.2, top_k=9, top_p=0.9, min_p=0.05),
  ],
  ids=str,
)
def test_frequencies_follow_the_filtered_distribution(params):
  num_draws, vocab_size = 20_000, 12
  row = np.random.default_rng(5).normal(size=vocab_size).astype(np.float32) * 1.5
  logits = jnp.broadcast_to(jnp.asarray(row), (num_draws, vocab_size))
  settings = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_draws,)), settings_of(params)
  )
  # One request that draws at many positions, then many requests at one position.
  positions = jnp.arange(num_draws, dtype=jnp.int32)
  by_position = SAMPLE(logits, settings, positions)
  settings = settings.replace(seed=positions.astype(jnp.uint32))
  by_seed = SAMPLE(logits, settings, jnp.full_like(positions, 9))

  expected, _ = reference_kept(row, params)
  weights = np.exp(row[expected].astype(np.float64) / params.temperature)
  for tokens in (by_position, by_seed):
    counts = np.bincount(np.asarray(tokens), minlength=vocab_size)
    assert counts.sum() == counts[expected].sum()  # nothing that was filtered out
    frequencies = num_draws * weights / weights.sum()
    assert scipy.stats.chisquare(counts[expected], frequencies).pvalue > 0.01


def test_rare_tokens_are_drawn_as_often_as_they_should():
  # Half the mass is in 2^16 tokens of 2^-17 each: the tail of the noise decides.
  logits = np.full((100, 2**16 + 1), -17 * math.log(2.0), np.float32)
  logits[:, -1] = -math.log(2.0)
  settings = settings_of(
    *[SamplingParams(temperature=1.0, seed=seed) for seed in range(100)]
  )
  tokens = [
    DRAW(jnp.asarray(logits), settings, jnp.full(100, position, jnp.int32))
    for position in range(8)
  ]
  tokens = np.concatenate(tokens)
  num_rare = int((tokens < 2**16).sum())
  assert scipy.stats.binomtest(num_rare, 800, 0.5).pvalue > 0.01
  assert len(set(tokens[tokens < 2**16])) == pytest.approx(num_rare, abs=5)


def test_noise_is_that_of_jax_random():
  seeds = jnp.asarray(np.array([0, 1, 2**31, 2**32 - 1], np.uint32))
  positions = jnp.asarray([0, 7, 100_000, 2**31 - 1], jnp.int32)
  noise = np.asarray(sampling._gumbel(seeds, positions, 257))
  for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    with jax.threefry_partitionable(True):
      bits = np.asarray(jax.random.bits(key, (257,), "uint32"))
    uniform = np.minimum((bits + 0.5) / 2.0**32, 1 - 2.0**-24)
    np.testing.assert_allclose(
      noise[row], -np.log(-np.log1p(-uniform)), rtol=1e-5, atol=1e-5
    )


def test_tokens_do_not_depend_on_neighbours_row_or_batch_size():
  rng = np.random.default_rng(11)
  for trial in range(24):
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    params = [random_params(rng) for _ in range(ROWS)]
    positions = rng.integers(0, 5000, ROWS).astype(np.int32)
    together = run_sample(logits, *params, positions=positions)
    moved = rng.permutation(ROWS)
    shuffled = run_sample(
      logits[moved], *[params[i] for i in moved], positions=positions[moved]
    )
    np.testing.assert_array_equal(shuffled, together[moved])
    row = trial % ROWS
    alone = SAMPLE(
      jnp.asarray(logits[row : row + 1]),
      settings_of(params[row]),
      jnp.asarray(positions[row : row + 1]),
    )
    assert alone[0] == together[row]


def test_filtered_logits_have_the_same_bits_alone_and_in_a_batch():
  logits = np.random.default_rng(2).normal(size=(ROWS, VOCAB)).astype(np.float32) * 4
  together = np.asarray(FILTER(jnp.asarray(logits), settings_of(*[FULL] * ROWS)))
  for row in range(ROWS):
    alone = np.asarray(FILTER(jnp.asarray(logits[row : row + 1]), settings_of(FULL)))
    np.testing.assert_array_equal(
      alone[0].view(np.uint32), together[row].view(np.uint32)
    )


def test_seed_and_position_each_change_the_token():
  logits = np.zeros((3, 1000), np.float32)
  params = [SamplingParams(temperature=1.0, seed=seed) for seed in (1, 2, 1)]
  assert len(set(run_sample(logits, *params, positions=[4, 4, 5]))) == 3
  again = [SamplingParams(temperature=1.0, seed=1)] * 3
  assert len(set(run_sample(logits, *again))) == 1


def test_temperature_zero_is_greedy_among_rows_that_are_not():
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(6, 300)).astype(np.float32)
  logits[0, [7, 9]] = 99.0  # a tie: the smaller id
  cold = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5, seed=8)
  hot = SamplingParams(temperature=50.0, seed=8)
  tokens = run_sample(logits, cold, hot, cold, hot, cold, hot)
  expected = np.argmax(logits, axis=1)
  np.testing.assert_array_equal(tokens[::2], expected[::2])
  assert (tokens[1::2] != expected[1::2]).any()
  greedy = sampling.greedy(
    jnp.asarray(logits), settings_of(*[hot] * 6), jnp.zeros(6, jnp.int32)
  )
  np.testing.assert_array_equal(np.asarray(greedy), expected)
  assert greedy.dtype == jnp.int32
  assert tokens.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_too(temperature):
  logits = np.random.default_rng(6).normal(size=(8, 500)).astype(np.float32) * 1e3
  params = [SamplingParams(temperature=temperature, seed=i) for i in range(8)]
  np.testing.assert_array_equal(run_sample(logits, *params), logits.argmax(axis=1))


@pytest.mark.parametrize(
  "params", [SamplingParams(), SamplingParams(temperature=1.0), FULL], ids=str
)
def test_nan_and_infinity_have_a_defined_outcome(params):
  logits = np.array(
    [
      [NAN, NAN, NAN, NAN],  # nothing to choose from: token 0
      [-INF, -INF, -INF, -INF],
      [NAN, -INF, -5.0, NAN],  # the only real token
      [0.0, INF, 3.0, NAN],
      [-3e38, NAN, -INF, -INF],
    ],
    np.float32,
  )
  assert list(run_sample(logits, *[params] * 5)) == [0, 0, 2, 1, 0]


def test_several_infinities_are_equally_likely():
  logits = np.tile(np.array([0.0, INF, 5.0, INF], np.float32), (400, 1))
  settings = settings_of(
    *[SamplingParams(temperature=1.0, seed=seed) for seed in range(400)]
  )
  tokens = DRAW(jnp.asarray(logits), settings, jnp.zeros(400, jnp.int32))
  counts = np.bincount(np.asarray(tokens), minlength=4)
  assert counts[[0, 2]].sum() == 0
  assert scipy.stats.binomtest(int(counts[1]), 400, 0.5).pvalue > 0.01


def test_bfloat16_logits_are_read_as_float32():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.bfloat16)
  settings, positions = settings_of(FULL, FULL), jnp.asarray([1, 2], jnp.int32)
  for sampler in (DRAW, sampling.greedy):
    np.testing.assert_array_equal(
      np.asarray(sampler(logits, settings, positions)),
      np.asarray(sampler(logits.astype(jnp.float32), settings, positions)),
    )


def test_vmap_gives_the_tokens_of_each_batch():
  rng = np.random.default_rng(7)
  logits = jnp.asarray(rng.normal(size=(2, ROWS, VOCAB)).astype(np.float32))
  params = [random_params(rng) for _ in range(ROWS)]
  settings, positions = settings_of(*params), jnp.arange(ROWS, dtype=jnp.int32)
  mapped = jax.jit(jax.vmap(sampling.sample, in_axes=(0, None, None)))
  got = np.asarray(mapped(logits, settings, positions))
  for i in range(2):
    expected = SAMPLE(logits[i], settings, positions)
    np.testing.assert_array_equal(got[i], np.asarray(expected))


@pytest.mark.thorough
def test_eager_and_jit_agree():
  logits = jnp.asarray(np.random.default_rng(7).normal(size=(1, 5)), jnp.float32)
  args = (logits, settings_of(FULL), jnp.zeros(1, jnp.int32))
  assert sampling.sample(*args) == SAMPLE(*args)


@pytest.mark.thorough
def test_tokens_are_the_same_with_64_bits():
  rng = np.random.default_rng(11)
  logits = rng.normal(size=(3, 50)).astype(np.float32)
  params = [FULL, SamplingParams(temperature=0.7, top_k=4, seed=3), SamplingParams()]
  with jax.enable_x64(True):
    wide = jax.jit(sampling.sample)(
      jnp.asarray(logits), settings_of(*params), jnp.arange(3, dtype=jnp.int32)
    )
  want = SAMPLE(jnp.asarray(logits), settings_of(*params), jnp.arange(3))
  assert wide.dtype == jnp.int32 and wide.tolist() == want.tolist()


def primitives(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      inner = getattr(leaf, "jaxpr", leaf)
      if hasattr(inner, "eqns"):
        yield from primitives(inner)


def test_sample_is_straight_line_code():
  settings, positions = settings_of(FULL), jnp.zeros(1, jnp.int32)
  traced = SAMPLE.trace(jnp.zeros((1, 64)), settings, positions)
  listed = list(primitives(traced.jaxpr.jaxpr))
  names = set(listed)
  assert {"reduce_sum", "reduce_max", "log1p"} <= names
  sorting = set(primitives(jax.jit(lambda x: jnp.sort(x)).trace(positions).jaxpr.jaxpr))
  assert "sort" in sorting  # it does look into nested programs
  assert not names & {"while", "scan", "sort", "top_k", "random_bits"}
  # A choice between platforms is made when a program is lowered.
  assert listed.count("cond") == listed.count("platform_index")
  compiled = traced.lower().compile().as_text()
  assert "fusion(" in compiled
  for operation in ("while(", "sort(", "conditional(", "topk("):
    assert operation not in compiled.lower()


def test_choose_sampler_gives_the_tokens_of_sample():
  rng = np.random.default_rng(8)
  logits = jnp.asarray(rng.normal(size=(ROWS, VOCAB)).astype(np.float32))
  positions = jnp.arange(ROWS, dtype=jnp.int32)
  choices = set()
  for wishes in ({}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.9}):
    for temperature in (0.0, 1.0):
      params = [
        SamplingParams(temperature=temperature, min_p=0.01, seed=i, **wishes)
        for i in range(ROWS)
      ]
      sampler = sampling.choose_sampler(params)
      assert sampler is sampling.choose_sampler(params)
      choices.add(sampler)
      got = jax.jit(sampler)(logits, settings_of(*params), positions)
      expected = SAMPLE(logits, settings_of(*params), positions)
      np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
  assert len(choices) == 5
  assert sampling.greedy in choices
  assert sampling.sample in choices


def test_token_logprobs_are_those_of_the_raw_distribution():
  logits = np.random.default_rng(9).normal(size=(5, 333)).astype(np.float32) * 5
  logits[1, 3] = NAN
  logits[2] += 1e4
  tokens = np.array([0, 3, 332, 17, 4], np.int32)
  got = np.asarray(sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens)))
  exact = np.where(np.isnan(logits), -INF, logits).astype(np.float64)
  exact = exact - scipy.special.logsumexp(exact, axis=1, keepdims=True)
  np.testing.assert_allclose(got, exact[np.arange(5), tokens], rtol=1e-5)
  assert got.dtype == np.float32
  assert got[1] == -INF


def test_token_logprobs_of_odd_rows():
  logits = jnp.asarray([[NAN, NAN], [INF, INF], [INF, 0.0], [-INF, 2.0]], jnp.float32)
  got = sampling.token_logprobs(logits, jnp.asarray([0, 1, 1, 1], jnp.int32))
  np.testing.assert_allclose(np.asarray(got), [-INF, -math.log(2), -INF, 0.0])


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", NAN),
    ("temperature", INF),
    ("temperature", 1e39),  # infinite in float32
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", NAN),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", True),
  ],
)
def test_params_refuse_nonsense_by_name(name, value):
  with pytest.raises(ValueError, match=rf"{name} must be .*{re.escape(str(value))}"):
    SamplingParams(**{name: value})


def test_params_accept_the_limits_and_numpy_numbers():
  params = [
    SamplingParams(),
    SamplingParams(
      temperature=3e38, top_k=2**31 - 1, top_p=1e-30, min_p=1, seed=2**32 - 1
    ),
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7)),
  ]
  settings = sampling.make_settings(params)
  dtypes = {name: str(value.dtype) for name, value in vars(settings).items()}
  assert dtypes == {
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "seed": "uint32",
  }
  assert list(np.asarray(settings.seed)) == [0, 2**32 - 1, 7]
  assert sampling.make_settings([]).seed.shape == (0,)


def test_shapes_are_checked_when_traced():
  settings, positions = settings_of(FULL, FULL), jnp.zeros(2, jnp.int32)
  trace = functools.partial(jax.eval_shape, sampling.sample)
  with pytest.raises(ValueError, match=r"logits must be \[S, V\]"):
    trace(jnp.zeros(5), settings, positions)
  with pytest.raises(ValueError, match=r"logits must be \[S, V\]"):
    trace(jnp.zeros((2, 5), jnp.int32), settings, positions)
  with pytest.raises(ValueError, match=r"settings.temperature must be \[S\] = \(3,\)"):
    trace(jnp.zeros((3, 5)), settings, jnp.zeros(3, jnp.int32))
  with pytest.raises(ValueError, match=r"positions must be \[S\] = \(2,\)"):
    trace(jnp.zeros((2, 5)), settings, jnp.zeros(3, jnp.int32))
