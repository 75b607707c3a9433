"""Paged attention, obviously: float32, one dense row at a time. Not for speed."""

import jax
from jax import Array
import jax.numpy as jnp


def paged_attention(
  q: Array,
  k: Array,
  v: Array | None,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float,
  sliding_window: int | None = None,
  logits_soft_cap: float | None = None,
  sinks: Array | None = None,
  k_scale: Array | None = None,
  v_scale: Array | None = None,
  v_head_dim: int | None = None,
) -> tuple[Array, Array]:
  """Same contract as `paged_attention` of this package, outside of jit; with `lse`."""
  k = dequantise(k, k_scale)
  v = k[..., :v_head_dim] if v is None else dequantise(v, v_scale)
  num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
  out = jnp.zeros((*q.shape[:2], v.shape[-1]), jnp.float32)
  lse = jnp.full(q.shape[:2], -jnp.inf)
  for row in range(block_tables.shape[0]):
    start, stop = int(cu_seqlens[row]), int(cu_seqlens[row + 1])
    length = int(seq_lens[row])
    if start == stop or length == 0:
      continue
    keys, values = (
      pool[block_tables[row]]
      .transpose(1, 0, 2, 3)
      .reshape(pool.shape[1], -1, pool.shape[-1])[:, :length]
      .repeat(group, axis=0)
      for pool in (k, v)
    )
    queries = q[start:stop].astype(jnp.float32)
    logits = jnp.einsum("qhd,htd->hqt", queries, keys) * sm_scale
    if logits_soft_cap is not None:
      logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    position = length - (stop - start) + jnp.arange(stop - start)
    distance = position[:, None] - jnp.arange(length)[None]
    is_visible = distance >= 0
    if sliding_window is not None:
      is_visible &= distance < sliding_window
    logits = jnp.where(is_visible[None], logits, -jnp.inf)
    # What is behind a window has no influence, NaN included.
    values = jnp.where(is_visible.any(axis=0)[None, :, None], values, 0.0)
    if sinks is not None:
      sink = jnp.broadcast_to(sinks[:, None, None], (num_heads, stop - start, 1))
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
