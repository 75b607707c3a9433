"""How large a run is."""

import enum


class Size(enum.Enum):
  """Each section says what it measures at each of them."""

  FULL = "full"
  """All sizes, for the table that is kept."""
  QUICK = "quick"
  """The sizes that targets are about, and few repeats: some minutes in all."""
  TINY = "tiny"
  """As little as goes through everything. The numbers mean nothing."""
