"""Random walks over contexts with recurrent layers, sliding windows, and both."""

import pytest

from kvcache import Status
from tests.fixtures.thorough import more
from tests.walks import walk as walks

SEEDS = {
  "hybrid": 2,
  "hybrid_drafts": 2,
  "windows": 3,
  "windows_tiny": 2,
  "windows_decode": 1,
  "windows_short": 1,
  "three_groups": 2,
}
EVENTS = (
  "started from a snapshot",
  "cut for want of a state",
  "snapshot",
  "no state for a snapshot",
  "snapshot evicted alone",
  "snapshot passed in a draft step",
  "snapshot of an unpublished block lost",
  "1 snapshots merged",
  "2 snapshots merged",
  "window block recycled",
  "window block attached",
  "window moved on",
  "window block evicted alone",
  "window block held again",
  ("extend", Status.NO_WINDOW_BLOCKS),
  ("extend_decode", Status.NO_WINDOW_BLOCKS),
  ("rewind", Status.NO_STATE),
  ("handoff", Status.OK),
  ("handoff", Status.INVALID),
  ("handoff", Status.NO_ROW),
  ("rewind", Status.NO_BLOCKS),
  ("rewind", Status.NO_WINDOW_BLOCKS),
  ("handoff", Status.NO_WINDOW_BLOCKS),
)


REST = sorted(SEEDS.keys() - {"three_groups"})


@pytest.mark.parametrize("name", ["three_groups", *more(*REST)])
def test_walks_agree_with_the_oracle(name):
  for seed in range(SEEDS[name]):
    assert walks.walked(name, seed).num_steps == walks.NUM_STEPS


@pytest.mark.thorough
def test_walks_come_across_everything():
  assert not walks.rare(SEEDS, EVENTS)
