"""Status codes of single rows, and the exceptions the host makes from them.

A verb never raises for what can happen to a row at run time (no free row, no free
block, a prompt that is too long): it leaves the row as it was and reports a `Status` as
an int32 value, inside `jax.jit` as outside. `raise_for_status` turns codes into
exceptions at the door.
"""

from collections.abc import Sequence
import enum

from jax.typing import ArrayLike
import numpy as np


class CacheError(Exception):
  """Base class of every exception made from a `Status`."""


class SequenceOverflowError(CacheError):
  """No row of the sequence table was free."""


class BlockOverflowError(CacheError):
  """There were fewer free blocks than needed."""


class WindowOverflowError(BlockOverflowError):
  """There were fewer free blocks than needed in the pool of a sliding window."""


class TokenBudgetError(CacheError):
  """More tokens were asked for than the step's static number of tokens."""


class SequenceTooLongError(CacheError):
  """The sequence can never fit: it exceeds a row's table or the whole pool."""


class EmptySequenceError(CacheError):
  """The sequence has no token."""


class InactiveSequenceError(CacheError):
  """The row named holds no live sequence."""


class InvalidRequestError(CacheError):
  """An argument's value is outside its range, such as a negative count."""


class StateError(CacheError):
  """What the sequence needs where it was to return to is gone: a state or a window."""


class CheckpointError(CacheError):
  """A checkpoint is missing, damaged, or belongs to something else."""


class InvariantError(CacheError, AssertionError):
  """`check_invariants` found a context that no sequence of verbs can make."""


class Status(enum.IntEnum):
  """What became of one row of a call.

  Transient codes may succeed when asked again later, after blocks or rows were freed;
  permanent ones never will. `NO_BLOCKS` says that the context's own pool is short, and
  `evict` may help; `NO_WINDOW_BLOCKS`, that it would have done and a sliding window's
  pool is short, where `publish` and then `evict_window_blocks` may help.
  """

  OK = 0
  NO_ROW = 1
  NO_BLOCKS = 2
  OVER_BUDGET = 3
  TOO_LONG = 4
  EMPTY = 5
  INACTIVE = 6
  INVALID = 7
  NO_STATE = 8
  NO_WINDOW_BLOCKS = 9

  @property
  def is_transient(self) -> bool:
    """Whether asking again later can succeed."""
    return self in _TRANSIENT

  @property
  def is_permanent(self) -> bool:
    """Whether the same request can never succeed."""
    return self is not Status.OK and not self.is_transient


_TRANSIENT = (
  Status.NO_ROW,
  Status.NO_BLOCKS,
  Status.NO_WINDOW_BLOCKS,
  Status.OVER_BUDGET,
)

_EXCEPTIONS: dict[Status, type[CacheError]] = {
  Status.NO_ROW: SequenceOverflowError,
  Status.NO_BLOCKS: BlockOverflowError,
  Status.NO_WINDOW_BLOCKS: WindowOverflowError,
  Status.OVER_BUDGET: TokenBudgetError,
  Status.TOO_LONG: SequenceTooLongError,
  Status.EMPTY: EmptySequenceError,
  Status.INACTIVE: InactiveSequenceError,
  Status.INVALID: InvalidRequestError,
  Status.NO_STATE: StateError,
}


def raise_for_status(
  status: ArrayLike, request_ids: Sequence[object] | None = None
) -> None:
  """Raises the exception of the first row that is not `Status.OK`; returns if all are.

  Call it on the host, outside `jax.jit`.

  Args:
    status: `[...]` int32 codes as verbs return them; `Admission.status`.
    request_ids: Names for the rows in the message; `row 0` and so on if not given.

  Raises:
    ValueError: These are no codes, or there are more or fewer names than rows.
    CacheError: The subclass that belongs to the first failing row's code. The message
      names every failing row.

  Example:
    >>> kv.raise_for_status(jnp.array([0, 1]), ["first", "second"])
    Traceback (most recent call last):
    kvcache.errors.SequenceOverflowError: ...
  """
  codes = np.atleast_1d(np.asarray(status)).ravel()
  if codes.size and codes.dtype.kind not in "iu":
    got = type(status).__name__
    raise ValueError(f"status must be int32 codes, as Admission.status has, got {got}")
  failed = np.flatnonzero(codes != Status.OK)
  if not failed.size:
    return
  names = [f"row {i}" for i in range(codes.size)]
  names = names if request_ids is None else request_ids
  if len(names) != codes.size:
    raise ValueError(f"request_ids has {len(names)} names for {codes.size} rows")
  told = ", ".join(f"{names[i]}: {Status(codes[i]).name}" for i in failed[:8])
  more = f" and {failed.size - 8} more" if failed.size > 8 else ""
  raise _EXCEPTIONS[Status(codes[failed[0]])](f"refused {told}{more}")
