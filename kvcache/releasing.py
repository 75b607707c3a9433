"""Releasing: rows let go of the blocks at their end.

Costs what is released. Columns from `num_frozen` on have one reference and are in no
index, so they go straight back to the free list; the columns before may be shared or
cached and take the careful path, deepest first, so that the eviction ring holds
children before parents.
"""

from jax import Array, lax
import jax.numpy as jnp

from kvcache import blocks, prefix, ragged, sequences
from kvcache.blocks import BlockPool
from kvcache.config import NULL_BLOCK
from kvcache.prefix import PrefixIndex
from kvcache.publishing import Tables
from kvcache.sequences import SequenceTable


def release(
  tables: Tables, num_kept: Array, *, chunk_size: int, keep_prefix: bool = True
) -> Tables:
  """Shortens every row to its first `num_kept` blocks.

  Args:
    tables: Pool, sequence table and prefix index.
    num_kept: `[S]` int32. Rows with fewer blocks are left alone.
    chunk_size: Entries handled per iteration.
    keep_prefix: Whether cached blocks without holders stay cached. If not, those that
      no cached block continues return to the free list at once.
  """
  pool, table, index = tables
  num_pushes = jnp.sum(_count(table, num_kept), dtype=jnp.int32)
  index = prefix.compact_queue(index, jnp.minimum(num_pushes, index.num_blocks))
  exclusive = jnp.maximum(num_kept, table.num_frozen)

  # Both loops end because every iteration takes at least one block from a row with a
  # surplus.
  pool, table = lax.while_loop(
    lambda state: jnp.any(_count(state[1], exclusive) > 0),
    lambda state: _release_exclusive(*state, exclusive, num_entries=chunk_size),
    (pool, table),
  )
  return lax.while_loop(
    lambda state: jnp.any(_count(state[1], num_kept) > 0),
    lambda state: _release_frozen(
      *state, num_kept, num_entries=chunk_size, keep_prefix=keep_prefix
    ),
    (pool, table, index),
  )


def _count(table: SequenceTable, num_kept: Array) -> Array:
  return jnp.maximum(table.num_blocks - num_kept, 0)


def _take(
  table: SequenceTable, counts: Array, num_entries: int
) -> tuple[SequenceTable, Array, Array]:
  """Cuts up to `num_entries` blocks off the rows' ends: `(table, block_ids, is_valid)`.

  A row's blocks come deepest first. `counts [S]` says how many each row may lose.
  """
  entries = ragged.expand(counts, num_entries)
  columns = table.num_blocks[entries.rows] - 1 - entries.offsets
  block_ids, tables = ragged.read(table.block_tables, entries.rows, columns)
  table = table.replace(block_tables=tables)
  block_ids = jnp.where(entries.is_valid, block_ids, NULL_BLOCK)
  null = jnp.full_like(block_ids, NULL_BLOCK)
  table = sequences.set_blocks(table, entries.rows, columns, null, entries.is_valid)
  num_taken = jnp.clip(num_entries - entries.starts, 0, counts)
  table = table.replace(num_blocks=table.num_blocks - num_taken)
  return table, block_ids, entries.is_valid


def _release_exclusive(
  pool: BlockPool, table: SequenceTable, num_kept: Array, *, num_entries: int
) -> tuple[BlockPool, SequenceTable]:
  table, block_ids, is_valid = _take(table, _count(table, num_kept), num_entries)
  return blocks.release_exclusive(pool, block_ids, is_valid), table


def _release_frozen(
  pool: BlockPool,
  table: SequenceTable,
  index: PrefixIndex,
  num_kept: Array,
  *,
  num_entries: int,
  keep_prefix: bool,
) -> Tables:
  counts = _count(table, num_kept)
  if not keep_prefix:  # One row at a time, so that a list is one chain.
    row = jnp.arange(table.max_seqs, dtype=jnp.int32)
    counts = jnp.where(row == jnp.argmax(counts > 0).astype(jnp.int32), counts, 0)
  table, block_ids, is_valid = _take(table, counts, num_entries)
  is_cached = ragged.hold(is_valid & index.is_cached(block_ids))
  pool, is_last = blocks.release(pool, block_ids, keep=is_cached)
  stays = is_last & is_cached
  if not keep_prefix:
    goes = stays & _is_removable(index, block_ids, is_cached, is_last)
    index = prefix.remove(index, block_ids, goes)
    pool = blocks.push(pool, block_ids, goes)
    stays &= ~goes
  return pool, table, prefix.enqueue(index, block_ids, stays)


def _is_removable(
  index: PrefixIndex, block_ids: Array, is_cached: Array, is_last: Array
) -> Array:
  """Which blocks of a chain, deepest first, only the chain itself keeps indexed."""
  entry = jnp.arange(block_ids.shape[0], dtype=jnp.int32)
  own_child = jnp.where(entry > 0, jnp.roll(is_cached, 1), False).astype(jnp.int32)
  is_free_to_go = is_last & (index.num_children[block_ids] == own_child)
  blocked = lax.cummax((is_cached & ~is_free_to_go).astype(jnp.int32))
  return blocked == 0
