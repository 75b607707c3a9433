"""Small pictures for a terminal: of the block pool, its blocks, and the progress.

Colours and the moving line appear on a terminal that wants them; into a file or a pipe
goes plain text.
"""

from collections.abc import Sequence
import dataclasses
import os
import shutil
from typing import TextIO

import numpy as np

from kvcache.observe import block_map
from kvcache.observe.block_map import BlockMap
from kvcache.observe.palette import Kind, LOOKS

_RESET, _ERASE = "\x1b[0m", "\r\x1b[K"
_COLORS = {
  **{kind.name.lower(): f"\x1b[38;5;{look.ansi}m" for kind, look in LOOKS.items()},
  "used": f"\x1b[38;5;{LOOKS[Kind.EXCLUSIVE].ansi}m",
  "free": "\x1b[2m",
}
_GLYPHS = {"used": "█", "cached": "▒", "free": "·"}
_ASCII_GLYPHS = {"used": "#", "cached": "+", "free": "."}
_GRAPH_WIDTH = 16
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
    """Colours text as `"used"` or as the name of a `Kind`, such as `"cached"`."""
    return f"{_COLORS[kind]}{text}{_RESET}" if self.color and text else text


def is_terminal(stream: TextIO) -> bool:
  """Whether a person looks at the stream as it is written, a notebook's included."""
  if type(stream).__module__.startswith("ipykernel."):
    return True
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


def block_chart(
  found: BlockMap, *, style: Style, height: int = 6, max_rows: int = 8
) -> str:
  """Draws what every block is, one glyph each, and the rows that hold them.

  Where there are more blocks than glyphs, a glyph stands for several and shows what
  most of them are.

  Args:
    found: The map of a context.
    style: What the terminal can show.
    height: Most lines of one pool.
    max_rows: Most rows.
  """
  width = max(16, min(72, style.width - 4))
  lines = []
  for pool in found.pools:
    shown, size = _glyphs_of(pool.kinds[1:], width * height)
    scale = f", {size} to a glyph" if size > 1 else ""
    lines.append(f"{pool.name}: {pool.summary}{scale}")
    lines += [
      "  " + _painted(shown[at : at + width], style)
      for at in range(0, len(shown), width)
    ]
  rows = found.rows[:max_rows]
  most = max((len(found.row_blocks(row)) for row in rows), default=1)
  room = max(8, width - 26)
  for row in rows:
    blocks = found.row_blocks(row)
    # All rows in one scale.
    num = max(1, -(-len(blocks) // block_map.bin_width(most, room)))
    shown, _ = _glyphs_of(found.blocks.kinds[blocks], num)
    lines.append(
      f"  row {row:<4} {found.seq_len(row):>7} tokens  {_painted(shown, style)}"
    )
  more = len(found.rows) - len(rows)
  lines += [f"  and {more} more rows"] if more else []
  present = [kind for kind in LOOKS if any(kind in pool.counts for pool in found.pools)]
  legend = (f"{_painted([kind] * 2, style)} {LOOKS[kind].name}" for kind in present)
  return "\n".join([*lines, "  " + "   ".join(legend)])


def _glyphs_of(kinds: np.ndarray, num: int) -> tuple[list[Kind], int]:
  """The kind that each of at most `num` glyphs shows, and how many blocks it is of."""
  if not kinds.size:
    return [], 1
  shares = block_map.count_bins(kinds, num)
  return [Kind(kind) for kind in shares.argmax(axis=1)], block_map.bin_width(
    kinds.size, num
  )


def _painted(kinds: Sequence[Kind], style: Style) -> str:
  parts = []
  for name, count in _runs([kind.name.lower() for kind in kinds]):
    look = LOOKS[Kind[name.upper()]]
    glyph = look.glyph if style.unicode else look.letter
    parts.append(style.paint(glyph * count, name))
  return "".join(parts)


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
    self._width = 0

  def show(self, text: str) -> None:
    """Replaces the line."""
    if self.enabled:
      width = max(1, shutil.get_terminal_size().columns - 1)
      self._write(text[:width])
      self._width = len(text[:width])

  def clear(self) -> None:
    """Removes the line, so that something else can be written."""
    if self._width:
      self._write("")
      self._width = 0

  def _write(self, text: str) -> None:
    # Notebooks know `\r`, but not how to erase: blanks do it there.
    blanks = " " * (self._width - len(text))
    self.stream.write(f"{_ERASE}{text}{blanks}" + ("" if text else "\r"))
    self.stream.flush()


class RunProgress:
  """How far a run is, on a progress line.

  Attributes:
    samples: How the pool was used after each slice of work.
    times: Tokens generated until then, and seconds.
  """

  def __init__(self, line: ProgressLine, *, num_blocks: int):
    """Starts before the first slice of a pool of `num_blocks` usable blocks."""
    self.line, self.num_blocks = line, num_blocks
    self.samples: list[PoolSample] = []
    self.times: list[tuple[int, float]] = []

  def add(self, sample: PoolSample, *, num_tokens: int, seconds: float) -> None:
    """Takes what is true after a slice."""
    self.samples.append(sample)
    self.times.append((num_tokens, seconds))

  def show(self, *, num_finished: int, num_requests: int) -> None:
    """Shows the line."""
    used = self.samples[-1].used
    recent = [sample.used for sample in self.samples[-_GRAPH_WIDTH:]]
    graph = sparkline(recent, top=self.num_blocks, style=self.line.style)
    self.line.show(
      f"{num_finished}/{num_requests} finished, {self.times[-1][0]} tokens,"
      f" {self.tokens_per_second:.0f} tokens/s,"
      f" blocks {graph} {used}/{self.num_blocks}"
    )

  @property
  def tokens_per_second(self) -> float:
    """Without the first slice, which waits for the compiler."""
    (tokens, seconds), (first_tokens, first_seconds) = self.times[-1], self.times[0]
    if seconds > first_seconds:
      return (tokens - first_tokens) / (seconds - first_seconds)
    return tokens / seconds if seconds else 0.0


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
