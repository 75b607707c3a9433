"""Tiles of the queries' type, made of quantised ones by a warpgroup of its own.

It stands between those that fetch and those that compute, which so know nothing of
scales: a tile that is copied with its tokens' scales becomes one of another ring.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_ring as ring
from pallas_kernels.paged_attention.mosaic_ring import Piece, plgpu, Ring, SQUARE

_LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X
"""Four elements of a row to a thread: four bytes are read, and eight written."""


def widen_all(
  narrow: Sequence[Ring], wide: Sequence[Ring], each: Callable[[Any], Array]
) -> None:
  """Makes tiles of the queries' type of quantised ones, by a warpgroup."""

  def widen(piece: Piece) -> None:
    def step(index: Array, _: None) -> None:
      for source, target in zip(narrow, wide, strict=True):
        _widen(source, target, piece, index)

    lax.fori_loop(piece.first, piece.last, step, None)

  count = each(widen)
  for target in wide:
    ring.drain(target, count)


def _widen(source: Ring, target: Ring, piece: Piece, index: Array) -> None:
  """One tile, as soon as it is here and there is room for it."""
  num_tokens, width = source.tiles.shape[1:]
  start = index * num_tokens
  slot = ring.slot_of(source, piece, index)
  target_slot = ring.slot_of(target, piece, index)
  plgpu.barrier_wait(source.here.at[slot])
  ring.wait_for_room(target, piece, index)
  is_edge = (start < piece.begin) | (start + num_tokens > piece.length)
  step = math.gcd(width, SQUARE)

  def write(*, has_dead: bool) -> None:
    for row, column in itertools.product(
      range(0, num_tokens, SQUARE), range(0, width, step)
    ):
      rows, columns = pl.ds(row, SQUARE), pl.ds(column, step)
      tile = plgpu.load(source.tiles.at[slot, rows, columns], layout=_LAYOUT)
      scales = plgpu.load(
        source.scales.at[slot, rows], layout=_LAYOUT.reduce(1), optimized=False
      )
      # Exact, and fewer instructions than the direct way.
      is_fp8 = tile.dtype == jnp.float8_e4m3fn
      tile = tile.astype(jnp.float16 if is_fp8 else jnp.bfloat16)
      tile = tile.astype(jnp.float32) * lax.broadcast_in_dim(scales, tile.shape, [0])
      if has_dead:
        live = ring.is_live(tile.shape, start + row, piece, _LAYOUT)
        tile = jnp.where(live, tile, 0.0)
      square = target.tiles.at[target_slot, rows, columns]
      square[...] = tile.astype(square.dtype)

  pl.when(is_edge)(functools.partial(write, has_dead=True))
  pl.when(jnp.logical_not(is_edge))(functools.partial(write, has_dead=False))
  plgpu.commit_smem()
  plgpu.barrier_arrive(source.free.at[slot])
  plgpu.barrier_arrive(target.here.at[target_slot])
