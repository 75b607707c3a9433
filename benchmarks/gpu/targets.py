"""What a GPU should reach, how rows compare with peers, and which targets are met."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

from benchmarks.gpu.rows import IMPLEMENTATIONS, Row

PEERS = {
  "jax": ("jax paged_attention",),
  "cuDNN": ("cuDNN",),
  "FlashInfer": ("FlashInfer", "FlashInfer, NHD pool"),
  "flex": ("flex attention",),
  "NHD": ("triton, NHD pool",),
}
"""Columns of ratios, and who is compared; of several the faster one. NHD is this
project's kernel on another layout."""
_LARGE_BYTES = 64 << 20
_SMALL_BYTES = 16 << 20
"""Keys and values so few that launching rules."""


def is_ours(row: Row) -> bool:
  """Whether a row is a measurement of this project's."""
  return row.microseconds is not None and row.by.split(",")[0] in IMPLEMENTATIONS


def ratios(row: Row, rows: Iterable[Row]) -> dict[str, float]:
  """How many times as long each peer takes for the same thing."""
  if not is_ours(row) or row.microseconds is None:
    return {}
  times = {
    other.by: other.microseconds
    for other in rows
    if (other.section, other.what) == (row.section, row.what)
    and other.by != row.by
    and other.microseconds
  }
  found = {}
  for name, bys in PEERS.items():
    if known := [times[by] for by in bys if by in times]:
      found[name] = min(known) / row.microseconds
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """What rows should reach.

  Attributes:
    text: For people.
    value: Of a row among all rows, or None where the target does not apply.
    bound: Of the value.
    is_least: Whether the bound is a lower one.
  """

  text: str
  value: Callable[[Row, Sequence[Row]], float | None]
  bound: float
  is_least: bool = True

  def is_met(self, value: float) -> bool:
    """Whether a value reaches the bound; NaN does not."""
    return value >= self.bound if self.is_least else value <= self.bound


def _share(section: str, *, least_bytes: int = 0) -> Callable:
  def value(row: Row, rows: Sequence[Row]) -> float | None:
    del rows
    is_meant = row.section == section and _bytes(row) >= least_bytes
    return row.share if is_meant and is_ours(row) else None

  return value


def _bytes(row: Row) -> float:
  """What a call moves, which its rate tells as well."""
  return row.num_bytes or 1e3 * (row.rate or 0.0) * (row.microseconds or 0.0)


def _ratio(peer: str) -> Callable:
  def value(row: Row, rows: Sequence[Row]) -> float | None:
    return ratios(row, rows).get(peer) if row.section == "decode" else None

  return value


def _tiny(row: Row, rows: Sequence[Row]) -> float | None:
  del rows
  is_tiny = row.section == "decode" and (row.num_bytes or 0) < _SMALL_BYTES
  return row.microseconds if is_tiny and is_ours(row) else None


def _evenness(row: Row, rows: Sequence[Row]) -> float | None:
  """Rate of a ragged batch, in that of a uniform one of as many bytes."""
  if row.section != "decode" or not row.what.endswith(", ragged"):
    return None
  for other in rows:
    is_alike = (other.section, other.by) == (row.section, row.by)
    if not is_alike or other.what.endswith(", ragged") or not row.num_bytes:
      continue
    if row.what.split(",")[:2] != other.what.split(",")[:2]:
      continue
    same = abs((other.num_bytes or 0) / row.num_bytes - 1) < 0.02
    if same and row.rate and other.rate and is_ours(row):
      return row.rate / other.rate
  return None


def _prefill(row: Row, rows: Sequence[Row]) -> float | None:
  del rows
  return row.rate if row.section == "prefill" and is_ours(row) else None


def _bookkeeping(row: Row, rows: Sequence[Row]) -> float | None:
  del rows
  is_meant = row.section == "bookkeeping" and row.by.startswith("serve")
  return row.microseconds if is_meant else None


def _check(row: Row, rows: Sequence[Row]) -> float | None:
  """1 for a comparison that failed."""
  del rows
  if row.section != "check" or row.by not in IMPLEMENTATIONS:
    return None
  if isinstance(row.error, str) and not row.is_bad:
    return None  # not served
  return float(row.is_bad)


TARGETS = (
  Target(text="results agree with XLA", value=_check, bound=0.0, is_least=False),
  Target(
    text="decode, 64 MB and more: 90 % of copy bandwidth",
    value=_share("decode", least_bytes=_LARGE_BYTES),
    bound=0.9,
  ),
  Target(text="decode, ragged: 90 % of uniform", value=_evenness, bound=0.9),
  Target(text="decode, tiny: 12 us", value=_tiny, bound=12.0, is_least=False),
  Target(text="decode: 1.0 of FlashInfer", value=_ratio("FlashInfer"), bound=1.0),
  Target(text="decode: 1.0 of cuDNN", value=_ratio("cuDNN"), bound=1.0),
  Target(text="decode: 1.3 of jax", value=_ratio("jax"), bound=1.3),
  Target(text="prefill: 540 TFLOP/s", value=_prefill, bound=540.0),
  Target(
    text="SSD step, 64 MB and more: 85 % of copy bandwidth",
    value=_share("ssd step", least_bytes=_LARGE_BYTES),
    bound=0.85,
  ),
  Target(
    text="bookkeeping of a step: 100 us",
    value=_bookkeeping,
    bound=100.0,
    is_least=False,
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """Whether a target is met.

  Attributes:
    text: The target.
    num_met: Shapes of which the best implementation meets it.
    num: Shapes that were measured.
    worst: The worst of these, or None.
    where: Which shape that is.
  """

  text: str
  num_met: int
  num: int
  worst: float | None
  where: str

  @property
  def word(self) -> str:
    """In a word."""
    if not self.num:
      return "not measured"
    return "met" if self.num_met == self.num else "MISSED"


def missed(row: Row, rows: Sequence[Row]) -> list[str]:
  """Targets that apply to a row and that it misses."""
  pairs = [(target, target.value(row, rows)) for target in TARGETS]
  return [t.text for t, value in pairs if value is not None and not t.is_met(value)]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
  """Judges a run: of each shape the best of this project's implementations counts."""
  found = []
  for target in TARGETS:
    best: dict[str, float] = {}
    better = max if target.is_least else min
    if target.value is _check:
      better = max  # no implementation may be wrong
    for row in rows:
      value = target.value(row, rows)
      if value is not None:
        best[row.what] = better(value, best.get(row.what, value))
    order = sorted(best, key=best.__getitem__, reverse=not target.is_least)
    found.append(
      Verdict(
        text=target.text,
        num_met=sum(map(target.is_met, best.values())),
        num=len(best),
        worst=best[order[0]] if order else None,
        where=order[0] if order else "",
      )
    )
  return found
