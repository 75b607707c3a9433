"""Stats and events, by example; see `small` for the sizes."""

import dataclasses

import jax
import numpy as np
import pytest

import kvcache
from tests.fixtures import small
from tests.fixtures.small import append, finish, fork, ints, mask, rows, start

A = list(range(1, 17))  # prompts that share nothing
B = list(range(101, 117))

stats = jax.jit(kvcache.stats)
events = jax.jit(kvcache.events)


def measured(ctx):
  now = stats(ctx)
  names = [field.name for field in dataclasses.fields(now)]
  return {name: getattr(now, name).tolist() for name in names if name != "counters"}


def changed(before, after):
  """Blocks that were stored, blocks that were removed."""
  masks = events(before, after)
  return tuple(np.flatnonzero(m).tolist() for m in (masks.stored, masks.removed))


def test_an_empty_context_measures_nothing():
  now = measured(small.empty())
  assert now.pop("num_free") == 11
  assert not any(now.values())


def test_every_number_counts_what_it_says():
  ctx = finish(start(small.empty(), A[:9], B[:7]), mask(0))  # leaves two blocks
  ctx = start(ctx, A[:6])  # adopts the first one
  ctx, _, _ = fork(ctx, ints([0, 0]))
  ctx, _ = small.extend(ctx, rows({1: 6}), num_tokens=small.NUM_TOKENS)
  assert small.tables(ctx) == [[1, 3], [4, 5, 8, 9], [1, 6], [1, 7]]
  assert small.queue(ctx) == [2]
  assert measured(ctx) == {
    "num_sequences": 4,
    "num_tokens": 6 + 7 + 6 + 6,
    "num_free": 2,
    "num_evictable": 1,
    "num_in_use": 8,
    "num_shared": 1,
    "num_references": 10,
    "num_cached": 3,
    "num_reserved": 2 + 9 + 2 + 2,
    "num_snapshots": 0,
    "num_free_states": 0,
    "num_window_free": [],
    "num_window_evictable": [],
    "hit_rate": np.float32(4 / 22),
  }
  jax.tree.map(np.testing.assert_array_equal, stats(ctx).counters, ctx.counters)


def test_publishing_stores_full_blocks():
  before = start(small.empty(), A[:9])
  after = small.publish(before)
  assert changed(before, after) == ([1, 2], [])
  assert changed(after, append(after, {0: A[9:12]})) == ([], [])
  assert changed(after, after) == ([], [])


def test_letting_go_of_a_cached_block_is_no_event():
  before = small.publish(start(small.empty(), A[:9]))
  after = finish(before, mask(0))
  assert changed(before, after) == ([], [])


def test_eviction_removes():
  before = finish(start(small.empty(), A[:9]), mask(0))
  after, _ = small.evict(before, 1)
  assert changed(before, after) == ([], [2])
  assert changed(after, before) == ([2], [])


def test_a_block_that_holds_another_prefix_now_is_in_both():
  before = finish(start(small.empty(), A[:9]), mask(0))
  ctx, _ = small.evict(before, 2)
  ctx = small.publish(start(ctx, B[:13]))
  assert small.tables(ctx)[0] == [1, 2, 3, 4]
  assert changed(before, ctx) == ([1, 2, 3], [1, 2])


def test_a_block_that_came_back_as_it_was_is_in_neither():
  before = finish(start(small.empty(), A[:9]), mask(0))
  ctx, _ = small.evict(before, 2)
  ctx = small.publish(start(ctx, A[:9]))
  assert small.tables(ctx)[0] == [1, 2, 3]
  assert changed(before, ctx) == ([], [])


def test_equal_tokens_behind_another_prefix_are_another_prefix():
  before = finish(start(small.empty(), A[:9]), mask(0))
  ctx, _ = small.evict(before, 2)
  ctx = small.publish(start(ctx, B[:4] + A[4:9]))
  assert changed(before, ctx) == ([1, 2], [1, 2])


def test_namespaces_are_part_of_what_is_stored():
  before = small.publish(start(small.empty(), A[:5]))
  ctx = kvcache.Context.replace(
    before, prefix=before.prefix.replace(namespace=before.prefix.namespace.at[1].set(7))
  )
  assert changed(before, ctx) == ([1], [1])


def test_contexts_of_different_shapes_cannot_be_compared():
  config = dataclasses.replace(small.CONFIG, num_blocks=13)
  other = jax.eval_shape(lambda: kvcache.init(config))
  with pytest.raises(ValueError, match="different configurations"):
    kvcache.events(small.empty(), other)
