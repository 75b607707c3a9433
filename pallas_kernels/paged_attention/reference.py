"""Paged attention, obviously: float32, one dense row at a time. Not for speed."""

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.paged_attention.call import Call


def paged_attention(call: Call) -> tuple[Array, Array]:
  """Same contract as `paged_attention` of this package, outside of jit; with `lse`."""
  q, block_tables = call.q, call.block_tables
  k = dequantise(call.k, call.k_scale)
  v = k[..., : call.v_head_dim] if call.v is None else dequantise(call.v, call.v_scale)
  out = jnp.zeros((*q.shape[:2], v.shape[-1]), jnp.float32)
  lse = jnp.full(q.shape[:2], -jnp.inf)
  for row in range(block_tables.shape[0]):
    start, stop = (int(x) for x in call.cu_seqlens[row : row + 2])
    length = int(call.seq_lens[row])
    if start == stop or length == 0:
      continue
    keys, values = (
      pool[block_tables[row]]
      .transpose(1, 0, 2, 3)
      .reshape(pool.shape[1], -1, pool.shape[-1])[:, :length]
      .repeat(call.group, axis=0)
      for pool in (k, v)
    )
    queries = q[start:stop].astype(jnp.float32)
    logits = jnp.einsum("qhd,htd->hqt", queries, keys) * call.sm_scale
    if (cap := call.logits_soft_cap) is not None:
      logits = cap * jnp.tanh(logits / cap)
    position = length - (stop - start) + jnp.arange(stop - start)
    distance = position[:, None] - jnp.arange(length)[None]
    is_visible = distance >= 0
    if call.sliding_window is not None:
      is_visible &= distance < call.sliding_window
    logits = jnp.where(is_visible[None], logits, -jnp.inf)
    # What is behind a window has no influence, NaN included.
    values = jnp.where(is_visible.any(axis=0)[None, :, None], values, 0.0)
    if call.sinks is not None:
      sink = call.sinks[:, None, None].repeat(stop - start, axis=1)
      logits = jnp.concatenate([logits, sink], axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - total[..., None])[..., :length]
    out = out.at[start:stop].set(jnp.einsum("hqt,htd->qhd", weights, values))
    lse = lse.at[start:stop].set(total.T)
  return out.astype(q.dtype), lse


def dequantise(pool: Array, scale: Array | None) -> Array:
  """In float32, by the scales of its tokens if it has any."""
  if pool.dtype == jnp.uint8:
    pool = jax.lax.bitcast_convert_type(pool, jnp.float8_e4m3fn)
  pool = pool.astype(jnp.float32)
  return pool if scale is None else pool * scale[..., None]
