"""Random walks over all verbs against the oracle: alone, under `vmap`, shrinkable."""

import itertools

import hypothesis
from hypothesis import strategies
import jax
import numpy as np
import pytest

from kvcache import Status
from tests.fixtures.thorough import more
from tests.walks import walk as walks
from tests.walks.checks import same_bits, to_host
from tests.walks.moves import CONFIGS, PHASES, script

NUM_STEPS = 1000
SEEDS = {
  "small": 4,
  "tiny": 5,
  "single_token_blocks": 4,
  "long_decode": 3,
  "single_row": 2,
  "cramped": 4,
  "int8": 1,
}
MUST_HAPPEN = {
  "admit": "OK NO_ROW TOO_LONG EMPTY INVALID",
  "admit_few": "OK NO_ROW NO_BLOCKS",
  "extend": "OK NO_BLOCKS OVER_BUDGET TOO_LONG INACTIVE INVALID",
  "extend_decode": "OK NO_BLOCKS OVER_BUDGET TOO_LONG INACTIVE INVALID",
  "fork": "OK NO_ROW NO_BLOCKS INACTIVE",
  "rewind": "OK NO_BLOCKS INACTIVE INVALID",
}


REST = sorted(SEEDS.keys() - {"tiny"})


@pytest.mark.parametrize("name", ["tiny", *more(*REST)])
def test_walks_agree_with_the_oracle(name):
  for seed in range(SEEDS[name]):
    assert walks.walked(name, seed).num_steps == walks.NUM_STEPS


@pytest.mark.thorough
def test_walks_come_across_everything():
  """A walk that never met a refusal or a swap would prove little."""
  wanted = [
    (name, Status[status])
    for name, statuses in MUST_HAPPEN.items()
    for status in statuses.split()
  ]
  wanted += ["hit", "swap", "copy on rewind", "adopted while evictable", "evicted"]
  wanted += ["ring compacted", "sealed", "nothing changed"]
  assert not walks.rare(SEEDS, wanted)


@pytest.mark.thorough
def test_walks_under_vmap_give_the_same_bits():
  config = CONFIGS["tiny"]
  several = [walks.Walk(config, seed=seed) for seed in range(100, 103)]
  names = script(config, np.random.default_rng(0))
  for name in itertools.islice(names, 400):
    arrays = [walk.proposer.propose(name) for walk in several]
    alone = [
      walks.programs(config)[name](walk.ctx, own)
      for walk, own in zip(several, arrays, strict=True)
    ]
    pairs = [
      (to_host(walk.ctx), own) for walk, own in zip(several, arrays, strict=True)
    ]
    both = jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)
    after, poisoned, _ = to_host(walks.programs(config, batched=True)[name](*both))
    for i, walk in enumerate(several):
      own = jax.tree.map(lambda leaf, i=i: leaf[i], (after, poisoned))
      assert same_bits(own, alone[i][:2]), f"{name}, context {i}"
      walk.apply(name, arrays[i], *alone[i])


NAMES = sorted(
  {part for phase in PHASES.values() for name in phase for part in name.split("+")}
  # "tiny" has no such layers.
  - {"evict_snapshots", "evict_window_blocks", "extend_draft", "draft"}
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  seed=strategies.integers(0, 2**16),
  names=strategies.lists(strategies.sampled_from(NAMES), max_size=40),
)
def test_short_walks(seed, names):
  """Any order of verbs; a failing one is shrunk to the few that matter."""
  walk = walks.Walk(CONFIGS["tiny"], seed=seed)
  for name in names:
    walk.advance(name)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_million_transitions(name):
  steps, seeds = 5000, 1_000_000 // (5000 * len(CONFIGS)) + 1
  for seed in range(1000, 1000 + seeds):
    walks.run(CONFIGS[name], seed=seed, num_steps=steps)
