"""How a run on a GPU is shown and stored."""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row
from benchmarks.gpu.targets import missed, PEERS, ratios, verdicts

_NAMES = ("section", "what", "by", "us", "GB/s or TFLOP/s", "of the limit")
_NAMES += (*(f"x {peer}" for peer in PEERS), "error", "targets missed")
_TARGETS = ("target", "verdict", "shapes that meet it", "worst", "where")


Facts = dict[str, str | bool]


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


def markdown(rows: Sequence[Row], facts: Facts) -> str:
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


def save(rows: Sequence[Row], folder: Path, facts: Facts) -> list[Path]:
  """Writes `<device>.md` and `<device>.json`, and returns their paths."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [_path(folder, facts, suffix) for suffix in ("md", "json")]
  records = [
    dataclasses.asdict(row) | {"ratios": ratios(row, rows), "missed": missed(row, rows)}
    for row in rows
  ]
  targets = [
    dataclasses.asdict(verdict) | {"verdict": verdict.word}
    for verdict in verdicts(rows)
  ]
  data = {"environment": facts, "targets": targets, "rows": records}
  text = json.dumps(_without_nan(data), indent=2, allow_nan=False) + "\n"
  for path, content in zip(paths, (markdown(rows, facts), text), strict=True):
    part = path.with_suffix(".part")
    part.write_text(content, "utf-8")
    os.replace(part, path)  # A run that is cut off leaves a whole file.
  return paths


def load(folder: Path, facts: Facts) -> list[Row]:
  """The rows of an earlier run with the same device and jax; none without one."""
  path = _path(folder, facts, "json")
  if not path.exists():
    return []
  data = json.loads(path.read_text("utf-8"))
  if any(data["environment"].get(name) != facts[name] for name in ("device", "jax")):
    return []
  names = [field.name for field in dataclasses.fields(Row)]
  return [Row(**{name: row.get(name) for name in names}) for row in data["rows"]]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
  """Old rows and new ones; of the same measurement the last."""
  return list({row.key: row for row in (*old, *new)}.values())


def _path(folder: Path, facts: Facts, suffix: str) -> Path:
  name = f"dry-{facts['device']}" if facts["quick"] else facts["device"]
  return folder / f"{name}.{suffix}"


def _without_nan(value: Any) -> Any:
  """JSON has no NaN and no infinity: they become text."""
  if isinstance(value, dict):
    return {name: _without_nan(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(x) for x in value]
  is_odd = isinstance(value, float) and not math.isfinite(value)
  return str(value) if is_odd else value


def _number(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(row)} |" for row in rows]
