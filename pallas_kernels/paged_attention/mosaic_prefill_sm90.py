"""Paged attention of prompt chunks in Pallas for Hopper GPUs, through Mosaic GPU.

Two warpgroups compute, each for 64 queries `token * group + head` of one kv head, and a
third fetches for both; a fourth stands between them where keys and values are
quantised. Keys and values are walked once per tile of queries; only where some query
does not see some key is there a mask.

Reference: Shah et al., "FlashAttention-3", 2024.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import mosaic_ring as ring
from pallas_kernels.paged_attention import mosaic_widening
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.mosaic_ring import (
  Layer,
  Piece,
  plgpu,
  Pool,
  Ref,
  Ring,
  SQUARE,
  WGMMA,
)
from pallas_kernels.paged_attention.triton_walk import LOG2_E
from pallas_kernels.paged_attention.work_queue import TileQueue

MAX_GROUP = 64
"""Heads of a kv head: a warpgroup has whole tokens."""
NUM_PROGRAMS = 132
"""One for each multiprocessor of an H100."""
_ROWS = 64
"""Queries of a warpgroup, the height of its products."""
_COMPUTING = 2
"""Warpgroups that do."""
_SHARED_BYTES = 208 << 10
_MASKED = float(np.finfo(np.float32).min)
_LEAST = -1e30
"""Where the maximum of a row's logits begins, far above what is masked: that weighs
nothing then, also in rows that see nothing."""
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def tokens_per_tile(group: int) -> int:
  """Tokens whose queries are one piece of work."""
  return _COMPUTING * (_ROWS // group)


def fill(
  results: tuple[Array, Array] | None,
  call: Call,
  tiles: TileQueue,
  layer: Layer,
  *,
  interpret: Any,
) -> tuple[Array, Array]:
  """Writes the results of the rows in a queue into those of the others.

  Args:
    results: `out [T, H, D]` and `lse [T, H]` of other rows, or None.
    call: The arguments of `paged_attention`, values as wide as keys.
    tiles: Of `tokens_per_tile` tokens.
    layer: Static facts.
    interpret: Parameters of the GPU interpreter, or None.
  """
  q, cu_seqlens, sinks = call.q, call.cu_seqlens, call.sinks
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, group = call.num_kv_heads, call.group
  num_tiles, per_warpgroup = tiles.rows.size, _ROWS // group
  padding = _ROWS - per_warpgroup * group
  if results is None:
    results = jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
  # The tokens of each tile; what is not there has a place of its own past the end.
  row = jnp.maximum(tiles.rows, 0)
  place = jnp.arange(tokens_per_tile(group), dtype=jnp.int32)
  token = (cu_seqlens[row] + tiles.first // group)[:, None] + place[None]
  is_live = (tiles.rows >= 0)[:, None] & (token < cu_seqlens[row + 1][:, None])
  absent = num_tokens + jnp.arange(token.size, dtype=jnp.int32).reshape(token.shape)
  queries = q[jnp.clip(token, 0, num_tokens - 1)]
  queries = queries.reshape(
    num_tiles, _COMPUTING, per_warpgroup, num_kv_heads, group, head_dim
  ).transpose(0, 3, 1, 2, 4, 5)
  queries = queries.reshape(*queries.shape[:3], per_warpgroup * group, head_dim)
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
  if sinks is not None:  # of each query of a warpgroup
    sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, group) * LOG2_E
    sinks = sinks[:, jnp.arange(_ROWS) % group]
  out, lse = _attend(queries, sinks, call, tiles, layer, interpret)

  def by_token(x: Array) -> Array:
    """`[W * tokens, H, ...]`."""
    x = x[:, :, :, : per_warpgroup * group]
    x = x.reshape(*x.shape[:3], per_warpgroup, group, -1).transpose(0, 2, 3, 1, 4, 5)
    return x.reshape(token.size, num_heads, -1)

  at = jnp.where(is_live & (token < num_tokens), token, absent).ravel()
  out_at, lse_at = results[0].at[at], results[1].at[at]
  return (
    out_at.set(by_token(out), mode="drop", unique_indices=True),
    lse_at.set(by_token(lse[..., None])[..., 0], mode="drop", unique_indices=True),
  )


def _attend(
  q: Array,
  sinks: Array | None,
  call: Call,
  tiles: TileQueue,
  layer: Layer,
  interpret: Any,
) -> tuple[Array, Array]:
  """Results `[W, K, 2, 64, D]`, and `[W, K, 2, 64]` in float32.

  `q` and `sinks` are as warpgroups have them, see `_Inputs`.
  """
  num_tiles, num_kv_heads, _, _, head_dim = q.shape
  tile = tile_of(head_dim)
  assert call.v is not None
  pools = (
    ring.pool_of(call.k, call.k_scale, tile),
    ring.pool_of(call.v, call.v_scale, tile),
  )
  num_programs = min(NUM_PROGRAMS, num_tiles * num_kv_heads)
  inputs = _Inputs(
    q=q,
    pools=pools,
    block_tables=call.block_tables,
    seq_lens=call.seq_lens,
    cu_seqlens=call.cu_seqlens,
    rows=tiles.rows,
    first=tiles.first,
    num_tiles=jnp.sum(tiles.rows >= 0, dtype=jnp.int32, keepdims=True),
    sinks=sinks,
  )
  num_stages, num_wide = _stages(q, pools, tile)
  copied, wide = ring.rings_of(
    pools,
    tile,
    dtype=q.dtype,
    num_users=_COMPUTING,
    num_stages=num_stages,
    num_wide=num_wide,
  )
  registers = _registers(head_dim, is_quantised=bool(wide))

  def paged_attention_prefill_sm90(
    inputs: _Inputs, out: Ref, lse: Ref, *refs: Any
  ) -> None:
    scratch = _Scratch(*refs)
    each = functools.partial(
      ring.each_piece,
      piece_at=functools.partial(_piece_at, inputs, layer, tile),
      num_pieces=inputs.num_tiles[0],
      num_heads=num_kv_heads,
      num_programs=num_programs,
    )
    thread = lax.axis_index("thread")

    @pl.when(thread < _COMPUTING)
    def _() -> None:
      plgpu.set_max_registers(registers[0], action="increase")
      each(functools.partial(_compute, inputs, out, lse, scratch, layer))

    @pl.when(thread == _COMPUTING)
    def _() -> None:
      plgpu.set_max_registers(registers[1], action="decrease")
      ring.fetch_all(inputs.pools, scratch.copied, inputs.block_tables, each)

    if scratch.wide:

      @pl.when(thread == _COMPUTING + 1)
      def _() -> None:
        plgpu.set_max_registers(registers[2], action="decrease")
        mosaic_widening.widen_all(scratch.copied, scratch.wide, each)

  return plgpu.kernel(
    paged_attention_prefill_sm90,
    out_type=(
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
    ),
    scratch_types=_Scratch(
      q=ring.tiled((_COMPUTING, _ROWS, head_dim), q.dtype),
      copied=copied,
      wide=wide,
      lse=plgpu.SMEM((_COMPUTING, _ROWS), jnp.float32),
      q_here=plgpu.Barrier(num_barriers=_COMPUTING),
      buried=plgpu.Barrier(num_arrivals=_COMPUTING),
      weights=ring.tiled((_COMPUTING, _ROWS, tile), q.dtype, head_dim)
      if layer.is_interpreted
      else None,
    ),
    grid=(num_programs,),
    grid_names=("program",),
    num_threads=_COMPUTING + len(registers) - 1,
    thread_name="thread",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    **({} if interpret is None else {"interpret": interpret}),
  )(inputs)


def tile_of(head_dim: int) -> int:
  """Tokens per tile of keys."""
  return 128 if head_dim <= 128 else 64


def _registers(head_dim: int, *, is_quantised: bool) -> tuple[int, ...]:
  """Of the threads that compute, fetch, and widen quantised tiles.

  A program has no more than it is launched with: 168 for each thread of three
  warpgroups, 128 of four. One that asks for more waits for good.
  """
  if is_quantised:
    return 208, 24, 72
  return (240, 24) if head_dim > 128 else (224, 56)


def _stages(q: Array, pools: tuple[Pool, Pool], tile: int) -> tuple[int, int]:
  """Tiles of the two kinds of rings."""
  head_dim, blocks = q.shape[-1], pools[0].blocks
  per_stage, per_wide = (
    2 * tile * head_dim * dtype.itemsize for dtype in (blocks.dtype, q.dtype)
  )
  return ring.stages(
    _SHARED_BYTES - _COMPUTING * _ROWS * head_dim * q.dtype.itemsize,
    per_stage,
    0 if pools[0].scales is None else per_wide,
    most=4,
  )


class _Inputs(NamedTuple):
  """Arguments in the memory of the device."""

  q: Ref  # [W, K, 2, 64, D]
  pools: tuple[Pool, Pool]  # of keys, and of values
  block_tables: Ref  # [S, P]
  seq_lens: Ref  # [S]
  cu_seqlens: Ref  # [S + 1]
  rows: Ref  # [W]
  first: Ref  # [W]
  num_tiles: Ref  # [1]
  sinks: Ref  # [K, 64] in base 2, or None


class _Scratch(NamedTuple):
  """Shared memory of a program, and the barriers by which its threads meet."""

  q: Ref  # [2, 64, D], and in the end the result
  copied: tuple[Ring, ...]  # from each pool
  wide: tuple[Ring, ...]  # what quantised tiles become, if any are
  lse: Ref  # [2, 64]
  q_here: Ref  # [2]
  buried: Ref
  weights: Ref  # [2, 64, tile]; None where they stay in registers


def _positions(
  inputs: _Inputs, layer: Layer, number: Array, row: Array
) -> tuple[Array, Array, Array]:
  """Of the first query of a tile and of its last, and the length of its row."""
  max_len = inputs.block_tables.shape[1] * inputs.pools[0].block_size
  length = jnp.minimum(inputs.seq_lens[row], max_len)
  query_len = inputs.cu_seqlens[row + 1] - inputs.cu_seqlens[row]
  token = lax.div(inputs.first[number], jnp.int32(layer.group))
  last = jnp.minimum(token + tokens_per_tile(layer.group), query_len) - 1
  return length - query_len + token, length - query_len + last, length


def _piece_at(
  inputs: _Inputs, layer: Layer, tile: int, number: Array, head: Array, done: Array
) -> Piece:
  """The tiles of keys that some query of a tile sees."""
  row = inputs.rows[number]
  top, bottom, length = _positions(inputs, layer, number, row)
  begin = jnp.int32(0)
  if layer.sliding_window is not None:
    begin = jnp.maximum(top - (layer.sliding_window - 1), 0)
  first = lax.div(begin, jnp.int32(tile))
  return Piece(
    number=number,
    head=head,
    row=row,
    first=first,
    last=jnp.maximum(lax.div(bottom + tile, jnp.int32(tile)), first),
    begin=begin,
    length=length,
    done=done,
  )


def _compute(
  inputs: _Inputs, out: Ref, lse: Ref, scratch: _Scratch, layer: Layer, piece: Piece
) -> None:
  """Attends over the keys of a tile of queries, by each of two warpgroups."""
  thread = lax.axis_index("thread")
  key_ring, value_ring = scratch.wide or scratch.copied
  tile, head_dim = key_ring.tiles.shape[1:]
  first, last, _ = _positions(inputs, layer, piece.number, piece.row)
  q, q_here = scratch.q.at[thread], scratch.q_here.at[thread]
  plgpu.copy_gmem_to_smem(inputs.q.at[piece.number, piece.head, thread], q, q_here)
  plgpu.barrier_wait(q_here)
  factor, cap = layer.sm_scale * LOG2_E, layer.logits_soft_cap
  if cap is not None:
    factor = cap * LOG2_E

  def step(
    index: Array, state: tuple[Array, ...], *, is_masked: bool
  ) -> tuple[Array, ...]:
    acc, top, total = state
    slot = ring.slot_of(key_ring, piece, index)
    keys, values = key_ring.tiles.at[slot], value_ring.tiles.at[slot]
    is_buried = is_masked and not scratch.wide  # else it was done
    if is_buried:  # Here, where most registers are free.
      plgpu.barrier_wait(value_ring.here.at[slot])

      @pl.when((index * tile < piece.begin) | ((index + 1) * tile > piece.length))
      def _() -> None:
        _bury(values, thread, index * tile, piece)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.buried)
        plgpu.barrier_wait(scratch.buried)

    plgpu.barrier_wait(key_ring.here.at[slot])
    logits = ring.product(q, keys.T, (_ROWS, tile))
    plgpu.barrier_arrive(key_ring.free.at[slot])
    if cap is not None:
      logits = jnp.tanh(logits * (layer.sm_scale / cap))
    if is_masked:
      start = first + thread * (_ROWS // layer.group)
      mask = _mask(logits.shape, start, index * tile, layer)
      logits = jnp.where(mask, logits, _MASKED)
    new_top = jnp.maximum(top, logits.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits * factor - _spread(new_top, logits.shape))
    total = total * shrink + weights.sum(axis=1)
    acc = acc * _spread(shrink, acc.shape)
    weights = weights.astype(q.dtype)
    if scratch.weights is None:  # Registers hold what follows, and no more.
      acc, new_top, total, weights = lax.optimization_barrier(
        (acc, new_top, total, weights)
      )
    if not is_buried:
      plgpu.barrier_wait(value_ring.here.at[slot])
    if scratch.weights is not None:  # The interpreter multiplies shared memory alone.
      scratch.weights.at[thread][...] = weights
      plgpu.commit_smem()
      weights = scratch.weights.at[thread]
    acc = ring.add_product(acc, weights, values, layer)
    plgpu.barrier_arrive(value_ring.free.at[slot])
    return acc, new_top, total

  top, total = ring.full((_ROWS,), _LEAST, _BY_ROW), ring.full((_ROWS,), 0.0, _BY_ROW)
  if inputs.sinks is not None:
    top = plgpu.load(inputs.sinks.at[piece.head], layout=_BY_ROW, optimized=False)
    top = jnp.maximum(top, _LEAST)
    total = total + 1.0
  state = ring.full((_ROWS, head_dim), 0.0, WGMMA), top, total
  masked = functools.partial(step, is_masked=True)
  # Every query sees the keys from `clear` to `fringe`.
  clear = piece.first
  fringe = lax.div(jnp.maximum(first + 1, 0), jnp.int32(tile))
  fringe = jnp.clip(fringe, piece.first, piece.last)
  if layer.sliding_window is not None:
    behind = jnp.maximum(last - (layer.sliding_window - 1), 0)
    clear = lax.div(behind + (tile - 1), jnp.int32(tile))
    clear = jnp.clip(clear, piece.first, fringe)
    state = lax.fori_loop(piece.first, clear, masked, state)
  state = lax.fori_loop(clear, fringe, functools.partial(step, is_masked=False), state)
  acc, top, total = lax.fori_loop(fringe, piece.last, masked, state)
  safe = jnp.where(total == 0.0, 1.0, total)
  q[...] = (acc / _spread(safe, acc.shape)).astype(q.dtype)
  log = (top + jnp.log2(safe)) / LOG2_E
  scratch.lse.at[thread][...] = jnp.where(total == 0.0, -jnp.inf, log)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(q, out.at[piece.number, piece.head, thread])
  plgpu.copy_smem_to_gmem(
    scratch.lse.at[thread], lse.at[piece.number, piece.head, thread]
  )
  plgpu.wait_smem_to_gmem(0)


def _mask(shape: tuple[int, ...], first: Array, start: Array, layer: Layer) -> Array:
  """Which keys, along a row, its query sees."""
  iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=WGMMA)
  position = first + lax.div(iota(dimension=0), jnp.int32(layer.group))
  behind = position - (start + iota(dimension=1))
  if layer.sliding_window is None:
    return behind >= 0
  return behind.astype(jnp.uint32) < layer.sliding_window


def _bury(values: Ref, thread: Array, start: Array, piece: Piece) -> None:
  """Zeroes the values that nobody sees, each warpgroup in a half of the squares."""
  tile, head_dim = values.shape
  side = math.gcd(head_dim, SQUARE)
  for column in range(0, head_dim, side):
    for row in range(0, tile, SQUARE):

      @pl.when(thread == (row // SQUARE + column // side) % _COMPUTING)
      def _(row: int = row, column: int = column) -> None:
        square = values.at[pl.ds(row, SQUARE), pl.ds(column, side)]
        ring.bury(square, start + row, piece)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
  """One value per row, to all columns."""
  return lax.broadcast_in_dim(x, shape, [0])
