"""Measured rows, and how they are shown and stored."""

from collections.abc import Callable, Iterable
import dataclasses
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import re

import jax

from benchmarks.sizes import Size

_SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One measurement.

  Attributes:
    section: Name of the section.
    what: What was measured.
    sizes: Under which sizes, such as `S=256 N=4096 P=64`.
    value: In `unit`; lower is better unless the unit is a rate.
    unit: `us`, `ms`, `s`, `x`, `%`, `tokens/s`, `operations`, `bytes`, or nothing.
    target: Upper bound that the design sets, in `unit`, or None.
    repeats: Of the measurement.
  """

  section: str
  what: str
  sizes: str
  value: float
  unit: str
  target: float | None = None
  repeats: int = 1

  @property
  def is_met(self) -> bool | None:
    """Whether the target is met; None without one."""
    return None if self.target is None else self.value <= self.target

  def __str__(self) -> str:
    """Returns the row as a line of progress."""
    verdict = {None: "", True: "  ok", False: "  MISSED"}[self.is_met]
    target = "" if self.target is None else f"  (target {_number(self.target)})"
    value = f"{_number(self.value):>8} {self.unit:<10}"
    return f"  {self.what:<44} {self.sizes:<24} {value}{target}{verdict}"


def seconds(value: float, unit: str) -> float:
  """Converts seconds to a unit."""
  return value * _SCALES[unit]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A named group of measurements.

  Attributes:
    name: For `--only`.
    title: For people.
    measure: Yields rows; its argument says how many and how large.
  """

  name: str
  title: str
  measure: Callable[[Size], Iterable[Row]]


def device_name() -> str:
  """A neutral name of the device, such as `cpu-2-cores`."""
  device = jax.devices()[0]
  kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
  return f"{kind}-{os.cpu_count()}-cores" if device.platform == "cpu" else kind


def environment(*, is_quick: bool) -> dict[str, str | bool]:
  """What the numbers depend on."""
  return {
    "device": device_name(),
    "jax": jax.__version__,
    "jaxlib": importlib.metadata.version("jaxlib"),
    "python": platform.python_version(),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "quick": is_quick,
  }


def markdown(rows: Iterable[Row], facts: dict[str, str | bool]) -> str:
  """The rows as tables, a table per section."""
  lines = [f"# Benchmarks on {facts['device']}", ""]
  lines += ["Best of the repeats of each row. " + _sentence(facts), ""]
  sections: dict[str, list[Row]] = {}
  for row in rows:
    sections.setdefault(row.section, []).append(row)
  for title, members in sections.items():
    lines += [
      f"## {title}",
      "",
      "| what | sizes | value | unit | target | met | repeats |",
      "|---|---|---:|---|---:|---|---:|",
    ]
    for row in members:
      target = "" if row.target is None else f"<= {_number(row.target)}"
      met = {None: "", True: "yes", False: "**no**"}[row.is_met]
      lines.append(
        f"| {row.what} | {row.sizes} | {_number(row.value)} | {row.unit} | {target} |"
        f" {met} | {row.repeats} |"
      )
    lines.append("")
  return "\n".join(lines)


def save(rows: list[Row], facts: dict[str, str | bool], folder: Path) -> list[Path]:
  """Writes `<device>.md` and `<device>.json` and returns their paths."""
  folder.mkdir(parents=True, exist_ok=True)
  stem = folder / str(facts["device"])
  table, data = stem.with_suffix(".md"), stem.with_suffix(".json")
  table.write_text(markdown(rows, facts), "utf-8")
  records = [dataclasses.asdict(row) for row in rows]
  text = json.dumps({"environment": facts, "rows": records}, indent=2)
  data.write_text(text + "\n", "utf-8")
  return [table, data]


def _sentence(facts: dict[str, str | bool]) -> str:
  names = {key: value for key, value in facts.items() if not isinstance(value, bool)}
  text = ", ".join(f"{key} {value}" for key, value in names.items() if key != "device")
  return f"{text}{', a quick run' if facts['quick'] else ''}.".capitalize()


def _number(value: float) -> str:
  """Three significant digits, whole numbers from 100 on."""
  if value >= 100 or value == int(value):
    return f"{value:,.0f}"
  return f"{value:.3g}"
