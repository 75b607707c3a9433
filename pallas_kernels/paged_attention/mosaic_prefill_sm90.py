"""Paged attention of prompt chunks in Pallas for Hopper GPUs, through Mosaic GPU.

Two warpgroups compute, each for 64 queries `token * group + head` of one kv head, and a
third fetches for both. Keys and values are walked once per tile of queries; only where
some query does not see some key is there a mask.

Reference: Shah et al., "FlashAttention-3", 2024.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_ring as ring
from pallas_kernels.paged_attention.mosaic_ring import (
  Layer,
  Piece,
  plgpu,
  Ref,
  Ring,
  SQUARE,
  WGMMA,
)
from pallas_kernels.paged_attention.triton_walk import LOG2_E, NEG
from pallas_kernels.paged_attention.work_queue import TileQueue

MAX_GROUP = 64
"""Heads of a kv head: a warpgroup has whole tokens."""
NUM_PROGRAMS = 132
"""One for each multiprocessor of an H100."""
_ROWS = 64
"""Queries of a warpgroup, the height of its products."""
_COMPUTING = 2
"""Warpgroups that do."""
_REGISTERS = 232, 40
"""Of the threads that compute, and of those that fetch; 64 Ki in all."""
_SHARED_BYTES = 208 << 10
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def tokens_per_tile(group: int) -> int:
  """Tokens whose queries are one piece of work."""
  return _COMPUTING * (_ROWS // group)


def fill(
  results: tuple[Array, Array] | None,
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  sinks: Array | None,
  tiles: TileQueue,
  layer: Layer,
  *,
  interpret: Any,
) -> tuple[Array, Array]:
  """Writes the results of the rows in a queue into those of the others.

  Args:
    results: `out [T, H, D]` and `lse [T, H]` of other rows, or None.
    q: `[T, H, D]`.
    k: `[N, K, block_size, D]`.
    v: `[N, K, block_size, D]`.
    block_tables: `[S, P]`.
    seq_lens: `[S]`.
    cu_seqlens: `[S + 1]`.
    sinks: `[H]`, or None.
    tiles: Of `tokens_per_tile` tokens.
    layer: Static facts.
    interpret: Parameters of the GPU interpreter, or None.
  """
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, group = k.shape[1], layer.group
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
  out, lse = _attend(
    queries, k, v, block_tables, seq_lens, cu_seqlens, sinks, tiles, layer, interpret
  )

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
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  sinks: Array | None,
  tiles: TileQueue,
  layer: Layer,
  interpret: Any,
) -> tuple[Array, Array]:
  """Results `[W, K, 2, 64, D]`, and `[W, K, 2, 64]` in float32."""
  num_tiles, num_kv_heads, _, _, head_dim = q.shape
  tile = 128 if head_dim <= 128 else 64
  own = _COMPUTING * _ROWS * head_dim * q.dtype.itemsize
  per_stage = 2 * tile * head_dim * k.dtype.itemsize
  num_stages = max(2, min(4, (_SHARED_BYTES - own) // per_stage))
  num_programs = min(NUM_PROGRAMS, num_tiles * num_kv_heads)
  inputs = _Inputs(
    q=q,
    k=ring.split_blocks(k, tile),
    v=ring.split_blocks(v, tile),
    block_tables=block_tables,
    seq_lens=seq_lens,
    cu_seqlens=cu_seqlens,
    rows=tiles.rows,
    first=tiles.first,
    num_tiles=jnp.sum(tiles.rows >= 0, dtype=jnp.int32, keepdims=True),
    sinks=sinks,
  )

  def paged_attention_prefill_sm90(
    inputs: _Inputs, out: Ref, lse: Ref, *refs: Ref
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
      plgpu.set_max_registers(_REGISTERS[0], action="increase")
      each(functools.partial(_compute, inputs, out, lse, scratch, layer))

    @pl.when(thread == _COMPUTING)
    def _() -> None:
      plgpu.set_max_registers(_REGISTERS[1], action="decrease")
      ring.fetch_all(scratch.rings(inputs), inputs.block_tables, each)

  barriers = functools.partial(plgpu.Barrier, num_barriers=num_stages)
  copies = ring.copies_per_tile(k, tile)
  return plgpu.kernel(
    paged_attention_prefill_sm90,
    out_type=(
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
    ),
    scratch_types=_Scratch(
      q=ring.tiled((_COMPUTING, _ROWS, head_dim), q.dtype),
      k=ring.tiled((num_stages, tile, head_dim), q.dtype),
      v=ring.tiled((num_stages, tile, head_dim), q.dtype),
      lse=plgpu.SMEM((_COMPUTING, _ROWS), jnp.float32),
      q_here=plgpu.Barrier(num_barriers=_COMPUTING),
      k_here=barriers(num_arrivals=copies),
      v_here=barriers(num_arrivals=copies),
      k_free=barriers(num_arrivals=_COMPUTING),
      v_free=barriers(num_arrivals=_COMPUTING),
      buried=plgpu.Barrier(num_arrivals=_COMPUTING),
      weights=None
      if interpret is None
      else ring.tiled((_COMPUTING, _ROWS, tile), q.dtype),
    ),
    grid=(num_programs,),
    grid_names=("program",),
    num_threads=_COMPUTING + 1,
    thread_name="thread",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    **({} if interpret is None else {"interpret": interpret}),
  )(inputs)


class _Inputs(NamedTuple):
  """Arguments in the memory of the device."""

  q: Ref  # [W, K, 2, 64, D]
  k: Ref  # [N, K, tiles per block, tokens per copy, D]
  v: Ref  # [N, K, tiles per block, tokens per copy, D]
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
  k: Ref  # [stages, tile, D]
  v: Ref  # [stages, tile, D]
  lse: Ref  # [2, 64]
  q_here: Ref  # [2]
  k_here: Ref  # [stages]
  v_here: Ref  # [stages]
  k_free: Ref  # [stages]
  v_free: Ref  # [stages]
  buried: Ref
  weights: Ref  # [2, 64, tile]; None where they stay in registers

  def rings(self, inputs: _Inputs) -> tuple[Ring, Ring]:
    """Of keys, and of values."""
    return (
      Ring(inputs.k, self.k, self.k_here, self.k_free),
      Ring(inputs.v, self.v, self.v_here, self.v_free),
    )


def _positions(
  inputs: _Inputs, layer: Layer, number: Array, row: Array
) -> tuple[Array, Array, Array]:
  """Of the first query of a tile and of its last, and the length of its row."""
  max_len = inputs.block_tables.shape[1] * inputs.k.shape[2] * inputs.k.shape[3]
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
  first = jnp.int32(0)
  if layer.sliding_window is not None:
    first = lax.div(jnp.maximum(top - (layer.sliding_window - 1), 0), jnp.int32(tile))
  return Piece(
    number=number,
    head=head,
    row=row,
    first=first,
    last=jnp.maximum(lax.div(bottom + tile, jnp.int32(tile)), first),
    length=length,
    done=done,
  )


def _compute(
  inputs: _Inputs, out: Ref, lse: Ref, scratch: _Scratch, layer: Layer, piece: Piece
) -> None:
  """Attends over the keys of a tile of queries, by each of two warpgroups."""
  thread = lax.axis_index("thread")
  tile, head_dim = scratch.k.shape[1:]
  first, last, length = _positions(inputs, layer, piece.number, piece.row)
  begin = jnp.int32(0)
  if layer.sliding_window is not None:
    begin = jnp.maximum(first - (layer.sliding_window - 1), 0)
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
    slot = ring.slot_of(scratch.k, piece, index)
    keys, values = scratch.k.at[slot], scratch.v.at[slot]
    if is_masked:  # Here, where most registers are free.
      plgpu.barrier_wait(scratch.v_here.at[slot])

      @pl.when((index * tile < begin) | ((index + 1) * tile > length))
      def _() -> None:
        _bury(values, thread, index * tile, begin, length)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.buried)
        plgpu.barrier_wait(scratch.buried)

    plgpu.barrier_wait(scratch.k_here.at[slot])
    logits = ring.product(q, keys.T, (_ROWS, tile))
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    if cap is not None:
      logits = jnp.tanh(logits * (layer.sm_scale / cap))
    mask = None
    if is_masked:
      start = first + thread * (_ROWS // layer.group)
      mask = _mask(logits.shape, start, index * tile, layer)
      logits = jnp.where(mask, logits, NEG)
    new_top = jnp.maximum(top, logits.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits * factor - _spread(new_top, logits.shape))
    if mask is not None:
      weights = jnp.where(mask, weights, 0.0)
    total = total * shrink + weights.sum(axis=1)
    acc = acc * _spread(shrink, acc.shape)
    weights = weights.astype(q.dtype)
    if scratch.weights is None:  # Registers hold what follows, and no more.
      acc, new_top, total, weights = lax.optimization_barrier(
        (acc, new_top, total, weights)
      )
    if not is_masked:
      plgpu.barrier_wait(scratch.v_here.at[slot])
    if scratch.weights is None:
      acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(
        plgpu.ACC.init(acc)
      )
    else:  # The interpreter multiplies shared memory alone, and adds nothing up.
      scratch.weights.at[thread][...] = weights
      plgpu.commit_smem()
      acc = acc + ring.product(scratch.weights.at[thread], values, acc.shape)
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return acc, new_top, total

  top, total = ring.full((_ROWS,), NEG, _BY_ROW), ring.full((_ROWS,), 0.0, _BY_ROW)
  if inputs.sinks is not None:
    top = plgpu.load(inputs.sinks.at[piece.head], layout=_BY_ROW, optimized=False)
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
  place = start + iota(dimension=1)
  mask = place <= position
  if layer.sliding_window is not None:
    mask &= place > position - layer.sliding_window
  return mask


def _bury(
  values: Ref, thread: Array, start: Array, begin: Array, length: Array
) -> None:
  """Zeroes the values that nobody sees, each warpgroup in a half of the squares."""
  tile, head_dim = values.shape
  for column in range(0, head_dim, SQUARE):
    for row in range(0, tile, SQUARE):

      @pl.when(thread == (row + column) // SQUARE % _COMPUTING)
      def _(row: int = row, column: int = column) -> None:
        square = values.at[pl.ds(row, SQUARE), pl.ds(column, SQUARE)]
        ring.bury(square, start + row, begin, length)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
  """One value per row, to all columns."""
  return lax.broadcast_in_dim(x, shape, [0])
