"""Hashes, against the same arithmetic in Python's own integers, one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from kvcache.parts import hashing
from tests.fixtures.small import ints

M32 = 2**32 - 1
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)

digest = jax.jit(hashing.digest)
root = jax.jit(hashing.root)
chain_from_root = jax.jit(hashing.chain_from_root)


@jax.jit
def chain(digests, base, starts, offsets):
  return hashing.chain(digests, base, segment_starts=starts, offsets=offsets)


def chained(digests, base):
  """H_i = a * H_{i-1} + d_i modulo 2^32, serially."""
  out, state = [], [int(x) for x in base]
  for block in np.asarray(digests).tolist():
    state = [(a * h + d) & M32 for a, h, d in zip(MULTIPLIERS, state, block)]  # noqa: B905
    out.append(state)
  return np.array(out, np.uint32)


def random_words(seed, *shape):
  bits = np.random.default_rng(seed).integers(2**32, size=shape, dtype=np.uint32)
  return jnp.asarray(bits)


def test_mix_is_lowbias32():
  def lowbias32(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & M32
    x ^= x >> 15
    x = x * 0x846CA68B & M32
    return x ^ (x >> 16)

  words = [0, 1, 2, 0x80000000, M32, 123456789]
  mixed = hashing.mix(jnp.array(words, jnp.uint32))
  assert mixed.tolist() == [lowbias32(word) for word in words]
  assert mixed.dtype == jnp.uint32


def test_one_cumsum_gives_the_serial_chain():
  digests, roots = random_words(0, 3, 9, 2), random_words(1, 3, 2)
  hashes = chain_from_root(digests, roots)
  assert hashes.shape == (3, 9, 2) and hashes.dtype == jnp.uint32
  for mine, one_digests, one_root in zip(hashes, digests, roots, strict=True):
    np.testing.assert_array_equal(mine, chained(one_digests, one_root))


def test_segments_of_one_list_are_chains_of_their_own():
  lengths = [1, 4, 0, 3, 1]
  digests = random_words(2, sum(lengths), 2)
  ends = np.cumsum(lengths)
  bases = np.asarray(random_words(3, len(lengths), 2))
  segment = np.repeat(np.arange(len(lengths)), lengths)
  starts = (ends - lengths)[segment]
  offsets = np.arange(sum(lengths)) - starts
  hashes = chain(digests, jnp.asarray(bases[segment]), ints(starts), ints(offsets))
  for s, (length, end) in enumerate(zip(lengths, ends, strict=True)):
    mine = np.asarray(hashes)[end - length : end]
    want = chained(digests[end - length : end], bases[s]).reshape(-1, 2)
    np.testing.assert_array_equal(mine, want)


def test_a_chain_can_be_continued():
  """A prefix hashed in two pieces, as publishing does, has the hash of one piece."""
  digests, roots = random_words(4, 1, 9, 2), random_words(5, 1, 2)
  whole = chain_from_root(digests, roots)[0]
  tail, places = digests[0, 4:], jnp.arange(5, dtype=jnp.int32)
  base = jnp.broadcast_to(whole[3], (5, 2))
  pieces = chain(tail, base, jnp.zeros_like(places), places)
  np.testing.assert_array_equal(pieces, whole[4:])


def test_every_token_and_its_place_count():
  tokens = [[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 3, 5], [1, 2, 4, 3], [0, 2, 3, 4]]
  tokens += [[1, 2, 3, -4], [4, 3, 2, 1], [0, 0, 0, 0], [-1, -1, -1, -1]]
  for lane in np.asarray(digest(ints(tokens))).T:
    assert len(set(lane.tolist())) == len(tokens)


def test_lanes_are_independent_and_do_not_collide():
  tokens = np.random.default_rng(6).integers(50000, size=(1 << 14, 4), dtype=np.int32)
  first, second = np.asarray(digest(jnp.asarray(tokens))).T.astype(np.uint64)
  assert np.unique(first << np.uint64(32) | second).size == 1 << 14
  # Each lane alone fills its buckets like a fair die: chi-square over 256 buckets.
  for lane in (first, second, first ^ second):
    counts = np.bincount((lane & np.uint64(255)).astype(int), minlength=256)
    assert ((counts - 64) ** 2 / 64).sum() < 400  # 255 expected, 400 is 6 sigma


def test_roots_differ_by_namespace_and_by_salt():
  salts = [ints([0, 0]), ints([0, 1]), ints([1, 0])]
  names = ints([0, 1, -1, 7, 2**31 - 1, -(2**31)])
  roots = np.stack([root(salt.astype(jnp.uint32), names) for salt in salts])
  assert roots.shape == (3, 6, 2)
  assert np.unique(roots[0], axis=0).shape[0] == 6  # by namespace
  assert (roots[0, :, 1] != roots[1, :, 1]).all()  # each lane has a salt of its own
  assert (roots[0, :, 0] != roots[2, :, 0]).all()


def test_a_hash_depends_on_the_past_and_not_on_the_future():
  digests = random_words(7, 1, 6, 2)
  roots = random_words(8, 1, 2)
  changed = digests.at[0, 3].add(jnp.uint32(1))
  before, after = (chain_from_root(d, roots)[0] for d in (digests, changed))
  assert (before == after).all(axis=-1).tolist() == [True] * 3 + [False] * 3
