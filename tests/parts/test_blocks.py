"""BlockPool: who gets which block, and when one is free again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.parts import blocks
from tests.fixtures.small import ints

allocate = jax.jit(blocks.allocate, static_argnames="num_entries")
allocate_one_each = jax.jit(blocks.allocate_one_each)
release = jax.jit(blocks.release)
share = jax.jit(blocks.share)
release_exclusive = jax.jit(blocks.release_exclusive)


def free(pool):
  """Free blocks, the next to be handed out first."""
  return pool.free_list[: pool.num_free.item()].tolist()[::-1]


@pytest.fixture
def pool():
  """Seven blocks: 1 has two references, 2 and 3 one, 4 to 6 are free."""
  pool, _ = allocate(blocks.init(7), ints([1, 0, 2]), num_entries=4)
  return share(pool, ints([1, 0]))


def test_all_blocks_but_the_null_block_are_free_at_first():
  pool = blocks.init(7)
  assert pool.num_blocks == 7
  assert free(pool) == [1, 2, 3, 4, 5, 6]
  assert not pool.ref_counts.any()


def test_allocate_hands_out_low_ids_in_row_order():
  pool, given = allocate(blocks.init(7), ints([1, 0, 2]), num_entries=4)
  assert given.block_ids.tolist() == [1, 2, 3, 0]
  assert given.rows.tolist() == [0, 2, 2, 0]
  assert given.offsets.tolist() == [0, 0, 1, 0]
  assert given.is_valid.tolist() == [True, True, True, False]
  assert free(pool) == [4, 5, 6]
  assert pool.ref_counts.tolist() == [0, 1, 1, 1, 0, 0, 0]


def test_allocate_hands_out_the_last_block(pool):
  pool, given = allocate(pool, ints([0, 3, 0]), num_entries=4)
  assert given.block_ids.tolist() == [4, 5, 6, 0]
  assert free(pool) == [] and pool.num_free == 0
  assert pool.ref_counts.tolist() == [0, 2, 1, 1, 1, 1, 1]
  pool, given = allocate(pool, ints([0, 0, 0]), num_entries=4)
  assert not given.block_ids.any() and pool.num_free == 0


def test_allocate_one_each_agrees_with_allocate(pool):
  after, block_ids = allocate_one_each(pool, jnp.array([True, False, True]))
  assert block_ids.tolist() == [4, 0, 5]
  other, given = allocate(pool, ints([1, 0, 1]), num_entries=4)
  assert given.block_ids.tolist() == [4, 5, 0, 0]
  assert free(after) == free(other) == [6]
  assert after.ref_counts.tolist() == other.ref_counts.tolist()


def test_sharing_counts_repeated_ids_and_ignores_null():
  pool, _ = allocate(blocks.init(7), ints([2, 0, 0]), num_entries=4)
  pool = share(pool, ints([1, 0, 1, 2, 0]))
  assert pool.ref_counts.tolist() == [0, 3, 2, 0, 0, 0, 0]
  assert pool.num_free == 4


def test_released_blocks_are_handed_out_again_last_one_first(pool):
  pool, is_last = release(pool, ints([2, 3, 0, 0]), keep=jnp.zeros(4, bool))
  assert is_last.tolist() == [True, True, False, False]
  assert free(pool) == [3, 2, 4, 5, 6]
  assert pool.ref_counts.tolist() == [0, 2, 0, 0, 0, 0, 0]


def test_a_shared_block_is_free_after_its_last_reference(pool):
  nothing = jnp.zeros(4, bool)
  pool, is_last = release(pool, ints([1, 0, 0, 0]), keep=nothing)
  assert not is_last.any() and free(pool) == [4, 5, 6]
  pool, is_last = release(pool, ints([1, 0, 0, 0]), keep=nothing)
  assert is_last.tolist() == [True, False, False, False]
  assert free(pool) == [1, 4, 5, 6]


def test_kept_blocks_stay_out_of_the_free_list(pool):
  keep = jnp.array([False, True, False, False])
  pool, is_last = release(pool, ints([3, 2, 0, 0]), keep=keep)
  assert is_last.tolist() == [True, True, False, False]
  assert free(pool) == [3, 4, 5, 6]
  assert pool.ref_counts.tolist() == [0, 2, 0, 0, 0, 0, 0]


def test_release_is_right_for_every_list_of_ids(pool):
  """All lists of four ids out of null, shared, exclusive and free."""
  lists = list(itertools.product([0, 1, 2, 4], repeat=4))
  each = jax.jit(jax.vmap(lambda ids: release(pool, ids, keep=ids == 2)))
  pools, is_last = jax.device_get(each(ints(lists)))
  for ids, refs, height, stack, last in zip(
    lists, pools.ref_counts, pools.num_free, pools.free_list, is_last, strict=True
  ):
    want = {1: 2, 2: 1}
    for block in ids:
      if want.get(block):
        want[block] -= 1
    # The mark is on the last occurrence, even past the block's last reference.
    want_last = [
      want.get(block) == 0 and block not in ids[i + 1 :] for i, block in enumerate(ids)
    ]
    assert refs.tolist() == [0, want[1], want[2], 1, 0, 0, 0], ids
    assert last.tolist() == want_last, ids
    freed = {1} if not want[1] else set()
    assert set(stack[:height]) == {4, 5, 6} | freed and height == 3 + len(freed), ids


def test_release_exclusive_is_release_for_blocks_with_one_reference(pool):
  after = release_exclusive(pool, ints([3, 0, 2, 0]), ints([0, 1, 1, 2]))
  assert free(after) == [2, 3, 4, 5, 6]
  other, _ = release(pool, ints([3, 0, 2, 0]), keep=jnp.zeros(4, bool))
  assert free(other) == free(after)
  assert after.ref_counts.tolist() == other.ref_counts.tolist() == [0, 2] + [0] * 5


def test_every_block_can_be_free_at_once(pool):
  pool, _ = release(pool, ints([1, 1, 2, 3]), keep=jnp.zeros(4, bool))
  assert sorted(free(pool)) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_array_equal(pool.ref_counts, np.zeros(7))
