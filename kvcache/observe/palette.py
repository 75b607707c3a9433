"""What a block can be, and the colour of each: the same in every picture.

The colours are from the palette of Okabe and Ito, which colour-blind readers tell
apart; the blue of what is shared is also darker than that of what is not.
"""

import dataclasses
import enum


class Kind(enum.IntEnum):
  """What a block, or a row of the state pool, is at one moment."""

  NULL = 0
  """The reserved block 0; no picture shows it."""
  SHARED = 1
  """Held by more than one row."""
  EXCLUSIVE = 2
  """Held by one row."""
  CACHED = 3
  """Held by no row, but found by prompts that begin like it."""
  SNAPSHOT = 4
  """A recurrent state kept at the end of a cached block."""
  LOST = 5
  """None of the others: a leak, which `check_invariants` names."""
  FREE = 6
  """Waiting to be handed out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
  """How one kind is drawn.

  Attributes:
    name: As in a legend.
    color: Of pictures, `#rrggbb`.
    ansi: Of terminals, from their 256 colours.
    glyph: Of terminals that know Unicode.
    letter: Of those that do not.
  """

  name: str
  color: str
  ansi: int
  glyph: str
  letter: str


LOOKS = {
  Kind.SHARED: Look(name="shared", color="#0072b2", ansi=25, glyph="█", letter="@"),
  Kind.EXCLUSIVE: Look(
    name="exclusive", color="#56b4e9", ansi=74, glyph="▓", letter="#"
  ),
  Kind.CACHED: Look(name="cached", color="#e69f00", ansi=178, glyph="▒", letter="+"),
  Kind.SNAPSHOT: Look(
    name="snapshot", color="#cc79a7", ansi=175, glyph="▒", letter="s"
  ),
  Kind.LOST: Look(name="lost", color="#d55e00", ansi=166, glyph="!", letter="!"),
  Kind.FREE: Look(name="free", color="#c8ccd0", ansi=245, glyph="·", letter="."),
}
