"""The recurrences, a token at a time, in float32: obvious, and slow."""

import jax
from jax import Array
import jax.numpy as jnp


def causal_conv1d(
  x: Array,
  weight: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  bias: Array | None = None,
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.causal_conv1d`."""
  x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)

  def token(states: Array, t: Array) -> tuple[Array, Array]:
    row, is_valid = _row_of(t, cu_seqlens)
    window = jnp.concatenate([states[row], x[t][:, None]], axis=1)
    y = jnp.sum(window * weight, axis=1)
    after = states.at[row].set(window[:, 1:])
    return jnp.where(is_valid, after, states), y

  steps = jnp.arange(x.shape[0], dtype=jnp.int32)
  states, y = jax.lax.scan(token, state.astype(jnp.float32), steps)
  return (y if bias is None else y + bias.astype(jnp.float32)[None]), states


def ssd(
  x: Array, dt: Array, a: Array, b: Array, c: Array, state: Array, cu_seqlens: Array
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.ssd`; without the skip connection."""
  x, dt, a, b, c = (array.astype(jnp.float32) for array in (x, dt, a, b, c))
  repeats = x.shape[1] // b.shape[1]

  def token(states: Array, t: Array) -> tuple[Array, Array]:
    row, is_valid = _row_of(t, cu_seqlens)
    b_t, c_t = (jnp.repeat(array[t], repeats, axis=0) for array in (b, c))
    decay = jnp.exp(dt[t] * a)[:, None, None]
    new = (dt[t][:, None] * x[t])[:, :, None] * b_t[:, None, :]
    h = decay * states[row] + new
    y = jnp.sum(h * c_t[:, None, :], axis=-1)
    return jnp.where(is_valid, states.at[row].set(h), states), y

  steps = jnp.arange(x.shape[0], dtype=jnp.int32)
  states, y = jax.lax.scan(token, state.astype(jnp.float32), steps)
  return y, states


def _row_of(t: Array, cu_seqlens: Array) -> tuple[Array, Array]:
  row = jnp.sum(cu_seqlens[1:] <= t, dtype=jnp.int32)
  last = cu_seqlens.shape[0] - 2
  return jnp.minimum(row, last), row <= last
