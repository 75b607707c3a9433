"""StepMetadata: both layouts of one small table, drawn by hand.

Blocks of four tokens, twelve blocks. Row 0 holds 6 tokens in blocks 3 and 5, row 1 is
inactive, row 2 holds 4 tokens in block 7 and has block 2 reserved, row 3 is full.
"""

import jax
import numpy as np
import pytest

from kvcache.parts import sequences
from kvcache.verbs import metadata
from tests.fixtures.small import ints

PADDING = 12 * 4

build = jax.jit(
  metadata.build, static_argnames=("num_tokens", "num_blocks", "block_size")
)


@pytest.fixture
def table():
  return sequences.init(4, 3).replace(
    block_tables=ints([[3, 5, 0], [0, 0, 0], [7, 2, 0], [9, 8, 0]]),
    num_blocks=ints([2, 0, 2, 2]),
    seq_lens=ints([6, 0, 4, 8]),
  )


def fields(meta):
  names = "seq_ids positions slot_mapping query_lens seq_lens cu_seqlens is_padding"
  return {name: np.asarray(getattr(meta, name)).tolist() for name in names.split()}


def make(table, query_lens, num_tokens):
  return build(
    table, ints(query_lens), num_tokens=num_tokens, num_blocks=12, block_size=4
  )


def test_packed_tokens_lie_end_to_end(table):
  meta = make(table, [1, 0, 3, 0], 6)
  assert fields(meta) == {
    "seq_ids": [0, 2, 2, 2, 0, 0],
    "positions": [6, 4, 5, 6, 0, 0],
    # Block 5 offset 2, then block 2 from offset 0 on.
    "slot_mapping": [22, 8, 9, 10, PADDING, PADDING],
    "query_lens": [1, 0, 3, 0],
    "seq_lens": [7, 0, 7, 0],
    "cu_seqlens": [0, 1, 1, 4, 4],
    "is_padding": [False] * 4 + [True] * 2,
  }
  assert meta.logits_indices[0] == 0 and meta.logits_indices[2] == 3
  assert meta.num_tokens == 6 and not meta.is_decode
  np.testing.assert_array_equal(meta.block_tables, table.block_tables)


def test_a_decode_step_leaves_gaps(table):
  meta = make(table, [1, 0, 1, 0], None)
  assert fields(meta) == {
    "seq_ids": [0, 1, 2, 3],
    "positions": [6, 0, 4, 8],
    "slot_mapping": [22, PADDING, 8, PADDING],
    "query_lens": [1, 0, 1, 0],
    "seq_lens": [7, 0, 5, 0],
    "cu_seqlens": [0, 1, 2, 3, 4],
    "is_padding": [False, True, False, True],
  }
  assert meta.logits_indices.tolist() == [0, 1, 2, 3]
  assert meta.num_tokens == 4 and meta.is_decode


@pytest.mark.parametrize(
  ("asked", "given"),
  [
    ([9, 9, 0, 0], [2, 0, 0, 0]),  # as much as the blocks hold; inactive rows nothing
    ([-1, -5, 4, 1], [0, 0, 4, 0]),  # nothing for negative numbers or full rows
    ([2, 2, 9, 9], [2, 0, 4, 0]),
    ([2**31 - 1, 0, -(2**31), 0], [2, 0, 0, 0]),
  ],
)
def test_rows_get_no_more_than_they_have_room_for(table, asked, given):
  meta = make(table, asked, 6)
  assert meta.query_lens.tolist() == given
  assert meta.cu_seqlens[-1] == sum(given)
  after = [n + q if q else 0 for n, q in zip([6, 0, 4, 8], given, strict=True)]
  assert meta.seq_lens.tolist() == after


def test_tokens_past_the_step_are_cut_off(table):
  meta = make(table, [2, 0, 4, 0], 3)
  assert fields(meta) == {
    "seq_ids": [0, 0, 2],
    "positions": [6, 7, 4],
    "slot_mapping": [22, 23, 8],
    "query_lens": [2, 0, 1, 0],
    "seq_lens": [8, 0, 5, 0],
    "cu_seqlens": [0, 2, 2, 3, 3],
    "is_padding": [False] * 3,
  }
  assert meta.logits_indices[0] == 1 and meta.logits_indices[2] == 2


def test_a_row_wholly_past_the_step_is_not_in_it(table):
  meta = make(table, [2, 0, 4, 0], 2)
  assert meta.query_lens.tolist() == [2, 0, 0, 0]
  assert meta.seq_lens.tolist() == [8, 0, 0, 0]
  assert meta.cu_seqlens.tolist() == [0, 2, 2, 2, 2]


def test_a_decode_step_has_one_token_for_each_row(table):
  meta = make(table, [2, 1, 4, 1], None)
  assert meta.query_lens.tolist() == [1, 0, 1, 0]
  assert meta.slot_mapping.tolist() == [22, PADDING, 8, PADDING]


@pytest.mark.parametrize("num_tokens", [None, 6])
def test_an_empty_step_is_all_padding(table, num_tokens):
  meta = make(table, [0, 0, 0, 0], num_tokens)
  assert meta.is_padding.all()
  assert (meta.slot_mapping == PADDING).all()
  assert not meta.seq_lens.any()
  in_range = (meta.logits_indices >= 0) & (meta.logits_indices < meta.num_tokens)
  assert in_range.all()
