"""Choosing the next token of every sequence from its logits.

`greedy` and `sample` are two values of one contract, `sampler(logits, settings,
positions) -> tokens`, so that a loop can take either, or one of your own. They run
inside the decode loop, so they are straight-line code: no sort, no nested loop, no
branch.

Randomness belongs to the request. The noise behind the token at position `p` of a
request with seed `r` is a function of `(r, p)` and of nothing else, so its tokens
depend neither on its neighbours nor on its row, the batch size or a preemption.

Dimensions: `S` sequences, `V` vocabulary. The wishes of one request, on the host, are a
`SamplingParams`; those of `S` rows, on the device, a `SamplingSettings`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import functools
import math
import numbers

import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from kvcache.parts import arguments
from kvcache.printing import Node

_MAX_UINT32 = 2**32 - 1
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How one request picks its tokens; lives on the host.

  Attributes:
    temperature: Divides the logits. 0 is greedy, whatever the other settings say.
    top_k: Keep the `top_k` likeliest tokens; 0 keeps all.
    top_p: Keep the smallest set of likeliest tokens whose mass reaches `top_p`; 1 keeps
      all.
    min_p: Keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    seed: Names the random stream of the request. Two requests with the same prompt,
      settings and seed get the same tokens.

  Example:
    >>> kv.SamplingParams(temperature=0.8, top_p=0.95, seed=7).top_k
    0
    >>> kv.SamplingParams(temperature=-1.0)
    Traceback (most recent call last):
    ValueError: temperature must be ...
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0

  def __post_init__(self):
    _check_number("temperature", self.temperature, 0.0, math.inf)
    if self.temperature > float(np.finfo(np.float32).max):
      raise ValueError(f"temperature must be finite in float32, got {self.temperature}")
    _check_integer("top_k", self.top_k, _MAX_INT32)
    _check_number("top_p", self.top_p, 0.0, 1.0)
    if self.top_p == 0:
      raise ValueError(f"top_p must be above 0 (1 keeps every token), got {self.top_p}")
    _check_number("min_p", self.min_p, 0.0, 1.0)
    _check_integer("seed", self.seed, _MAX_UINT32)


class SamplingSettings(Node, kw_only=True):
  """The sampling parameters of `S` rows, one entry per row; see `SamplingParams`."""

  temperature: Array  # [S] float32
  top_k: Array  # [S] int32
  top_p: Array  # [S] float32
  min_p: Array  # [S] float32
  seed: Array  # [S] uint32


Sampler = Callable[[Array, SamplingSettings, Array], Array]


def draw(
  sampler: Sampler, logits: Array, settings: SamplingSettings, positions: Array
) -> Array:
  """Calls a sampler, and refuses what are no tokens `[S]`; `ValueError`."""
  tokens = sampler(logits, settings, positions)
  return arguments.as_int32("the sampler's result", tokens, shape=logits.shape[:1])


def make_settings(params: Sequence[SamplingParams]) -> SamplingSettings:
  """Returns the settings whose row `i` is `params[i]`."""
  for entry in params:
    if not isinstance(entry, SamplingParams):
      raise ValueError(f"params must be SamplingParams, got {entry!r}")
  return SamplingSettings(
    temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
    top_k=jnp.asarray([p.top_k for p in params], jnp.int32),
    top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
    min_p=jnp.asarray([p.min_p for p in params], jnp.float32),
    seed=jnp.asarray(np.asarray([p.seed for p in params], np.uint32)),
  )


def choose_sampler(params: Sequence[SamplingParams]) -> Sampler:
  """Returns the cheapest sampler that gives each of `params` its tokens.

  Requests that all want the greedy token need no noise, and requests without `top_k` or
  `top_p` no search for a threshold. The tokens are those of `sample`. Equal needs give
  the same object, so it can be a static argument of a jitted loop.
  """
  noisy = [p for p in params if p.temperature > 0]
  if not noisy:
    return greedy
  return _specialised(any(p.top_k for p in noisy), any(p.top_p < 1 for p in noisy))


@functools.cache
def _specialised(use_top_k: bool, use_top_p: bool) -> Sampler:
  if use_top_k and use_top_p:
    return sample
  return functools.partial(sample, use_top_k=use_top_k, use_top_p=use_top_p)


def greedy(logits: Array, settings: SamplingSettings, positions: Array) -> Array:
  """Picks each row's likeliest token, the smallest id among equals.

  Args:
    logits: `[S, V]`, any float dtype. NaN counts as `-inf`; a row without any other
      value gives token 0.
    settings: Ignored; part of the contract of a sampler.
    positions: Ignored, likewise.

  Returns:
    `[S]` int32 tokens.
  """
  del settings, positions
  return _first_argmax(_clean(logits))


def sample(
  logits: Array,
  settings: SamplingSettings,
  positions: Array,
  *,
  use_top_k: bool = True,
  use_top_p: bool = True,
) -> Array:
  """Draws each row's token from its filtered distribution (Gumbel-max).

  The noise of a row is `jax.random.bits(fold_in(key(seed), position), [V])` of JAX's
  threefry generator, computed in place. Rows with temperature 0 give exactly the token
  of `greedy`. See `filter_logits` for the filters and their order.

  Args:
    logits: `[S, V]`, any float dtype. NaN counts as `-inf`; a row without any other
      value gives token 0. Several `+inf` in a row are equally likely.
    settings: Fields `[S]`.
    positions: `[S]` int32. The place in its sequence of the token being chosen: what
      makes the steps of one request differ.
    use_top_k: Static. False promises that no row sets `top_k`, and leaves its search
      out.
    use_top_p: Static. The same for `top_p`.

  Returns:
    `[S]` int32 tokens.
  """
  likely = filter_logits(logits, settings, use_top_k=use_top_k, use_top_p=use_top_p)
  if positions.shape != logits.shape[:1]:
    raise ValueError(
      f"positions must be [S] = {logits.shape[:1]}, got {positions.shape}"
    )
  noise = _gumbel(settings.seed, positions, logits.shape[1])
  drawn = _first_argmax(likely + noise)
  likeliest = greedy(logits, settings, positions)
  return jnp.where(settings.temperature > 0, drawn, likeliest)


def filter_logits(
  logits: Array,
  settings: SamplingSettings,
  *,
  use_top_k: bool = True,
  use_top_p: bool = True,
) -> Array:
  """Returns the logits after temperature, top-k, top-p and min-p, in this order.

  This is the order of Hugging Face transformers and of the first vLLM engine: the mass
  that `top_p` counts is renormalised over what top-k left, and min-p comes last.
  (vLLM's V1 engine applies min-p before top-k and top-p; there, with both set, top-p
  counts the mass that min-p left and may keep fewer tokens.)

  Top-k and top-p are exact for every `k` and `p`. Each needs one threshold per row,
  found by bisection over the 2^32 bit patterns of a float32, so nothing is sorted. Ties
  are kept: all tokens whose logit equals that of the last one kept stay. Probability
  mass is summed in fixed point, so that the sums, and with them the tokens, do not
  depend on the order in which a device adds. One token's mass is rounded to 2^-31 of
  the total.

  Args:
    logits: `[S, V]`, any float dtype; NaN counts as `-inf`.
    settings: Fields `[S]`. Temperature 0 counts as 1 here.
    use_top_k: Static. False leaves the search for top-k out.
    use_top_p: Static. False leaves the search for top-p out.

  Returns:
    `[S, V]` float32: tempered logits relative to the row's largest, so at most 0;
    `-inf` where a filter removed the token.
  """
  _check_rows(logits, settings)
  vocab_size = logits.shape[1]
  logits = _clean(logits)
  peak = jnp.max(logits, axis=-1, keepdims=True)
  temperature = settings.temperature[:, None]
  temperature = jnp.where(temperature > 0, temperature, 1.0)
  # Relative to the peak first: a tiny temperature cannot overflow to several +inf.
  tempered = jnp.where(logits == peak, 0.0, (logits - peak) / temperature)
  tempered = jnp.where(logits == -jnp.inf, -jnp.inf, tempered)
  keys = _sortable(logits)

  if use_top_k:
    wants = settings.top_k > 0
    top_k = jnp.where(wants, jnp.minimum(settings.top_k, vocab_size), 1)
    one = jnp.ones((1, 1), jnp.int32)
    threshold = jnp.where(wants, _largest_threshold(keys, one, top_k), jnp.uint32(0))
    tempered = jnp.where(keys >= threshold[:, None], tempered, -jnp.inf)
  if use_top_p:
    wants = settings.top_p < 1
    masses = _fixed_point(jnp.exp(tempered))
    total = jnp.sum(masses, axis=-1, dtype=jnp.int32)
    need = jnp.ceil(settings.top_p * total.astype(jnp.float32)).astype(jnp.int32)
    need = jnp.clip(need, 1, total)  # the product may round up past the total
    threshold = jnp.where(wants, _largest_threshold(keys, masses, need), jnp.uint32(0))
    tempered = jnp.where(keys >= threshold[:, None], tempered, -jnp.inf)
  is_likely = tempered >= jnp.log(settings.min_p)[:, None]  # log 0 = -inf keeps all
  return jnp.where(is_likely, tempered, -jnp.inf)


def token_logprobs(logits: Array, tokens: Array) -> Array:
  """Returns the log-probability of each row's token under the raw distribution.

  Raw means the model's: before temperature and filters.

  Args:
    logits: `[S, V]`, any float dtype. NaN counts as `-inf`; several `+inf` share the
      mass.
    tokens: `[S]` int32, clipped to the vocabulary.

  Returns:
    `[S]` float32, `-inf` for a token whose logit is `-inf`.
  """
  logits = _clean(logits)
  peak = jnp.max(logits, axis=-1, keepdims=True)
  relative = jnp.where(logits == peak, 0.0, logits - peak)
  relative = jnp.where(logits == -jnp.inf, -jnp.inf, relative)
  mass = jnp.sum(jnp.exp(relative), axis=-1)  # at least 1, or 0 for a row of -inf
  chosen = jnp.take_along_axis(relative, tokens[:, None], axis=-1, mode="clip")[:, 0]
  return jnp.where(chosen == -jnp.inf, -jnp.inf, chosen - jnp.log(mass))


def _clean(logits: Array) -> Array:
  """Returns float32 logits with `-inf` in place of NaN.

  What comes in is held: were the compiler to compute it once per use, rounded
  differently, the largest logit might equal none of them. What goes out is not, because
  every use computes the same of it, and a held copy would be one more `[S, V]` to write
  and to read.
  """
  logits = lax.optimization_barrier(logits).astype(jnp.float32)
  return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _first_argmax(scores: Array) -> Array:
  """Returns the smallest index of each row's maximum.

  One reduction over (value, index) pairs reads the scores once, as far as they are not
  computed in it. On CPU, where XLA makes scalar code of that (measured: 3 times slower,
  10 with the noise fused into it), two plain ones.

  Args:
    scores: `[S, V]` without NaN.
  """
  return lax.platform_dependent(scores, cpu=_argmax_by_two, default=_argmax_by_pairs)


def _argmax_by_pairs(scores: Array) -> Array:
  return lax.argmax(scores, axis=scores.ndim - 1, index_dtype=jnp.int32)


def _argmax_by_two(scores: Array) -> Array:
  scores = lax.optimization_barrier(scores)  # both must see the same bits
  index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
  is_peak = scores == jnp.max(scores, axis=-1, keepdims=True)
  return jnp.min(jnp.where(is_peak, index, scores.shape[-1]), axis=-1)


def _sortable(values: Array) -> Array:
  """Maps float32 to uint32 so that the order stays: `a < b` just if image < image.

  Positive floats already sort like their bits and negative ones in reverse. Both zeros
  get one image. No float but a NaN maps to 0.
  """
  bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(keys: Array, amounts: Array, need: Array) -> Array:
  """Returns the largest `t` with `sum(amounts where keys >= t) >= need`, row by row.

  Bisection from the top bit down, two bits a pass: 16 passes, unrolled, each one
  reduction with three sums. (Measured on CPU: one bit a pass takes the same time and
  compiles three times slower; four bits take five times longer.)

  Args:
    keys: `[S, V]` uint32.
    amounts: `[S, V]` or `[1, 1]` int32, not negative; a row's sum must fit int32.
    need: `[S]` int32, from 1 to the row's sum.

  Returns:
    `[S]` uint32: always one of the row's keys.
  """
  # Held, so that the passes read these arrays and do not make them again.
  keys, amounts = lax.optimization_barrier((keys, amounts))
  threshold = jnp.zeros(need.shape, jnp.uint32)
  steps = jnp.arange(1, 4, dtype=jnp.uint32)[None, :]
  for shift in range(30, -2, -2):
    candidates = threshold[:, None] | (steps << jnp.uint32(shift))
    sums = lax.platform_dependent(
      keys, amounts, candidates, cpu=_sums_by_row, default=_sums_at_once
    )
    num_steps = jnp.sum(sums >= need[:, None], axis=-1, dtype=jnp.uint32)
    threshold |= num_steps << jnp.uint32(shift)
  return threshold


def _sums_by_row(keys: Array, amounts: Array, candidates: Array) -> Array:
  """Returns `[S, C]`: each candidate's sum of `amounts` where `keys` reach it."""
  is_above = keys[:, None, :] >= candidates[:, :, None]
  # Named, so that it is int32 with `jax_enable_x64` too, like `_sums_at_once`.
  reached = jnp.where(is_above, amounts[:, None, :], 0)
  return jnp.sum(reached, axis=-1, dtype=jnp.int32)


def _sums_at_once(keys: Array, amounts: Array, candidates: Array) -> Array:
  """The same by one reduction of several sums: on a GPU one read of the keys.

  XLA for GPUs compiles `_sums_by_row` to a reduction of `[S, C, V]`, which reads the
  keys once per candidate.
  """
  parts = [
    jnp.where(keys >= candidates[:, i, None], amounts, 0)
    for i in range(candidates.shape[1])
  ]

  def add(a: list[Array], b: list[Array]) -> list[Array]:
    return [x + y for x, y in zip(a, b, strict=True)]

  return jnp.stack(lax.reduce(parts, [jnp.int32(0)] * len(parts), add, (1,)), axis=1)


def _fixed_point(weights: Array) -> Array:
  """Scales each row of weights in `[0, 1]` to int32 with a sum just below 2^31.

  The scale comes from sums of integers too, so that no sum depends on the order of
  addition: a first coarse sum that cannot overflow, then a second one with its scale.
  """
  vocab_size = weights.shape[-1]
  limit = 2**31 - 2 * vocab_size - 1024  # less what rounding can add
  scale = jnp.full(weights.shape[:-1], limit / vocab_size, jnp.float32)
  for _ in range(2):
    total = jnp.sum(_round(weights * scale[..., None]), axis=-1, dtype=jnp.int32)
    # Rounding hides at most half a unit per token.
    scale *= limit / (total.astype(jnp.float32) + 0.5 * vocab_size)
  return _round(weights * scale[..., None])


def _round(values: Array) -> Array:
  return (values + 0.5).astype(jnp.int32)


def _gumbel(seed: Array, positions: Array, vocab_size: int) -> Array:
  """Returns `[S, vocab_size]` Gumbel noise, a function of seed and position alone.

  The bits are those of `jax.random.bits(fold_in(key(seed), position), [V])`, written
  out because JAX's generator is a loop on CPU (measured: 9 times slower) and a call out
  of the program on GPU. Small uniforms, which make the large values that win, keep 32
  bits.
  """
  zero = jnp.zeros_like(seed)
  key = _threefry((zero, seed), (zero, positions.astype(jnp.uint32)))
  index = lax.broadcasted_iota(jnp.uint32, (seed.shape[0], vocab_size), 1)
  words = _threefry((key[0][:, None], key[1][:, None]), (jnp.zeros_like(index), index))
  bits = words[0] ^ words[1]
  uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
  exponential = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
  return -jnp.log(exponential)


def _threefry(
  key: tuple[Array, Array], block: tuple[Array, Array]
) -> tuple[Array, Array]:
  """Encrypts a block of two words: Threefry-2x32-20 (Salmon et al., SC 2011)."""
  schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
  left, right = (
    jnp.broadcast_arrays(b, k)[0] + k for b, k in zip(block, key, strict=True)
  )
  for group in range(5):
    for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
      left += right
      right = (right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation))
      right ^= left
    left += schedule[(group + 1) % 3]
    right += schedule[(group + 2) % 3] + jnp.uint32(group + 1)
  return left, right


def _check_rows(logits: Array, settings: SamplingSettings) -> None:
  if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f"logits must be [S, V] floats, got {jax.typeof(logits)}")
  for name, values in vars(settings).items():
    if values.shape != logits.shape[:1]:
      raise ValueError(
        f"settings.{name} must be [S] = {logits.shape[:1]}, got {values.shape}"
      )


def _check_number(name: str, value: float, low: float, high: float) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(f"{name} must be a number, got {value!r}")
  if not (low <= value <= high and math.isfinite(value)):
    limits = (
      f"at least {low:g} and finite" if high == math.inf else f"{low:g} to {high:g}"
    )
    raise ValueError(f"{name} must be {limits}, got {value}")


def _check_integer(name: str, value: int, high: int) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(f"{name} must be an integer, got {value!r}")
  if not 0 <= value <= high:
    raise ValueError(f"{name} must be 0 to {high}, got {value}")
