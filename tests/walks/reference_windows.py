"""The oracle of sliding windows: what is kept of them, in plain Python.

One `ReferenceWindow` beside the blocks of `ReferenceCache`: of each row the columns it
holds, of each cached block the one that is attached to it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class WindowBlock:
  """One block that is not free."""

  refs: int = 1
  owner: object = None  # the cached block that it is attached to


class ReferenceWindow:
  """The pool of one sliding window; each row is a dict from column to block."""

  def __init__(self, *, sliding_window, num_blocks, block_size, max_seqs, seen):
    self.sliding_window = sliding_window
    self.block_size = block_size
    self.num_usable = num_blocks - 1
    self.seen = seen
    self.reset(max_seqs)

  def reset(self, max_seqs):
    self.rows: list[dict[int, WindowBlock]] = [{} for _ in range(max_seqs)]
    self.valid_from = [0] * max_seqs  # an imported row brings no more than it needs
    self.attached: dict[object, WindowBlock] = {}
    self.lru: list[WindowBlock] = []  # front first: the next to be evicted
    self.num_free = self.num_usable

  # Views.

  def first_needed(self, length):
    """The first column that the token after this length sees."""
    return self.first_seen(length) // self.block_size

  def first_seen(self, length):
    """The first position that the token after this length sees."""
    return max(length - self.sliding_window + 1, 0)

  def columns_needed(self, length):
    """Those columns that hold a token which the next one sees."""
    return range(self.first_needed(length), -(-length // self.block_size))

  def behind(self, s, length):
    """Columns of a row that its next token does not see."""
    return sorted(c for c in self.rows[s] if c < self.first_needed(length))

  def recycles(self, s, length):
    """Whether a row can write over its oldest block."""
    behind = self.behind(s, length)
    return bool(behind) and self._is_loose(self.rows[s][behind[0]])

  def _is_loose(self, block):
    return block.refs == 1 and block.owner is None

  def may_end(self, blocks, end):
    """Whether a hit on the first `end` of these cached blocks can go on."""
    needed = self.columns_needed(end * self.block_size)
    return all(blocks[column] in self.attached for column in needed)

  # One block.

  def _allocate(self):
    assert self.num_free > 0
    self.num_free -= 1
    return WindowBlock()

  def _hold(self, block):
    if block.refs == 0:
      self.lru.remove(block)
    block.refs += 1
    return block

  def _release(self, block):
    block.refs -= 1
    assert block.refs >= 0
    if block.refs == 0 and block.owner is not None:
      self.lru.append(block)
    elif block.refs == 0:
      self.num_free += 1

  # What verbs do.

  def start(self, s, hits):
    """A row adopts what its prefix hit needs."""
    needed = self.columns_needed(len(hits) * self.block_size)
    self.rows[s] = {c: self._hold(self.attached[hits[c]]) for c in needed}

  def grow(self, s, columns, *, recycles=False):
    """A row gets blocks for new columns; in a decode step maybe its own oldest."""
    for column in columns:
      if recycles:
        oldest = min(self.rows[s])
        self.rows[s][column] = self.rows[s].pop(oldest)
        self.seen["window block recycled"] += 1
      else:
        self.rows[s][column] = self._allocate()

  def begin(self, s, length):
    """A row is imported: it gets blocks for what its next token sees."""
    self.grow(s, self.columns_needed(length))
    self.valid_from[s] = self.first_seen(length)

  def attach(self, s, column, owner):
    """Publishing: a cached block gets the row's block, if it has none."""
    block = self.rows[s].get(column)
    is_whole = column * self.block_size >= self.valid_from[s]
    if block is not None and is_whole and not (block.owner or owner in self.attached):
      block.owner = owner
      self.attached[owner] = block
      self.seen["window block attached"] += 1

  def trim(self, lengths):
    """Rows let go of what is behind their window."""
    for s, length in enumerate(lengths):
      for column in self.behind(s, length):
        self._release(self.rows[s].pop(column))
        self.seen["window moved on"] += 1

  def shorten(self, s, num_kept):
    """A row lets go of the columns from `num_kept` on."""
    for column in sorted(c for c in self.rows[s] if c >= num_kept):
      self._release(self.rows[s].pop(column))
    if num_kept == 0:
      self.valid_from[s] = 0

  def detach(self, owner):
    """A cached block is gone, and what was attached to it."""
    block = self.attached.pop(owner, None)
    if block is not None:
      assert block.refs == 0
      self.lru.remove(block)
      self.num_free += 1

  def evict(self, count):
    """Frees the least recently used; returns their number."""
    count = min(max(count, 0), len(self.lru))
    victims, self.lru = self.lru[:count], self.lru[count:]
    for block in victims:
      del self.attached[block.owner]
    self.num_free += count
    self.seen["window block evicted alone"] += count
    return count

  def fork(self, source, s, *, num_full, copies):
    """A row shares the full blocks of another, and copies the partial one."""
    held = self.rows[source].items()
    self.valid_from[s] = self.valid_from[source]
    self.rows[s] = {c: self._hold(block) for c, block in held if c < num_full}
    if copies:
      self.rows[s][num_full] = self._allocate()

  def can_return(self, s, length, blocks):
    """Whether all that a row of this length needs is held or attached."""
    first = self.first_seen(length)
    return (first >= self.valid_from[s] or first == length) and all(
      c in self.rows[s] or blocks[c] in self.attached
      for c in self.columns_needed(length)
    )

  def must_copy(self, s, length, blocks):
    """Whether the block that a row of this length would write is not its own."""
    if length % self.block_size == 0:
      return False
    column = length // self.block_size
    block = self.rows[s].get(column)
    return block is None or not self._is_loose(block)

  def go_back(self, s, length, blocks, *, copy):
    """A row returns to a shorter length; `copy` was taken for its partial block."""
    num_kept = -(-length // self.block_size) - (copy is not None)
    for column in self.columns_needed(length):
      if column not in self.rows[s] and column < num_kept:
        self.rows[s][column] = self._hold(self.attached[blocks[column]])
        self.seen["window block held again"] += 1
    self.valid_from[s] = min(self.valid_from[s], self.first_seen(length))
    self.shorten(s, num_kept)
    if copy is not None:
      self.rows[s][num_kept] = copy
