"""Paged attention, obviously: float32, one dense row at a time. Not for speed."""

from jax import Array
import jax.numpy as jnp


def paged_attention(
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float,
) -> Array:
  """Same contract as `paged_attention` of this package, outside of jit."""
  group = q.shape[1] // k.shape[1]
  out = jnp.zeros((*q.shape[:2], v.shape[-1]), jnp.float32)
  for row in range(block_tables.shape[0]):
    start, stop = int(cu_seqlens[row]), int(cu_seqlens[row + 1])
    length = int(seq_lens[row])
    if start == stop or length == 0:
      continue
    keys, values = (
      pool[block_tables[row]]
      .transpose(1, 0, 2, 3)
      .reshape(pool.shape[1], -1, pool.shape[-1])[:, :length]
      .astype(jnp.float32)
      .repeat(group, axis=0)
      for pool in (k, v)
    )
    queries = q[start:stop].astype(jnp.float32)
    logits = jnp.einsum("qhd,htd->hqt", queries, keys) * sm_scale
    position = length - (stop - start) + jnp.arange(stop - start)
    visible = jnp.arange(length)[None] <= position[:, None]
    logits = jnp.where(visible[None], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    out = out.at[start:stop].set(jnp.einsum("hqt,htd->qhd", weights, values))
  return out.astype(q.dtype)
