"""The oracle of recurrent states: where snapshots stand, and who reads them."""


class ReferenceStates:
  """What `ReferenceCache` does about states; it has the rows and the blocks."""

  def _drop_snapshot(self, block):
    if block.snapshot is not None:
      self.snapshots.remove(block.snapshot)
      block.snapshot = None

  def _use_snapshot(self, snapshot):
    self.snapshots.remove(snapshot)
    self.snapshots.append(snapshot)

  def _merge_snapshots(self, mine, known):
    """One of two equal states stays; it counts as used when either was."""
    if mine.snapshot is None:
      return
    both = [block.snapshot for block in (mine, known) if block.snapshot is not None]
    self.seen[f"{len(both)} snapshots merged"] += 1
    gone, kept = (
      min(both, key=self.snapshots.index),
      max(both, key=self.snapshots.index),
    )
    if gone is not kept:
      self.snapshots.remove(gone)
      for row in self.rows:
        if row.reads is gone:
          row.reads = kept
    mine.snapshot, known.snapshot = None, kept

  def _next_wanted(self, row, length):
    regular = (length // self.snapshot_tokens + 1) * self.snapshot_tokens
    return min(regular, row.wanted_len) if row.wanted_len > length else regular

  def tokens_to_snapshot(self):
    """Tokens that each row may compute before its state is wanted."""
    lens = [len(row.tokens) for row in self.rows]
    rows = zip(self.rows, lens, strict=True)
    return [self._next_wanted(row, length) - length for row, length in rows]

  def _has_state_at(self, row, new_len):
    """Whether a row can go on from there: it needs the recurrent state, if any."""
    if self.num_snapshots is None or new_len == 0:
      return True
    last = row.blocks[new_len // self.block_size - 1]
    return new_len % self.block_size == 0 and last.snapshot is not None

  def state_lens(self, s):
    """Lengths to which row `s` can return: its own, and where a state stands."""
    row = self.rows[s]
    lens = [(i + 1) * self.block_size for i in range(self._num_full(row))]
    found = [n for n in lens if self._has_state_at(row, n)]
    return [0, *found, len(row.tokens)]

  def evict_snapshots(self, count):
    """Frees the least recently used snapshots that no row reads; returns how many."""
    read = [row.reads for row in self.rows]
    victims = [snapshot for snapshot in self.snapshots if snapshot not in read]
    victims = victims[: max(count, 0)]
    rows = [block for row in self.rows for block in row.blocks]
    for block in {*rows, *self.index.values()}:
      if block.snapshot in victims:
        self._drop_snapshot(block)
    self.seen["snapshot evicted alone"] += len(victims)
    return len(victims)
