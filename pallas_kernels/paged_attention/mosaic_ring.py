"""What the Mosaic kernels share: work in turns, and a ring of tiles of keys or values.

Programs take turns at the pieces of a queue. In each, a warp fetches keys and another
values, a block of the table per copy, into rings of tiles that warpgroups compute with.
A ring does not stop between two pieces.

Unlike loads by token, copies bring whole blocks: what is dead in them is masked in the
logits, and zeroed in the values, where `0 * NaN` would be NaN.
"""

from collections.abc import Callable
import dataclasses
import functools
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
  length: Array  # of the row
  done: Array  # tiles that the program had before


class Ring(NamedTuple):
  """Where tiles come from and go to."""

  pool: Ref  # [N, K, tiles per block, tokens per copy, D]
  tiles: Ref  # [stages, tile, D]
  here: Ref  # [stages] barriers
  free: Ref  # [stages] barriers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """What kernels are specialised for.

  Attributes:
    group: Query heads per kv head.
    sm_scale, sliding_window, logits_soft_cap: As in `paged_attention`.
  """

  group: int
  sm_scale: float
  sliding_window: int | None
  logits_soft_cap: float | None


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


def _fetch(ring: Ring, block_tables: Ref, piece: Piece) -> None:
  """Copies the tiles of a piece into the ring, each as soon as there is room."""
  num_blocks, _, tiles_per_block, rows_per_copy, _ = ring.pool.shape
  num_stages, tile, _ = ring.tiles.shape
  block_size = tiles_per_block * rows_per_copy

  def ids(index: Array) -> tuple[Array, ...]:
    """Blocks of a tile; never outside of the table or the pool."""
    at = lax.div(index * tile, jnp.int32(block_size))
    last = block_tables.shape[1] - 1
    columns = [jnp.minimum(at + j, last) for j in range(tile // rows_per_copy)]
    blocks = [block_tables[piece.row, column] for column in columns]
    return tuple(jnp.clip(block, 0, num_blocks - 1) for block in blocks)

  def step(index: Array, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
    following = ids(index + 1)  # a tile ahead, so that copies do not wait for it
    count = piece.done + index - piece.first
    slot = slot_of(ring.tiles, piece, index)

    @pl.when(count >= num_stages)
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
        is_live = index * tile + first < piece.length
        pl.when(is_live)(copy)
        pl.when(index * tile + first >= piece.length)(
          functools.partial(plgpu.barrier_arrive, ring.here.at[slot])
        )
    return following

  lax.fori_loop(piece.first, piece.last, step, ids(piece.first))


def fetch_all(
  rings: tuple[Ring, ...], block_tables: Ref, each: Callable[[Any], Array]
) -> None:
  """Fetches the tiles of all pieces, each ring by a warp of its own."""

  @plgpu.warp_map
  def _(warp: Array) -> None:
    for i, ring in enumerate(rings):

      @pl.when(warp == i)
      def _(ring: Ring = ring) -> None:
        _drain(ring, each(functools.partial(_fetch, ring, block_tables)))


def _drain(ring: Ring, count: Array) -> None:
  """Waits until the last tiles are used, so that no barrier ends in mid-phase."""
  num_stages = ring.tiles.shape[0]
  for back in range(num_stages):
    tile = count - 1 - back

    @pl.when(tile >= 0)
    def _(tile: Array = tile) -> None:
      plgpu.barrier_wait(ring.free.at[lax.rem(tile, jnp.int32(num_stages))])


def slot_of(tiles: Ref, piece: Piece, index: Array) -> Array:
  """Where in the ring a tile of a piece is."""
  count = piece.done + index - piece.first
  return lax.rem(count, jnp.int32(tiles.shape[0]))


def copies_per_tile(pool: Array, tile: int) -> int:
  """Blocks of a tile, or one part of a block that is larger."""
  return max(1, tile // pool.shape[2])


def split_blocks(pool: Array, tile: int) -> Array:
  """`[N, K, tiles per block, tokens per copy, D]`: large blocks come in parts."""
  rows = min(pool.shape[2], tile)
  return pool.reshape(*pool.shape[:2], -1, rows, pool.shape[-1])


def bury(square: Ref, start: Array, begin: Array, length: Array) -> None:
  """Zeroes the values that nobody sees in a square, whose first token is `start`."""
  tile = plgpu.load(square, layout=WGMMA)
  place = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=WGMMA) + start
  is_live = (place >= begin) & (place < length)
  square[...] = jnp.where(is_live, tile, jnp.zeros_like(tile))


def product(x: Any, y: Ref, shape: tuple[int, ...]) -> Array:
  """`x @ y` in float32."""

  def run(result: Ref) -> Array:
    plgpu.wgmma(result, x, y)
    return result[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
  """A float32 array in registers."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory as the products want it: rows of 128 bytes, swizzled."""
  width = 128 // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)),
  )
