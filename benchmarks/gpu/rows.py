"""Rows of a run on a GPU, and what the sections of a run have in common."""

from collections.abc import Callable, Iterator
import dataclasses
import traceback

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.watch import Begun, Send
from pallas_kernels.choice import NotServedError

IMPLEMENTATIONS = ("triton", "mosaic")
"""Of this project, as opposed to peers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the table; what does not apply is None.

  Attributes:
    section: Name of the section.
    what: The shape. Rows of a section that agree in it are compared.
    by: Which implementation.
    error: Largest difference from XLA in float32, or why there is no number.
    microseconds: Per call on the device.
    rate: GB/s, or TFLOP/s of `prefill` and the matmul.
    share: Of the measured copy bandwidth, or of the measured matmul rate; of the step
      in `serve`.
    num_bytes: Of the keys and values, or states, that a call reads.
    is_bad: Whether the run is to end with an error.
    details: Where an exception came from.
  """

  section: str
  what: str
  by: str
  error: float | str | None = None
  microseconds: float | None = None
  rate: float | None = None
  share: float | None = None
  num_bytes: int | None = None
  is_bad: bool = False
  details: str | None = None

  @property
  def key(self) -> tuple[str, str, str]:
    """What a later row of the same measurement has too."""
    return self.section, self.what, self.by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What sections know of the run they are part of.

  Attributes:
    sizes: How large it is.
    interpret: Whether kernels are interpreted, on any device.
    rows: All rows so far.
    lost: `(section, by)` that took a process down, and are not tried again.
    is_careful: Whether programs are compiled one at a time, so that one that takes the
      process down is known.
    send: Tells those who watch what is about to run.
  """

  sizes: Sizes
  interpret: bool
  rows: list[Row] = dataclasses.field(default_factory=list)
  lost: frozenset[tuple[str, str]] = frozenset()
  is_careful: bool = False
  send: Send = lambda message: None

  def wants(self, section: str, what: str, by: str) -> bool:
    """Whether something is yet to be measured, and worth the risk."""
    is_known = any(row.key == (section, what, by) for row in self.rows)
    return not is_known and (section, by) not in self.lost

  def begin(self, section: str, what: str, by: str, *, seconds: float = 30.0) -> None:
    """Says that something is about to run, and takes so long at the most."""
    self.send(Begun(name=(section, what, by), seconds=seconds))

  def begin_to_compile(self, section: str, what: str, by: str) -> None:
    """The same of a program, where programs are compiled one at a time."""
    if self.is_careful:
      self.begin(section, what, by, seconds=120.0)

  @property
  def implementations(self) -> tuple[str, ...]:
    """What is compared and timed; Mosaic has an interpreter of its own, and tests."""
    return tuple(
      by for by in IMPLEMENTATIONS if not (self.interpret and by == "mosaic")
    )

  def share_of(self, what: str, rate: float) -> float | None:
    """Share of a rate of the device (`copy` or `matmul`), if that was measured."""
    for row in self.rows:
      if row.section == "device" and row.what.startswith(what) and row.rate:
        return rate / row.rate
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A named part of a run.

  Attributes:
    name: For `--only`, and of its rows.
    measure: Yields rows as they come.
    seconds: It is not worth starting with less time than that.
  """

  name: str
  measure: Callable[[Run], Iterator[Row]]
  seconds: float = 10.0


def failed(
  section: str, what: str, by: str, problem: Exception, *, is_bad: bool = True
) -> Row:
  """A row without a number; that something is not served is no failure."""
  details = None
  if isinstance(problem, NotServedError):
    text, is_bad = f"not served: {problem}", False
  else:
    details = "".join(traceback.format_exception(problem))
    text = f"{type(problem).__name__}: {problem}".replace("\n", " ").replace("|", "/")
  return Row(
    section=section,
    what=what,
    by=by,
    error=text[:200],
    is_bad=is_bad,
    details=details,
  )
