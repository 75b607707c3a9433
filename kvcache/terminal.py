"""Small pictures for a terminal: a chart of the block pool, and a line of progress.

Only the standard library is used. Colours and the moving line appear on a terminal that
wants them; into a file or a pipe goes plain text.
"""

from collections.abc import Sequence
import dataclasses
import os
import shutil
from typing import TextIO

_RESET, _ERASE = "\x1b[0m", "\r\x1b[K"
_COLORS = {"used": "\x1b[36m", "cached": "\x1b[33m", "free": "\x1b[2m"}
_GLYPHS = {"used": "█", "cached": "▒", "free": "·"}
_ASCII_GLYPHS = {"used": "#", "cached": "+", "free": "."}
_LEVELS, _ASCII_LEVELS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSample:
  """How the blocks of a pool were used at one moment.

  Attributes:
    step: Model steps until then.
    used: Blocks that some sequence holds.
    cached: Blocks that nobody holds but the prefix index keeps. The rest is free.
  """

  step: int
  used: int
  cached: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """What a stream can show."""

  color: bool = False
  unicode: bool = False
  width: int = 80

  @classmethod
  def of(cls, stream: TextIO) -> "Style":
    """Asks a stream and the environment (`NO_COLOR`, `TERM`, `COLUMNS`)."""
    is_dumb = os.environ.get("TERM") == "dumb"
    return cls(
      color=is_terminal(stream) and not is_dumb and not os.environ.get("NO_COLOR"),
      unicode=_can_encode(stream, "".join(_GLYPHS.values()) + _LEVELS),
      width=shutil.get_terminal_size().columns,
    )

  def paint(self, text: str, kind: str) -> str:
    """Colours text as `"used"`, `"cached"` or `"free"`."""
    return f"{_COLORS[kind]}{text}{_RESET}" if self.color and text else text


def is_terminal(stream: TextIO) -> bool:
  """Whether a person looks at the stream as it is written."""
  return hasattr(stream, "isatty") and stream.isatty()


def pool_chart(
  samples: Sequence[PoolSample],
  *,
  num_blocks: int,
  style: Style,
  height: int = 8,
) -> str:
  """Draws how a pool was split into used, cached and free blocks over the steps.

  Args:
    samples: In order of `step`.
    num_blocks: Usable blocks of the pool: the top of the chart.
    style: What the terminal can show.
    height: Lines of the area.
  """
  glyphs = _GLYPHS if style.unicode else _ASCII_GLYPHS
  last = max((sample.step for sample in samples), default=0)
  margin = len(str(num_blocks)) + 1
  width = max(8, min(72, style.width - margin - 2))
  columns = [_at(samples, (column + 1) * last / width) for column in range(width)]
  axis = ("│", "└", "─") if style.unicode else ("|", "+", "-")
  lines = []
  for row in range(height):
    # A cell shows whose share its middle lies in.
    level = (height - row - 0.5) / height * num_blocks
    kinds = [
      "used" if level < c.used else "cached" if level < c.used + c.cached else "free"
      for c in columns
    ]
    label = num_blocks if row == 0 else ""
    area = "".join(
      style.paint(glyphs[kind] * count, kind) for kind, count in _runs(kinds)
    )
    lines.append(f"{label:>{margin}} {axis[0]}{area}")
  lines.append(f"{0:>{margin}} {axis[1]}{axis[2] * width}")
  end = f"step {last}"
  lines.append(" " * (margin + 2) + "0" + end.rjust(width - 1))
  legend = (f"{style.paint(glyphs[kind] * 2, kind)} {kind}" for kind in _GLYPHS)
  lines.append(" " * (margin + 2) + "   ".join(legend))
  return "\n".join(lines)


def sparkline(values: Sequence[float], *, top: float, style: Style) -> str:
  """Draws one glyph per value, from 0 to `top`."""
  levels = _LEVELS if style.unicode else _ASCII_LEVELS
  steps = len(levels) - 1
  shares = (min(max(value / top, 0.0), 1.0) if top > 0 else 0.0 for value in values)
  return "".join(levels[round(share * steps)] for share in shares)


class ProgressLine:
  """One line that is written over again; silent where nobody looks at it."""

  def __init__(self, stream: TextIO, *, enabled: bool = True):
    """Starts without a line."""
    self.stream = stream
    self.style = Style.of(stream)
    self.enabled = enabled and is_terminal(stream)
    self._is_shown = False

  def show(self, text: str) -> None:
    """Replaces the line."""
    if self.enabled:
      width = max(1, shutil.get_terminal_size().columns - 1)
      self.stream.write(_ERASE + text[:width])
      self.stream.flush()
      self._is_shown = True

  def clear(self) -> None:
    """Removes the line, so that something else can be written."""
    if self._is_shown:
      self.stream.write(_ERASE)
      self.stream.flush()
      self._is_shown = False


def _at(samples: Sequence[PoolSample], step: float) -> PoolSample:
  """Returns the first sample at a step or later; without one the pool is empty."""
  empty = PoolSample(step=0, used=0, cached=0)
  return next((sample for sample in samples if sample.step >= step), empty)


def _runs(kinds: Sequence[str]) -> list[tuple[str, int]]:
  """Groups equal neighbours: `[a, a, b] -> [(a, 2), (b, 1)]`."""
  runs: list[tuple[str, int]] = []
  for kind in kinds:
    if runs and runs[-1][0] == kind:
      runs[-1] = (kind, runs[-1][1] + 1)
    else:
      runs.append((kind, 1))
  return runs


def _can_encode(stream: TextIO, text: str) -> bool:
  try:
    text.encode(getattr(stream, "encoding", None) or "ascii")
  except (UnicodeEncodeError, LookupError):
    return False
  return True
