"""Publishing: full blocks of live rows enter the prefix index.

`commit` only stores tokens and lengths. Before the next admission, release, preemption
or fork, the new full blocks of all rows are published here in chunks of fixed size. A
block that equals an indexed one is given back and the row goes on with the indexed one,
so that equal prompts that arrive together converge to one copy and parents are always
canonical.
"""

from typing import NamedTuple

from jax import Array, lax
import jax.numpy as jnp

from kvcache.config import NULL_BLOCK
from kvcache.parts import blocks, loops, prefix, ragged, sequences, state_rows, windows
from kvcache.parts.blocks import BlockPool
from kvcache.parts.prefix import PrefixIndex
from kvcache.parts.sequences import SequenceTable
from kvcache.parts.state_rows import StateRows
from kvcache.parts.windows import WindowBlocks


class Tables(NamedTuple):
  """Everything of a context but keys, values and states: what bulk loops carry."""

  pool: BlockPool
  sequences: SequenceTable
  prefix: PrefixIndex
  state_rows: StateRows | None
  windows: tuple[WindowBlocks, ...]


def pending(table: SequenceTable, index: PrefixIndex) -> Array:
  """`[S]` int32: full blocks of each row that are still to be published."""
  num_full = table.seq_lens // index.block_size
  may = table.is_active & ~table.is_sealed
  return jnp.where(may, num_full - table.num_published, 0)


@loops.compiled("chunk_size")
def publish(tables: Tables, *, chunk_size: int) -> Tables:
  """Publishes every full block of every row that is not sealed."""
  # Ends because the first entry of a round is always published or seals its row.
  return lax.while_loop(
    lambda tables: jnp.any(pending(tables.sequences, tables.prefix) > 0),
    lambda tables: _round(tables, num_entries=chunk_size),
    tables,
  )


def _round(tables: Tables, *, num_entries: int) -> Tables:
  pool, table, index, states, window_blocks = tables
  counts = pending(table, index)
  entries = ragged.expand(counts, num_entries)
  rows, valid = entries.rows, entries.is_valid
  columns = table.num_published[rows] + entries.offsets
  own, block_tables = ragged.read(table.block_tables, rows, columns)
  before, block_tables = ragged.read(block_tables, rows, jnp.maximum(columns - 1, 0))
  table = table.replace(block_tables=block_tables)
  own = jnp.where(valid, own, NULL_BLOCK)
  previous = jnp.where(valid & (columns > 0), before, NULL_BLOCK)
  index, done = prefix.insert(
    index,
    own,
    previous,
    table.namespaces[rows],
    columns,
    offsets=entries.offsets,
    is_valid=valid,
  )

  swapped = done.is_done & (done.block_ids != own)
  adopted = jnp.where(swapped, done.block_ids, NULL_BLOCK)
  pool = blocks.share(pool, adopted)
  index = prefix.dequeue(index, adopted)
  given = jnp.where(swapped, own, NULL_BLOCK)
  pool, _ = blocks.release(pool, given, keep=jnp.zeros_like(swapped))
  if states is not None:
    states = state_rows.merge(states, rows, own, adopted, swapped)

  table = sequences.set_blocks(table, rows, columns, adopted, swapped)
  to = ragged.masked(rows, done.is_done, table.max_seqs)
  num_published = table.num_published.at[to].add(1, mode="drop")
  hopeless = ragged.masked(rows, done.is_hopeless, table.max_seqs)
  table = table.replace(
    num_published=num_published,
    num_frozen=jnp.maximum(table.num_frozen, num_published),
    is_sealed=table.is_sealed.at[hopeless].set(True, mode="drop"),
  )
  window_blocks = tuple(
    windows.attach(window, rows, columns, done.block_ids, done.is_done)
    for window in window_blocks
  )
  return Tables(pool, table, index, states, window_blocks)
