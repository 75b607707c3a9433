"""PrefixIndex: hits are exact, equal blocks have one name, the oldest leaves go first.

Blocks of two tokens; ids are chosen by hand and stand for blocks of a pool.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.parts import hashing, prefix
from tests.fixtures.small import ints

N, BLOCK = 12, 2

init = functools.partial(
  prefix.init,
  num_blocks=N,
  block_size=BLOCK,
  num_buckets=8,
  salt=jnp.zeros(2, jnp.uint32),
)
store_tokens = jax.jit(prefix.store_tokens)
copy_tokens = jax.jit(prefix.copy_tokens)
remove = jax.jit(prefix.remove)
enqueue = jax.jit(prefix.enqueue)
dequeue = jax.jit(prefix.dequeue)
compact_queue = jax.jit(prefix.compact_queue)
pop = jax.jit(prefix.pop, static_argnames="num_entries")


@jax.jit
def jitted_insert(index, block_ids, previous, namespaces, depths, offsets, is_valid):
  return prefix.insert(
    index,
    block_ids,
    previous,
    namespaces,
    depths,
    offsets=offsets,
    is_valid=is_valid,
  )


def insert(index, *segments, verb=jitted_insert, num_entries=5):
  """Inserts chains `(block_ids, previous, depth, namespace)`, one after the other."""
  entries = []
  for block_ids, previous, depth, namespace in segments:
    for i, block in enumerate(block_ids):
      entries.append((block, previous, namespace, depth + i, i, 1))
  entries += [(0,) * 6] * (num_entries - len(entries))
  *columns, is_valid = (ints(column) for column in zip(*entries, strict=True))
  index, result = verb(index, *columns, is_valid > 0)
  num = sum(len(segment[0]) for segment in segments)
  assert not result.is_done[num:].any() and not result.is_hopeless[num:].any()
  told = (result.block_ids, result.is_done, result.is_hopeless)
  return index, *[values[:num].tolist() for values in told]


match_jitted = jax.jit(prefix.match)


def match(index, *texts, num_full=3, namespace=0, verb=match_jitted):
  """The cached prefix of one or two prompts of three blocks."""
  padded = np.full((2, 3 * BLOCK), -7, np.int32)
  for row, text in zip(padded, texts, strict=False):
    row[: len(text)] = text
  block_ids, num_hits = verb(
    index,
    jnp.asarray(padded).reshape(2, 3, BLOCK),
    jnp.full(2, num_full),
    jnp.full(2, namespace),
  )
  for ids, num in zip(block_ids, num_hits, strict=True):
    assert ids[:num].all() and not ids[num:].any()
  return [ids[:num].tolist() for ids, num in zip(block_ids, num_hits, strict=True)][
    : len(texts)
  ]


def with_tokens(index, tokens):
  """`tokens[b]` are the tokens of block `b`."""
  slots = [BLOCK * b + i for b in tokens for i in range(BLOCK)]
  values = [token for b in tokens for token in tokens[b]]
  pad = [N * BLOCK] * (16 - len(slots))
  return store_tokens(index, ints(slots + pad), ints(values + [0] * len(pad)))


@pytest.fixture
def index():
  """The prompts 1 2 3 4 5 6 in blocks 3, 8, 5 and 1 2 9 9 in 3, 6 are cached."""
  tokens = {3: (1, 2), 8: (3, 4), 5: (5, 6), 6: (9, 9)}
  index = with_tokens(init(num_ways=4), tokens)
  index, ids, is_done, _ = insert(index, ([3, 8, 5], 0, 0, 0))
  assert ids == [3, 8, 5] and all(is_done)
  index, ids, is_done, _ = insert(index, ([6], 3, 1, 0))
  assert ids == [6] and all(is_done)
  return index


# Finding and inserting.


def test_an_empty_index_has_nothing():
  index = init(num_ways=4)
  assert (index.num_blocks, index.block_size) == (N, BLOCK)
  assert match(index, [0, 0, 0, 0], [1, 2, 3, 4]) == [[], []]
  assert not index.is_cached(jnp.arange(N)).any()


def test_the_longest_cached_prefix_is_found(index):
  assert match(index, [1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 5, 6]) == [[3, 8, 5], [3, 6]]
  assert match(index, [1, 2, 3, 5, 5, 6], [2, 1, 3, 4, 5, 6]) == [[3], []]


def test_a_block_is_found_behind_its_own_parent_only(index):
  """Blocks 3 4 and 5 6 are cached, but in no prompt that begins with them."""
  assert match(index, [3, 4, 5, 6], [1, 2, 5, 6]) == [[], [3]]
  assert match(index, [1, 2, 1, 2], [9, 9]) == [[3], []]


@pytest.mark.parametrize(("num_full", "ids"), [(0, []), (1, [3]), (2, [3, 8])])
def test_no_more_than_asked_for_is_matched(index, num_full, ids):
  assert match(index, [1, 2, 3, 4, 5, 6], num_full=num_full) == [ids]


def test_what_is_known_of_cached_blocks(index):
  cached = [3, 5, 6, 8]
  assert np.flatnonzero(index.way_of).tolist() == cached
  assert index.is_cached(ints([0, 3, 4])).tolist() == [False, True, False]
  assert index.parent[ints(cached)].tolist() == [0, 8, 3, 3]
  assert index.depth[ints(cached)].tolist() == [0, 2, 1, 1]
  assert index.num_children[ints(cached)].tolist() == [2, 0, 0, 1]
  places = np.asarray(index.way_of)[cached] - 1
  assert np.asarray(index.way_ids).reshape(-1)[places].tolist() == cached
  assert np.count_nonzero(index.way_ids) == 4
  hashes = np.asarray(index.prefix_hash)
  assert (np.asarray(index.way_tags).reshape(-1)[places] == hashes[cached, 1]).all()
  root = hashing.root(index.salt, jnp.int32(0))[None]
  chain = hashing.chain_from_root(hashing.digest(ints([[[1, 2], [3, 4]]])), root)
  np.testing.assert_array_equal(hashes[[3, 8]], chain[0])


def test_namespaces_do_not_see_each_other(index):
  assert match(index, [1, 2, 3, 4], namespace=7) == [[]]
  index = with_tokens(index, {2: (1, 2)})
  index, ids, is_done, _ = insert(index, ([2], 0, 0, 7))
  assert ids == [2] and is_done == [True]
  assert match(index, [1, 2, 3, 4], namespace=7) == [[2]]
  assert match(index, [1, 2, 3, 4]) == [[3, 8]]


def test_salts_change_hashes_but_not_hits(index):
  salted = init(num_ways=4, salt=jnp.array([1, 5], jnp.uint32))
  salted = with_tokens(salted, {3: (1, 2)})
  salted, *_ = insert(salted, ([3], 0, 0, 0))
  assert match(salted, [1, 2]) == [[3]]
  assert (salted.prefix_hash[3] != index.prefix_hash[3]).all()


def test_equal_blocks_are_found_instead_of_inserted(index):
  index = with_tokens(index, {1: (1, 2), 2: (3, 4), 4: (7, 7)})
  after, ids, is_done, is_hopeless = insert(index, ([1, 2, 4], 0, 0, 0))
  assert ids == [3, 8, 4]  # the new block goes on from the canonical parent
  assert all(is_done) and not any(is_hopeless)
  assert np.flatnonzero(after.way_of).tolist() == [3, 4, 5, 6, 8]
  assert after.parent[4] == 8 and after.depth[4] == 2
  assert after.num_children[8] == 2
  assert match(after, [1, 2, 3, 4, 7, 7]) == [[3, 8, 4]]


def test_a_block_inserted_again_stays_as_it_is(index):
  after, ids, is_done, _ = insert(index, ([3, 8], 0, 0, 0))
  assert ids == [3, 8] and all(is_done)
  jax.tree.map(np.testing.assert_array_equal, after, index)


def test_of_equal_new_blocks_the_earlier_wins_and_the_later_finds_it(index):
  index = with_tokens(index, {1: (7, 7), 2: (8, 8), 4: (7, 7), 7: (8, 8)})
  segments = ([1, 2], 0, 0, 0), ([4, 7], 0, 0, 0)
  index, ids, is_done, is_hopeless = insert(index, *segments)
  assert ids[:2] == [1, 2]
  assert is_done == [True, True, False, False]
  assert not any(is_hopeless)
  index, ids, is_done, _ = insert(index, segments[1])
  assert ids == [1, 2] and all(is_done)
  assert np.flatnonzero(index.way_of).tolist() == [1, 2, 3, 5, 6, 8]


def test_a_full_bucket_is_hopeless_and_ends_its_segment():
  index = init(num_ways=1, num_buckets=1)
  index = with_tokens(index, {1: (1, 1), 2: (2, 2), 4: (3, 3), 5: (1, 1), 6: (7, 7)})
  index, ids, is_done, is_hopeless = insert(index, ([1], 0, 0, 0))
  assert is_done == [True]
  index, ids, is_done, is_hopeless = insert(index, ([5, 2, 4], 0, 0, 0), ([6], 0, 0, 0))
  assert ids[0] == 1  # found, though there is no room
  assert is_done == [True, False, False, False]
  assert is_hopeless == [False, True, False, True]
  assert np.flatnonzero(index.way_of).tolist() == [1]
  assert index.num_children[1] == 0


# With other hashes. A program compiled before has the true ones: these are new.


def put(index, *segments):
  """`insert`, compiled anew."""
  return insert(
    index, *segments, verb=jax.jit(lambda *args: jitted_insert.__wrapped__(*args))
  )


def find(index, *texts, **kwargs):
  """`match`, compiled anew."""
  return match(index, *texts, verb=jax.jit(lambda *args: prefix.match(*args)), **kwargs)


@pytest.mark.parametrize("num_ways", [1, 4])
def test_hashes_that_all_collide_never_give_a_false_hit(monkeypatch, num_ways):
  monkeypatch.setattr(
    hashing, "digest", lambda tokens: jnp.zeros((*tokens.shape[:-1], 2), jnp.uint32)
  )
  monkeypatch.setattr(
    hashing, "root", lambda salt, names: jnp.zeros((*names.shape, 2), jnp.uint32)
  )

  tokens = {1: (1, 1), 2: (2, 2), 3: (3, 3), 4: (2, 2)}
  index = with_tokens(init(num_ways=num_ways), tokens)
  index, _, is_done, _ = put(index, ([1, 2], 0, 0, 0))
  assert is_done[0]  # in a bucket of one way, nothing else has room
  index, *_ = put(index, ([3, 4], 0, 0, 0))
  for text in ([1, 1, 2, 2], [3, 3, 2, 2], [2, 2, 1, 1], [2, 2, 2, 2], [4, 4]):
    ids = find(index, text)[0]
    held = np.asarray(index.block_tokens)[ids].reshape(-1).tolist()
    assert held == text[: len(held)]
    assert [index.parent[b] for b in ids] == [0, *ids[:-1]][: len(ids)]
    assert find(index, text, namespace=1) == [[]]


def test_a_parent_is_compared_and_not_only_hashed(monkeypatch):
  # A block's hash says nothing of what comes before it.
  monkeypatch.setattr(hashing, "chain", lambda digests, base, **_: digests)
  monkeypatch.setattr(hashing, "chain_from_root", lambda digests, roots: digests)

  tokens = {1: (1, 1), 2: (2, 2), 3: (3, 3), 4: (4, 4), 5: (2, 2)}
  index = with_tokens(init(num_ways=4), tokens)
  for segment in (([1], 0, 0, 0), ([2], 1, 1, 0), ([3], 0, 0, 0), ([4], 3, 1, 0)):
    index, _, is_done, _ = put(index, segment)
    assert is_done == [True]
  assert find(index, [1, 1, 2, 2], [3, 3, 4, 4]) == [[1, 2], [3, 4]]
  assert find(index, [1, 1, 4, 4], [3, 3, 2, 2]) == [[1], [3]]
  # Nor is it given to another parent: its owner goes on unpublished.
  _, _, is_done, is_hopeless = put(index, ([5], 3, 0, 1))
  assert is_done == [False] and is_hopeless == [True]


def test_removed_blocks_are_found_no_more(index):
  ids, mask = ints([5, 8, 6]), jnp.array([True, True, False])
  index = remove(index, ids, mask)
  assert match(index, [1, 2, 3, 4, 5, 6], [1, 2, 9, 9]) == [[3], [3, 6]]
  assert np.flatnonzero(index.way_of).tolist() == [3, 6]
  assert index.num_children[3] == 1
  assert sorted(index.way_ids.reshape(-1).tolist())[-3:] == [0, 3, 6]


def test_the_place_of_a_removed_block_is_used_again():
  index = with_tokens(init(num_ways=1, num_buckets=1), {1: (1, 1), 2: (2, 2)})
  index, *_ = insert(index, ([1], 0, 0, 0))
  index = remove(index, ints([1, 0, 0]), jnp.array([True, False, False]))
  index, _, is_done, _ = insert(index, ([2], 0, 0, 0))
  assert is_done == [True] and match(index, [2, 2], [1, 1]) == [[2], []]


# Tokens.


def test_tokens_are_stored_and_copied_and_padding_is_dropped():
  index = with_tokens(init(num_ways=4), {1: (5, 6), 11: (7, 8)})
  want = np.zeros((N, BLOCK), np.int32)
  want[1], want[11] = (5, 6), (7, 8)
  np.testing.assert_array_equal(index.block_tokens, want)
  index = copy_tokens(index, ints([11, 1, 1]), ints([2, N, 11]))
  want[2], want[11] = (7, 8), (5, 6)
  np.testing.assert_array_equal(index.block_tokens, want)


# The ring.


def queue(index):
  places = {b: place for b, place in enumerate(index.ring.queue_pos.tolist()) if place}
  assert len(places) == index.num_evictable
  return sorted(places, key=places.__getitem__)


def push(index, *block_ids):
  ids = ints([*block_ids] + [0] * (4 - len(block_ids)))
  return enqueue(index, ids, jnp.arange(4) < len(block_ids))


def taken(index, count, num_entries=3):
  index, ids, mask = pop(index, jnp.int32(count), num_entries=num_entries)
  return index, ids[mask].tolist()


@pytest.fixture
def waiting(index):
  """Leaves first: 5, 8, 6, 3."""
  waiting = push(push(index, 5, 8), 6, 3)
  assert queue(waiting) == [5, 8, 6, 3]
  return waiting


def test_the_first_in_the_ring_is_evicted_first(waiting):
  index, ids = taken(waiting, 2)
  assert ids == [5, 8] and queue(index) == [6, 3]
  assert np.flatnonzero(index.way_of).tolist() == [3, 6]
  assert match(index, [1, 2, 3, 4], [1, 2, 9, 9]) == [[3], [3, 6]]
  index, ids = taken(index, 3)
  assert ids == [6, 3] and queue(index) == []
  assert not index.way_of.any() and not index.way_ids.any()
  assert taken(index, 3)[1] == []


def test_one_round_looks_at_few_entries(waiting):
  index, ids = taken(waiting, 4)
  assert ids == [5, 8, 6] and queue(index) == [3]


def test_nothing_is_evicted_if_nothing_is_wanted(waiting):
  index, ids = taken(waiting, 0)
  assert ids == [] and queue(index) == [5, 8, 6, 3]
  assert taken(index, 4, num_entries=4)[1] == [5, 8, 6, 3]


def test_adopted_blocks_leave_the_ring(waiting):
  index = dequeue(waiting, ints([3, 8, 3, 0, 9]))  # twice, null, not in it
  assert queue(index) == [5, 6]
  index, ids = taken(index, 2)
  assert ids == [5, 6]
  assert np.flatnonzero(index.way_of).tolist() == [3, 8]


def test_an_adopted_block_that_comes_back_is_the_youngest(waiting):
  index = dequeue(waiting, ints([3, 8, 0, 0, 0]))
  index = push(index, 8, 3)
  assert queue(index) == [5, 6, 8, 3]
  index, first = taken(index, 4)
  index, second = taken(index, 4)
  assert first + second == [5, 6, 8, 3]


def test_the_ring_is_compacted_when_its_end_comes_near(waiting):
  index = waiting
  for _ in range(7):  # 4 + 7 * 4 = 32 of 36 slots are used
    index = push(dequeue(index, ints([5, 8, 6, 3, 0])), 5, 8, 6, 3)
  assert index.ring.tail == 32
  same = compact_queue(index, jnp.int32(4))
  assert same.ring.tail == 32
  packed = compact_queue(index, jnp.int32(5))
  assert packed.ring.head == 0 and packed.ring.tail == 4
  assert queue(packed) == [5, 8, 6, 3]
  assert packed.ring.queue[:4].tolist() == [5, 8, 6, 3]
  assert packed.num_evictable == 4
  index, ids = taken(packed, 2)
  assert ids == [5, 8]
  assert taken(push(index), 4)[1] == [6, 3]


def test_compaction_forgets_who_was_evicted_or_adopted(waiting):
  index, ids = taken(waiting, 1)
  assert ids == [5]
  index = dequeue(index, ints([6, 0, 0, 0, 0]))
  index = compact_queue(index, jnp.int32(3 * N - 3))
  assert queue(index) == [8, 3]
  assert index.ring.queue[:3].tolist() == [8, 3, 0] and index.ring.tail == 2
