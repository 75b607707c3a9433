"""What changed between two contexts, for people and for tests."""

import dataclasses
from html import escape

import numpy as np

from kvcache.context import Context
from kvcache.observe import block_map
from kvcache.observe.block_map import BlockMap
from kvcache.observe.measures import index_events
from kvcache.observe.palette import Kind, LOOKS
from kvcache.printing import count

_MAX_LISTED = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """What changed from one context to a later one.

  Attributes:
    admitted: Rows that hold a sequence which was not there before -> its tokens.
    finished: Rows whose sequence is gone -> the tokens it had. A row that holds another
      sequence now is in both.
    grown: Rows whose sequence got longer -> tokens before and after.
    shrunk: Rows whose sequence was rewound -> tokens before and after.
    moved: `(pool, kind before, kind after)` -> ids of the blocks, or states, that
      became something else.
    stored: Blocks that entered the prefix index.
    removed: Blocks whose prefix left it, by eviction or because they were given up.
  """

  admitted: dict[int, int]
  finished: dict[int, int]
  grown: dict[int, tuple[int, int]]
  shrunk: dict[int, tuple[int, int]]
  moved: dict[tuple[str, Kind, Kind], list[int]]
  stored: list[int]
  removed: list[int]

  @property
  def is_empty(self) -> bool:
    """Whether nothing changed."""
    return not any(dataclasses.astuple(self))

  def lines(self) -> list[tuple[str, str]]:
    """What changed and how, a line each, as `(what, how)`."""
    found = [
      ("admitted", _rows({row: count(n, "token") for row, n in self.admitted.items()})),
      ("finished", _rows({row: count(n, "token") for row, n in self.finished.items()})),
      ("grown", _rows({row: f"{a} to {b}" for row, (a, b) in self.grown.items()})),
      ("shrunk", _rows({row: f"{a} to {b}" for row, (a, b) in self.shrunk.items()})),
      *(
        (f"{pool}: {LOOKS[old].name} to {LOOKS[new].name}", _ids(ids))
        for (pool, old, new), ids in self.moved.items()
      ),
      ("index: stored", _ids(self.stored)),
      ("index: removed", _ids(self.removed)),
    ]
    return [(what, how) for what, how in found if how]

  def __repr__(self) -> str:
    lines = [f"  {what}: {how}" for what, how in self.lines()]
    return "\n".join(["Difference", *(lines or ["  nothing changed"])])

  def _repr_html_(self) -> str:
    lines = self.lines() or [("nothing changed", "")]
    style = "text-align:left;padding:1px 10px 1px 0;vertical-align:top"
    rows = (
      f'<tr><th style="{style}">{escape(what)}</th>'
      f'<td style="{style}">{escape(how)}</td></tr>'
      for what, how in lines
    )
    return f"<table>{''.join(rows)}</table>"


def diff(before: Context | BlockMap, after: Context | BlockMap) -> Difference:
  """Computes what changed between two contexts of one configuration.

  A context that is donated is gone: take its `map_blocks` before.

  Args:
    before: An earlier context or its map.
    after: A later one.

  Raises:
    ValueError: The configurations differ, or a context cannot be read on the host.
  """
  old, new = block_map.as_block_map(before), block_map.as_block_map(after)
  if old.config != new.config:
    raise ValueError("before and after have different configurations")
  was, now = set(old.rows), set(new.rows)
  stayed = {row for row in was & now if _is_same(old, new, row)}
  lens = {row: (old.seq_len(row), new.seq_len(row)) for row in sorted(stayed)}
  changes = index_events(old.tables.prefix, new.tables.prefix)
  return Difference(
    admitted={row: new.seq_len(row) for row in sorted(now - stayed)},
    finished={row: old.seq_len(row) for row in sorted(was - stayed)},
    grown={row: (a, b) for row, (a, b) in lens.items() if b > a},
    shrunk={row: (a, b) for row, (a, b) in lens.items() if b < a},
    moved=_moved(old, new),
    stored=np.flatnonzero(changes.stored).tolist(),
    removed=np.flatnonzero(changes.removed).tolist(),
  )


def _is_same(old: BlockMap, new: BlockMap, row: int) -> bool:
  """Whether a row's sequence goes on: it begins with the same tokens."""
  first, second = old.tables.sequences, new.tables.sequences
  if first.namespaces[row] != second.namespaces[row]:
    return False
  before, after = old.row_tokens(row), new.row_tokens(row)
  num = min(before.size, after.size)
  if not num:  # a row that lost every token is a new one, not yet computed
    return not before.size
  return bool(np.array_equal(before[:num], after[:num]))


def _moved(old: BlockMap, new: BlockMap) -> dict[tuple[str, Kind, Kind], list[int]]:
  found = {}
  for first, second in zip(old.pools, new.pools, strict=True):
    pairs = first.kinds.astype(np.int32) * len(Kind) + second.kinds
    changed = first.kinds != second.kinds
    for pair in np.unique(pairs[changed]).tolist():
      kinds = Kind(pair // len(Kind)), Kind(pair % len(Kind))
      ids = np.flatnonzero(changed & (pairs == pair)).tolist()
      found[first.name, *kinds] = ids
  return found


def _rows(rows: dict[int, str]) -> str:
  listed = [f"row {row} ({text})" for row, text in list(rows.items())[:_MAX_LISTED]]
  more = len(rows) - len(listed)
  return ", ".join(listed) + (f" and {more} more" if more > 0 else "")


def _ids(ids: list[int]) -> str:
  """`[1, 2, 3, 7]` -> `"4 (1-3 7)"`."""
  if not ids:
    return ""
  cuts = np.flatnonzero(np.diff(ids) != 1) + 1
  runs = [
    f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}"
    for run in np.split(np.array(ids), cuts)
  ]
  more = " ..." if len(runs) > _MAX_LISTED else ""
  return f"{len(ids)} ({' '.join(runs[:_MAX_LISTED])}{more})"
