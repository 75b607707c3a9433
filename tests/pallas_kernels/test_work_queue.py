"""The queue of pieces: every key and query once, whatever stands beside a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import work_queue

TILE, MIN_TILES, MAX_SPLITS, MAX_LEN = 4, 2, 3, 64
SETTINGS = {"tile_kv": TILE, "min_tiles": MIN_TILES, "max_splits": MAX_SPLITS}


def ints(values):
  return jnp.asarray(values, jnp.int32)


def starts(query_lens):
  return ints(np.append(0, np.cumsum(query_lens)))


@functools.partial(jax.jit, static_argnames=("max_queries", "window", "num_tokens"))
def split(lens, cu_seqlens, *, max_queries=2, window=None, num_tokens=12):
  return work_queue.split_rows(
    lens,
    cu_seqlens,
    num_tokens=num_tokens,
    max_len=MAX_LEN,
    max_queries=max_queries,
    sliding_window=window,
    **SETTINGS,
  )


def pieces(queue):
  """`(row, first, last)` of each piece."""
  num = queue.num_pieces.item()
  assert num <= queue.rows.size
  columns = (queue.rows, queue.first, queue.last)
  return list(zip(*(column[:num].tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
  ("length", "expected"),
  [
    (0, []),
    (1, [(0, 1)]),
    (8, [(0, 2)]),
    (9, [(0, 2), (2, 3)]),
    (24, [(0, 2), (2, 4), (4, 6)]),
    (25, [(0, 3), (3, 6), (6, 7)]),  # more than three pieces of two tiles: larger ones
    (64, [(0, 6), (6, 12), (12, 16)]),
    (70, [(0, 6), (6, 12), (12, 16)]),  # longer than the table: what it holds
  ],
)
def test_a_row_is_cut_by_its_own_length(length, expected):
  queue = split(ints([5, length, 40]), starts([1, 1, 1]))
  assert [piece[1:] for piece in pieces(queue) if piece[0] == 1] == expected


def test_a_full_table_of_long_rows_fits_the_queue():
  queue = split(jnp.full(6, MAX_LEN, jnp.int32), starts([2] * 6))
  assert queue.num_pieces == queue.rows.size == 6 * MAX_SPLITS


def test_rows_with_many_queries_are_left_to_the_other_queue():
  lens, cu_seqlens = ints([9, 30, 9, 0, 9]), starts([1, 3, 2, 1, 0])
  assert pieces(split(lens, cu_seqlens)) == [(0, 0, 2), (0, 2, 3), (2, 0, 2), (2, 2, 3)]


def test_tokens_find_their_pieces():
  queue = split(ints([9, 30, 9, 0, 9]), starts([1, 3, 2, 1, 0]))
  assert queue.token_count.tolist() == [2, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0]
  assert queue.token_piece[jnp.array([0, 4, 5])].tolist() == [0, 2, 2]
  assert queue.token_place[:7].tolist() == [0, 0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize(
  ("window", "expected"),
  [
    (1, [(7, 8)]),
    (5, [(6, 8)]),
    (10, [(4, 6), (6, 8)]),
    (99, [(0, 3), (3, 6), (6, 8)]),
  ],
)
def test_tiles_before_the_window_are_left_out(window, expected):
  """Of 30 tokens, the queries are the last two."""
  queue = split(ints([30]), starts([2]), window=window)
  assert [piece[1:] for piece in pieces(queue)] == expected


def test_the_queue_of_a_window_is_as_long_as_windows_need():
  for length in range(1, MAX_LEN + 1):
    queue = split(jnp.full(3, length, jnp.int32), starts([1] * 3), window=5)
    assert queue.num_pieces <= queue.rows.size == 3 * 2


@functools.partial(jax.jit, static_argnames=("group",))
def tile(lens, cu_seqlens, *, group):
  return work_queue.tile_rows(
    lens, cu_seqlens, num_tokens=12, group=group, min_queries=3, tile_q=4
  )


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(
  "query_lens", [[12, 0, 0], [3, 1, 8], [4, 4, 4], [0, 2, 9], [0, 0, 0], [3, 3, 3]]
)
def test_every_query_is_in_one_tile(query_lens, group):
  queue = tile(ints([12, 12, 12]), starts(query_lens), group=group)
  found = [
    (row, first)
    for row, first in zip(queue.rows.tolist(), queue.first.tolist(), strict=True)
    if row >= 0
  ]
  wanted = [
    (row, first)
    for row, num in enumerate(query_lens)
    if num >= 3
    for first in reversed(range(0, num * group, 4))
  ]
  assert found == wanted
