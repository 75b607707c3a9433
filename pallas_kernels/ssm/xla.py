"""The recurrences in plain JAX, for every backend.

One token per row is one update of all states; where the state after every token is
wanted, a few such updates follow each other. Longer rows go in chunks: within a chunk
the recurrence is two matrix products under a lower-triangular mask, from chunk to chunk
only the state is handed on. The chunks of all rows are one list; a loop of as many
rounds as there are chunks works it off, so that padding costs nothing.

A step over a pool of states gathers those it reads and scatters those it writes.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.numpy as jnp

from pallas_kernels.ssm.rows import Rows


def over_pool(
  operation: Callable[..., tuple[Array, Array]],
  inputs: Sequence[Array],
  pool: Array,
  rows: Rows,
  **options: Any,
) -> tuple[Array, Array]:
  """`causal_conv1d` or `ssd` of some inputs, on states of a pool."""
  state = _gather(pool, rows.layer, rows.read_ids)
  y, state = operation(*inputs, state, rows.cu_seqlens, **options)
  return y, _scatter(pool, rows.layer, state, rows.write_ids)


def causal_conv1d(
  x: Array,
  weight: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  bias: Array | None,
  num_states: int | None,
  is_decode: bool,
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.causal_conv1d`."""
  num_tokens, dtype = x.shape[0], x.dtype
  x, weight, state = (array.astype(jnp.float32) for array in (x, weight, state))
  num_taps = weight.shape[1]
  num_before = num_taps - 1
  if is_decode:
    window = jnp.concatenate([state, x[:, :, None]], axis=2)
    taps = [window[:, :, tap] for tap in range(num_taps)]
    state = window[:, :, 1:]
  else:
    rows, offsets = _tokens(cu_seqlens, num_tokens)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    taps = []
    for tap in range(num_taps):
      at = offsets - (num_before - tap)  # in the row; negative: before the step
      before = state[rows, :, jnp.clip(at + num_before, 0, num_before - 1)]
      inside = x[jnp.maximum(token - (num_before - tap), 0)]
      taps.append(jnp.where((at >= 0)[:, None], inside, before))
    starts, lens = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    if num_states is None:
      state = _last_inputs(x, state, starts, lens)
    else:
      after = (jnp.minimum(lens, i + 1) for i in range(num_states))
      state = jnp.stack([_last_inputs(x, state, starts, n) for n in after], axis=1)
  y = taps[0] * weight[None, :, 0]
  for tap in range(1, num_taps):
    y = y + taps[tap] * weight[None, :, tap]
  if bias is not None:
    y = y + bias.astype(jnp.float32)[None]
  return y.astype(dtype), state


def _last_inputs(x: Array, state: Array, starts: Array, lens: Array) -> Array:
  """The inputs that tokens after the rows' first `lens` see: `[S, C, W - 1]`."""
  num_before = state.shape[2]
  place = jnp.arange(num_before, dtype=jnp.int32)[None]
  at = lens[:, None] - num_before + place  # [S, W - 1], in the row
  index = jnp.clip(starts[:, None] + at, 0, x.shape[0] - 1)
  inside = jnp.swapaxes(x[index], 1, 2)
  kept = jnp.clip(lens[:, None] + place, 0, num_before - 1)
  before = jnp.take_along_axis(state, kept[:, None, :], axis=2)
  return jnp.where((at >= 0)[:, None, :], inside, before)


class _Inputs(NamedTuple):
  """What the tokens bring, `[T, ...]` each; float32."""

  x: Array
  dt: Array
  b: Array
  c: Array


def ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  d: Array | None,
  **options: Any,
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.ssd`; the options are those of `_recurrence`."""
  y, state = _recurrence(x, dt, a, b, c, state, cu_seqlens, **options)
  if d is not None:
    y = y + d.astype(jnp.float32)[None, :, None] * x.astype(jnp.float32)
  return y.astype(x.dtype), state


# Compiled once where it is called outside `jax.jit`: the body of its loop is a new
# function in each call, which XLA would compile anew.
@functools.partial(
  jax.jit, static_argnames=("chunk_size", "num_states", "is_decode"), inline=True
)
def _recurrence(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  chunk_size: int,
  num_states: int | None,
  is_decode: bool,
) -> tuple[Array, Array]:
  """The recurrence alone: `y` is float32 and lacks the skip connection."""
  inputs = _Inputs(*(array.astype(jnp.float32) for array in (x, dt, b, c)))
  a, state = a.astype(jnp.float32), state.astype(jnp.float32)
  if is_decode:
    return _step(inputs, a, state)
  if num_states is not None:
    return _steps(inputs, a, state, cu_seqlens, num_states)
  num_tokens = x.shape[0]
  starts, lens = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
  is_single = lens == 1
  first = jnp.clip(starts, 0, num_tokens - 1)
  y_first, state_first = _step(_Inputs(*(array[first] for array in inputs)), a, state)
  to = jnp.where(is_single, starts, num_tokens)
  y = jnp.zeros(x.shape, jnp.float32).at[to].set(y_first, mode="drop")
  state = jnp.where(is_single[:, None, None, None], state_first, state)

  num_chunks = jnp.where(is_single, 0, (lens + (chunk_size - 1)) // chunk_size)
  ends = jnp.cumsum(num_chunks)
  lane = jnp.arange(chunk_size, dtype=jnp.int32)

  def compute(chunk: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    y, states = carry
    row = jnp.sum(ends <= chunk, dtype=jnp.int32)
    begin = starts[row] + (chunk - (ends[row] - num_chunks[row])) * chunk_size
    token = begin + lane
    is_valid = token < cu_seqlens[row + 1]
    at = jnp.minimum(token, num_tokens - 1)
    # Lanes past the row's end do nothing: no decay, no input.
    ours = _Inputs(*(_select(is_valid, array[at]) for array in inputs))
    y_chunk, after = _chunk(ours, a, states[row])
    to = jnp.where(is_valid, token, num_tokens)
    return y.at[to].set(y_chunk, mode="drop"), states.at[row].set(after)

  return lax.fori_loop(0, ends[-1], compute, (y, state))


def _step(inputs: _Inputs, a: Array, state: Array) -> tuple[Array, Array]:
  """One token of each row: `state [S, H, P, N]`."""
  repeats = inputs.x.shape[1] // inputs.b.shape[1]
  b, c = (jnp.repeat(array, repeats, axis=1) for array in (inputs.b, inputs.c))
  decay = jnp.exp(inputs.dt * a[None])[:, :, None, None]
  new = (inputs.dt[:, :, None] * inputs.x)[..., None] * b[:, :, None, :]
  state = decay * state + new
  return jnp.sum(state * c[:, :, None, :], axis=-1), state


def _steps(
  inputs: _Inputs, a: Array, state: Array, cu_seqlens: Array, num_states: int
) -> tuple[Array, Array]:
  """Up to `num_states` tokens of each row, and the states after each."""
  num_tokens = inputs.x.shape[0]
  starts, lens = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
  y, states = jnp.zeros(inputs.x.shape, jnp.float32), []
  for i in range(num_states):
    at = jnp.minimum(starts + i, num_tokens - 1)
    y_next, after = _step(_Inputs(*(array[at] for array in inputs)), a, state)
    is_token = i < lens
    state = jnp.where(is_token[:, None, None, None], after, state)
    to = jnp.where(is_token, starts + i, num_tokens)
    y = y.at[to].set(y_next, mode="drop")
    states.append(state)
  return y, jnp.stack(states, axis=1)


def _chunk(inputs: _Inputs, a: Array, state: Array) -> tuple[Array, Array]:
  """Consecutive tokens of one row: `[chunk_size, ...]`, `state [H, P, N]`."""
  x, dt, b, c = inputs
  repeats = x.shape[1] // b.shape[1]
  decay = jnp.cumsum(dt * a[None], axis=0)  # [chunk, H], logarithm, up to each token
  gap = decay.T[:, :, None] - decay.T[:, None, :]  # [H, chunk, chunk]
  lane = jnp.arange(x.shape[0], dtype=jnp.int32)
  is_past = lane[:, None] >= lane[None]
  weight = jnp.exp(jnp.where(is_past[None], gap, -jnp.inf))
  scores = _product("ign,jgn->gij", c, b)
  weight = weight * jnp.repeat(scores, repeats, axis=0) * dt.T[:, None, :]
  b, c = (jnp.repeat(array, repeats, axis=1) for array in (b, c))
  from_chunk = _product("hij,jhp->ihp", weight, x)
  from_state = _product("ihn,hpn->ihp", c * jnp.exp(decay)[..., None], state)
  left = jnp.exp(decay[-1:] - decay) * dt  # what of each token is left at the end
  gained = _product("jhp,jhn->hpn", x * left[..., None], b)
  after = jnp.exp(decay[-1])[:, None, None] * state + gained
  return from_chunk + from_state, after


def _product(spec: str, left: Array, right: Array) -> Array:
  return jnp.einsum(spec, left, right, precision=lax.Precision.HIGHEST)


def _select(mask: Array, values: Array) -> Array:
  """Zeros where not `mask [E]`, whatever `values [E, ...]` are there."""
  return jnp.where(mask.reshape(-1, *(1,) * (values.ndim - 1)), values, 0.0)


def _tokens(cu_seqlens: Array, num_tokens: int) -> tuple[Array, Array]:
  """Row of each token, and its place in the row."""
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  rows = jnp.searchsorted(cu_seqlens[1:], token, side="right", method="scan_unrolled")
  rows = jnp.minimum(rows.astype(jnp.int32), cu_seqlens.shape[0] - 2)
  return jax.lax.optimization_barrier((rows, token - cu_seqlens[rows]))


def _gather(pool: Array, layer: Array, ids: Array) -> Array:
  """States of one layer: `pool [R, M, ...]`, `ids [S]` -> `[S, ...]`."""
  flat = pool.reshape(-1, *pool.shape[2:])
  # The scatter that follows must not see the pool read again in its place.
  return lax.optimization_barrier(flat[layer * pool.shape[1] + ids])


def _scatter(pool: Array, layer: Array, state: Array, ids: Array) -> Array:
  """Writes states of one layer; ids at or past `M` are dropped."""
  num_layers, num_states = pool.shape[:2]
  end = num_layers * num_states
  rows = jnp.where(ids < num_states, layer * num_states + ids, end)
  flat = pool.reshape(-1, *pool.shape[2:])
  flat = flat.at[rows].set(state.astype(pool.dtype), mode="drop")
  return flat.reshape(pool.shape)
