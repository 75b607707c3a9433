"""Status codes and the exceptions made from them."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvcache import CacheError, errors, raise_for_status, Status

EXCEPTIONS = {
  Status.NO_ROW: errors.SequenceOverflowError,
  Status.NO_BLOCKS: errors.BlockOverflowError,
  Status.OVER_BUDGET: errors.TokenBudgetError,
  Status.TOO_LONG: errors.SequenceTooLongError,
  Status.EMPTY: errors.EmptySequenceError,
  Status.INACTIVE: errors.InactiveSequenceError,
  Status.INVALID: errors.InvalidRequestError,
  Status.NO_STATE: errors.StateError,
  Status.NO_WINDOW_BLOCKS: errors.WindowOverflowError,
}


def test_ok_is_zero_and_neither_transient_nor_permanent():
  assert Status.OK == 0
  assert not Status.OK.is_transient and not Status.OK.is_permanent


def test_every_other_code_is_transient_or_permanent():
  transient = {Status.NO_ROW, Status.NO_BLOCKS, Status.NO_WINDOW_BLOCKS}
  transient |= {Status.OVER_BUDGET}
  assert {status for status in Status if status.is_transient} == transient
  assert {status for status in Status if status.is_permanent} == (
    set(Status) - transient - {Status.OK}
  )


@pytest.mark.parametrize("status", [s for s in Status if s != Status.OK])
def test_every_code_has_its_own_exception(status):
  with pytest.raises(CacheError, match=f"refused row 0: {status.name}$") as raised:
    raise_for_status(jnp.array([status]))
  assert raised.type is EXCEPTIONS[status]
  assert len(set(EXCEPTIONS.values())) == len(Status) - 1


@pytest.mark.parametrize("status", [[], [0], np.zeros(5, np.int32), 0, np.int32(0)])
def test_nothing_is_raised_if_every_row_is_served(status):
  assert raise_for_status(status) is None


def test_the_first_failure_decides_and_all_are_told():
  status = jnp.array([0, Status.NO_BLOCKS, 0, Status.EMPTY], jnp.int32)
  with pytest.raises(
    errors.BlockOverflowError, match=r"^refused row 1: NO_BLOCKS, row 3: EMPTY$"
  ):
    raise_for_status(status)


def test_rows_are_told_by_their_names():
  with pytest.raises(
    errors.SequenceOverflowError, match=r"^refused b: NO_ROW, c: INVALID$"
  ):
    raise_for_status([0, 1, 7], ["a", "b", "c"])


def test_long_lists_are_cut_short():
  with pytest.raises(errors.EmptySequenceError) as raised:
    raise_for_status([Status.EMPTY] * 10)
  assert str(raised.value).endswith("7: EMPTY and 2 more")


def test_a_single_code_counts_as_one_row():
  with pytest.raises(errors.SequenceTooLongError, match="0: TOO_LONG"):
    raise_for_status(Status.TOO_LONG)


def test_an_invariant_error_is_a_cache_error_and_an_assertion_error():
  assert issubclass(errors.InvariantError, CacheError)
  assert issubclass(errors.InvariantError, AssertionError)
