"""The oracle: the cache in plain Python, one block at a time.

Blocks are objects, tables are lists, the prefix index is a dict from
`(namespace, tokens of the whole prefix)` to a block, and the queue of evictable blocks
is a list. Everything is predicted but the block ids: compare up to renaming.
"""

from __future__ import annotations

import collections
import itertools

import numpy as np

from kvcache import Status
from tests.walks.reference_rows import Block, Prefix, Query, Row, Snapshot
from tests.walks.reference_states import ReferenceStates
from tests.walks.reference_windows import ReferenceWindow


class ReferenceCache(ReferenceStates):
  """All verbs over dicts and lists; each returns what the real verb reports."""

  def __init__(
    self,
    *,
    num_blocks,
    block_size,
    max_seqs,
    max_blocks_per_seq,
    num_snapshots=None,
    snapshot_tokens=None,
    windows=(),
  ):
    self.num_snapshots = num_snapshots  # None: no layer is recurrent
    self.snapshot_tokens = snapshot_tokens
    self.snapshots: list[Snapshot] = []  # least recently used first
    self.num_usable = num_blocks - 1
    self.block_size = block_size
    self.max_blocks_per_seq = max_blocks_per_seq
    self.rows = [Row() for _ in range(max_seqs)]
    self.index: dict[Prefix, Block] = {}
    self.lru: list[Block] = []  # front first: the next to be evicted
    self.num_free = self.num_usable
    self._serials = itertools.count(1)
    self.counters = self._zeros()
    self.seen = collections.Counter()  # what a walk came across, for its own test
    self.windows = [  # from `(sliding_window, num_window_blocks)`
      ReferenceWindow(
        sliding_window=window,
        num_blocks=num,
        block_size=block_size,
        max_seqs=max_seqs,
        seen=self.seen,
      )
      for window, num in windows
    ]

  def _zeros(self):
    names = "num_admitted prompt_tokens hit_tokens num_complete num_cut num_evicted"
    names += " lost_tokens"
    return dict.fromkeys(names.split(), 0)

  # Views.

  @property
  def num_evictable(self):
    """Cached blocks that nobody holds."""
    return len(self.lru)

  @property
  def max_len(self):
    """Tokens of the longest sequence that a row, and the whole pool, can hold."""
    return min(self.max_blocks_per_seq, self.num_usable) * self.block_size

  def inactive_rows(self):
    """Rows that can be taken, lowest first."""
    return [s for s, row in enumerate(self.rows) if not row.active]

  def lru_prefixes(self):
    """Prefixes of the evictable blocks, the next victim first."""
    return [block.prefix for block in self.lru]

  def num_pending(self):
    """What `publish` would do: full blocks to index, blocks behind windows."""
    rows = [row for row in self.rows if not row.is_sealed]
    num_behind = sum(
      len(window.behind(s, length))
      for window in self.windows
      for s, length in enumerate(self._lengths())
    )
    return num_behind + sum(self._num_full(row) - row.num_published for row in rows)

  def _lengths(self):
    return [len(row.tokens) for row in self.rows]

  def room(self, s):
    """Tokens that fit into the blocks which row `s` owns already."""
    return self._capacity(self.rows[s]) - len(self.rows[s].tokens)

  def _num_full(self, row):
    return len(row.tokens) // self.block_size

  def _capacity(self, row):
    return len(row.blocks) * self.block_size

  def _blocks_for(self, num_tokens):
    return -(-num_tokens // self.block_size)

  # One block at a time.

  def _allocate(self):
    assert self.num_free > 0
    self.num_free -= 1
    return Block(serial=next(self._serials))

  def _adopt(self, block):
    if block.refs == 0:
      self.lru.remove(block)
      self.seen["adopted while evictable"] += 1
    block.refs += 1

  def _release(self, block, *, keep_prefix=True):
    block.refs -= 1
    assert block.refs >= 0
    if block.refs > 0:
      return
    if block.prefix is None:
      self.num_free += 1
      self.seen["snapshot of an unpublished block lost"] += block.snapshot is not None
      self._drop_snapshot(block)
    elif not keep_prefix and not self._has_child(block):
      self._forget(block)
    else:
      self.lru.append(block)

  def _forget(self, block):
    """Takes a block that nobody holds out of the index and frees it."""
    assert block.refs == 0
    del self.index[block.prefix]
    block.prefix = None
    self.num_free += 1
    for window in self.windows:
      window.detach(block)
    self._drop_snapshot(block)

  def _has_child(self, block):
    namespace, tokens = block.prefix
    return any(
      len(other) == len(tokens) + self.block_size and other[: len(tokens)] == tokens
      for other_namespace, other in self.index
      if other_namespace == namespace
    )

  def _clear_row(self, s, *, keep_prefix=True):
    """Its windows have let go already."""
    for block in reversed(self.rows[s].blocks):
      self._release(block, keep_prefix=keep_prefix)
    self.rows[s] = Row()

  # Verbs.

  def publish(self):
    """Indexes all full blocks; a row whose block is there already swaps to it."""
    for s, row in enumerate(self.rows):
      if not row.is_sealed:
        for column in range(row.num_published, self._num_full(row)):
          self._publish_block(row, column)
          for window in self.windows:
            window.attach(s, column, row.blocks[column])
        row.num_published = row.num_frozen = self._num_full(row)
    for window in self.windows:
      window.trim(self._lengths())

  def _publish_block(self, row, column):
    prefix = (row.namespace, tuple(row.tokens[: (column + 1) * self.block_size]))
    mine, known = row.blocks[column], self.index.get(prefix)
    if known is None:
      mine.prefix = prefix
      self.index[prefix] = mine
    else:
      assert known is not mine
      self._adopt(known)
      row.blocks[column] = known
      self._merge_snapshots(mine, known)
      self._release(mine)
      self.seen["swap"] += 1

  def admit(self, prompts, *, lengths, width, namespaces, block_budget=None):
    """Takes a row for each prompt; returns `(seq_id, num_cached, status)` of each.

    `prompts` are as long as `lengths` say, except where those are out of bounds.
    """
    self.publish()
    inactive = self.inactive_rows()
    statuses = []
    plans = []
    num_needed = num_candidates = 0
    for prompt, length, namespace in zip(prompts, lengths, namespaces, strict=True):
      status = self._judge_length(length, width)
      if status == Status.OK:
        num_candidates += 1
        if num_candidates > len(inactive):
          status = Status.NO_ROW
      if status == Status.OK:
        # The blocks to be adopted are as they were before the call: prompts of one
        # call that share an evictable block count it twice.
        hits, num_lost = self._longest_prefix(prompt, namespace)
        num_needed += self._blocks_for(length) - sum(hit.refs > 0 for hit in hits)
        if block_budget is not None and num_needed > block_budget:
          status = Status.NO_BLOCKS
        else:
          plans.append((inactive[len(plans)], prompt, namespace, hits))
          self.counters["lost_tokens"] += num_lost
      statuses.append(status)
    for s, prompt, namespace, hits in plans:
      self._start_row(s, prompt, namespace, hits)
    rows = iter([s for s, *_ in plans])
    ids = [next(rows) if status == Status.OK else -1 for status in statuses]
    num_cached = [len(self.rows[s].tokens) if s >= 0 else 0 for s in ids]
    return list(zip(ids, num_cached, statuses, strict=True))

  def _judge_length(self, length, width):
    if length <= 0:
      return Status.EMPTY
    if length > self.max_len:
      return Status.TOO_LONG
    return Status.INVALID if length > width else Status.OK

  def _longest_prefix(self, prompt, namespace):
    """The cached blocks that a prompt may adopt: its last token is to be computed."""
    hits = []
    for end in range(self.block_size, len(prompt), self.block_size):
      block = self.index.get((namespace, tuple(prompt[:end])))
      if block is None:
        break
      hits.append(block)
    usable = [
      i + 1
      for i, hit in enumerate(hits)
      if (self.num_snapshots is None or hit.snapshot is not None)
      and all(window.may_end(hits, i + 1) for window in self.windows)
    ]
    kept = max(usable, default=0)
    self.seen["cut for want of a state"] += kept < len(hits)
    return hits[:kept], (len(hits) - kept) * self.block_size

  def _start_row(self, s, prompt, namespace, hits):
    for block in hits:
      self._adopt(block)
    for window in self.windows:
      window.start(s, hits)
    num_cached = len(hits) * self.block_size
    self.rows[s] = Row(
      active=True,
      namespace=namespace,
      tokens=list(prompt[:num_cached]),
      blocks=list(hits),
      num_published=len(hits),
      num_frozen=len(hits),
      wanted_len=(len(prompt) - 1) // self.block_size * self.block_size,
    )
    if hits and self.num_snapshots is not None:
      self.rows[s].reads = hits[-1].snapshot
      self._use_snapshot(hits[-1].snapshot)
      self.seen["started from a snapshot"] += 1
    self._count_admission(len(prompt), num_cached)

  def _count_admission(self, length, num_cached):
    best = (length - 1) // self.block_size * self.block_size
    self.counters["num_admitted"] += 1
    self.counters["prompt_tokens"] += length
    self.counters["hit_tokens"] += num_cached
    self.counters["num_complete" if num_cached == best else "num_cut"] += 1

  def extend(self, query_lens, *, num_tokens=None, order=None):
    """Makes room; returns the status of each row."""
    statuses = [Status.OK] * len(self.rows)
    num_queried = num_needed = 0
    is_decode, lengths = num_tokens is None, self._lengths()
    recycles = [
      [is_decode and window.recycles(s, length) for s, length in enumerate(lengths)]
      for window in self.windows
    ]
    taken = [0] * len(self.windows)
    order = range(len(self.rows)) if order is None else order
    for s in order:
      row, query_len = self.rows[s], query_lens[s]
      if query_len == 0:
        continue
      if query_len < 0:
        statuses[s] = Status.INVALID
        continue
      if not row.active:
        statuses[s] = Status.INACTIVE
        continue
      if len(row.tokens) + query_len > self.max_len:
        statuses[s] = Status.TOO_LONG
        continue
      num_queried += query_len
      bound, asked = (1, query_len) if num_tokens is None else (num_tokens, num_queried)
      if asked > bound:
        statuses[s] = Status.OVER_BUDGET
        continue
      need = self._blocks_for(len(row.tokens) + query_len) - len(row.blocks)
      num_needed += max(need, 0)
      taken = [
        n + (0 if own[s] else max(need, 0))
        for n, own in zip(taken, recycles, strict=True)
      ]
      pairs = zip(taken, self.windows, strict=True)
      lacks = any(n > window.num_free for n, window in pairs)
      if need > 0 and (lacks or num_needed > self.num_free):
        statuses[s] = self._shortage(num_needed <= self.num_free)
    # Judged against the free blocks before the call, so blocks are taken at the end.
    for s, (query_len, status) in enumerate(zip(query_lens, statuses, strict=True)):
      row = self.rows[s]
      if status == Status.OK and query_len > 0:
        columns = range(len(row.blocks), self._blocks_for(len(row.tokens) + query_len))
        for window, own in zip(self.windows, recycles, strict=True):
          window.grow(s, columns, recycles=own[s])
        while self._capacity(row) < len(row.tokens) + query_len:
          row.blocks.append(self._allocate())
    return statuses

  def _shortage(self, is_enough):
    """Of a row that lacks blocks: does the context have enough, and a window not?"""
    return Status.NO_WINDOW_BLOCKS if is_enough else Status.NO_BLOCKS

  def plan_step(self, query_lens, *, num_tokens=None):
    """Packs the tokens of a step; returns them and each row's number of them."""
    queries: list[Query] = []
    effective = []
    for s, row in enumerate(self.rows):
      first, left = len(queries), 1
      if num_tokens is None:
        first = s  # decode shape: token s belongs to row s
      else:
        left = num_tokens - len(queries)
      query_len = min(max(query_lens[s], 0), self.room(s), left)
      start = len(row.tokens)
      queries += [Query(first + i, s, start + i) for i in range(query_len)]
      effective.append(query_len)
    return queries, effective

  def commit(self, queries, tokens, effective, *, accepted=None, is_draft=False):
    """Stores the accepted ones of the packed tokens."""
    if accepted is None:
      accepted = effective
    least = int(self.num_snapshots is not None)  # what recurrent layers cannot undo
    limits = [min(max(a, least), q) for a, q in zip(accepted, effective, strict=True)]
    ends = [len(row.tokens) + n for row, n in zip(self.rows, limits, strict=True)]
    before = [len(row.tokens) for row in self.rows]
    for query in queries:
      if query.position < ends[query.row]:
        self.rows[query.row].tokens.append(tokens[query.index])
    if self.num_snapshots is not None:
      for row, old_len in zip(self.rows, before, strict=True):
        if len(row.tokens) > old_len:
          row.reads = None  # but its own state
          lens = [old_len, len(row.tokens)]
          if is_draft:  # a state stands after each token
            lens = list(range(old_len, len(row.tokens) + 1))
          for before, after in itertools.pairwise(lens):
            if self._next_wanted(row, before) == after:
              self._take_snapshot(row, after)

  def _take_snapshot(self, row, length):
    """Keeps a state that was just written, which the row may stand at."""
    if len(self.snapshots) == self.num_snapshots:
      self.seen["no state for a snapshot"] += 1
      return
    block = row.blocks[length // self.block_size - 1]
    assert block.refs == 1 and block.prefix is None and block.snapshot is None
    block.snapshot = Snapshot()
    self.snapshots.append(block.snapshot)
    self.seen["snapshot"] += 1
    if length == len(row.tokens):
      row.reads = block.snapshot
    else:
      self.seen["snapshot passed in a draft step"] += 1

  def fork(self, sources):
    """Copies rows; returns `(seq_id, status)` of each."""
    self.publish()
    inactive = self.inactive_rows()
    results = []
    taken = []
    num_needed = rank = 0
    for src in sources:
      if not 0 <= src < len(self.rows) or not self.rows[src].active:
        results.append((-1, Status.INACTIVE))
        continue
      if rank >= len(inactive):
        results.append((-1, Status.NO_ROW))
        continue
      s = inactive[rank]
      rank += 1
      need = int(len(self.rows[src].tokens) % self.block_size != 0)
      num_needed += need
      pools = [self, *self.windows]
      if need and any(num_needed > pool.num_free for pool in pools):
        results.append((-1, self._shortage(num_needed <= self.num_free)))
        continue
      taken.append((src, s, need))
      results.append((s, Status.OK))
    for src, s, need in taken:
      num_full = self._num_full(self.rows[src])
      for window in self.windows:
        window.fork(src, s, num_full=num_full, copies=bool(need))
      self.rows[s] = self._copy_row(self.rows[src], copies_last=bool(need))
    return results

  def _copy_row(self, row, *, copies_last):
    row.num_frozen = self._num_full(row)
    shared = row.blocks[: row.num_frozen]
    for block in shared:
      self._adopt(block)
    last = [self._allocate()] if copies_last else []
    return Row(
      active=True,
      namespace=row.namespace,
      tokens=list(row.tokens),
      blocks=shared + last,
      num_published=row.num_published,
      num_frozen=row.num_frozen,
      is_sealed=row.is_sealed,
      wanted_len=row.wanted_len,
    )

  def handoff(self, sources):
    """Exports rows and imports them again; returns `(seq_id, status)` of each."""
    self.publish()
    inactive = self.inactive_rows()
    results, plans, rank = [], [], 0
    num_needed = [0] * (1 + len(self.windows))
    for src in sources:
      if not 0 <= src < len(self.rows) or not self.rows[src].active:
        results.append((-1, Status.INVALID))
        continue
      rank += 1
      if rank > len(inactive):
        results.append((-1, Status.NO_ROW))
        continue
      row = self.rows[src]
      hits = self._cached_blocks(row)
      columns = range(len(hits), self._blocks_for(len(row.tokens)))
      needed = [columns, *(w.columns_needed(len(row.tokens)) for w in self.windows)]
      num_needed = [n + len(c) for n, c in zip(num_needed, needed, strict=True)]
      pools = zip(num_needed, needed, [self, *self.windows], strict=True)
      fits = [not c or n <= pool.num_free for n, c, pool in pools]
      if not all(fits):
        results.append((-1, self._shortage(fits[0])))
        continue
      s = inactive[len(plans)]
      plans.append((s, row, hits, needed))
      results.append((s, Status.OK))
    for s, row, hits, needed in plans:
      for block in hits:
        self._adopt(block)
      for window in self.windows:
        window.begin(s, len(row.tokens))
      self.rows[s] = Row(
        active=True,
        namespace=row.namespace,
        tokens=list(row.tokens),
        blocks=[*hits, *(self._allocate() for _ in needed[0])],
        num_published=len(hits),
        num_frozen=len(hits),
      )
    return results

  def _cached_blocks(self, row):
    """The cached blocks that a row's text begins with."""
    ends = range(self.block_size, len(row.tokens) + 1, self.block_size)
    keys = ((row.namespace, tuple(row.tokens[:end])) for end in ends)
    found = itertools.takewhile(lambda key: key in self.index, keys)
    return [self.index[key] for key in found]

  def rewind(self, num_tokens):
    """Drops the last tokens of each row; returns the status of each row."""
    statuses = [Status.OK] * len(self.rows)
    plans = []
    num_copies = 0
    num_window_copies = [0] * len(self.windows)
    for s, (row, count) in enumerate(zip(self.rows, num_tokens, strict=True)):
      if count == 0:
        continue
      if count < 0:
        statuses[s] = Status.INVALID
      elif not row.active:
        statuses[s] = Status.INACTIVE
      elif count > len(row.tokens):
        statuses[s] = Status.INVALID
      else:
        new_len = len(row.tokens) - count
        if not self._has_state_at(row, new_len) or not all(
          window.can_return(s, new_len, row.blocks) for window in self.windows
        ):
          statuses[s] = Status.NO_STATE
          continue
        copies = self._must_copy(row, new_len)
        num_copies += copies
        is_short = lacks_here = copies and num_copies > self.num_free
        in_windows = [w.must_copy(s, new_len, row.blocks) for w in self.windows]
        for i, (window, copies_here) in enumerate(
          zip(self.windows, in_windows, strict=True)
        ):
          num_window_copies[i] += copies_here
          is_short |= copies_here and num_window_copies[i] > window.num_free
        if is_short:
          statuses[s] = self._shortage(not lacks_here)
        else:
          plans.append((s, new_len, copies, in_windows))
    fresh = [self._allocate() if copies else None for _, _, copies, _ in plans]
    for i, window in enumerate(self.windows):
      copied = [window._allocate() if plan[3][i] else None for plan in plans]
      for (s, new_len, *_), copy in zip(plans, copied, strict=True):
        window.go_back(s, new_len, self.rows[s].blocks, copy=copy)
    for (s, new_len, copies, _), copy in zip(plans, fresh, strict=True):
      self._shorten(self.rows[s], new_len, copy=copy)
      assert copies == (copy is not None)
    return statuses

  def _must_copy(self, row, new_len):
    """Whether the block that the row would write next is not its own."""
    if new_len % self.block_size == 0:
      return False
    block = row.blocks[new_len // self.block_size]
    return block.refs > 1 or block.prefix is not None

  def _shorten(self, row, new_len, *, copy):
    kept = self._blocks_for(new_len)
    for block in reversed(row.blocks[kept:]):
      self._release(block)
    del row.blocks[kept:]
    if copy is not None:
      self._release(row.blocks[-1])
      row.blocks[-1] = copy
      self.seen["copy on rewind"] += 1
    del row.tokens[new_len:]
    if self.num_snapshots is not None:
      row.reads = row.blocks[-1].snapshot if new_len else None
    row.num_published = min(row.num_published, self._num_full(row))
    row.num_frozen = min(row.num_frozen, self._num_full(row))
    row.is_sealed &= row.num_published < row.num_frozen

  def finish(self, mask, *, keep_prefix=True):
    """Empties the masked rows."""
    if keep_prefix:
      self.publish()
    for window in self.windows:
      for s in np.flatnonzero(mask):
        window.shorten(s, 0)
    for s, masked in enumerate(mask):
      if masked and self.rows[s].active:
        self._clear_row(s, keep_prefix=keep_prefix)

  def evict(self, count):
    """Frees the least recently used evictable blocks; returns their number."""
    count = min(max(count, 0), len(self.lru))
    victims, self.lru = self.lru[:count], self.lru[count:]
    for block in victims:
      assert not self._has_child(block), "a root left before its leaf"
      self._forget(block)
    self.counters["num_evicted"] += count
    return count

  def evict_window_blocks(self, counts):
    """Frees the least recently used ones of each window; returns how many."""
    pairs = zip(self.windows, counts, strict=True)
    return [window.evict(count) for window, count in pairs]

  def reset(self, *, keep_prefix=False):
    """Empties all rows, and the index unless it is kept."""
    if keep_prefix:
      self.finish([True] * len(self.rows))
      return
    self.rows = [Row() for _ in self.rows]
    for window in self.windows:
      window.reset(len(self.rows))
    self.index.clear()
    self.lru.clear()
    self.snapshots.clear()
    self.num_free = self.num_usable
    self.counters = self._zeros()
