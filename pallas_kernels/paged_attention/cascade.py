"""Attention in parts: merging partial results, and shared prefixes read once.

Reference: Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared
Prefixes", 2024.
"""

from collections.abc import Sequence
from typing import Any

from jax import Array
import jax.numpy as jnp

from pallas_kernels.paged_attention.api import paged_attention


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
  """Merges attention over disjoint sets of keys into attention over all of them.

  Args:
    parts: `(out [T, H, Dv], lse [T, H])` of each set, as `paged_attention` returns them
      with `return_lse`. A set with nothing to see has `-inf` and no influence.

  Returns:
    `(out, lse)` over all sets: zeros and `-inf` where no set has anything to see.
  """
  if not parts:
    raise ValueError("parts must hold at least one (out, lse)")
  outs = jnp.stack([out for out, _ in parts])
  lses = jnp.stack([lse for _, lse in parts])
  top = jnp.max(lses, axis=0, keepdims=True)
  is_seen = lses > -jnp.inf
  weights = jnp.where(is_seen, jnp.exp(jnp.where(is_seen, lses - top, 0.0)), 0.0)
  total = jnp.sum(weights, axis=0, keepdims=True)
  lse = jnp.where(total > 0.0, top + jnp.log(total), -jnp.inf)[0]
  weights = (weights / jnp.where(total > 0.0, total, 1.0))[..., None]
  values = jnp.where(is_seen[..., None], outs.astype(jnp.float32), 0.0)
  return jnp.sum(weights * values, axis=0).astype(outs.dtype), lse


def cascade_attention(
  q: Array,
  k: Array,
  v: Array | None,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  num_prefix_blocks: Array | int,
  max_query_len: int | None = None,
  sinks: Array | None = None,
  **options: Any,
) -> Array:
  """Attention of rows whose first blocks are the same: these are read once for all.

  The queries of all rows attend to the shared blocks together, as if they were one row,
  each row to the rest of its blocks, and the two results are merged.

  Args:
    q: `[T, H, D]`.
    k: As in `paged_attention`; so are all arguments not named here.
    v: As in `paged_attention`.
    block_tables: `[S, P]` int32.
    seq_lens: `[S]` int32.
    cu_seqlens: `[S + 1]` int32.
    num_prefix_blocks: `[]` int32, may be traced. The first so many columns of
      `block_tables` are equal in all rows of the step, and every query stands behind
      them.
    max_query_len: As in `paged_attention`.
    sinks: `[H]`; joins the softmax once.
    **options: Others of `paged_attention`, without `sliding_window` and `return_lse`.

  Returns:
    `[T, H, Dv]` in `q`'s dtype, equal to `paged_attention` up to rounding.
  """
  for name in ("sliding_window", "return_lse", "is_causal"):
    if name in options:
      raise ValueError(f"{name} is no option of cascade_attention")
  num_prefix_blocks = jnp.asarray(num_prefix_blocks, jnp.int32)
  num_columns = block_tables.shape[1]
  prefix_len = num_prefix_blocks * k.shape[2]
  row = jnp.argmax(seq_lens > 0)  # any row of the step will do
  num_tokens = jnp.full(1, q.shape[0], jnp.int32)
  prefix = paged_attention(
    q,
    k,
    v,
    block_tables[row][None],
    jnp.where(seq_lens[row] > 0, prefix_len, 0)[None],
    jnp.pad(num_tokens, (1, 0)),
    is_causal=False,
    return_lse=True,
    **options,
  )
  columns = num_prefix_blocks + jnp.arange(num_columns, dtype=jnp.int32)
  out, lse = paged_attention(
    q,
    k,
    v,
    block_tables[:, jnp.minimum(columns, num_columns - 1)],
    jnp.maximum(seq_lens - prefix_len, 0),
    cu_seqlens,
    max_query_len=max_query_len,
    sinks=sinks,
    return_lse=True,
    **options,
  )
  # Padding is part of the one long row, and of no row of its own.
  is_padding = jnp.isneginf(lse)
  prefix = prefix[0], jnp.where(is_padding, -jnp.inf, prefix[1])
  return merge([prefix, (out, lse)])[0]
