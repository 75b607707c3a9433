"""Paged attention in Pallas for Hopper GPUs through Mosaic GPU.

As in Triton, rows with few queries (decoding, drafts) are split along their keys, and
those with many (prompt chunks) are cut into tiles of queries. Each kernel has a queue
of its own, and one without work costs a launch.
"""

import dataclasses
from typing import Any

from jax import Array

from pallas_kernels.paged_attention import mosaic_decode_sm90 as decode
from pallas_kernels.paged_attention import mosaic_prefill_sm90 as prefill
from pallas_kernels.paged_attention import triton, work_queue
from pallas_kernels.paged_attention.call import Call, Outline
from pallas_kernels.paged_attention.mosaic_ring import Layer
from pallas_kernels.paged_attention.work_queue import Plan, Splits, Tiles


def why_not(call: Call) -> str | None:
  """Says why this backend cannot serve such arguments; None if it can."""
  q, k, v, v_head_dim = call.q, call.k, call.v, call.value_dim
  group, max_query_len = call.group, call.max_query_len
  if q.dtype.name not in ("bfloat16", "float16"):
    return f"q must be bfloat16 or float16, got {q.dtype}"
  is_quantised = call.k_scale is not None
  for name, x in (("k", k), ("v", v)):
    if x is not None and (x.dtype.itemsize > 1 if is_quantised else x.dtype != q.dtype):
      kinds = "int8 or float8" if is_quantised else q.dtype
      return f"{name} must be {kinds}, got {x.dtype}"
  widths = (64, 96, 128, 256) if is_quantised else (64, 80, 96, 128, 256)
  for name, width in (("head_dim", k.shape[-1]), ("v_head_dim", v_head_dim)):
    if v is None and (width % 64 or width > 576):
      return f"{name} must be a multiple of 64 up to 576 without v, got {width}"
    if v is not None and width not in widths:
      return f"{name} must be one of {widths} with {k.dtype}, got {width}"
  # Copies of scales end where 128 bytes begin.
  sizes = (32, 64, 128) if is_quantised else (8, 16, 32, 64, 128)
  if call.block_size not in sizes:
    return f"block_size must be one of {sizes} with {k.dtype}, got {call.block_size}"
  if not call.is_causal:
    return "it needs is_causal"
  if not call.sm_scale > 0:
    return f"sm_scale must be positive, got {call.sm_scale}"
  if group > prefill.MAX_GROUP:
    return f"a kv head must have at most {prefill.MAX_GROUP} heads, got {group}"
  if _has_chunks(group, max_query_len) and (v is None or k.shape[-1] != v_head_dim):
    return (
      f"values must be as wide as keys {k.shape} where max_query_len times {group}"
      f" heads may be more than {decode.MAX_COLUMNS}, got v_head_dim {v_head_dim}"
    )
  return None


def paged_attention(
  call: Call, *, plan: Plan | None = None, interpret: Any = None
) -> tuple[Array, Array]:
  """Causal attention of packed queries over paged keys and values.

  See `pallas_kernels.paged_attention.paged_attention`, whose `out` and `lse` are the
  results. `interpret` holds parameters of the GPU interpreter, or None.
  """
  layer = Layer(
    group=call.group,
    sm_scale=call.sm_scale,
    sliding_window=call.sliding_window,
    logits_soft_cap=call.logits_soft_cap,
    is_interpreted=interpret is not None,
  )
  rows = call.seq_lens, call.cu_seqlens
  splits, *tiles = cuts(call.outline)
  results = None
  if splits.max_queries:
    queue = work_queue.split_rows(*rows, plan=plan, **dataclasses.asdict(splits))
    parts = decode.split(
      call, queue, layer, max_queries=splits.max_queries, interpret=interpret
    )
    results = triton.combine(
      *parts,
      queue,
      call.sinks,
      group=call.group,
      dtype=call.q.dtype,
      interpret=interpret is not None,
    )
  for cut in tiles:
    work = work_queue.tile_rows(*rows, plan=plan, **dataclasses.asdict(cut))
    if work.rows.size:
      results = prefill.fill(results, call, work, layer, interpret=interpret)
  assert results is not None
  return results


def cuts(outline: Outline) -> tuple[Splits, *tuple[Tiles, ...]]:
  """How rows are cut; without `q`, how they are cut in a decode step."""
  k, v = outline.k, outline.v
  group, max_query_len = outline.group, outline.max_query_len
  settings = decode.settings(k, v)
  max_queries = _max_split_queries(group, max_query_len)
  splits = Splits(
    num_tokens=outline.num_tokens,
    max_len=outline.max_len,
    max_queries=max_queries,
    tile_kv=settings.tile_kv,
    min_tiles=max(1, settings.min_split // settings.tile_kv),
    max_splits=min(64, max(4, settings.num_programs // outline.num_kv_heads)),
    sliding_window=outline.sliding_window,
  )
  if outline.q is None or v is None or not _has_chunks(group, max_query_len):
    return (splits,)
  tiles = Tiles(
    num_tokens=outline.num_tokens,
    group=group,
    min_queries=max_queries + 1,
    tile_q=prefill.tokens_per_tile(group) * group,
  )
  return splits, tiles


def _max_split_queries(group: int, max_query_len: int | None) -> int:
  """Tokens of a row up to which its keys are split; 0 if one has too many heads."""
  most = decode.MAX_COLUMNS // group
  return most if max_query_len is None else min(most, max_query_len)


def _has_chunks(group: int, max_query_len: int | None) -> bool:
  """Whether rows may have more tokens than that."""
  return max_query_len is None or max_query_len > _max_split_queries(
    group, max_query_len
  )
