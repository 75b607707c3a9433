"""SequenceTable: rows are taken, filled, and emptied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.parts import sequences
from tests.fixtures.small import ints

inactive_rows = jax.jit(sequences.inactive_rows, static_argnums=1)
start = jax.jit(sequences.start)
set_blocks = jax.jit(sequences.set_blocks)
clear = jax.jit(sequences.clear)


def begin(table, rows):
  """Two sequences with two and one blocks, in the rows given."""
  return start(
    table,
    ints(rows),
    block_ids=ints([[5, 6, 9], [7, 9, 9]]),  # 9: past the row's blocks
    num_blocks=ints([2, 1]),
    seq_lens=ints([8, 4]),
    namespaces=ints([0, -3]),
    num_published=ints([2, 1]),
    num_frozen=ints([2, 1]),
    is_sealed=jnp.array([False, True]),
  )


def assert_same(a, b):
  for field in dataclasses.fields(a):
    np.testing.assert_array_equal(
      getattr(a, field.name), getattr(b, field.name), err_msg=field.name
    )


@pytest.fixture
def table():
  """Five rows of four columns; rows 1 and 3 are live."""
  return begin(sequences.init(5, 4), [3, 1])


def test_rows_are_empty_at_first():
  table = sequences.init(5, 4)
  assert (table.max_seqs, table.max_blocks_per_seq) == (5, 4)
  assert not any(leaf.any() for leaf in jax.tree.leaves(table))
  assert inactive_rows(table, 3).tolist() == [0, 1, 2]


def test_sequences_start_in_the_rows_given(table):
  assert table.block_tables.tolist() == [
    [0, 0, 0, 0],
    [7, 0, 0, 0],
    [0, 0, 0, 0],
    [5, 6, 0, 0],
    [0, 0, 0, 0],
  ]
  assert table.num_blocks.tolist() == [0, 1, 0, 2, 0]
  assert table.seq_lens.tolist() == [0, 4, 0, 8, 0]
  assert table.is_active.tolist() == [False, True, False, True, False]
  assert table.num_published.tolist() == [0, 1, 0, 2, 0]
  assert table.num_frozen.tolist() == [0, 1, 0, 2, 0]
  assert table.is_sealed.tolist() == [False, True, False, False, False]
  assert table.namespaces.tolist() == [0, -3, 0, 0, 0]


def test_one_past_the_last_row_starts_nothing(table):
  assert_same(begin(table, [5, 5]), table)


@pytest.mark.parametrize(
  ("num", "rows"), [(0, []), (1, [0]), (3, [0, 2, 4]), (6, [0, 2, 4, 5, 5, 5])]
)
def test_the_lowest_inactive_rows_come_first(table, num, rows):
  assert inactive_rows(table, num).tolist() == rows


def test_no_row_is_inactive_when_all_are_live(table):
  full = table.replace(is_active=jnp.ones(5, bool))
  assert inactive_rows(full, 3).tolist() == [5, 5, 5]


def test_set_blocks_writes_where_the_mask_is_set(table):
  mask = jnp.array([True, False, True, True])
  rows, columns, ids = ints([3, 3, 1, 1]), ints([2, 3, 1, 0]), ints([8, 9, 4, 2])
  after = set_blocks(table, rows, columns, ids, mask)
  assert after.block_tables[1].tolist() == [2, 4, 0, 0]
  assert after.block_tables[3].tolist() == [5, 6, 8, 0]
  assert_same(after.replace(block_tables=table.block_tables), table)


def test_cleared_rows_are_as_at_first(table):
  no_blocks = table.replace(
    block_tables=table.block_tables.at[1].set(0),
    num_blocks=table.num_blocks.at[1].set(0),
  )
  after = clear(no_blocks, jnp.array([True, True, False, False, False]))
  assert not any(leaf[jnp.arange(3)].any() for leaf in jax.tree.leaves(after))
  for field in dataclasses.fields(table):
    new, old = (getattr(t, field.name)[3] for t in (after, table))
    np.testing.assert_array_equal(new, old, err_msg=field.name)


def test_sizes_are_those_of_each_context_of_a_batch():
  table = sequences.init(4, 6)
  batch = jax.tree.map(lambda x: jnp.stack([x] * 3), table)
  assert (batch.max_seqs, batch.max_blocks_per_seq) == (4, 6)
