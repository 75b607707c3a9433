"""Paged attention of few queries per row in Pallas for Hopper GPUs, through Mosaic GPU.

The operands of the products are swapped, so that the long side of each is the tile of
keys: `S^T = K Q^T` and `O^T = V^T P^T`, with as many columns as a kv head has queries,
padded to eight. One warpgroup computes, and another fetches. Latent keys, the first
part of which are the values, are fetched once.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_ring as ring
from pallas_kernels.paged_attention import tuning
from pallas_kernels.paged_attention.mosaic_ring import (
  Layer,
  Piece,
  plgpu,
  Ref,
  Ring,
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
_SHARED_BYTES = 108 << 10
"""Of one program, so that two find room on a multiprocessor."""
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def split(
  q: Array,
  k: Array,
  v: Array | None,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  queue: SplitQueue,
  layer: Layer,
  *,
  v_head_dim: int,
  max_queries: int,
  interpret: Any,
) -> tuple[Array, Array]:
  """Attention of the rows in a queue of pieces.

  Args:
    q: `[T, H, D]`.
    k: `[N, K, block_size, D]`.
    v: `[N, K, block_size, Dv]`, or None: the first part of the keys.
    block_tables: `[S, P]`.
    seq_lens: `[S]`.
    cu_seqlens: `[S + 1]`.
    queue: Pieces in tiles of `TILE` tokens.
    layer: Static facts.
    v_head_dim: `Dv`.
    max_queries: Most query tokens of a row in the queue.
    interpret: Parameters of the GPU interpreter, or None.

  Returns:
    Partial results `[W, K, columns, Dv]`, and the logarithms to base 2 of their
    softmax's denominators, `[W, K, columns]`; both in float32. Column
    `token * group + head` is a query of the row.
  """
  num_tokens, _, head_dim = q.shape
  num_kv_heads = k.shape[1]
  columns = 8 if max_queries * layer.group <= 8 else MAX_COLUMNS
  setup = settings(k, v)
  num_stages = setup.num_stages
  place = jnp.arange(max_queries, dtype=jnp.int32)
  token = jnp.minimum(cu_seqlens[:-1, None] + place[None], num_tokens - 1)
  rows = q[token].reshape(*token.shape, num_kv_heads, layer.group, head_dim)
  rows = rows.transpose(0, 2, 1, 3, 4).reshape(
    token.shape[0], num_kv_heads, -1, head_dim
  )
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, columns - rows.shape[2]), (0, 0)))
  shape = (queue.rows.size, num_kv_heads, columns)
  num_programs = min(setup.num_programs, queue.rows.size * num_kv_heads)

  inputs = _Inputs(
    q=rows,
    k=ring.split_blocks(k, TILE),
    v=None if v is None else ring.split_blocks(v, TILE),
    block_tables=block_tables,
    seq_lens=seq_lens,
    cu_seqlens=cu_seqlens,
    rows=queue.rows,
    first=queue.first,
    last=queue.last,
    num_pieces=queue.num_pieces,
  )

  def paged_attention_decode_sm90(
    inputs: _Inputs, out: Ref, lse: Ref, *refs: Ref
  ) -> None:
    scratch = _Scratch(*refs)
    each = functools.partial(
      ring.each_piece,
      piece_at=functools.partial(_piece_at, inputs),
      num_pieces=inputs.num_pieces[0],
      num_heads=num_kv_heads,
      num_programs=num_programs,
    )
    thread = lax.axis_index("thread")

    @pl.when(thread == 0)
    def _() -> None:
      each(functools.partial(_compute, inputs, out, lse, scratch, layer))

    @pl.when(thread == 1)
    def _() -> None:
      ring.fetch_all(scratch.rings(inputs), inputs.block_tables, each)

  barriers = functools.partial(plgpu.Barrier, num_barriers=num_stages)
  copies = ring.copies_per_tile(k, TILE)
  return plgpu.kernel(
    paged_attention_decode_sm90,
    out_type=(
      jax.ShapeDtypeStruct((*shape, v_head_dim), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    scratch_types=_Scratch(
      q=ring.tiled((columns, head_dim), q.dtype),
      k=ring.tiled((num_stages, TILE, head_dim), q.dtype),
      v=None if v is None else ring.tiled((num_stages, TILE, v_head_dim), q.dtype),
      weights=ring.tiled((columns, TILE), q.dtype),
      out=ring.tiled((columns, v_head_dim), jnp.float32),
      lse=plgpu.SMEM((columns,), jnp.float32),
      q_here=plgpu.Barrier(),
      k_here=barriers(num_arrivals=copies),
      v_here=None if v is None else barriers(num_arrivals=copies),
      k_free=barriers(),
      v_free=None if v is None else barriers(),
    ),
    grid=(num_programs,),
    grid_names=("program",),
    num_threads=2,
    thread_name="thread",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=2048,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    **({} if interpret is None else {"interpret": interpret}),
  )(inputs)


def settings(k: Array, v: Array | None) -> Settings:
  """How the kernel is set up; shapes and dtypes of arrays suffice."""
  width = k.shape[-1] + (0 if v is None else v.shape[-1])
  per_stage = TILE * width * k.dtype.itemsize
  num_stages = max(2, min(6, _SHARED_BYTES // per_stage))
  has_room_for_two = num_stages * per_stage <= _SHARED_BYTES
  default = Settings(
    tile_kv=TILE,
    num_stages=num_stages,
    min_split=_MIN_SPLIT,
    num_programs=_NUM_PROGRAMS if has_room_for_two else _NUM_PROGRAMS // 2,
  )
  return tuning.settle("mosaic split", k, v, default)


class _Inputs(NamedTuple):
  """Arguments in the memory of the device."""

  q: Ref  # [S, K, columns, D]
  k: Ref  # [N, K, tiles per block, tokens per copy, D]
  v: Ref  # [N, K, tiles per block, tokens per copy, Dv], or None
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
  k: Ref  # [stages, tile, D]
  v: Ref  # [stages, tile, Dv], or None as what belongs to it
  weights: Ref  # [columns, tile]
  out: Ref  # [columns, Dv]
  lse: Ref  # [columns]
  q_here: Ref
  k_here: Ref  # [stages]
  v_here: Ref  # [stages]
  k_free: Ref  # [stages]
  v_free: Ref  # [stages]

  def rings(self, inputs: _Inputs) -> tuple[Ring, ...]:
    """Of keys, and of values that are no part of them."""
    keys = Ring(inputs.k, self.k, self.k_here, self.k_free)
    if self.v is None:
      return (keys,)
    return keys, Ring(inputs.v, self.v, self.v_here, self.v_free)


def _piece_at(inputs: _Inputs, number: Array, head: Array, done: Array) -> Piece:
  row = inputs.rows[number]
  max_len = inputs.block_tables.shape[1] * inputs.k.shape[2] * inputs.k.shape[3]
  return Piece(
    number=number,
    head=head,
    row=row,
    first=inputs.first[number],
    last=inputs.last[number],
    length=jnp.minimum(inputs.seq_lens[row], max_len),
    done=done,
  )


def _compute(
  inputs: _Inputs, out: Ref, lse: Ref, scratch: _Scratch, layer: Layer, piece: Piece
) -> None:
  """Attends over the tiles of a piece, and writes its partial result."""
  columns, v_head_dim = scratch.out.shape
  row, length = piece.row, piece.length
  query_len = inputs.cu_seqlens[row + 1] - inputs.cu_seqlens[row]
  base = length - query_len  # position of the first query
  begin = jnp.int32(0)
  if layer.sliding_window is not None:
    begin = jnp.maximum(base - (layer.sliding_window - 1), 0)
  plgpu.copy_gmem_to_smem(inputs.q.at[row, piece.head], scratch.q, scratch.q_here)
  plgpu.barrier_wait(scratch.q_here)

  def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    acc, top, total = state
    slot = ring.slot_of(scratch.k, piece, index)
    keys = scratch.k.at[slot]
    is_latent = scratch.v is None
    values = keys.at[:, pl.ds(0, v_head_dim)] if is_latent else scratch.v.at[slot]
    plgpu.barrier_wait(scratch.k_here.at[slot])
    logits = ring.product(keys, scratch.q.T, (TILE, columns))
    if not is_latent:
      plgpu.barrier_arrive(scratch.k_free.at[slot])
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
    if not is_latent:
      plgpu.barrier_wait(scratch.v_here.at[slot])

    @pl.when((index * TILE < begin) | ((index + 1) * TILE > length))
    def _() -> None:
      for column in range(0, v_head_dim, ring.SQUARE):
        square = values.at[:, pl.ds(column, ring.SQUARE)]
        ring.bury(square, index * TILE, begin, length)

    plgpu.commit_smem()
    part = ring.product(values.T, scratch.weights.T, acc.shape)
    plgpu.barrier_arrive((scratch.k_free if is_latent else scratch.v_free).at[slot])
    return acc * _spread(shrink, acc.shape) + part, new_top, total

  acc, top, total = lax.fori_loop(
    piece.first,
    piece.last,
    step,
    (
      ring.full((v_head_dim, columns), 0.0, WGMMA),
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
  plgpu.copy_smem_to_gmem(scratch.out, out.at[piece.number, piece.head])
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
