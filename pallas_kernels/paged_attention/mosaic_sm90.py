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
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

from pallas_kernels.paged_attention import triton, tuning, work_queue
from pallas_kernels.paged_attention.triton_walk import LOG2_E, NEG
from pallas_kernels.paged_attention.tuning import Settings
from pallas_kernels.paged_attention.work_queue import Plan, SplitQueue, Splits

plgpu: Any = mosaic_gpu  # It does not say which of its names are public.
type _Ref = Any
"""A Pallas reference; jax has no public name for it."""

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
  def copies_per_tile(self) -> int:
    """Blocks of a tile, or one part of a block that is larger."""
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
  plan: Plan | None = None,
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
  settings = _settings(k, v)
  layer = _Layer(
    group=group,
    columns=columns,
    block_size=block_size,
    num_stages=settings.num_stages,
    sm_scale=sm_scale,
    sliding_window=sliding_window,
    logits_soft_cap=logits_soft_cap,
  )
  (splits,) = cuts(
    k,
    v,
    num_tokens=num_tokens,
    max_len=block_tables.shape[1] * block_size,
    max_query_len=max_query_len,
    sliding_window=sliding_window,
  )
  queue = work_queue.split_rows(
    seq_lens, cu_seqlens, plan=plan, **dataclasses.asdict(splits)
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


def cuts(
  k: Array,
  v: Array | None,
  *,
  num_tokens: int,
  max_len: int,
  max_query_len: int | None,
  sliding_window: int | None,
  **_: Any,
) -> tuple[Splits, ...]:
  """How rows are cut; shapes and dtypes of arrays suffice."""
  if max_query_len is None:
    return ()
  settings = _settings(k, v)
  splits = Splits(
    num_tokens=num_tokens,
    max_len=max_len,
    max_queries=max_query_len,
    tile_kv=_TILE,
    min_tiles=max(1, settings.min_split // _TILE),
    max_splits=min(64, max(4, settings.num_programs // k.shape[1])),
    sliding_window=sliding_window,
  )
  return (splits,)


def _settings(k: Array, v: Array | None) -> Settings:
  """How the kernel is set up."""
  width = k.shape[-1] + (0 if v is None else v.shape[-1])
  per_stage = _TILE * width * k.dtype.itemsize
  default = Settings(
    tile_kv=_TILE,
    num_stages=max(2, min(6, _SHARED_BYTES // per_stage)),
    min_split=_MIN_SPLIT,
    num_programs=_NUM_PROGRAMS,
  )
  return tuning.settle("mosaic split", k, v, default)


class _Memory(NamedTuple):
  """Arguments and results in the memory of the device."""

  q: _Ref  # [S, K, columns, D]
  k: _Ref  # [N, K, tiles per block, tokens per copy, D]
  v: _Ref  # [N, K, tiles per block, tokens per copy, Dv]
  block_tables: _Ref  # [S, P]
  seq_lens: _Ref  # [S]
  cu_seqlens: _Ref  # [S + 1]
  rows: _Ref  # [W]
  first: _Ref  # [W]
  last: _Ref  # [W]
  num_pieces: _Ref  # [1]
  out: _Ref  # [W, K, columns, Dv]
  lse: _Ref  # [W, K, columns]


class _Scratch(NamedTuple):
  """Shared memory of a program, and the barriers by which its threads meet."""

  q: _Ref  # [columns, D]
  k: _Ref  # [stages, tile, D]
  v: _Ref  # [stages, tile, Dv]
  weights: _Ref  # [columns, tile]
  out: _Ref  # [columns, Dv]
  lse: _Ref  # [columns]
  q_here: _Ref
  k_here: _Ref  # [stages]
  v_here: _Ref  # [stages]
  k_free: _Ref  # [stages]
  v_free: _Ref  # [stages]


class _Piece(NamedTuple):
  """A piece of work; every entry is `[]` int32."""

  number: Array  # its place in the queue
  head: Array
  row: Array
  first: Array  # tile
  last: Array  # one past the last tile
  length: Array  # of the row
  done: Array  # tiles that the program had before


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
  """Partial results `[W, K, columns, Dv]`, and `[W, K, columns]` in base 2."""
  num_blocks, num_kv_heads, block_size, head_dim = k.shape
  v_head_dim, dtype = v.shape[-1], q.dtype
  # A block that is larger than a tile is copied in parts.
  rows_per_copy = min(block_size, _TILE)
  part = (num_blocks, num_kv_heads, block_size // rows_per_copy, rows_per_copy)
  shape = (queue.rows.size, num_kv_heads, layer.columns)
  num_programs = min(_settings(k, v).num_programs, queue.rows.size * num_kv_heads)

  def paged_attention_sm90(*refs: _Ref) -> None:
    memory, scratch = _Memory(*refs[:12]), _Scratch(*refs[12:])
    each = functools.partial(_each_piece, memory, num_programs=num_programs)
    thread = lax.axis_index("thread")

    @pl.when(thread == 0)
    def _() -> None:
      each(functools.partial(_compute, memory, scratch, layer))

    @pl.when(thread == 1)
    def _() -> None:
      @plgpu.warp_map
      def _(warp: Array) -> None:
        @pl.when(warp == 0)
        def _() -> None:
          tiles = _Ring(memory.k, scratch.k, scratch.k_here, scratch.k_free)
          _drain(tiles, layer, each(functools.partial(_fetch, memory, tiles, layer)))

        @pl.when(warp == 1)
        def _() -> None:
          tiles = _Ring(memory.v, scratch.v, scratch.v_here, scratch.v_free)
          _drain(tiles, layer, each(functools.partial(_fetch, memory, tiles, layer)))

  ring = functools.partial(plgpu.Barrier, num_barriers=layer.num_stages)
  return plgpu.kernel(
    paged_attention_sm90,
    out_type=(
      jax.ShapeDtypeStruct((*shape, v_head_dim), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    scratch_types=_Scratch(
      q=_tiled((layer.columns, head_dim), dtype),
      k=_tiled((layer.num_stages, _TILE, head_dim), dtype),
      v=_tiled((layer.num_stages, _TILE, v_head_dim), dtype),
      weights=_tiled((layer.columns, _TILE), dtype),
      out=_tiled((layer.columns, v_head_dim), jnp.float32),
      lse=plgpu.SMEM((layer.columns,), jnp.float32),
      q_here=plgpu.Barrier(),
      k_here=ring(num_arrivals=layer.copies_per_tile),
      v_here=ring(num_arrivals=layer.copies_per_tile),
      k_free=ring(),
      v_free=ring(),
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


def _each_piece(
  memory: _Memory, work: Callable[[_Piece], None], *, num_programs: int
) -> Array:
  """Works off the pieces of this program, by every thread; returns all their tiles."""
  program = lax.axis_index("program")
  num_heads = memory.k.shape[1]
  max_len = memory.block_tables.shape[1] * memory.k.shape[2] * memory.k.shape[3]
  todo = memory.num_pieces[0] * num_heads - program
  turns = lax.div(todo + (num_programs - 1), jnp.int32(num_programs))

  def turn(index: Array, done: Array) -> Array:
    at = index * num_programs + program
    piece = lax.div(at, jnp.int32(num_heads))
    row, first, last = memory.rows[piece], memory.first[piece], memory.last[piece]
    work(
      _Piece(
        number=piece,
        head=lax.rem(at, jnp.int32(num_heads)),
        row=row,
        first=first,
        last=last,
        length=jnp.minimum(memory.seq_lens[row], max_len),
        done=done,
      )
    )
    return done + (last - first)

  return lax.fori_loop(jnp.int32(0), turns, turn, jnp.int32(0))


class _Ring(NamedTuple):
  """Where tiles come from and go to; `[stages, ...]` but for the pool."""

  pool: _Ref
  tiles: _Ref
  here: _Ref
  free: _Ref


def _fetch(memory: _Memory, ring: _Ring, layer: _Layer, piece: _Piece) -> None:
  """Copies the tiles of a piece into the ring, each as soon as there is room."""
  num_blocks, _, tiles_per_block, rows_per_copy, _ = ring.pool.shape
  block_size = tiles_per_block * rows_per_copy

  def ids(index: Array) -> tuple[Array, ...]:
    """Blocks of a tile; never outside of the table or the pool."""
    at = lax.div(index * _TILE, jnp.int32(block_size))
    columns = [at + j for j in range(layer.copies_per_tile)]
    last = memory.block_tables.shape[1] - 1
    blocks = [memory.block_tables[piece.row, jnp.minimum(c, last)] for c in columns]
    return tuple(jnp.clip(block, 0, num_blocks - 1) for block in blocks)

  def step(index: Array, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
    following = ids(index + 1)  # a tile ahead, so that copies do not wait for it
    count = piece.done + index - piece.first
    slot = lax.rem(count, jnp.int32(layer.num_stages))

    @pl.when(count >= layer.num_stages)
    def _() -> None:
      plgpu.barrier_wait(ring.free.at[slot])

    part = lax.rem(index, jnp.int32(tiles_per_block))
    for j, block in enumerate(blocks):
      first = j * rows_per_copy
      copy = functools.partial(
        plgpu.copy_gmem_to_smem,
        ring.pool.at[block, piece.head, part],
        ring.tiles.at[slot, pl.ds(first, rows_per_copy)],
        ring.here.at[slot],
      )
      if j == 0:
        copy()
      else:  # A dead block is not copied, but counted.
        is_live = index * _TILE + first < piece.length
        pl.when(is_live)(copy)
        pl.when(index * _TILE + first >= piece.length)(
          functools.partial(plgpu.barrier_arrive, ring.here.at[slot])
        )
    return following

  lax.fori_loop(piece.first, piece.last, step, ids(piece.first))


def _drain(ring: _Ring, layer: _Layer, count: Array) -> None:
  """Waits until the last tiles are used, so that no barrier ends in mid-phase."""
  for back in range(layer.num_stages):
    tile = count - 1 - back

    @pl.when(tile >= 0)
    def _(tile: Array = tile) -> None:
      plgpu.barrier_wait(ring.free.at[lax.rem(tile, jnp.int32(layer.num_stages))])


def _compute(memory: _Memory, scratch: _Scratch, layer: _Layer, piece: _Piece) -> None:
  """Attends over the tiles of a piece, and writes its partial result."""
  columns, v_head_dim = scratch.out.shape
  row, length = piece.row, piece.length
  query_len = memory.cu_seqlens[row + 1] - memory.cu_seqlens[row]
  base = length - query_len  # position of the first query
  begin = jnp.int32(0)
  if layer.sliding_window is not None:
    begin = jnp.maximum(base - (layer.sliding_window - 1), 0)
  plgpu.copy_gmem_to_smem(memory.q.at[row, piece.head], scratch.q, scratch.q_here)
  plgpu.barrier_wait(scratch.q_here)

  def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    acc, top, total = state
    count = piece.done + index - piece.first
    slot = lax.rem(count, jnp.int32(layer.num_stages))
    keys, values = scratch.k.at[slot], scratch.v.at[slot]
    plgpu.barrier_wait(scratch.k_here.at[slot])
    logits = _product(keys, scratch.q.T, (_TILE, columns))
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    mask = _mask(logits.shape, index * _TILE, base, length, layer)
    logits = jnp.where(mask, _scaled(logits, layer), NEG)
    new_top = jnp.maximum(top, logits.max(axis=0))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits - _spread(new_top, logits.shape))
    weights = jnp.where(mask, weights, 0.0)
    # Summed over the tile at the end: until then each thread has sums of its own.
    total = total * _spread(shrink, total.shape) + weights
    weights = weights.astype(scratch.weights.dtype)
    scratch.weights.T[...] = plgpu.layout_cast(weights, _TRANSPOSED)
    plgpu.barrier_wait(scratch.v_here.at[slot])

    @pl.when((index * _TILE < begin) | ((index + 1) * _TILE > length))
    def _() -> None:
      _bury(values, index * _TILE, begin, length)

    plgpu.commit_smem()
    part = _product(values.T, scratch.weights.T, acc.shape)
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return acc * _spread(shrink, acc.shape) + part, new_top, total

  acc, top, total = lax.fori_loop(
    piece.first,
    piece.last,
    step,
    (
      _full((v_head_dim, columns), 0.0, _WGMMA),
      _full((columns,), NEG, _COLUMNS),
      _full((_TILE, columns), 0.0, _WGMMA),
    ),
  )
  total = total.sum(axis=0)
  safe = jnp.where(total == 0.0, 1.0, total)
  acc = acc / _spread(safe, acc.shape)
  scratch.out.T[...] = plgpu.layout_cast(acc, _TRANSPOSED)
  scratch.lse[...] = jnp.where(total == 0.0, NEG, top + jnp.log2(safe))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(scratch.out, memory.out.at[piece.number, piece.head])
  plgpu.copy_smem_to_gmem(scratch.lse, memory.lse.at[piece.number, piece.head])
  plgpu.wait_smem_to_gmem(0)


def _product(x: _Ref, y: _Ref, shape: tuple[int, ...]) -> Array:
  def run(result: _Ref) -> Array:
    plgpu.wgmma(result, x, y)
    return result[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _mask(
  shape: tuple[int, ...], start: Array, base: Array, length: Array, layer: _Layer
) -> Array:
  """Which keys, down a column, its query sees."""
  iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=_WGMMA)
  place = iota(dimension=0) + start
  position = base + lax.div(iota(dimension=1), jnp.int32(layer.group))
  mask = (place <= position) & (place < length)
  if layer.sliding_window is not None:
    mask &= place > position - layer.sliding_window
  return mask


def _bury(values: _Ref, start: Array, begin: Array, length: Array) -> None:
  """Zeroes what no query sees, in squares, which take the fewest registers."""
  for column in range(0, values.shape[-1], 64):
    square = values.at[:, pl.ds(column, 64)]
    tile = plgpu.load(square, layout=_WGMMA)
    place = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=_WGMMA) + start
    is_live = (place >= begin) & (place < length)
    square[...] = jnp.where(is_live, tile, jnp.zeros_like(tile))


def _full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


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
