"""Paged attention of few queries per row in Pallas for Hopper GPUs, through Mosaic GPU.

The operands of the products are swapped, so that the long side of each is the tile of
keys: `S^T = K Q^T` and `O^T = V^T P^T`, with as many columns as a kv head has queries,
padded to eight. One warpgroup computes, and another fetches; where keys and values are
quantised, a third stands between them. Latent keys, the first part of which are the
values, are fetched once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_ring as ring
from pallas_kernels.paged_attention import mosaic_widening, tuning
from pallas_kernels.paged_attention.call import Call, Shaped
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
from pallas_kernels.paged_attention.triton_walk import LOG2_E, NEG
from pallas_kernels.paged_attention.tuning import Settings
from pallas_kernels.paged_attention.work_queue import SplitQueue

TILE = 64
"""Tokens per tile, the least that a warpgroup's product has."""
MAX_COLUMNS = 16
_MIN_SPLIT = 256
"""Least tokens of a piece: its partial result is some 3 % of what it reads."""
_NUM_PROGRAMS = 264
"""Two for each multiprocessor of an H100."""
_SHARED_BYTES = 102 << 10
"""Of one program, so that two find room on a multiprocessor."""
_REGISTERS = 240, 40, 224
"""Of the threads that compute, fetch and widen tiles, of one program alone."""
_EQUAL_SHARE = 168
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def split(
  call: Call, queue: SplitQueue, layer: Layer, *, max_queries: int, interpret: Any
) -> tuple[Array, Array]:
  """Attention of the rows in a queue of pieces.

  Args:
    call: The arguments of `paged_attention`. Without `v`, values are the first part of
      the keys.
    queue: Pieces in tiles of `TILE` tokens.
    layer: Static facts.
    max_queries: Most query tokens of a row in the queue.
    interpret: Parameters of the GPU interpreter, or None.

  Returns:
    Partial results `[W, K, columns, Dv]`, and the logarithms to base 2 of their
    softmax's denominators, `[W, K, columns]`; both in float32. Column
    `token * group + head` is a query of the row.
  """
  q, k, v, v_head_dim = call.q, call.k, call.v, call.value_dim
  head_dim, num_kv_heads = call.head_dim, call.num_kv_heads
  columns = 8 if max_queries * layer.group <= 8 else MAX_COLUMNS
  setup = settings(k, v)
  _, num_wide, is_small = _stages(k, v)
  place = jnp.arange(max_queries, dtype=jnp.int32)
  token = call.cu_seqlens[:-1, None] + place[None]
  token = jnp.minimum(token, call.num_tokens - 1)
  rows = q[token].reshape(*token.shape, num_kv_heads, layer.group, head_dim)
  rows = rows.transpose(0, 2, 1, 3, 4).reshape(
    token.shape[0], num_kv_heads, -1, head_dim
  )
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, columns - rows.shape[2]), (0, 0)))
  shape = (queue.rows.size, num_kv_heads, columns)
  num_programs = min(setup.num_programs, queue.rows.size * num_kv_heads)

  pools = [ring.pool_of(k, call.k_scale, TILE)]
  if v is not None:
    # What is copied into padded tiles must be one piece there: eight rows.
    max_rows = 8 if call.v_scale is None and v_head_dim % SQUARE else TILE
    pools.append(ring.pool_of(v, call.v_scale, max_rows))
  inputs = _Inputs(
    q=rows,
    pools=tuple(pools),
    block_tables=call.block_tables,
    seq_lens=call.seq_lens,
    cu_seqlens=call.cu_seqlens,
    rows=queue.rows,
    first=queue.first,
    last=queue.last,
    num_pieces=queue.num_pieces,
  )
  copied, wide = ring.rings_of(
    pools,
    TILE,
    num_stages=setup.num_stages,
    num_wide=num_wide,
    dtype=q.dtype,
    num_users=1,
    pads_values=True,
  )

  def paged_attention_decode_sm90(
    inputs: _Inputs, out: Ref, lse: Ref, *refs: Any
  ) -> None:
    scratch = _Scratch(*refs)
    each = functools.partial(
      ring.each_piece,
      piece_at=functools.partial(_piece_at, inputs, layer),
      num_pieces=inputs.num_pieces[0],
      num_heads=num_kv_heads,
      num_programs=num_programs,
    )
    thread = lax.axis_index("thread")

    def take(num_registers: int) -> None:
      """Shares registers anew where three warpgroups have a multiprocessor."""
      if wide and not is_small:
        action = "increase" if num_registers > _EQUAL_SHARE else "decrease"
        plgpu.set_max_registers(num_registers, action=action)

    @pl.when(thread == 0)
    def _() -> None:
      take(_REGISTERS[0])
      each(functools.partial(_compute, inputs, out, lse, scratch, layer))

    @pl.when(thread == 1)
    def _() -> None:
      take(_REGISTERS[1])
      ring.fetch_all(inputs.pools, scratch.copied, inputs.block_tables, each)

    if scratch.wide:

      @pl.when(thread == 2)
      def _() -> None:
        take(_REGISTERS[2])
        mosaic_widening.widen_all(scratch.copied, scratch.wide, each)

  return plgpu.kernel(
    paged_attention_decode_sm90,
    out_type=(
      jax.ShapeDtypeStruct((*shape, v_head_dim), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    scratch_types=_Scratch(
      q=ring.tiled((columns, head_dim), q.dtype),
      copied=copied,
      wide=wide,
      weights=ring.tiled((columns, TILE), q.dtype, v_head_dim),
      out=ring.tiled((columns, ring.pad(v_head_dim)), jnp.float32, v_head_dim),
      lse=plgpu.SMEM((columns,), jnp.float32),
      q_here=plgpu.Barrier(),
    ),
    grid=(num_programs,),
    grid_names=("program",),
    num_threads=3 if wide else 2,
    thread_name="thread",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=1024,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    **({} if interpret is None else {"interpret": interpret}),
  )(inputs)


def settings(k: Shaped, v: Shaped | None) -> Settings:
  """How the kernel is set up; shapes and dtypes of arrays suffice."""
  num_stages, _, is_small = _stages(k, v)
  default = Settings(
    tile_kv=TILE,
    num_stages=num_stages,
    min_split=_MIN_SPLIT,
    num_programs=_NUM_PROGRAMS if is_small else _NUM_PROGRAMS // 2,
  )
  return tuning.settle("mosaic split", k, v, default)


def _stages(k: Shaped, v: Shaped | None) -> tuple[int, int, bool]:
  """Tiles of the rings, and whether they leave room for another program."""
  is_quantised = k.dtype.itemsize == 1
  width = k.shape[-1] + (0 if v is None else ring.pad(v.shape[-1]))
  per_stage = TILE * width * k.dtype.itemsize
  num_stages, num_wide = ring.stages(
    _SHARED_BYTES, per_stage, 2 * per_stage if is_quantised else 0, most=6
  )
  used = per_stage * (num_stages + (2 * num_wide if is_quantised else 0))
  return num_stages, num_wide, used <= _SHARED_BYTES


class _Inputs(NamedTuple):
  """Arguments in the memory of the device."""

  q: Ref  # [S, K, columns, D]
  pools: tuple[Pool, ...]  # of keys, and of values that are no part of them
  block_tables: Ref  # [S, P]
  seq_lens: Ref  # [S]
  cu_seqlens: Ref  # [S + 1]
  rows: Ref  # [W]
  first: Ref  # [W]
  last: Ref  # [W]
  num_pieces: Ref  # [1]


class _Scratch(NamedTuple):
  """Shared memory of a program, and the barriers by which its threads meet."""

  q: Ref  # [columns, D]
  copied: tuple[Ring, ...]  # from each pool
  wide: tuple[Ring, ...]  # what quantised tiles become, if any are
  weights: Ref  # [columns, tile]
  out: Ref  # [columns, Dv], padded
  lse: Ref  # [columns]
  q_here: Ref


def _piece_at(
  inputs: _Inputs, layer: Layer, number: Array, head: Array, done: Array
) -> Piece:
  row = inputs.rows[number]
  max_len = inputs.block_tables.shape[1] * inputs.pools[0].block_size
  length = jnp.minimum(inputs.seq_lens[row], max_len)
  begin = jnp.int32(0)
  if layer.sliding_window is not None:
    query_len = inputs.cu_seqlens[row + 1] - inputs.cu_seqlens[row]
    begin = jnp.maximum(length - query_len - (layer.sliding_window - 1), 0)
  return Piece(
    number=number,
    head=head,
    row=row,
    first=inputs.first[number],
    last=inputs.last[number],
    begin=begin,
    length=length,
    done=done,
  )


def _compute(
  inputs: _Inputs, out: Ref, lse: Ref, scratch: _Scratch, layer: Layer, piece: Piece
) -> None:
  """Attends over the tiles of a piece, and writes its partial result."""
  columns, v_head_dim = scratch.out.shape[0], out.shape[-1]
  row, length = piece.row, piece.length
  query_len = inputs.cu_seqlens[row + 1] - inputs.cu_seqlens[row]
  base = length - query_len  # position of the first query
  keys, *values = scratch.wide or scratch.copied
  plgpu.copy_gmem_to_smem(inputs.q.at[row, piece.head], scratch.q, scratch.q_here)
  plgpu.barrier_wait(scratch.q_here)

  def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    acc, top, total = state
    slot = ring.slot_of(keys, piece, index)
    if values:
      (others,) = values
      value_tile = others.tiles.at[slot]
    else:
      others = keys
      value_tile = keys.tiles.at[slot, :, pl.ds(0, v_head_dim)]
    plgpu.barrier_wait(keys.here.at[slot])
    logits = ring.product(keys.tiles.at[slot], scratch.q.T, (TILE, columns))
    if values:
      plgpu.barrier_arrive(keys.free.at[slot])
    mask = _mask(logits.shape, index * TILE, base, length, layer)
    logits = jnp.where(mask, _scaled(logits, layer), NEG)
    new_top = jnp.maximum(top, logits.max(axis=0))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits - _spread(new_top, logits.shape))
    weights = jnp.where(mask, weights, 0.0)
    # Summed over the tile at the end: until then each thread has sums of its own.
    total = total * _spread(shrink, total.shape) + weights
    weights = weights.astype(scratch.weights.dtype)
    scratch.weights.T[...] = plgpu.layout_cast(weights, _TRANSPOSED)
    if values:
      plgpu.barrier_wait(others.here.at[slot])
    if not scratch.wide:  # else it was done

      @pl.when((index * TILE < piece.begin) | ((index + 1) * TILE > length))
      def _() -> None:
        side = math.gcd(v_head_dim, SQUARE)
        for column in range(0, v_head_dim, side):
          square = value_tile.at[:, pl.ds(column, side)]
          ring.bury(square, index * TILE, piece)

    plgpu.commit_smem()
    acc = acc * _spread(shrink, acc.shape)
    acc = ring.add_product(acc, value_tile.T, scratch.weights.T, layer)
    plgpu.barrier_arrive(others.free.at[slot])
    return acc, new_top, total

  acc, top, total = lax.fori_loop(
    piece.first,
    piece.last,
    step,
    (
      ring.full(scratch.out.shape[::-1], 0.0, WGMMA),
      ring.full((columns,), NEG, _COLUMNS),
      ring.full((TILE, columns), 0.0, WGMMA),
    ),
  )
  total = total.sum(axis=0)
  safe = jnp.where(total == 0.0, 1.0, total)
  acc = acc / _spread(safe, acc.shape)
  scratch.out.T[...] = plgpu.layout_cast(acc, _TRANSPOSED)
  scratch.lse[...] = jnp.where(total == 0.0, NEG, top + jnp.log2(safe))
  plgpu.commit_smem()
  for column in range(0, columns, 8):  # more would be in pieces if it is padded
    eight = pl.ds(column, 8)
    plgpu.copy_smem_to_gmem(
      scratch.out.at[eight, pl.ds(0, v_head_dim)],
      out.at[piece.number, piece.head, eight],
    )
  plgpu.copy_smem_to_gmem(scratch.lse, lse.at[piece.number, piece.head])
  plgpu.wait_smem_to_gmem(0)


def _mask(
  shape: tuple[int, ...], start: Array, base: Array, length: Array, layer: Layer
) -> Array:
  """Which keys, down a column, its query sees."""
  iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=WGMMA)
  place = iota(dimension=0) + start
  position = base + lax.div(iota(dimension=1), jnp.int32(layer.group))
  mask = (place <= position) & (place < length)
  if layer.sliding_window is not None:
    mask &= place > position - layer.sliding_window
  return mask


def _scaled(logits: Array, layer: Layer) -> Array:
  """To base 2, and capped."""
  if layer.logits_soft_cap is None:
    return logits * (layer.sm_scale * LOG2_E)
  cap = layer.logits_soft_cap
  return jnp.tanh(logits * (layer.sm_scale / cap)) * (cap * LOG2_E)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
  """One value per column, to all rows."""
  return lax.broadcast_in_dim(x, shape, [1])
