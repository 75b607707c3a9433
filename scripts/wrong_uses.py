"""Writes docs/wrong_uses.md from tests/hostile: `python -m scripts.wrong_uses`."""

from itertools import groupby
from pathlib import Path
import re

from kvcache import Status
from tests.hostile import files, kernels, requests, rows, settings, verbs
from tests.hostile.table import WrongUse

PATH = Path(__file__).parents[1] / "docs" / "wrong_uses.md"
MODULES = (verbs, rows, settings, requests, kernels, files)
HEADER = """# Wrong uses

What happens when the library is used in ways it was not meant for. Each row is a test;
after each of them the contexts that it was tried on were as before. Written by
`python -m scripts.wrong_uses` from `tests/hostile`.
"""


def every_use() -> list[WrongUse]:
  return [use for module in MODULES for use in module.USES]


def outcome(use: WrongUse) -> str:
  """What the table says of it."""
  said = ""
  if use.raises is not None:
    said = f"`{use.raises.__name__}`: {_plain(use.message)}"
  elif use.note:
    return use.note
  else:
    said = _values(use.gives)
  return f"{said}; {use.note}" if use.note else said


def _plain(message: str) -> str:
  """A regular expression as one reads it."""
  return re.sub(r"\\(.)", r"\1", message).replace(".*", " … ").replace("|", "\\|")


def _values(gives) -> str:
  codes = gives if isinstance(gives, list) else [gives]
  flat = [c for code in codes for c in (code if isinstance(code, list) else [code])]
  if isinstance(gives, int) and not isinstance(gives, bool):
    return str(gives)
  if all(isinstance(c, int) for c in flat):
    names = dict.fromkeys(Status(c).name for c in flat if c)
    return ", ".join(f"`{name}`" for name in names)
  if all(isinstance(c, tuple) for c in flat):
    return ", ".join(
      reason if status == Status.OK else f"{reason}, `{status.name}`"
      for reason, status in dict.fromkeys(flat)
    )
  return str(gives)


def text() -> str:
  parts = [HEADER]
  for area, uses in groupby(every_use(), key=lambda use: use.area):
    parts.append(f"\n## {area}\n\n| what is done | what comes of it |\n|---|---|\n")
    parts += [f"| {use.name} | {outcome(use)} |\n" for use in uses]
  return "".join(parts)


if __name__ == "__main__":
  PATH.write_text(text(), "utf-8")
