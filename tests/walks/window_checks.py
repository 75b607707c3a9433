"""What the sliding windows of a context must satisfy, in NumPy; see `walk_checks`."""

import numpy as np

from kvcache import Context
from tests.walks.reference import ReferenceCache


def check_invariants(host: Context) -> None:
  """Asserts what must hold of every window after any sequence of verbs."""
  for window in host.windows:
    pool, ring, N = window.pool, window.ring, window.pool.ref_counts.size
    free = pool.free_list[: pool.num_free].tolist()
    assert len(set(free)) == pool.num_free and 0 not in free, "free window blocks"
    held = np.bincount(window.block_tables.ravel(), minlength=N)
    held[0] = 0
    np.testing.assert_array_equal(pool.ref_counts, held, "ref_counts of a window")
    is_attached = window.owner_ids > 0
    is_free = np.zeros(N, bool)
    is_free[free] = True
    kinds = is_free.astype(int) + (is_attached & (held == 0)) + (held > 0)
    assert (kinds[1:] == 1).all(), "a window block is not exactly one of three kinds"
    column = np.arange(window.block_tables.shape[1])
    num_blocks = host.sequences.num_blocks
    used = (column >= window.first_blocks[:, None]) & (column < num_blocks[:, None])
    assert ((window.block_tables > 0) == used).all(), "a window's table has a gap"
    owned = np.flatnonzero(is_attached)
    assert (window.attached_ids[window.owner_ids[owned]] == owned).all()
    assert np.count_nonzero(window.attached_ids) == owned.size
    assert host.prefix.way_of[window.owner_ids[owned]].all(), "an owner is not cached"
    waits = np.flatnonzero(ring.queue_pos)
    assert (ring.queue[ring.queue_pos[waits] - 1] == waits).all()
    assert set(waits) == set(np.flatnonzero(is_attached & (held == 0)))
    assert ring.num_waiting == waits.size


def check_oracle(host: Context, oracle: ReferenceCache, twins: dict) -> None:
  """Asserts that every window is the oracle's, up to the names of blocks.

  Args:
    host: The context.
    oracle: What it must be.
    twins: The oracle's block of each block of the context that is in use or cached.
  """
  for window, wanted in zip(host.windows, oracle.windows, strict=True):
    assert window.pool.num_free == wanted.num_free, ("num_free", wanted.num_free)
    assert window.valid_from.tolist() == wanted.valid_from, wanted.valid_from
    mine = {}  # block id -> the oracle's block
    for s, columns in enumerate(wanted.rows):
      table = window.block_tables[s]
      assert np.flatnonzero(table).tolist() == sorted(columns), f"columns of row {s}"
      for column, block in columns.items():
        twin = mine.setdefault(int(table[column]), block)
        assert twin is block, f"row {s}: window block in column {column}"
    for owner_id in np.flatnonzero(window.attached_ids).tolist():
      block = wanted.attached[twins[owner_id]]
      assert mine.setdefault(int(window.attached_ids[owner_id]), block) is block
    assert np.count_nonzero(window.attached_ids) == len(wanted.attached), "attached"
    for block_id, block in mine.items():
      assert window.pool.ref_counts[block_id] == block.refs, f"refs of {block_id}"
      assert twins.get(int(window.owner_ids[block_id])) is block.owner, "owner"
    waits = np.flatnonzero(window.ring.queue_pos)
    order = waits[np.argsort(window.ring.queue_pos[waits])]
    assert [mine[int(b)] for b in order] == wanted.lru, "the order of eviction"


def tokens_held(host, oracle, window, row_prints, cached_prints):
  """Fingerprints `[Nw, block_size]` of what a window holds, and where it holds any.

  Args:
    host: The context.
    oracle: Knows from where on rows have tokens.
    window: Index of the window.
    row_prints: Of each row, the fingerprints of its tokens.
    cached_prints: Of each cached block, those of its own tokens.
  """
  valid_from = oracle.windows[window].valid_from
  window, size = host.windows[window], host.prefix.block_size
  prints = np.zeros((window.num_blocks, size), np.uint32)
  expected = np.zeros(prints.shape, bool)
  for s, (table, own) in enumerate(zip(window.block_tables, row_prints, strict=True)):
    position = np.arange(len(own))
    block = table[position // size]
    is_held = (block > 0) & (position >= valid_from[s])
    at = block[is_held], (position % size)[is_held]
    prints[at], expected[at] = own[is_held], True
  for owner in np.flatnonzero(window.attached_ids):
    block = window.attached_ids[owner]
    if not expected[block].all():
      prints[block], expected[block] = cached_prints[owner], True
  return prints, expected


def owned(host: Context, window: int) -> np.ndarray:
  """`[Nw]` bool: blocks that some row or some cached block has."""
  window = host.windows[window]
  return (window.pool.ref_counts > 0) | (window.owner_ids > 0)


def check_view(views, queries, before: Context) -> None:
  """Asserts that a step's tokens go where the windows' tables say."""
  size = before.prefix.block_size
  for view, window in zip(views, before.windows, strict=True):
    slots = np.full(view.slot_mapping.size, window.num_blocks * size)
    for query in queries:
      block = window.block_tables[query.row, query.position // size]
      assert block > 0, "a token has no place in its window"
      slots[query.index] = block * size + query.position % size
    np.testing.assert_array_equal(view.slot_mapping, slots, "slots of a window")
    np.testing.assert_array_equal(view.block_tables, window.block_tables)
