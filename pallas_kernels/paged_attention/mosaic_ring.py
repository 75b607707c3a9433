"""What the Mosaic kernels share: work in turns, and a ring of tiles of keys or values.

Programs take turns at the pieces of a queue. In each, a warp fetches keys and another
values, a block of the table per copy, into rings of tiles that warpgroups compute with.
A ring does not stop between two pieces.

Unlike loads by token, copies bring whole blocks: what is dead in them is masked in the
logits, and zeroed in the values, where `0 * NaN` would be NaN.

Quantised tiles come with the scales of their tokens. A warpgroup between those that
fetch and those that compute makes tiles of the queries' type of them, in rings of their
own: what computes does not know the difference.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp

plgpu: Any = mosaic_gpu  # It does not say which of its names are public.
type Ref = Any
"""A Pallas reference; jax has no public name for it."""

WGMMA = plgpu.Layout.WGMMA
SQUARE = 64
"""Side of the least tile that a warpgroup loads in the layout of its products."""


class Piece(NamedTuple):
  """A piece of work; every entry is `[]` int32."""

  number: Array  # its place in the queue
  head: Array
  row: Array
  first: Array  # tile of keys
  last: Array  # one past the last tile
  begin: Array  # the first token that some query sees
  length: Array  # of the row
  done: Array  # tiles that the program had before


class Ring(NamedTuple):
  """Tiles, and the barriers that say whether each is here, and free again."""

  tiles: Ref  # [stages, tile, D]
  here: Ref  # [stages]
  free: Ref  # [stages]
  scales: Ref = None  # [stages, tile] float32, or None if tiles are not quantised


class Pool(NamedTuple):
  """Where tiles come from."""

  blocks: Ref  # [N, K, parts of a block, tokens per copy, D]
  scales: Ref = None  # [N, K, parts of a block, tokens per copy], or None

  @property
  def block_size(self) -> int:
    """Tokens per block."""
    return self.blocks.shape[2] * self.blocks.shape[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """What kernels are specialised for.

  Attributes:
    group: Query heads per kv head.
    sm_scale, sliding_window, logits_soft_cap: As in `paged_attention`.
    is_interpreted: Whether the GPU interpreter runs them, which cannot do all.
  """

  group: int
  sm_scale: float
  sliding_window: int | None
  logits_soft_cap: float | None
  is_interpreted: bool


def each_piece(
  work: Callable[[Piece], None],
  piece_at: Callable[[Array, Array, Array], Piece],
  *,
  num_pieces: Array,
  num_heads: int,
  num_programs: int,
) -> Array:
  """Works off the pieces of this program, by every thread; returns all their tiles.

  Args:
    work: What is done with a piece.
    piece_at: Makes a piece of its number, its head and the tiles done before.
    num_pieces: `[]` int32.
    num_heads: `K`; all heads of a piece come before the next.
    num_programs: That take turns.
  """
  program = lax.axis_index("program")
  todo = num_pieces * num_heads - program
  turns = lax.div(todo + (num_programs - 1), jnp.int32(num_programs))

  def turn(index: Array, done: Array) -> Array:
    at = index * num_programs + program
    number, head = lax.div(at, jnp.int32(num_heads)), lax.rem(at, jnp.int32(num_heads))
    piece = piece_at(number, head, done)
    work(piece)
    return done + (piece.last - piece.first)

  return lax.fori_loop(jnp.int32(0), turns, turn, jnp.int32(0))


def _fetch(pool: Pool, ring: Ring, block_tables: Ref, piece: Piece) -> None:
  """Copies the tiles of a piece into the ring, each as soon as there is room."""
  num_blocks, _, parts, rows_per_copy, width = pool.blocks.shape
  tile = ring.tiles.shape[1]
  num_copies = tile // rows_per_copy

  def sources(index: Array) -> list[tuple[Array, Array]]:
    """Blocks of a tile and parts of them; never outside of the table or the pool."""
    found = []
    for j in range(num_copies):
      at = index * num_copies + j
      column = jnp.minimum(lax.div(at, jnp.int32(parts)), block_tables.shape[1] - 1)
      block = jnp.clip(block_tables[piece.row, column], 0, num_blocks - 1)
      found.append((block, lax.rem(at, jnp.int32(parts))))
    return found

  def step(
    index: Array, following: list[tuple[Array, Array]]
  ) -> list[tuple[Array, Array]]:
    now, following = following, sources(index + 1)  # so that copies do not wait
    slot = slot_of(ring, piece, index)
    wait_for_room(ring, piece, index)
    for j, (block, part) in enumerate(now):
      first = j * rows_per_copy
      rows = pl.ds(first, rows_per_copy)

      def copy(block: Array = block, part: Array = part, rows: Any = rows) -> None:
        source = block, piece.head, part
        here = ring.here.at[slot]
        target = ring.tiles.at[slot, rows, pl.ds(0, width)]
        plgpu.copy_gmem_to_smem(pool.blocks.at[source], target, here)
        if pool.scales is not None:
          plgpu.copy_gmem_to_smem(
            pool.scales.at[source], ring.scales.at[slot, rows], here
          )

      if j == 0:
        copy()
      else:  # A dead block is not copied, but counted.
        is_live = index * tile + first < piece.length
        pl.when(is_live)(copy)

        @pl.when(index * tile + first >= piece.length)
        def _() -> None:
          for _ in range(1 if pool.scales is None else 2):
            plgpu.barrier_arrive(ring.here.at[slot])

    return following

  lax.fori_loop(piece.first, piece.last, step, sources(piece.first))


def fetch_all(
  pools: Sequence[Pool],
  rings: Sequence[Ring],
  block_tables: Ref,
  each: Callable[[Any], Array],
) -> None:
  """Fetches the tiles of all pieces, each ring by a warp of its own."""

  @plgpu.warp_map
  def _(warp: Array) -> None:
    for i, (pool, ring) in enumerate(zip(pools, rings, strict=True)):

      @pl.when(warp == i)
      def _(pool: Pool = pool, ring: Ring = ring) -> None:
        count = each(functools.partial(_fetch, pool, ring, block_tables))
        drain(ring, count)


def wait_for_room(ring: Ring, piece: Piece, index: Array) -> None:
  """Waits until the tile that was in the place of this one is used."""

  @pl.when(_count(piece, index) >= ring.tiles.shape[0])
  def _() -> None:
    plgpu.barrier_wait(ring.free.at[slot_of(ring, piece, index)])


def drain(ring: Ring, count: Array) -> None:
  """Waits until the last tiles are used, so that no barrier ends in mid-phase."""
  num_stages = ring.tiles.shape[0]
  for back in range(num_stages):
    tile = count - 1 - back

    @pl.when(tile >= 0)
    def _(tile: Array = tile) -> None:
      plgpu.barrier_wait(ring.free.at[lax.rem(tile, jnp.int32(num_stages))])


def slot_of(ring: Ring, piece: Piece, index: Array) -> Array:
  """Where in the ring a tile of a piece is."""
  num_stages = ring.tiles.shape[0]
  if num_stages == 1:
    # Zero; but if the compiler knew, it would keep all addresses of a tile at hand.
    return jnp.minimum(_count(piece, index), 0)
  return lax.rem(_count(piece, index), jnp.int32(num_stages))


def _count(piece: Piece, index: Array) -> Array:
  """Tiles that the program had before this one."""
  return piece.done + index - piece.first


def pool_of(blocks: Array, scales: Array | None, max_rows: int) -> Pool:
  """A pool as it is copied: large blocks come in parts, bits as the floats they are.

  Args:
    blocks: `[N, K, block_size, D]`.
    scales: `[N, K, block_size]`, or None.
    max_rows: Most tokens of a copy.
  """
  if blocks.dtype == jnp.uint8:
    blocks = lax.bitcast_convert_type(blocks, jnp.float8_e4m3fn)
  rows = min(blocks.shape[2], max_rows)
  shape = (*blocks.shape[:2], -1, rows)
  return Pool(
    blocks.reshape(*shape, blocks.shape[-1]),
    None if scales is None else scales.reshape(shape),
  )


def rings_of(
  pools: Sequence[Pool],
  tile: int,
  *,
  num_stages: int,
  num_wide: int,
  dtype: Any,
  num_users: int,
  pads_values: bool = False,
) -> tuple[tuple[Ring, ...], tuple[Ring, ...]]:
  """The rings that tiles are copied into, and those of what quantised ones become.

  Args:
    pools: Of keys, and of values that are no part of them, as they are copied.
    tile: Tokens of a tile.
    num_stages: Tiles of each of the first rings.
    num_wide: Tiles of each of the second rings.
    dtype: Of the queries.
    num_users: Warpgroups that compute with each tile.
    pads_values: Whether values have columns up to a multiple of 64, as where these are
      rows of a product. Nobody writes to those, nor reads what becomes of them.

  Returns:
    The two, the second empty if tiles stay as they are copied.
  """
  copied, wide = [], []
  for i, (blocks, scales) in enumerate(pools):
    width = blocks.shape[-1]
    padded = pad(width) if pads_values and i == 1 else width
    copies = max(1, tile // blocks.shape[3])
    if scales is None:
      tiles = tiled((num_stages, tile, padded), dtype, width)
      copied.append(_ring(tiles, num_copies=copies, num_users=num_users))
    else:
      tiles = tiled((num_stages, tile, width), blocks.dtype, math.gcd(width, SQUARE))
      room = plgpu.SMEM((num_stages, tile), jnp.float32)
      copied.append(_ring(tiles, room, num_copies=2 * copies, num_users=1))
      tiles = tiled((num_wide, tile, padded), dtype, width)
      wide.append(_ring(tiles, num_copies=1, num_users=num_users))
  return tuple(copied), tuple(wide)


def stages(room: int, per_stage: int, per_wide: int, *, most: int) -> tuple[int, int]:
  """How many tiles the two kinds of rings have; two each if there is room, or more.

  Args:
    room: Bytes of shared memory.
    per_stage: Bytes of a tile of each ring that is copied into.
    per_wide: Bytes of a tile of each ring of what quantised ones become; else 0.
    most: Tiles of a ring that is copied into.
  """
  num_wide = 2 if 2 * (per_stage + per_wide) <= room else 1
  num_stages = (room - num_wide * per_wide) // per_stage
  return max(2, min(most, num_stages)), num_wide


def _ring(tiles: Any, scales: Any = None, *, num_copies: int, num_users: int) -> Ring:
  """The types of a ring's references."""
  barrier = functools.partial(plgpu.Barrier, num_barriers=tiles.shape[0])
  return Ring(
    tiles=tiles,
    here=barrier(num_arrivals=num_copies),
    free=barrier(num_arrivals=num_users),
    scales=scales,
  )


def pad(width: int) -> int:
  """The next multiple of what a product has rows."""
  return -(-width // SQUARE) * SQUARE


def bury(square: Ref, start: Array, piece: Piece) -> None:
  """Zeroes the values that nobody sees in a square, whose first token is `start`."""
  tile = plgpu.load(square, layout=WGMMA)
  live = is_live(tile.shape, start, piece, WGMMA)
  square[...] = jnp.where(live, tile, jnp.zeros_like(tile))


def is_live(shape: tuple[int, ...], start: Array, piece: Piece, layout: Any) -> Array:
  """Which tokens, down a column from `start`, some query of a piece sees."""
  place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + start
  return (place >= piece.begin) & (place < piece.length)


def product(x: Any, y: Ref, shape: tuple[int, ...]) -> Array:
  """`x @ y` in float32."""

  def run(result: Ref) -> Array:
    plgpu.wgmma(result, x, y)
    return result[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_product(acc: Array, x: Any, y: Ref, layer: Layer) -> Array:
  """`acc + x @ y` in float32, in the registers of `acc`; the interpreter adds later."""
  if layer.is_interpreted:
    return acc + product(x, y, acc.shape)
  return pl.run_state(lambda result: plgpu.wgmma(result, x, y))(plgpu.ACC.init(acc))


def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
  """A float32 array in registers."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def tiled(shape: tuple[int, ...], dtype: Any, width: int | None = None) -> Any:
  """Shared memory as products want it: rows of up to 128 bytes, swizzled.

  Only the first `width` elements of a row are copied, all if not given.
  """
  itemsize = jnp.dtype(dtype).itemsize
  swizzle = swizzle_of(width or shape[-1], itemsize)
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, swizzle // itemsize)),
      plgpu.SwizzleTransform(swizzle),
    ),
  )


def swizzle_of(width: int, itemsize: int) -> int:
  """Bytes of the longest rows that go into rows of so many elements."""
  return next(s for s in (128, 64, 32) if width * itemsize % s == 0)
