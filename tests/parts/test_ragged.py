"""Flat lists of ragged rows, by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.parts import ragged
from tests.fixtures.small import ints

expand = jax.jit(ragged.expand, static_argnums=1)
first_come = jax.jit(ragged.first_come)


def test_rows_lie_end_to_end():
  entries = expand(ints([2, 0, 3, 0]), 7)
  assert entries.rows.tolist() == [0, 0, 2, 2, 2, 0, 0]
  assert entries.offsets.tolist() == [0, 1, 0, 1, 2, 0, 0]
  assert entries.is_valid.tolist() == [True] * 5 + [False] * 2
  assert entries.starts.tolist() == [0, 2, 2, 5]
  assert entries.total == 5


def test_entries_past_the_list_are_cut_off_but_counted():
  entries = expand(ints([0, 9, 0, 4]), 7)
  assert entries.rows.tolist() == [1] * 7
  assert entries.offsets.tolist() == list(range(7))
  assert entries.is_valid.all()
  assert entries.starts.tolist() == [0, 0, 9, 9]
  assert entries.total == 13


def test_no_rows_give_no_entries():
  entries = expand(ints([0, 0, 0, 0]), 7)
  assert not entries.is_valid.any() and entries.total == 0
  assert not entries.rows.any() and not entries.offsets.any()


def test_expand_is_numpy_repeat_for_every_small_case():
  counts = np.stack(np.meshgrid(*[range(4)] * 4), axis=-1).reshape(-1, 4)
  entries = jax.jit(jax.vmap(lambda c: ragged.expand(c, 7)))(ints(counts))
  for row_counts, rows, offsets, is_valid in zip(
    counts,
    np.asarray(entries.rows),
    np.asarray(entries.offsets),
    np.asarray(entries.is_valid),
    strict=True,
  ):
    want = np.repeat(np.arange(4), row_counts)[:7]
    where = np.concatenate([np.arange(num) for num in row_counts])[:7]
    np.testing.assert_array_equal(is_valid, np.arange(7) < want.size)
    np.testing.assert_array_equal(rows[: want.size], want)
    np.testing.assert_array_equal(offsets[: want.size], where)


@pytest.mark.parametrize(
  ("available", "fits"),
  [
    (9, [True, True, True, True]),
    (6, [True, True, True, True]),
    (5, [True, True, True, False]),
    (4, [True, False, True, False]),  # the last one waits though it would fit
    (1, [False, False, True, False]),
    (0, [False, False, True, False]),  # who needs nothing always fits
  ],
)
def test_first_come_first_served(available, fits):
  starts, served = first_come(ints([2, 3, 0, 1]), jnp.int32(available))
  assert starts.tolist() == [0, 2, 5, 5]
  assert served.tolist() == fits


def test_order_says_who_comes_first():
  starts, fits = first_come(ints([2, 3, 0, 1]), jnp.int32(4), order=ints([3, 1, 2, 0]))
  assert starts.tolist() == [4, 1, 4, 0]
  assert fits.tolist() == [False, True, True, True]


def test_ranks_count_who_is_set_before():
  mask = jnp.array([False, True, True, False, True])
  assert ragged.ranks(mask).tolist() == [0, 0, 1, 2, 2]
  assert ragged.sum_int(mask) == 3
  assert ragged.ranks(mask).dtype == ragged.sum_int(mask).dtype == jnp.int32


def test_masked_entries_point_one_past_the_end():
  mask = jnp.array([True, False, True])
  assert ragged.masked(ints([4, 5, 0]), mask, 9).tolist() == [4, 9, 0]


def test_hold_and_read_change_no_value():
  array, index = ints([7, 8, 9]), ints([2, 0])
  assert ragged.hold(array).tolist() == [7, 8, 9]
  assert [x.tolist() for x in ragged.hold(array, index)] == [[7, 8, 9], [2, 0]]
  values, after = ragged.read(array, index)
  assert values.tolist() == [9, 7] and after.tolist() == [7, 8, 9]


@pytest.mark.parametrize("available", range(8))
def test_an_order_that_is_none_gives_away_no_more_than_there_is(available):
  """Rows named twice count twice, rows not named get nothing."""
  need = ints([1, 2, 0, 3])
  for order in np.stack(np.meshgrid(*[range(-1, 5)] * 4), axis=-1).reshape(-1, 4)[::7]:
    _, fits = first_come(need, jnp.int32(available), order=ints(order))
    named = np.isin(np.arange(4), np.where(order < 0, order + 4, order))
    assert np.sum(np.asarray(need)[np.asarray(fits)]) <= available
    assert not np.asarray(fits)[~named & (np.asarray(need) > 0)].any()
