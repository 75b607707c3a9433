"""Releasing: rows let go of the blocks at their end.

Costs what is released. Columns from `num_frozen` on have one reference and are in no
index, so they go straight back to the free list; the columns before may be shared or
cached and take the careful path, deepest first, so that the eviction ring holds
children before parents.
"""

import functools
import math

from jax import Array, lax
import jax.numpy as jnp

from kvcache.config import NULL_BLOCK
from kvcache.parts import blocks, loops, prefix, ragged, state_rows, windows
from kvcache.parts.blocks import BlockPool
from kvcache.parts.prefix import PrefixIndex
from kvcache.parts.publishing import Tables
from kvcache.parts.sequences import SequenceTable
from kvcache.parts.state_rows import StateRows

_WINDOW = 16
_BULK = 16


@loops.compiled("chunk_size", "keep_prefix")
def release(
  tables: Tables, num_kept: Array, *, chunk_size: int, keep_prefix: bool = True
) -> Tables:
  """Shortens every row to its first `num_kept` blocks.

  Args:
    tables: The tables of a context.
    num_kept: `[S]` int32. Rows with fewer blocks are left alone.
    chunk_size: Entries handled per iteration.
    keep_prefix: Whether cached blocks without holders stay cached. If not, those that
      no cached block continues return to the free list at once.
  """
  pool, table, index, states, window_blocks = tables
  # First, so that whoever leaves the index has nothing attached that a row holds.
  window_blocks = tuple(
    windows.shorten(window, table, num_kept, chunk_size=chunk_size)
    for window in window_blocks
  )
  num_pushes = jnp.sum(_count(table, num_kept), dtype=jnp.int32)
  index = prefix.compact_queue(index, jnp.minimum(num_pushes, index.num_blocks))
  exclusive = jnp.maximum(num_kept, table.num_frozen)

  # All loops end because every iteration takes blocks from a row with a surplus.
  for num_entries, at_least in ((_BULK * chunk_size, chunk_size), (chunk_size, 0)):
    pool, table, states = lax.while_loop(
      functools.partial(_has_surplus, num_kept=exclusive, at_least=at_least),
      functools.partial(
        _release_exclusive, num_kept=exclusive, num_entries=num_entries
      ),
      (pool, table, states),
    )
  return lax.while_loop(
    lambda tables: jnp.any(_count(tables.sequences, num_kept) > 0),
    lambda tables: _release_frozen(
      tables, num_kept, num_entries=chunk_size, keep_prefix=keep_prefix
    ),
    Tables(pool, table, index, states, window_blocks),
  )


_Bulk = tuple[BlockPool, SequenceTable, StateRows | None]


def _has_surplus(state: _Bulk, *, num_kept: Array, at_least: int) -> Array:
  return jnp.sum(_count(state[1], num_kept), dtype=jnp.int32) > at_least


def _count(table: SequenceTable, num_kept: Array) -> Array:
  return jnp.maximum(table.num_blocks - num_kept, 0)


def _take(
  table: SequenceTable, num_kept: Array, num_entries: int
) -> tuple[SequenceTable, Array, Array]:
  """Cuts about `num_entries` blocks off the rows' ends: `(table, block_ids, ranks)`.

  Works on aligned windows of a few columns, so that finding an entry's row and clearing
  the table cost little per block. A row's blocks come deepest first; lanes that are not
  taken hold `NULL_BLOCK`. `ranks` counts the blocks taken before each lane.
  """
  width = math.gcd(table.max_blocks_per_seq, _WINDOW)
  num_windows = max(1, num_entries // width)
  last = (table.num_blocks + (width - 1)) // width
  counts = jnp.where(table.num_blocks > num_kept, last - num_kept // width, 0)
  entries = ragged.expand(counts, num_windows)
  rows, window = entries.rows, last[entries.rows] - 1 - entries.offsets

  windows = table.block_tables.reshape(table.max_seqs, -1, width)
  block_ids, windows = ragged.read(windows, rows, window)
  begin = jnp.maximum(num_kept[rows], window * width)
  end = jnp.minimum(table.num_blocks[rows], (window + 1) * width)
  end = jnp.where(entries.is_valid, end, begin)
  lane = jnp.arange(width, dtype=jnp.int32)[None]
  columns = (window * width)[:, None] + lane
  is_taken = (columns >= begin[:, None]) & (columns < end[:, None])
  to = ragged.masked(rows, entries.is_valid, table.max_seqs)
  left = jnp.where(is_taken, NULL_BLOCK, block_ids)
  windows = windows.at[to, window].set(left, mode="drop")
  num_done = jnp.clip(num_windows - entries.starts, 0, counts)
  num_left = jnp.maximum((last - num_done) * width, num_kept)
  table = table.replace(
    block_tables=windows.reshape(table.block_tables.shape),
    num_blocks=jnp.where(num_done > 0, num_left, table.num_blocks),
  )
  taken = jnp.where(is_taken, block_ids, NULL_BLOCK)[:, ::-1]
  num_taken = end - begin
  num_skipped = (window + 1) * width - end
  ranks = (jnp.cumsum(num_taken) - num_taken - num_skipped)[:, None] + lane
  return table, taken.reshape(-1), ranks.reshape(-1)


def _release_exclusive(state: _Bulk, *, num_kept: Array, num_entries: int) -> _Bulk:
  pool, table, states = state
  table, block_ids, ranks = _take(table, num_kept, num_entries)
  if states is not None:
    states = state_rows.drop(states, block_ids, block_ids != NULL_BLOCK)
  return blocks.release_exclusive(pool, block_ids, ranks), table, states


def _release_frozen(
  tables: Tables, num_kept: Array, *, num_entries: int, keep_prefix: bool
) -> Tables:
  pool, table, index, states, window_blocks = tables
  if not keep_prefix:  # One row at a time, so that a list is one chain.
    row = jnp.arange(table.max_seqs, dtype=jnp.int32)
    first = jnp.argmax(table.num_blocks > num_kept).astype(jnp.int32)
    num_kept = jnp.where(row == first, num_kept, table.num_blocks)
  table, block_ids, _ = _take(table, num_kept, num_entries)
  is_cached = (block_ids != NULL_BLOCK) & index.is_cached(block_ids)
  pool, is_last = blocks.release(pool, block_ids, keep=is_cached)
  stays = is_last & is_cached
  if not keep_prefix:
    goes = stays & _is_removable(index, block_ids, is_cached, is_last)
    index = prefix.remove(index, block_ids, goes)
    pool = blocks.push(pool, block_ids, goes)
    window_blocks = tuple(windows.detach(w, block_ids, goes) for w in window_blocks)
    stays &= ~goes
  if states is not None:
    states = state_rows.drop(states, block_ids, is_last & ~stays)
  index = prefix.enqueue(index, block_ids, stays)
  return Tables(pool, table, index, states, window_blocks)


def _is_removable(
  index: PrefixIndex, block_ids: Array, is_cached: Array, is_last: Array
) -> Array:
  """Which blocks of a chain, deepest first, only the chain itself keeps indexed."""
  entry = jnp.arange(block_ids.shape[0], dtype=jnp.int32)
  own_child = jnp.where(entry > 0, jnp.roll(is_cached, 1), False).astype(jnp.int32)
  is_free_to_go = is_last & (index.num_children[block_ids] == own_child)
  blocked = lax.cummax((is_cached & ~is_free_to_go).astype(jnp.int32))
  return blocked == 0
