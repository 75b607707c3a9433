"""SequenceTable: which blocks each sequence owns, in order, and how long each is."""

from jax import Array
import jax.numpy as jnp

from kvcache.parts import ragged
from kvcache.printing import Node


class SequenceTable(Node, kw_only=True):
  """`S` rows; a live sequence keeps its row, its `seq_id`, until it is finished.

  Attributes:
    block_tables: `[S, P]` int32. Ids of the row's blocks in order, then `NULL_BLOCK`.
    num_blocks: `[S]` int32. How many columns are in use, reserved ones included.
    seq_lens: `[S]` int32. Tokens stored.
    is_active: `[S]` bool. Whether the row holds a live sequence.
    num_published: `[S]` int32. Leading blocks that are in the prefix index.
    num_frozen: `[S]` int32. Leading blocks that may be shared or indexed; all later
      ones have one reference and are in no index. At least `num_published`.
    is_sealed: `[S]` bool. Rows that publish no more, because the index had no place for
      one of their blocks.
    namespaces: `[S]` int32. Sequences share prefixes only within a namespace.
  """

  block_tables: Array
  num_blocks: Array
  seq_lens: Array
  is_active: Array
  num_published: Array
  num_frozen: Array
  is_sealed: Array
  namespaces: Array

  @property
  def max_seqs(self) -> int:
    """`S`."""
    return self.block_tables.shape[-2]

  @property
  def max_blocks_per_seq(self) -> int:
    """`P`."""
    return self.block_tables.shape[-1]


def init(max_seqs: int, max_blocks_per_seq: int) -> SequenceTable:
  """Makes a table whose rows are all inactive and empty."""
  return SequenceTable(
    block_tables=jnp.zeros((max_seqs, max_blocks_per_seq), jnp.int32),
    num_blocks=jnp.zeros(max_seqs, jnp.int32),
    seq_lens=jnp.zeros(max_seqs, jnp.int32),
    is_active=jnp.zeros(max_seqs, bool),
    num_published=jnp.zeros(max_seqs, jnp.int32),
    num_frozen=jnp.zeros(max_seqs, jnp.int32),
    is_sealed=jnp.zeros(max_seqs, bool),
    namespaces=jnp.zeros(max_seqs, jnp.int32),
  )


def inactive_rows(table: SequenceTable, num: int) -> Array:
  """`[num]` int32: the lowest inactive rows, then `S` where there are no more."""
  rank = ragged.masked(ragged.ranks(~table.is_active), ~table.is_active, num)
  rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
  return jnp.full(num, table.max_seqs, jnp.int32).at[rank].set(rows, mode="drop")


def set_blocks(
  table: SequenceTable, rows: Array, columns: Array, block_ids: Array, mask: Array
) -> SequenceTable:
  """Writes `block_ids [E]` at `(rows, columns)` where `mask`; lengths do not change."""
  columns = ragged.masked(columns, mask, table.max_blocks_per_seq)
  tables = table.block_tables.at[rows, columns].set(block_ids, mode="drop")
  return table.replace(block_tables=tables)


def start(
  table: SequenceTable,
  rows: Array,
  *,
  block_ids: Array,
  num_blocks: Array,
  seq_lens: Array,
  namespaces: Array,
  num_published: Array,
  num_frozen: Array,
  is_sealed: Array,
) -> SequenceTable:
  """Begins sequences in inactive rows.

  Args:
    table: The table.
    rows: `[A]` int32 distinct inactive rows; `S` drops the entry.
    block_ids: `[A, C]` int32, the first `num_blocks[a] <= C <= P` of each count.
    num_blocks: `[A]` int32.
    seq_lens: `[A]` int32.
    namespaces: `[A]` int32.
    num_published: `[A]` int32.
    num_frozen: `[A]` int32.
    is_sealed: `[A]` bool.
  """
  column = jnp.arange(block_ids.shape[1], dtype=jnp.int32)
  block_ids = jnp.where(column[None] < num_blocks[:, None], block_ids, 0)
  width = block_ids.shape[1]

  def at(field: Array, value: Array) -> Array:
    return field.at[rows].set(value, mode="drop")

  return SequenceTable(
    block_tables=table.block_tables.at[rows, :width].set(block_ids, mode="drop"),
    num_blocks=at(table.num_blocks, num_blocks),
    seq_lens=at(table.seq_lens, seq_lens),
    is_active=at(table.is_active, jnp.ones_like(is_sealed)),
    num_published=at(table.num_published, num_published),
    num_frozen=at(table.num_frozen, num_frozen),
    is_sealed=at(table.is_sealed, is_sealed),
    namespaces=at(table.namespaces, namespaces),
  )


def clear(table: SequenceTable, mask: Array) -> SequenceTable:
  """Makes rows inactive whose tables are empty already (`num_blocks == 0`)."""
  return table.replace(
    seq_lens=jnp.where(mask, 0, table.seq_lens),
    is_active=table.is_active & ~mask,
    num_published=jnp.where(mask, 0, table.num_published),
    num_frozen=jnp.where(mask, 0, table.num_frozen),
    is_sealed=table.is_sealed & ~mask,
    namespaces=jnp.where(mask, 0, table.namespaces),
  )
