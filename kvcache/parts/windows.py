"""WindowBlocks: the blocks of layers that keep only a sliding window.

Layers with one window have a pool, tables and stores of their own. Column `c` of a row
stands for the same tokens here as in the `SequenceTable`, and the columns behind the
window are given back as the row moves on, so what a row holds does not grow with it.

A block here may be attached to the cached block of the context that stands for the same
tokens: a prefix hit then finds it through that block. It stays attached until it is
evicted, alone or with its owner. Every row that holds an attached block holds its owner
too, so whoever evicts an owner finds the attached block held by nobody.

Blocks behind a window are let go by `trim`, after publishing, so that they stay cached.
A row that decodes on without any publishing writes over its oldest block instead, which
is then lost for others: `extend_one_each` costs nothing but a step, and always goes on.
"""

import flax.struct
from jax import Array, lax
import jax.numpy as jnp

from kvcache.config import NULL_BLOCK
from kvcache.parts import blocks, loops, ragged, ring
from kvcache.parts.blocks import BlockPool
from kvcache.parts.ring import EvictionRing
from kvcache.parts.sequences import SequenceTable
from kvcache.printing import Node

_MARK = -(1 << 30)


class WindowBlocks(Node, kw_only=True):
  """`Nw` blocks for `S` rows, beside the `N` blocks of the context.

  Attributes:
    pool: Which of the `Nw` blocks are free, how many table entries name each.
    block_tables: `[S, P]` int32. Columns from `first_blocks` up to the row's
      `num_blocks` are in use, all others are `NULL_BLOCK`.
    first_blocks: `[S]` int32.
    valid_from: `[S]` int32. Positions before it hold nothing, even in a column in use:
      an imported row brings along what it needs and no more.
    attached_ids: `[N]` int32. The block here that is attached to each cached block.
    owner_ids: `[Nw]` int32. The cached block that each is attached to, or `NULL_BLOCK`.
    ring: Attached blocks that no row holds, the next to be evicted first.
    sliding_window: Tokens that a query sees, itself included. Static.
    block_size: Token positions in one block. Static.
  """

  pool: BlockPool
  block_tables: Array
  first_blocks: Array
  valid_from: Array
  attached_ids: Array
  owner_ids: Array
  ring: EvictionRing
  sliding_window: int = flax.struct.field(pytree_node=False)
  block_size: int = flax.struct.field(pytree_node=False)

  @property
  def num_blocks(self) -> int:
    """`Nw`, the null block included."""
    return self.pool.num_blocks

  @property
  def max_seqs(self) -> int:
    """`S`."""
    return self.block_tables.shape[-2]

  @property
  def num_columns(self) -> int:
    """Most columns that a window can lie in."""
    return (self.sliding_window + self.block_size - 2) // self.block_size + 1


def init(
  *,
  sliding_window: int,
  num_window_blocks: int,
  num_blocks: int,
  block_size: int,
  max_seqs: int,
  max_blocks_per_seq: int,
) -> WindowBlocks:
  """Makes an empty pool of `num_window_blocks` beside a pool of `num_blocks`."""
  return WindowBlocks(
    pool=blocks.init(num_window_blocks),
    block_tables=jnp.zeros((max_seqs, max_blocks_per_seq), jnp.int32),
    first_blocks=jnp.zeros(max_seqs, jnp.int32),
    valid_from=jnp.zeros(max_seqs, jnp.int32),
    attached_ids=jnp.zeros(num_blocks, jnp.int32),
    owner_ids=jnp.zeros(num_window_blocks, jnp.int32),
    ring=ring.init(num_window_blocks),
    sliding_window=sliding_window,
    block_size=block_size,
  )


def first_needed(window: WindowBlocks, seq_lens: Array) -> Array:
  """The first column that a row of this length needs for its next token."""
  return _first_seen(window, seq_lens) // window.block_size


def _first_seen(window: WindowBlocks, seq_lens: Array) -> Array:
  """The first position that the next token sees; the length if it sees itself only."""
  return jnp.maximum(seq_lens - (window.sliding_window - 1), 0)


# --- Beginning and growing ------------------------------------------------------------


def may_end(window: WindowBlocks, block_ids: Array) -> Array:
  """Where prefix hits may end.

  Args:
    window: The window.
    block_ids: `[A, C]` int32. Cached blocks of each prompt, in order.

  Returns:
    `[A, C]` bool: whether the blocks that the token after column `c` needs are all
    attached.
  """
  column = jnp.arange(block_ids.shape[1], dtype=jnp.int32)[None]
  is_missing = window.attached_ids[block_ids] == NULL_BLOCK
  last_missing = lax.cummax(jnp.where(is_missing, column, -1), axis=1)
  return last_missing < first_needed(window, (column + 1) * window.block_size)


def start(
  window: WindowBlocks, rows: Array, block_ids: Array, num_hits: Array
) -> WindowBlocks:
  """Begins rows with the attached blocks that their prefix hits need.

  Args:
    window: The window.
    rows: `[A]` int32 inactive rows; `S` drops the entry, whose `num_hits` is then 0.
    block_ids: `[A, C]` int32 cached blocks of the context.
    num_hits: `[A]` int32. How many of them the row adopts.
  """
  column = jnp.arange(block_ids.shape[1], dtype=jnp.int32)[None]
  first = first_needed(window, num_hits * window.block_size)
  is_needed = (column >= first[:, None]) & (column < num_hits[:, None])
  ids = jnp.where(is_needed, window.attached_ids[block_ids], NULL_BLOCK)
  window = _hold(window, ids.reshape(-1))
  tables = window.block_tables.at[rows, : ids.shape[1]].set(ids, mode="drop")
  return window.replace(
    block_tables=tables,
    first_blocks=window.first_blocks.at[rows].set(first, mode="drop"),
  )


def can_recycle(window: WindowBlocks, seq_lens: Array) -> Array:
  """`[S]` bool: rows whose oldest block is behind the window and nobody else's."""
  oldest = _oldest(window)
  return (
    (window.first_blocks < first_needed(window, seq_lens))
    & (window.pool.ref_counts[oldest] == 1)
    & (window.owner_ids[oldest] == NULL_BLOCK)
  )


def extend_one_each(
  window: WindowBlocks,
  table: SequenceTable,
  wants: Array,
  recycles: Array,
  *,
  ranks: Array | None,
) -> WindowBlocks:
  """Gives a block to each row in `wants`: its own oldest one where `recycles`.

  Args:
    window: The window.
    table: The rows, before they grow.
    wants: `[S]` bool.
    recycles: `[S]` bool, from `can_recycle`. There are enough free blocks for the
      others.
    ranks: `[S]` int32. How many of the others come before each, if known.
  """
  P = window.block_tables.shape[1]
  recycles &= wants
  pool, fresh = blocks.allocate_one_each(window.pool, wants & ~recycles, ranks=ranks)
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)
  block_ids = jnp.where(recycles, _oldest(window), fresh)
  cleared = ragged.masked(window.first_blocks, recycles, P)
  block_ids, cleared = ragged.hold(block_ids, cleared)
  tables = window.block_tables.at[row, cleared].set(NULL_BLOCK, mode="drop")
  last = ragged.masked(table.num_blocks, wants, P)
  return window.replace(
    pool=pool,
    block_tables=tables.at[row, last].set(block_ids, mode="drop"),
    first_blocks=window.first_blocks + recycles.astype(jnp.int32),
  )


def extend(
  window: WindowBlocks,
  rows: Array,
  columns: Array,
  need: Array,
  *,
  num_entries: int,
) -> WindowBlocks:
  """Gives `need[e]` blocks to row `rows[e]` from column `columns[e]` on.

  Args:
    window: The window.
    rows: `[E]` int32, `S` drops the entry, whose `need` is then 0.
    columns: `[E]` int32.
    need: `[E]` int32. There are enough free blocks.
    num_entries: Static bound on their sum.
  """
  pool, given = blocks.allocate(window.pool, need, num_entries=num_entries)
  at = columns[given.rows] + given.offsets
  at = ragged.masked(at, given.is_valid, window.block_tables.shape[1])
  tables = window.block_tables.at[rows[given.rows], at].set(
    given.block_ids, mode="drop"
  )
  return window.replace(pool=pool, block_tables=tables)


def begin(
  window: WindowBlocks,
  rows: Array,
  seq_lens: Array,
  need: Array,
  *,
  num_entries: int,
) -> WindowBlocks:
  """Begins rows of lengths `seq_lens [A]` with `need [A]` new blocks; see `extend`.

  The caller writes what the window sees, and nothing before it.
  """
  first = first_needed(window, seq_lens)
  window = extend(window, rows, first, need, num_entries=num_entries)
  valid_from = _first_seen(window, seq_lens)
  return window.replace(
    first_blocks=window.first_blocks.at[rows].set(first, mode="drop"),
    valid_from=window.valid_from.at[rows].set(valid_from, mode="drop"),
  )


def fork(
  window: WindowBlocks,
  source: Array,
  rows: Array,
  mask: Array,
  *,
  num_full: Array,
  copies: Array,
) -> tuple[WindowBlocks, Array, Array]:
  """Lets new rows share the full blocks of others, and gives each a partial one.

  Args:
    window: The window.
    source: `[F]` int32 live rows.
    rows: `[F]` int32 inactive rows, `S` where not in `mask`.
    mask: `[F]` bool. Entries that count.
    num_full: `[F]` int32. Full blocks of the source.
    copies: `[F]` bool. Whether the source has a partial block. There are enough free
      blocks for those in `mask`.

  Returns:
    The window after, and the blocks to copy: `[F]` int32 from and `[F]` int32 to, `Nw`
    where there is nothing to copy.
  """
  copies &= mask
  pool, fresh = blocks.allocate_one_each(window.pool, copies)
  column = jnp.arange(window.block_tables.shape[1], dtype=jnp.int32)[None]
  tables = window.block_tables[source]
  partial = window.block_tables[source, jnp.minimum(num_full, column.size - 1)]
  is_shared = (column < num_full[:, None]) & mask[:, None]
  shared = jnp.where(is_shared, tables, NULL_BLOCK)
  shared, partial = ragged.hold(shared, partial)
  pool = blocks.share(pool, shared.reshape(-1))
  ids = jnp.where(column == num_full[:, None], fresh[:, None], shared)
  window = window.replace(
    pool=pool,
    block_tables=window.block_tables.at[rows].set(ids, mode="drop"),
    first_blocks=window.first_blocks.at[rows].set(
      window.first_blocks[source], mode="drop"
    ),
    valid_from=window.valid_from.at[rows].set(window.valid_from[source], mode="drop"),
  )
  return window, partial, ragged.masked(fresh, copies, window.num_blocks)


# --- Letting go -----------------------------------------------------------------------


def num_behind(window: WindowBlocks, table: SequenceTable) -> Array:
  """`[S]` int32: columns of each row that its next token does not need any more."""
  needed = jnp.minimum(first_needed(window, table.seq_lens), table.num_blocks)
  return jnp.maximum(needed - window.first_blocks, 0)


def trim(
  window: WindowBlocks, table: SequenceTable, *, chunk_size: int
) -> WindowBlocks:
  """Lets go of the blocks behind each row's window."""
  counts = num_behind(window, table)
  window = _release(window, window.first_blocks, counts, chunk_size=chunk_size)
  return window.replace(first_blocks=window.first_blocks + counts)


def shorten(
  window: WindowBlocks, table: SequenceTable, num_kept: Array, *, chunk_size: int
) -> WindowBlocks:
  """Shortens rows to their first `num_kept [S]` columns; `table` is still as before."""
  first = jnp.maximum(window.first_blocks, num_kept)
  counts = jnp.maximum(table.num_blocks - first, 0)
  window = _release(window, first, counts, chunk_size=chunk_size)
  is_shorter = num_kept < table.num_blocks
  kept_first = jnp.minimum(window.first_blocks, num_kept)
  return window.replace(
    first_blocks=jnp.where(is_shorter, kept_first, window.first_blocks),
    valid_from=jnp.where(is_shorter & (num_kept == 0), 0, window.valid_from),
  )


@loops.compiled("chunk_size")
def _release(
  window: WindowBlocks, starts: Array, counts: Array, *, chunk_size: int
) -> WindowBlocks:
  """Lets go of `counts [S]` columns of each row from `starts [S]` on, in order."""
  num_pushes = jnp.minimum(jnp.sum(counts, dtype=jnp.int32), window.num_blocks)
  window = window.replace(ring=ring.make_room(window.ring, num_pushes))

  def go(state: tuple[WindowBlocks, Array, Array]) -> tuple[WindowBlocks, Array, Array]:
    window, starts, counts = state
    entries = ragged.expand(counts, chunk_size)
    columns = starts[entries.rows] + entries.offsets
    ids, tables = ragged.read(window.block_tables, entries.rows, columns)
    ids = jnp.where(entries.is_valid, ids, NULL_BLOCK)
    is_attached = window.owner_ids[ids] != NULL_BLOCK
    pool, is_last = blocks.release(window.pool, ids, keep=is_attached)
    to = ragged.masked(entries.rows, entries.is_valid, window.max_seqs)
    num_done = jnp.clip(chunk_size - entries.starts, 0, counts)
    window = window.replace(
      pool=pool,
      block_tables=tables.at[to, columns].set(NULL_BLOCK, mode="drop"),
      ring=ring.push(window.ring, ids, is_last & is_attached),
    )
    return window, starts + num_done, counts - num_done

  # Ends because every round lets go of the first columns that are left.
  window, _, _ = lax.while_loop(
    lambda state: jnp.any(state[2] > 0), go, (window, starts, counts)
  )
  return window


# --- Beside the prefix index ----------------------------------------------------------


def attach(
  window: WindowBlocks, rows: Array, columns: Array, cached_ids: Array, mask: Array
) -> WindowBlocks:
  """Attaches blocks of rows to the cached blocks that have none.

  A row keeps a block of its own where an equal one is attached already: it is let go
  soon.

  Args:
    window: The window.
    rows: `[E]` int32.
    columns: `[E]` int32.
    cached_ids: `[E]` int32. The cached block in that place of the row; may repeat.
    mask: `[E]` bool. Entries that count.
  """
  own = window.block_tables[rows, columns]
  is_whole = columns * window.block_size >= window.valid_from[rows]
  is_loose = mask & is_whole & (own != NULL_BLOCK)
  is_loose &= window.owner_ids[own] == NULL_BLOCK
  before, attached = ragged.read(window.attached_ids, cached_ids)
  wants = is_loose & (before == NULL_BLOCK)
  marks = _MARK + jnp.arange(own.shape[0], dtype=jnp.int32)  # the earliest one wins
  to = ragged.masked(cached_ids, wants, attached.shape[0])
  found, attached = ragged.read(attached.at[to].min(marks, mode="drop"), cached_ids)
  has_won = wants & (found == marks)
  to = ragged.masked(cached_ids, has_won, attached.shape[0])
  owner = ragged.masked(own, has_won, window.num_blocks)
  return window.replace(
    attached_ids=attached.at[to].set(own, mode="drop"),
    owner_ids=window.owner_ids.at[owner].set(cached_ids, mode="drop"),
  )


def detach(window: WindowBlocks, cached_ids: Array, mask: Array) -> WindowBlocks:
  """Frees what is attached to distinct blocks that nobody holds any more."""
  ids, attached = ragged.read(window.attached_ids, cached_ids)
  ids = jnp.where(mask, ids, NULL_BLOCK)
  has = ids != NULL_BLOCK
  to = ragged.masked(cached_ids, has, attached.shape[0])
  owner = ragged.masked(ids, has, window.num_blocks)
  return window.replace(
    pool=blocks.push(window.pool, ids, has),
    attached_ids=attached.at[to].set(NULL_BLOCK, mode="drop"),
    owner_ids=window.owner_ids.at[owner].set(NULL_BLOCK, mode="drop"),
    ring=ring.remove(window.ring, ids),
  )


@loops.compiled("num_entries")
def evict(
  window: WindowBlocks, count: Array, *, num_entries: int
) -> tuple[WindowBlocks, Array]:
  """Frees up to `count` attached blocks that no row holds, least recently used first.

  Their owners stay cached; a hit on them ends earlier, or later.

  Returns:
    The window after, and `[]` int32: how many.
  """

  def go(state: tuple[WindowBlocks, Array]) -> tuple[WindowBlocks, Array]:
    window, left = state
    waiting, ids, mask = ring.pop(window.ring, left, num_entries=num_entries)
    owners, owner_ids = ragged.read(window.owner_ids, ids)
    owner = ragged.masked(owners, mask, window.attached_ids.shape[0])
    to = ragged.masked(ids, mask, window.num_blocks)
    window = window.replace(
      pool=blocks.push(window.pool, ids, mask),
      attached_ids=window.attached_ids.at[owner].set(NULL_BLOCK, mode="drop"),
      owner_ids=owner_ids.at[to].set(NULL_BLOCK, mode="drop"),
      ring=waiting,
    )
    return window, left - ragged.sum_int(mask)

  # Ends because every round frees a block or moves the ring's head on.
  window, left = lax.while_loop(
    lambda state: (state[1] > 0) & (state[0].ring.num_waiting > 0), go, (window, count)
  )
  return window, jnp.maximum(count, 0) - jnp.maximum(left, 0)


# --- Going back -----------------------------------------------------------------------


def can_return(window: WindowBlocks, table: SequenceTable, seq_lens: Array) -> Array:
  """`[S]` bool: whether what rows of these lengths need is held, or still attached."""
  column, is_lost = _lost(window, table, seq_lens)
  is_there = ~is_lost | (_attached(window, table, column) != NULL_BLOCK)
  first = _first_seen(window, seq_lens)
  is_valid = (first >= window.valid_from) | (first == seq_lens)
  return jnp.all(is_there, axis=1) & is_valid


def block_at(window: WindowBlocks, table: SequenceTable, column: Array) -> Array:
  """`[S]` int32: the block in a column `[S]` of each row, held or attached."""
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)
  held = window.block_tables[row, column]
  attached = _attached(window, table, column[:, None])[:, 0]
  return jnp.where(column < window.first_blocks, attached, held)


def _readopt(
  window: WindowBlocks, table: SequenceTable, seq_lens: Array, num_kept: Array
) -> WindowBlocks:
  """Holds again what rows need at shorter lengths and had let go."""
  column, is_lost = _lost(window, table, seq_lens)
  is_lost &= column < num_kept[:, None]
  ids = jnp.where(is_lost, _attached(window, table, column), NULL_BLOCK)
  window = _hold(window, ids.reshape(-1))
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)[:, None]
  at = ragged.masked(column, is_lost, window.block_tables.shape[1])
  needed = jnp.minimum(first_needed(window, seq_lens), num_kept)
  return window.replace(
    block_tables=window.block_tables.at[row, at].set(ids, mode="drop"),
    first_blocks=jnp.minimum(window.first_blocks, needed),
    valid_from=jnp.minimum(window.valid_from, _first_seen(window, seq_lens)),
  )


def go_back(
  window: WindowBlocks,
  table: SequenceTable,
  seq_lens: Array,
  num_kept: Array,
  *,
  copies: Array,
  chunk_size: int,
) -> tuple[WindowBlocks, Array]:
  """Returns rows to shorter lengths.

  Args:
    window: The window.
    table: The rows, before they return.
    seq_lens: `[S]` int32, for which `can_return` holds. Unchanged for other rows.
    num_kept: `[S]` int32. Columns that the rows keep.
    copies: `[S]` bool. Rows that get a new block behind these, for a copy of the one
      there. There are enough free blocks.
    chunk_size: Entries handled per iteration.

  Returns:
    The window after, and `[S]` int32: the new blocks, `Nw` where there is none.
  """
  pool, fresh = blocks.allocate_one_each(window.pool, copies)
  window = _readopt(window.replace(pool=pool), table, seq_lens, num_kept)
  window = shorten(window, table, num_kept, chunk_size=chunk_size)
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)
  at = ragged.masked(num_kept, copies, window.block_tables.shape[1])
  tables = window.block_tables.at[row, at].set(fresh, mode="drop")
  window = window.replace(block_tables=tables)
  return window, ragged.masked(fresh, copies, window.num_blocks)


def _lost(
  window: WindowBlocks, table: SequenceTable, seq_lens: Array
) -> tuple[Array, Array]:
  """Columns `[S, num_columns]` of windows at these lengths; which were let go."""
  offset = jnp.arange(window.num_columns, dtype=jnp.int32)[None]
  column = first_needed(window, seq_lens)[:, None] + offset
  end = (seq_lens + (window.block_size - 1)) // window.block_size
  is_lost = column < jnp.minimum(window.first_blocks, end)[:, None]
  return jnp.minimum(column, table.max_blocks_per_seq - 1), is_lost


def _attached(window: WindowBlocks, table: SequenceTable, column: Array) -> Array:
  """What is attached to the blocks in columns `[S, C]` of the rows."""
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)[:, None]
  return window.attached_ids[table.block_tables[row, column]]


def _hold(window: WindowBlocks, ids: Array) -> WindowBlocks:
  """Adds a reference to attached blocks; `NULL_BLOCK` is ignored."""
  return window.replace(
    pool=blocks.share(window.pool, ids), ring=ring.remove(window.ring, ids)
  )


def _oldest(window: WindowBlocks) -> Array:
  """`[S]` int32: the first block of each row, `NULL_BLOCK` if it has none."""
  row = jnp.arange(window.max_seqs, dtype=jnp.int32)
  last = window.block_tables.shape[1] - 1
  return window.block_tables[row, jnp.minimum(window.first_blocks, last)]
