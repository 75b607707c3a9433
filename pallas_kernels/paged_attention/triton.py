"""Paged attention in Pallas for GPUs through Triton: portable, Ampere and later.

Rows with few queries (decoding, drafts) are split along their keys: programs work off a
queue of pieces, and a second kernel combines the partial results. Rows with many
queries (prompt chunks) are cut into tiles of queries that walk the keys once each.

Reference: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device
from pallas_kernels.paged_attention import tuning, work_queue
from pallas_kernels.paged_attention.call import Call, Outline, Shaped
from pallas_kernels.paged_attention.triton_walk import (
  Layer,
  LOG2_E,
  Memory,
  NEG,
  pairs,
  Parts,
  Ref,
  store,
  walk,
)
from pallas_kernels.paged_attention.tuning import Settings
from pallas_kernels.paged_attention.work_queue import (
  Plan,
  SplitQueue,
  Splits,
  TileQueue,
  Tiles,
)

_MAX_QUERIES = 8
"""Tokens of a row, drafts included, up to which its keys are split."""
_MAX_TILE_Q = 64
_MIN_SPLIT = 256
"""Least tokens of a piece: its partial result is some 3 % of what it reads."""
_NUM_PROGRAMS = 264
"""Of the decode kernel: two for each multiprocessor of an H100."""
_SHARED_BYTES = 100 << 10
"""Of tiles in flight, so that two programs find room on a multiprocessor."""
_FLOATS = ("bfloat16", "float16", "float32")
_MAX_OFFSET = 2**31
"""Offsets, in elements, are 32-bit and signed in arrays of up to 4 GiB, else 64-bit."""


def why_not(call: Call) -> str | None:
  """Says why this backend cannot serve such arguments; None if it can."""
  q, k, v = call.q, call.k, call.v
  for name, width in (("head_dim", call.head_dim), ("v_head_dim", call.value_dim)):
    if width % 16 or width > 1024:
      return f"{name} must be a multiple of 16 up to 1024, got {width}"
  if q.dtype.name not in _FLOATS:
    return f"q must be one of {_FLOATS}, got {q.dtype}"
  for name, pool in {"k": k, "v": k if v is None else v}.items():
    if pool.dtype.name not in (*_FLOATS, "int8", "uint8"):
      return f"{name} must be one of {_FLOATS}, int8 or uint8, got {pool.dtype}"
    if math.prod(pool.shape[:-1]) >= 2**31:
      return f"{name} must hold less than 2^31 tokens and heads, got {pool.shape}"
  return None


def paged_attention(
  call: Call, *, plan: Plan | None = None, interpret: bool = False
) -> tuple[Array, Array]:
  """Causal attention of packed queries over paged keys and values.

  See `pallas_kernels.paged_attention.paged_attention`, whose `out` and `lse` are the
  results. `interpret` runs the kernels' bodies on any device.
  """
  q, k, v = call.q, call.k, call.v
  seq_lens, cu_seqlens = call.seq_lens, call.cu_seqlens
  splits, *tiles = cuts(call.outline)
  layer = Layer(
    num_kv_heads=call.num_kv_heads,
    group=call.group,
    block_size=call.block_size,
    key_parts=_parts(call.head_dim),
    value_parts=_parts(call.value_dim),
    dtype=_operand_dtype(q, k, v),
    stored=None if call.k_scale is None else k.dtype,
    has_float8=device.has_float8(),
    settings=_settings("split", k, v),
    is_causal=call.is_causal,
    sm_scale=call.sm_scale,
    sliding_window=call.sliding_window,
    logits_soft_cap=call.logits_soft_cap,
  )
  memory = Memory(
    q=q.reshape(-1, call.head_dim),
    k=_flat(k),
    v=None if v is None else _flat(v),
    k_scale=None if call.k_scale is None else call.k_scale.reshape(-1),
    v_scale=None if call.v_scale is None else call.v_scale.reshape(-1),
    sinks=None if call.sinks is None else call.sinks.astype(jnp.float32),
    block_tables=call.block_tables,
    seq_lens=seq_lens,
    cu_seqlens=cu_seqlens,
  )
  queue = work_queue.split_rows(
    seq_lens, cu_seqlens, plan=plan, **dataclasses.asdict(splits)
  )
  parts = _split(
    memory, queue, layer, max_queries=splits.max_queries, interpret=interpret
  )
  results = combine(
    *parts, queue, memory.sinks, group=call.group, dtype=q.dtype, interpret=interpret
  )
  for cut in tiles:
    work = work_queue.tile_rows(
      seq_lens, cu_seqlens, plan=plan, **dataclasses.asdict(cut)
    )
    if work.rows.size:
      layer = dataclasses.replace(layer, settings=_settings("fill", k, v))
      results = _fill(
        *results, memory, work, layer, tile_q=cut.tile_q, interpret=interpret
      )
  return results


def cuts(outline: Outline) -> tuple[Splits, *tuple[Tiles, ...]]:
  """How rows are cut.

  Without `q`, how rows with few queries are cut if a kv head has up to 8 query heads;
  in a decode step, however many it has.
  """
  q, k, v = outline.q, outline.k, outline.v
  num_tokens, group = outline.num_tokens, outline.group
  max_query_len = outline.max_query_len
  max_queries = max(1, min(_MAX_QUERIES, _MAX_TILE_Q // group, num_tokens))
  if max_query_len is not None:
    max_queries = min(max_queries, max_query_len)
  settings = _settings("split", k, v)
  splits = Splits(
    num_tokens=num_tokens,
    max_len=outline.max_len,
    max_queries=max_queries,
    tile_kv=settings.tile_kv,
    min_tiles=max(1, settings.min_split // settings.tile_kv),
    # All programs have work as soon as there is one long row.
    max_splits=min(
      64, max(4, settings.num_programs // (outline.num_kv_heads * max_queries))
    ),
    sliding_window=outline.sliding_window,
  )
  if q is None or (max_query_len is not None and max_query_len <= max_queries):
    return (splits,)
  is_float32 = _operand_dtype(q, k, v) == jnp.float32
  tiles = Tiles(
    num_tokens=num_tokens,
    group=group,
    min_queries=max_queries + 1,
    tile_q=_tile_q(num_tokens * group, _settings("fill", k, v), is_float32=is_float32),
  )
  return splits, tiles


# --- Kernels --------------------------------------------------------------------------


def _split(
  memory: Memory,
  queue: SplitQueue,
  layer: Layer,
  *,
  max_queries: int,
  interpret: bool,
) -> tuple[Array, Array]:
  """Partial results `[W, K, R, Dv]`, and `[W, K, R]` in base 2; `R` queries a row.

  Programs take turns at the pieces, all heads of one before the next.
  """
  num_queries = max_queries * layer.group
  settings = layer.settings
  tile_q = _tile_q(num_queries, settings, is_float32=layer.dtype == jnp.float32)
  tiles_q = -(-num_queries // tile_q)
  per_piece = layer.num_kv_heads * tiles_q
  num_programs = min(settings.num_programs, queue.rows.size * per_piece)

  def kernel(queue: Any, memory: Memory, out: Ref, lse_out: Ref) -> None:
    program = pl.program_id(0)

    def work(turn: Array, carry: None) -> None:
      index = turn * num_programs + program
      piece = lax.div(index, per_piece)
      head = lax.rem(index, layer.num_kv_heads)
      first = lax.div(lax.rem(index, per_piece), layer.num_kv_heads) * tile_q
      lanes = first + jnp.arange(tile_q, dtype=jnp.int32)
      parts, lse = walk(
        memory,
        layer,
        row=queue.rows[piece],
        head=head,
        queries=lanes,
        tiles=(queue.first[piece], queue.last[piece]),
        with_sinks=False,
      )
      is_query = lanes < num_queries
      for (a, b), part in zip(layer.value_parts, parts, strict=True):
        store(lambda r, c: out.at[piece, head, r, c], lanes, a, b, part, is_query)
      plt.store(lse_out.at[piece, head, lanes], lse, mask=is_query)

    todo = queue.num_pieces[0] * per_piece - program
    turns = lax.div(todo + (num_programs - 1), num_programs)
    lax.fori_loop(0, turns, work, None)

  shape = (queue.rows.size, layer.num_kv_heads, num_queries)
  return pl.pallas_call(
    kernel,
    grid=(num_programs,),
    out_shape=(
      jax.ShapeDtypeStruct((*shape, layer.v_head_dim), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    compiler_params=plt.CompilerParams(
      num_warps=_num_warps(tile_q, layer), num_stages=layer.settings.num_stages
    ),
    interpret=interpret,
    name="paged_attention_split",
  )(queue, memory)


def combine(
  parts: Array,
  part_lse: Array,
  queue: SplitQueue,
  sinks: Array | None,
  *,
  group: int,
  dtype: np.dtype,
  interpret: bool,
) -> tuple[Array, Array]:
  """Combines partial results.

  Args:
    parts: `[W, K, R, Dv]` of each piece, `R` at least the queries of a row.
    part_lse: `[W, K, R]` in base 2, `NEG` where nothing was seen.
    queue: What the pieces are.
    sinks: `[H]`, or None.
    group: Query heads per kv head.
    dtype: Of the result.
    interpret: As in `paged_attention`.

  Returns:
    `out [T, H, Dv]` and `lse [T, H]`; zeros and `-inf` for tokens of other rows.
  """
  num_tokens, (_, num_kv_heads, _, v_head_dim) = queue.token_count.size, parts.shape
  columns = _parts(v_head_dim)
  tile = min(_power_of_two(group, least=1), max(1, 4096 // v_head_dim))
  tiles = -(-group // tile)
  num_heads = num_kv_heads * group

  def kernel(
    queue: Any, sinks: Ref, parts: Ref, part_lse: Ref, out: Ref, lse_out: Ref
  ) -> None:
    token, head = pl.program_id(0), pl.program_id(1)
    lanes = pl.program_id(2) * tile + jnp.arange(tile, dtype=jnp.int32)
    count, first = queue.token_count[token], queue.token_piece[token]
    place = jnp.where(count > 0, queue.token_place[token], 0)
    query = place * group + jnp.minimum(lanes, group - 1)
    heads = head * group + jnp.minimum(lanes, group - 1)

    def step(index: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
      sums, top, total = state
      piece = first + index
      lse = part_lse[piece, head, query]
      new_top = jnp.maximum(top, lse)
      shrink = jnp.exp2(top - new_top)
      weight = jnp.where(lse > NEG, jnp.exp2(lse - new_top), 0.0)
      sums = [
        x * shrink[:, None] + parts[piece, head, query, a:b] * weight[:, None]
        for x, (a, b) in zip(sums, columns, strict=True)
      ]
      return sums, new_top, total * shrink + weight

    top = jnp.full((tile,), NEG, jnp.float32)
    total = jnp.zeros((tile,), jnp.float32)
    if sinks is not None:
      top, total = sinks[heads] * LOG2_E, total + 1.0
    sums = [jnp.zeros((tile, b - a), jnp.float32) for a, b in columns]
    sums, top, total = lax.fori_loop(0, count, step, (sums, top, total))
    lse = (top + jnp.log2(jnp.where(total == 0.0, 1.0, total))) / LOG2_E
    lse = jnp.where((total == 0.0) | (count == 0), -jnp.inf, lse)
    is_head, at = lanes < group, head * group + lanes
    for (a, b), x in zip(columns, sums, strict=True):
      x = (x / jnp.where(total == 0.0, 1.0, total)[:, None]).astype(dtype)
      store(lambda r, c: out.at[token, r, c], at, a, b, x, is_head)
    plt.store(lse_out.at[token, at], lse, mask=is_head)

  return pl.pallas_call(
    kernel,
    grid=(num_tokens, num_kv_heads, tiles),
    out_shape=(
      jax.ShapeDtypeStruct((num_tokens, num_heads, v_head_dim), dtype),
      jax.ShapeDtypeStruct((num_tokens, num_heads), jnp.float32),
    ),
    compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
    interpret=interpret,
    name="paged_attention_combine",
  )(queue, sinks, parts, part_lse)


def _fill(
  out: Array,
  lse: Array,
  memory: Memory,
  tiles: TileQueue,
  layer: Layer,
  *,
  tile_q: int,
  interpret: bool,
) -> tuple[Array, Array]:
  """Writes the results of the rows with many queries into those of the others."""

  def kernel(
    out_in: Ref, lse_in: Ref, tiles: Any, memory: Memory, out: Ref, lse_out: Ref
  ) -> None:
    del out_in, lse_in  # the same memory as `out` and `lse_out`
    head, tile = pl.program_id(0), pl.program_id(1)
    row = tiles.rows[tile]

    @pl.when(row >= 0)
    def _() -> None:
      start, stop = memory.cu_seqlens[row], memory.cu_seqlens[row + 1]
      lanes = tiles.first[tile] + jnp.arange(tile_q, dtype=jnp.int32)
      parts, lse = walk(
        memory,
        layer,
        row=row,
        head=head,
        queries=lanes,
        tiles=None,
        with_sinks=True,
      )
      token = start + lax.div(lanes, layer.group)
      is_query = (token < stop) & (token >= 0) & (token < out.shape[0])
      at = head * layer.group + lax.rem(lanes, layer.group)
      lse = jnp.where(lse > NEG, lse / LOG2_E, -jnp.inf)
      for (a, b), part in zip(layer.value_parts, parts, strict=True):
        part = part.astype(out.dtype)
        store(lambda r, c: out.at[r[0], r[1], c], (token, at), a, b, part, is_query)
      plt.store(lse_out.at[token, at], lse, mask=is_query)

  return pl.pallas_call(
    kernel,
    grid=(layer.num_kv_heads, tiles.rows.size),
    out_shape=(
      jax.ShapeDtypeStruct(out.shape, out.dtype),
      jax.ShapeDtypeStruct(lse.shape, lse.dtype),
    ),
    input_output_aliases={0: 0, 1: 1},
    compiler_params=plt.CompilerParams(
      num_warps=_num_warps(tile_q, layer), num_stages=layer.settings.num_stages
    ),
    interpret=interpret,
    name="paged_attention_fill",
  )(out, lse, tiles, memory)


# --- Static choices -------------------------------------------------------------------


def _parts(width: int) -> Parts:
  """Cuts columns into powers of two, which Triton wants: 576 into 512 and 64."""
  parts, start = [], 0
  while start < width:
    size = 1 << ((width - start).bit_length() - 1)
    parts.append((start, start + size))
    start += size
  return tuple(parts)


def _power_of_two(least_size: int, *, least: int = 16) -> int:
  """The power of two from `least` on (a product's smallest side) that holds so many."""
  return max(least, 1 << (least_size - 1).bit_length())


def _operand_dtype(q: Shaped, k: Shaped, v: Shaped | None) -> np.dtype:
  """What products are computed in: quantised elements are exact in any type of `q`."""
  dtypes = {q.dtype}
  if k.dtype.itemsize > 1:
    dtypes |= {x.dtype for x in (k, v) if x is not None}
  return np.dtype(q.dtype if len(dtypes) == 1 else jnp.float32)


def _flat(pool: Array) -> Array:
  """`[N * K * block_size, D]`, or as many pairs where offsets would be too large."""
  flat = pool.reshape(-1, pool.shape[-1])
  has_room = pool.dtype.itemsize > 1 or pool.size * pool.dtype.itemsize > 2**32
  return flat if has_room or pool.size <= _MAX_OFFSET else pairs(flat)


def _settings(kernel: str, k: Shaped, v: Shaped | None) -> Settings:
  """How a kernel is set up."""
  max_tile_q = _MAX_TILE_Q
  if (k if v is None else v).shape[-1] > 256:
    max_tile_q //= 4 if k.dtype.itemsize == 1 else 2
  tile_kv, num_stages = _tile_kv(k, v, max_tile_q)
  default = Settings(
    tile_kv=tile_kv,
    num_stages=num_stages,
    min_split=_MIN_SPLIT,
    num_programs=_NUM_PROGRAMS,
    max_tile_q=max_tile_q,
  )
  return tuning.settle(f"triton {kernel}", k, v, default)


def _tile_kv(k: Shaped, v: Shaped | None, max_tile_q: int) -> tuple[int, int]:
  """Tokens per tile, and stages of the pipeline."""
  per_token = sum(x.shape[-1] * x.dtype.itemsize for x in (k, v) if x is not None)
  choices = ((3, 64), (2, 64), (3, 32), (2, 32), (2, 16))
  if k.dtype.itemsize == 1 and k.shape[-1] > 512:
    choices = choices[2:]  # elements pass through registers on their way to a product
  # Beside them are the tiles of queries and of weights.
  others = max_tile_q * (k.shape[-1] + 64) * 2 + 2048
  room = min(_SHARED_BYTES, device.shared_bytes() - others)
  fits = (x for x in choices if math.prod(x) * per_token <= room)
  buffers, tile = next(fits, (1, 16))
  # A stage ahead of each buffer, block ids are loaded.
  return tile, 2 * buffers + 1


def _tile_q(num_queries: int, settings: Settings, *, is_float32: bool) -> int:
  """Queries per tile: what registers hold without spilling."""
  most = settings.max_tile_q // (4 if is_float32 else 1)
  return min(max(most, 16), _power_of_two(num_queries))


def _num_warps(tile_q: int, layer: Layer) -> int:
  """As many as hold the sums in a quarter of their registers."""
  if layer.settings.num_warps is not None:
    return layer.settings.num_warps
  return 8 if tile_q * layer.v_head_dim >= 8192 else 4
