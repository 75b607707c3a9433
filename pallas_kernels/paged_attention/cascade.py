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
  shares: Array | None = None,
  max_query_len: int | None = None,
  sinks: Array | None = None,
  **options: Any,
) -> Array:
  """Attention where the first blocks of rows are the same: these are read once for all.

  The queries attend to the shared blocks together, as if they were one row, each row to
  the rest of its blocks, and the two results are merged. Rows that do not share the
  blocks, and rows with a query inside of them, attend to all of their own blocks in the
  second part: any batch is right, and fast as far as it shares.

  Args:
    q: `[T, H, D]`.
    k: As in `paged_attention`; so are all arguments not named here.
    v: As in `paged_attention`.
    block_tables: `[S, P]` int32.
    seq_lens: `[S]` int32.
    cu_seqlens: `[S + 1]` int32.
    num_prefix_blocks: `[]` int32, may be traced. So many first columns of
      `block_tables` are shared.
    shares: `[S]` bool, the rows that are equal in these columns; other rows of the step
      may be False. If omitted, the rows that begin like the first row whose queries all
      stand behind the prefix, found by comparing `[S, P]` ids.
    max_query_len: As in `paged_attention`.
    sinks: `[H]`; joins the softmax once.
    **options: Others of `paged_attention`, without `sliding_window` and `return_lse`.

  Returns:
    `[T, H, Dv]` in `q`'s dtype, equal to `paged_attention` up to rounding.
  """
  for name in ("sliding_window", "return_lse", "is_causal"):
    if name in options:
      raise ValueError(f"{name} is no option of cascade_attention")
  num_seqs, num_columns = block_tables.shape
  if shares is not None and (shares.shape != (num_seqs,) or shares.dtype != bool):
    raise ValueError(
      f"shares must be [{num_seqs}] bool, got {shares.shape} {shares.dtype}"
    )
  num_prefix_blocks = jnp.asarray(num_prefix_blocks, jnp.int32)
  columns = jnp.arange(num_columns, dtype=jnp.int32)[None]
  prefix_len = num_prefix_blocks * k.shape[2]
  first_positions = seq_lens - (cu_seqlens[1:] - cu_seqlens[:-1])
  can_share = (seq_lens > 0) & (first_positions >= prefix_len)
  if shares is None:
    is_same = block_tables == block_tables[jnp.argmax(can_share)][None]
    shares = jnp.all(is_same | (columns >= num_prefix_blocks), axis=1)
  shares = shares & can_share
  num_tokens = q.shape[0]
  prefix_out, prefix_lse = paged_attention(
    q,
    k,
    v,
    block_tables[jnp.argmax(shares)][None],  # any row that shares will do
    jnp.where(jnp.any(shares), prefix_len, 0)[None],
    jnp.asarray([0, num_tokens], jnp.int32),
    is_causal=False,
    return_lse=True,
    **options,
  )
  # Rows that share begin behind the prefix, the others at their first block.
  columns = columns + jnp.where(shares, num_prefix_blocks, 0)[:, None]
  columns = jnp.minimum(columns, num_columns - 1)
  out, lse = paged_attention(
    q,
    k,
    v,
    jnp.take_along_axis(block_tables, columns, axis=1),
    jnp.where(shares, seq_lens - prefix_len, seq_lens),
    cu_seqlens,
    max_query_len=max_query_len,
    sinks=sinks,
    return_lse=True,
    **options,
  )
  # The one long row holds all tokens; to those of rows that do not share, and to
  # padding, which is part of no row, the prefix is nothing.
  tokens = jnp.arange(num_tokens, dtype=jnp.int32)
  rows = jnp.searchsorted(cu_seqlens[1:], tokens, side="right", method="scan_unrolled")
  sees_prefix = shares.at[rows].get(mode="fill", fill_value=False)[:, None]
  prefix_lse = jnp.where(sees_prefix, prefix_lse, -jnp.inf)
  return merge([(prefix_out, prefix_lse), (out, lse)])[0]
