"""Paged decoding attention in Pallas for Hopper GPUs, through Mosaic GPU.

The operands of the products are swapped, so that the long side of each is the tile of
keys: `S^T = K Q^T` and `O^T = V^T P^T`, with as many columns as a kv head has queries,
padded to eight. A warp fetches keys and another values, a block of the table per copy,
into a ring of tiles; a warpgroup computes. Programs work off the queue of pieces, and
the ring does not stop between two of them.

Unlike loads by token, copies bring whole blocks: what is dead in them is masked in the
logits, and zeroed in the values, where `0 * NaN` would be NaN.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.paged_attention import triton, work_queue
from pallas_kernels.paged_attention.triton_walk import LOG2_E, NEG
from pallas_kernels.paged_attention.work_queue import SplitQueue

_TILE = 64
"""Tokens per tile, the least that a warpgroup's product has."""
_MIN_SPLIT = 256
_NUM_PROGRAMS = 264
_SHARED_BYTES = 108 << 10
"""Of one program, so that two find room on a multiprocessor."""
_MAX_COLUMNS = 16
_WGMMA = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
  """What the kernel is specialised for.

  Attributes:
    group: Query heads per kv head.
    columns: Queries per row and kv head, padded.
    block_size: Tokens per block.
    num_stages: Tiles of keys, and of values, in the ring.
    sm_scale, sliding_window, logits_soft_cap: As in `paged_attention`.
  """

  group: int
  columns: int
  block_size: int
  num_stages: int
  sm_scale: float
  sliding_window: int | None
  logits_soft_cap: float | None

  @property
  def blocks_per_tile(self) -> int:
    """Copies that bring a tile; a larger block brings several tiles."""
    return max(1, _TILE // self.block_size)


def why_not(
  q: Array,
  k: Array,
  v: Array | None,
  *,
  max_query_len: int | None,
  is_causal: bool,
  k_scale: Array | None,
  **_: Any,
) -> str | None:
  """Says why this backend cannot serve such arguments; None if it can."""
  if v is None:
    return "it needs v"
  if k_scale is not None or not q.dtype == k.dtype == v.dtype:
    return f"q, k and v must be of one type, got {q.dtype}, {k.dtype} and {v.dtype}"
  if q.dtype.name not in ("bfloat16", "float16"):
    return f"q must be bfloat16 or float16, got {q.dtype}"
  for name, width in (("head_dim", k.shape[-1]), ("v_head_dim", v.shape[-1])):
    if width not in (64, 128, 256):
      return f"{name} must be 64, 128 or 256, got {width}"
  if k.shape[2] not in (8, 16, 32, 64, 128):
    return f"block_size must be a power of two from 8 to 128, got {k.shape[2]}"
  if not is_causal:
    return "it needs is_causal"
  group = q.shape[1] // k.shape[1]
  if max_query_len is None or max_query_len * group > _MAX_COLUMNS:
    return (
      f"max_query_len times {group} heads per kv head must be at most {_MAX_COLUMNS},"
      f" got max_query_len {max_query_len}"
    )
  return None


def paged_attention(
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float,
  max_query_len: int,
  sliding_window: int | None = None,
  logits_soft_cap: float | None = None,
  sinks: Array | None = None,
  interpret: Any = None,
  **_: Any,
) -> tuple[Array, Array]:
  """Causal attention of few queries per row over paged keys and values.

  See `pallas_kernels.paged_attention.paged_attention` for the arguments; the results
  are its `out` and `lse`. `interpret` holds parameters of the GPU interpreter, or None.
  """
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, block_size = k.shape[1:3]
  group = num_heads // num_kv_heads
  columns = 8 if max_query_len * group <= 8 else 16
  per_stage = _TILE * (head_dim + v.shape[-1]) * k.dtype.itemsize
  layer = _Layer(
    group=group,
    columns=columns,
    block_size=block_size,
    num_stages=max(2, min(6, _SHARED_BYTES // per_stage)),
    sm_scale=sm_scale,
    sliding_window=sliding_window,
    logits_soft_cap=logits_soft_cap,
  )
  queue = work_queue.split_rows(
    seq_lens,
    cu_seqlens,
    num_tokens=num_tokens,
    max_len=block_tables.shape[1] * block_size,
    max_queries=max_query_len,
    tile_kv=_TILE,
    min_tiles=_MIN_SPLIT // _TILE,
    max_splits=min(64, max(4, _NUM_PROGRAMS // num_kv_heads)),
    sliding_window=sliding_window,
  )
  # The queries of each row, as columns `token * group + head`.
  place = jnp.arange(max_query_len, dtype=jnp.int32)
  token = jnp.minimum(cu_seqlens[:-1, None] + place[None], num_tokens - 1)
  rows = q[token].reshape(*token.shape, num_kv_heads, group, head_dim)
  rows = rows.transpose(0, 2, 1, 3, 4).reshape(
    token.shape[0], num_kv_heads, -1, head_dim
  )
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, columns - rows.shape[2]), (0, 0)))
  parts = _split(
    rows, k, v, block_tables, seq_lens, cu_seqlens, queue, layer, interpret=interpret
  )
  return triton.combine(
    *parts,
    queue,
    sinks,
    group=group,
    dtype=q.dtype,
    interpret=interpret is not None,
  )


def _split(
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  queue: SplitQueue,
  layer: _Layer,
  *,
  interpret: Any,
) -> tuple[Array, Array]:
  """Partial results `[W, K, R, Dv]`, and `[W, K, R]` in base 2; `R` columns."""
  num_blocks, num_kv_heads, block_size, head_dim = k.shape
  v_head_dim, dtype = v.shape[-1], q.dtype
  columns, num_stages = layer.columns, layer.num_stages
  last_column = block_tables.shape[1] - 1
  max_len = block_tables.shape[1] * block_size
  # A block that is larger than a tile is copied in parts.
  rows_per_copy = min(block_size, _TILE)
  tiles_per_block = block_size // rows_per_copy
  part = (num_blocks, num_kv_heads, tiles_per_block, rows_per_copy)
  num_pieces = queue.rows.size
  num_programs = min(_NUM_PROGRAMS, num_pieces * num_kv_heads)

  def kernel(
    q, k, v, tables, lens, starts, rows, firsts, lasts, count, out, lse_out, *scratch
  ):
    q_s, k_s, v_s, p_s, out_s, lse_s, q_here, k_here, v_here, k_free, v_free = scratch
    program = lax.axis_index("program")
    thread = lax.axis_index("thread")
    todo = count[0] * num_kv_heads - program
    turns = lax.div(todo + (num_programs - 1), jnp.int32(num_programs))

    def each_piece(work: Callable[..., Array]) -> None:
      """Calls `work(done, ...)` for each piece; `done` counts tiles over all pieces."""

      def turn(index: Array, done: Array) -> Array:
        at = index * num_programs + program
        piece = lax.div(at, jnp.int32(num_kv_heads))
        head = lax.rem(at, jnp.int32(num_kv_heads))
        return work(done, piece, head, rows[piece], firsts[piece], lasts[piece])

      lax.fori_loop(jnp.int32(0), turns, turn, jnp.int32(0))

    @pl.when(thread == 0)
    def _() -> None:
      def work(done, piece, head, row, first, last):
        length = jnp.minimum(lens[row], max_len)
        base = length - (starts[row + 1] - starts[row])  # the first query's position
        begin = jnp.int32(0)
        if layer.sliding_window is not None:
          begin = jnp.maximum(base - (layer.sliding_window - 1), 0)
        plgpu.copy_gmem_to_smem(q.at[row, head], q_s, q_here)
        plgpu.barrier_wait(q_here)

        def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
          acc, top, total = state
          slot = lax.rem(done + index - first, jnp.int32(num_stages))
          plgpu.barrier_wait(k_here.at[slot])

          def product(ref):
            plgpu.wgmma(ref, k_s.at[slot], q_s.T)
            return ref[...]

          logits = pl.run_scoped(product, plgpu.ACC((_TILE, columns), jnp.float32))
          plgpu.barrier_arrive(k_free.at[slot])
          logits = _scaled(logits, layer)
          iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, logits.shape, layout=_WGMMA
          )
          place = iota(dimension=0) + index * _TILE
          position = base + lax.div(iota(dimension=1), jnp.int32(layer.group))
          mask = (place <= position) & (place < length)
          if layer.sliding_window is not None:
            mask &= place > position - layer.sliding_window
          logits = jnp.where(mask, logits, NEG)
          new_top = jnp.maximum(top, logits.max(axis=0))
          shrink = jnp.exp2(top - new_top)
          weights = jnp.exp2(logits - _spread(new_top, logits.shape))
          weights = jnp.where(mask, weights, 0.0)
          # Summed over rows at the end: until then each thread has a sum of its own.
          total = total * _spread(shrink, total.shape) + weights
          p_s.T[...] = plgpu.layout_cast(weights.astype(dtype), _TRANSPOSED)
          acc = acc * _spread(shrink, acc.shape)
          plgpu.barrier_wait(v_here.at[slot])

          @pl.when((index * _TILE < begin) | ((index + 1) * _TILE > length))
          def _() -> None:
            # In squares, which take the fewest registers.
            for column in range(0, v_head_dim, 64):
              square = v_s.at[slot, :, pl.ds(column, 64)]
              values = plgpu.load(square, layout=_WGMMA)
              at = plgpu.broadcasted_iota(jnp.int32, (_TILE, 64), 0, layout=_WGMMA)
              at = at + index * _TILE
              is_live = (at >= begin) & (at < length)
              square[...] = jnp.where(is_live, values, jnp.zeros_like(values))

          plgpu.commit_smem()

          def product_of_values(ref):
            plgpu.wgmma(ref, v_s.at[slot].T, p_s.T)
            return ref[...]

          acc = acc + pl.run_scoped(
            product_of_values, plgpu.ACC((v_head_dim, columns), jnp.float32)
          )
          plgpu.barrier_arrive(v_free.at[slot])
          return acc, new_top, total

        def full(shape, value, layout):
          return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        acc, top, total = lax.fori_loop(
          first,
          last,
          step,
          (
            full((v_head_dim, columns), 0.0, _WGMMA),
            full((columns,), NEG, _COLUMNS),
            full((_TILE, columns), 0.0, _WGMMA),
          ),
        )
        total = total.sum(axis=0)
        safe = jnp.where(total == 0.0, 1.0, total)
        acc = acc / _spread(safe, acc.shape)
        out_s.T[...] = plgpu.layout_cast(acc, _TRANSPOSED)
        lse_s[...] = jnp.where(total == 0.0, NEG, top + jnp.log2(safe))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[piece, head])
        plgpu.copy_smem_to_gmem(lse_s, lse_out.at[piece, head])
        plgpu.wait_smem_to_gmem(0)
        return done + (last - first)

      each_piece(work)

    @pl.when(thread == 1)
    def _() -> None:
      @plgpu.warp_map
      def _(warp: Array) -> None:
        for which, (pool, ring, here, free) in enumerate(
          ((k, k_s, k_here, k_free), (v, v_s, v_here, v_free))
        ):

          @pl.when(warp == which)
          def _(pool=pool, ring=ring, here=here, free=free) -> None:
            def work(done, piece, head, row, first, last):
              del piece
              length = jnp.minimum(lens[row], max_len)

              def ids(index: Array) -> tuple[Array, ...]:
                """Blocks of a tile; read one tile ahead, to hide the latency."""
                at = lax.div(index * _TILE, jnp.int32(block_size))
                each = [
                  tables[row, jnp.minimum(at + j, last_column)]
                  for j in range(layer.blocks_per_tile)
                ]
                return tuple(jnp.clip(block, 0, num_blocks - 1) for block in each)

              def fetch(index: Array, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
                following = ids(index + 1)
                count = done + index - first
                slot = lax.rem(count, jnp.int32(num_stages))

                @pl.when(count >= num_stages)
                def _() -> None:
                  plgpu.barrier_wait(free.at[slot])

                half = lax.rem(index, jnp.int32(tiles_per_block))
                for j, block in enumerate(blocks):
                  target = ring.at[slot, pl.ds(j * rows_per_copy, rows_per_copy)]
                  copy = functools.partial(
                    plgpu.copy_gmem_to_smem,
                    pool.at[block, head, half],
                    target,
                    here.at[slot],
                  )
                  if j == 0:
                    copy()
                    continue
                  place = index * _TILE + j * rows_per_copy

                  @pl.when(place < length)
                  def _(copy=copy) -> None:
                    copy()

                  @pl.when(place >= length)
                  def _() -> None:
                    plgpu.barrier_arrive(here.at[slot])

                return following

              lax.fori_loop(first, last, fetch, ids(first))
              return done + (last - first)

            each_piece(work)

  ring = functools.partial(plgpu.Barrier, num_barriers=num_stages)
  arrivals = layer.blocks_per_tile
  shape = (num_pieces, num_kv_heads, columns)
  return plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(
        (num_pieces, num_kv_heads, columns, v_head_dim), jnp.float32
      ),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    scratch_types=(
      _tiled((columns, head_dim), dtype),
      _tiled((num_stages, _TILE, head_dim), dtype),
      _tiled((num_stages, _TILE, v_head_dim), dtype),
      _tiled((columns, _TILE), dtype),
      _tiled((columns, v_head_dim), jnp.float32),
      plgpu.SMEM((columns,), jnp.float32),
      plgpu.Barrier(),
      ring(num_arrivals=arrivals),
      ring(num_arrivals=arrivals),
      ring(),
      ring(),
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
  )(
    q,
    k.reshape(*part, head_dim),
    v.reshape(*part, v_head_dim),
    block_tables,
    seq_lens,
    cu_seqlens,
    queue.rows,
    queue.first,
    queue.last,
    queue.num_pieces,
  )


def _scaled(logits: Array, layer: _Layer) -> Array:
  """To base 2, and capped."""
  if layer.logits_soft_cap is None:
    return logits * (layer.sm_scale * LOG2_E)
  cap = layer.logits_soft_cap
  return jnp.tanh(logits * (layer.sm_scale / cap)) * (cap * LOG2_E)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
  """One value per column, to all rows."""
  return lax.broadcast_in_dim(x, shape, [1])


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory as the products want it: rows of 128 bytes, swizzled."""
  width = 128 // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)),
  )
