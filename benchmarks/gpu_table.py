"""How a run on a GPU is shown and stored."""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path

from benchmarks import report
from benchmarks.gpu_rows import Row
from benchmarks.gpu_targets import missed, PEERS, ratios, verdicts

_NAMES = ("section", "what", "by", "us", "GB/s or TFLOP/s", "of the limit")
_NAMES += (*(f"x {peer}" for peer in PEERS), "error", "targets missed")
_TARGETS = ("target", "verdict", "shapes that meet it", "worst", "where")


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
  """What the table shows of a row."""
  error, found = row.error, ratios(row, rows)
  return [
    *(row.section, row.what, row.by),
    _number(row.microseconds, ".1f"),
    _number(row.rate, ".0f"),
    _number(row.share, ".0%"),
    *(_number(found.get(peer), ".2f") for peer in PEERS),
    f"{error:.1e}" if isinstance(error, float) else str(error or ""),
    "; ".join(missed(row, rows)),
  ]


def line(row: Row) -> str:
  """A line of progress."""
  texts = [text for text in cells(row, ()) if text]
  return "  ".join(["BAD" if row.is_bad else "   ", *texts])


def markdown(rows: Sequence[Row], facts: dict[str, str | bool]) -> str:
  """The targets and all rows."""
  lines = [f"# Kernels on {facts['device']}", ""]
  lines += [f"jax {facts['jax']}, {facts['date']}.", ""]
  lines += [
    "Times are medians on the device, dispatch left out. The limit is the copy"
    " bandwidth or the matmul rate measured in the same run. `x peer` is the peer's"
    " time in ours: above 1 this project is faster.",
    "",
  ]
  lines += _table([_TARGETS, ["---"] * len(_TARGETS)])
  for verdict in verdicts(rows):
    share = f"{verdict.num_met} of {verdict.num}"
    worst = _number(verdict.worst, ".2f")
    lines += _table([[verdict.text, verdict.word, share, worst, verdict.where]])
  lines += ["", *_table([_NAMES, ["---"] * len(_NAMES)])]
  lines += _table([cells(row, rows) for row in rows])
  return "\n".join(lines) + "\n"


def save(rows: Sequence[Row], folder: Path, *, is_dry: bool) -> list[Path]:
  """Writes `<device>.md` and `<device>.json`, and returns their paths."""
  folder.mkdir(parents=True, exist_ok=True)
  facts = report.environment(is_quick=is_dry)
  stem = folder / (f"dry-{facts['device']}" if is_dry else str(facts["device"]))
  paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
  paths[0].write_text(markdown(rows, facts), "utf-8")
  records = [
    dataclasses.asdict(row) | {"ratios": ratios(row, rows), "missed": missed(row, rows)}
    for row in rows
  ]
  targets = [
    dataclasses.asdict(verdict) | {"verdict": verdict.word}
    for verdict in verdicts(rows)
  ]
  data = {"environment": facts, "targets": targets, "rows": records}
  paths[1].write_text(json.dumps(data, indent=2) + "\n", "utf-8")
  return paths


def _number(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(row)} |" for row in rows]
