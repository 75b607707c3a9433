"""What the oracle's tables are made of: blocks, rows and the tokens of a step."""

from __future__ import annotations

import dataclasses

Prefix = tuple[int, tuple[int, ...]]
"""A namespace and all tokens up to the end of a block."""


@dataclasses.dataclass(eq=False)
class Snapshot:
  """A recurrent state that is kept at the end of a block."""


@dataclasses.dataclass(eq=False)
class Block:
  """One block that is not free."""

  serial: int
  refs: int = 1
  prefix: Prefix | None = None  # its key in the index, None if it is not cached
  snapshot: Snapshot | None = None  # of the recurrent state at its end


@dataclasses.dataclass(eq=False)
class Row:
  """One row of the sequence table."""

  active: bool = False
  namespace: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  blocks: list[Block] = dataclasses.field(default_factory=list)
  num_published: int = 0
  num_frozen: int = 0  # leading blocks that are published, or shared with a fork
  is_sealed: bool = False  # publishes no more, because the index had no place
  wanted_len: int = 0  # where a snapshot is wanted besides the regular ones
  reads: Snapshot | None = None  # the snapshot that the next step starts from


@dataclasses.dataclass(frozen=True)
class Query:
  """One token of a step: its place in the step, its row, its place in the row."""

  index: int
  row: int
  position: int
