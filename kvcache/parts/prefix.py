"""PrefixIndex: which blocks hold which tokens, and which to give up first.

Two structures over the same `N` blocks:

*   A set-associative table from hash to block. A bucket has a fixed number of ways,
    each a tag beside a block id; a lookup reads them all. A block knows its own way, so
    removing it clears that way directly: no tombstones, no probing. An insert that
    finds its bucket full, or its tag there with other tokens, is given up; a block that
    is not indexed is only a lost hit.
*   A ring of evictable blocks in the order in which their last holder let go, children
    before parents. That is least recently used with leaves first, because every holder
    of a child also holds its parent.

A hit is exact: tokens, namespace and the parent block are compared, never the hash
alone.
"""

from jax import Array, lax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.config import NULL_BLOCK
from kvcache.parts import hashing, ragged, ring
from kvcache.parts.ring import EvictionRing
from kvcache.printing import Node

_MARK = -(1 << 30)


class PrefixIndex(Node, kw_only=True):
  """What is known of each block's tokens. "Cached" means in the index.

  Attributes:
    block_tokens: `[N, block_size]` int32. Tokens of every block in use or cached.
    prefix_hash: `[N, 2]` uint32. Hash of the tokens up to the block's end, if cached.
    parent: `[N]` int32. The block before it in its prefix, `NULL_BLOCK` for a first
      block.
    depth: `[N]` int32. Its column in every row that holds it.
    namespace: `[N]` int32. Namespace of the prefix.
    num_children: `[N]` int32. Cached blocks whose parent it is.
    way_of: `[N]` int32. One plus its place in the flat table, 0 if not cached.
    way_ids: `[B, W]` int32. The block ids of `B` buckets, `NULL_BLOCK` for an empty
      way.
    way_tags: `[B, W]` uint32. Second lane of each block's hash.
    ring: Cached blocks that nobody holds, the next to be evicted first.
    salt: `[2]` uint32. Makes hashes of this context differ from those of others.
  """

  block_tokens: Array
  prefix_hash: Array
  parent: Array
  depth: Array
  namespace: Array
  num_children: Array
  way_of: Array
  way_ids: Array
  way_tags: Array
  ring: EvictionRing
  salt: Array

  @property
  def num_blocks(self) -> int:
    """`N`."""
    return self.parent.shape[-1]

  @property
  def block_size(self) -> int:
    """Token positions in one block."""
    return self.block_tokens.shape[-1]

  @property
  def num_evictable(self) -> Array:
    """`[]` int32: cached blocks that nobody holds."""
    return self.ring.num_waiting

  def is_cached(self, block_ids: Array) -> Array:
    """Whether each listed block is in the index."""
    return self.way_of[block_ids] > 0


def init(
  *,
  num_blocks: int,
  block_size: int,
  num_buckets: int,
  num_ways: int,
  salt: Array,
) -> PrefixIndex:
  """Makes an empty index."""

  def zeros(*shape: int, dtype: DTypeLike = jnp.int32) -> Array:
    return jnp.zeros(shape, dtype)

  return PrefixIndex(
    block_tokens=zeros(num_blocks, block_size),
    prefix_hash=zeros(num_blocks, hashing.LANES, dtype=jnp.uint32),
    parent=zeros(num_blocks),
    depth=zeros(num_blocks),
    namespace=zeros(num_blocks),
    num_children=zeros(num_blocks),
    way_of=zeros(num_blocks),
    way_ids=zeros(num_buckets, num_ways),
    way_tags=zeros(num_buckets, num_ways, dtype=jnp.uint32),
    ring=ring.init(num_blocks),
    salt=salt,
  )


def store_tokens(index: PrefixIndex, slots: Array, tokens: Array) -> PrefixIndex:
  """Remembers `tokens [T]` at write addresses `slots [T]`; one past the end drops."""
  flat = index.block_tokens.reshape(-1).at[slots].set(tokens, mode="drop")
  return index.replace(block_tokens=flat.reshape(index.block_tokens.shape))


def clear_tokens(index: PrefixIndex, block_ids: Array) -> PrefixIndex:
  """Forgets whole blocks of tokens: `block_ids [E]` int32; `N` drops the entry."""
  block_tokens = index.block_tokens.at[block_ids].set(0, mode="drop")
  return index.replace(block_tokens=block_tokens)


def copy_tokens(index: PrefixIndex, source: Array, target: Array) -> PrefixIndex:
  """Copies whole blocks of tokens; a target of `N` drops the entry."""
  rows = ragged.hold(index.block_tokens[source])
  return index.replace(
    block_tokens=index.block_tokens.at[target].set(rows, mode="drop")
  )


# --- Finding --------------------------------------------------------------------------


def match(
  index: PrefixIndex, tokens: Array, num_full: Array, namespaces: Array
) -> tuple[Array, Array]:
  """Finds the longest cached prefix of each prompt, in whole blocks.

  Args:
    index: The index.
    tokens: `[A, C, block_size]` int32. The prompts' first `C` blocks.
    num_full: `[A]` int32. How many of them may be matched.
    namespaces: `[A]` int32.

  Returns:
    `(block_ids [A, C], num_hits [A])`: the first `num_hits[a]` ids are the cached
    prefix, the others are `NULL_BLOCK`.
  """
  digests = hashing.digest(tokens)
  hashes = hashing.chain_from_root(digests, hashing.root(index.salt, namespaces))
  candidates = _lookup(index, hashes)[1]
  parents = jnp.pad(candidates[:, :-1], ((0, 0), (1, 0)))
  column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  hit = (
    _is_same(index, candidates, tokens, namespaces[:, None])
    & (index.parent[candidates] == parents)
    & (column < num_full[:, None])
  )
  num_hits = jnp.min(
    jnp.where(hit, tokens.shape[1], column), axis=1, initial=tokens.shape[1]
  ).astype(jnp.int32)
  return jnp.where(column < num_hits[:, None], candidates, NULL_BLOCK), num_hits


def _bucket(index: PrefixIndex, hashes: Array) -> Array:
  mask = jnp.uint32(index.way_ids.shape[0] - 1)
  return (hashing.mix(hashes[..., 0]) & mask).astype(jnp.int32)


def _lookup(index: PrefixIndex, hashes: Array) -> tuple[Array, Array, Array]:
  """Reads buckets of `hashes [..., 2]`: `(buckets, candidates, way_ids [..., W])`."""
  buckets = _bucket(index, hashes)
  ids = index.way_ids[buckets]
  is_match = index.way_tags[buckets] == hashes[..., 1:]
  return buckets, jnp.max(jnp.where(is_match, ids, NULL_BLOCK), axis=-1), ids


def _is_same(
  index: PrefixIndex, candidates: Array, tokens: Array, namespaces: Array
) -> Array:
  """Whether candidate blocks truly hold the tokens; says nothing of their parents."""
  return (
    (candidates != NULL_BLOCK)
    & jnp.all(index.block_tokens[candidates] == tokens, axis=-1)
    & (index.namespace[candidates] == namespaces)
  )


# --- Inserting ------------------------------------------------------------------------


class Insertion(Node, kw_only=True):
  """What became of each entry of one `insert`.

  Attributes:
    block_ids: `[E]` int32. The canonical block: the entry's own, or an equal one found.
    is_done: `[E]` bool. The block is in the index. Within a segment, a leading run.
    is_hopeless: `[E]` bool. The entry can never be inserted; at most one per segment.
  """

  block_ids: Array
  is_done: Array
  is_hopeless: Array


def insert(
  index: PrefixIndex,
  block_ids: Array,
  previous: Array,
  namespaces: Array,
  depths: Array,
  *,
  offsets: Array,
  is_valid: Array,
) -> tuple[PrefixIndex, Insertion]:
  """Puts full blocks into the index, or finds the equal ones that are there already.

  The entries are segments of consecutive blocks of a row. An entry that loses a way to
  an earlier entry of the same call is neither done nor hopeless and may be tried again.
  The first entry of the list is always done or hopeless, so trying again makes
  progress.

  Args:
    index: The index. `block_tokens` of the blocks are in place.
    block_ids: `[E]` int32.
    previous: `[E]` int32. The cached block before each segment's first one, else
      ignored.
    namespaces: `[E]` int32.
    depths: `[E]` int32.
    offsets: `[E]` int32. Place of each entry in its segment; a segment's entries are
      adjacent.
    is_valid: `[E]` bool.
  """
  entry = jnp.arange(block_ids.shape[0], dtype=jnp.int32)
  starts = entry - offsets
  is_first = offsets == 0
  tokens = index.block_tokens[block_ids]
  base_block = previous[starts]
  base = jnp.where(
    (base_block != NULL_BLOCK)[:, None],
    index.prefix_hash[base_block],
    hashing.root(index.salt, namespaces),
  )
  hashes = hashing.chain(
    hashing.digest(tokens), base, segment_starts=starts, offsets=offsets
  )
  buckets, candidates, ids = _lookup(index, hashes)
  is_hit = is_valid & _is_same(index, candidates, tokens, namespaces)
  canonical = jnp.where(is_hit, candidates, block_ids)
  parents = jnp.where(is_first, previous, jnp.roll(canonical, 1))
  is_true_hit = is_hit & (index.parent[candidates] == parents)

  # New blocks take the first empty way, counted from a place the tag chooses, so that
  # two blocks of one call rarely want the same one, and two with one tag always do. The
  # earlier entry wins. So a bucket never holds a tag twice, and one compare is enough.
  num_ways = index.way_ids.shape[1]
  turn = (hashes[:, 1] % jnp.uint32(num_ways)).astype(jnp.int32)
  ways = (turn[:, None] + jnp.arange(num_ways, dtype=jnp.int32)[None]) % num_ways
  is_empty = jnp.take_along_axis(ids, ways, axis=1) == NULL_BLOCK
  way = jnp.take_along_axis(ways, jnp.argmax(is_empty, axis=1)[:, None], axis=1)[:, 0]
  place = buckets * num_ways + way
  wants = is_valid & (candidates == NULL_BLOCK) & jnp.any(is_empty, axis=1)
  flat_ids = index.way_ids.reshape(-1)
  num_places = flat_ids.shape[0]
  marks = entry + _MARK
  to = ragged.masked(place, wants, num_places)
  found, flat_ids = ragged.read(flat_ids.at[to].min(marks, mode="drop"), place)
  has_won = wants & (found == marks)

  is_good = is_true_hit | has_won | ~is_valid
  last_bad = lax.cummax(jnp.where(is_good, -1, entry))
  is_done = is_valid & (last_bad < starts)
  is_first_bad = ~is_good & (jnp.where(is_first, -1, jnp.roll(last_bad, 1)) < starts)
  has_lost = wants & ~has_won

  is_new = is_done & ~is_hit
  flat_ids = flat_ids.at[to].max(0, mode="drop")  # Wipes the marks.
  place = ragged.masked(place, is_new, num_places)
  block = ragged.masked(block_ids, is_new, index.num_blocks)
  family = ragged.masked(parents, is_new & (parents != NULL_BLOCK), index.num_blocks)

  def put(field: Array, value: Array) -> Array:
    return field.at[block].set(value, mode="drop")

  index = index.replace(
    way_ids=flat_ids.at[place].set(block_ids, mode="drop").reshape(index.way_ids.shape),
    way_tags=index.way_tags.reshape(-1)
    .at[place]
    .set(hashes[:, 1], mode="drop")
    .reshape(index.way_tags.shape),
    way_of=put(index.way_of, place + 1),
    prefix_hash=put(index.prefix_hash, hashes),
    parent=put(index.parent, parents),
    depth=put(index.depth, depths),
    namespace=put(index.namespace, namespaces),
    num_children=put(index.num_children, jnp.zeros_like(block))
    .at[family]
    .add(1, mode="drop"),
  )
  return index, Insertion(
    block_ids=canonical, is_done=is_done, is_hopeless=is_first_bad & ~has_lost
  )


def remove(index: PrefixIndex, block_ids: Array, mask: Array) -> PrefixIndex:
  """Takes distinct cached blocks without cached children out of the index.

  Evictable blocks are still in the ring after this; the caller takes them out.
  """
  num_places = index.way_ids.size
  ways, way_of = ragged.read(index.way_of, block_ids)
  place = ragged.masked(ways - 1, mask, num_places)
  parents = index.parent[block_ids]
  family = ragged.masked(parents, mask & (parents != NULL_BLOCK), index.num_blocks)
  block = ragged.masked(block_ids, mask, index.num_blocks)
  return index.replace(
    way_ids=index.way_ids.reshape(-1)
    .at[place]
    .set(NULL_BLOCK, mode="drop")
    .reshape(index.way_ids.shape),
    way_of=way_of.at[block].set(0, mode="drop"),
    num_children=index.num_children.at[family].add(-1, mode="drop"),
  )


# --- Evicting -------------------------------------------------------------------------


def enqueue(index: PrefixIndex, block_ids: Array, mask: Array) -> PrefixIndex:
  """Makes distinct cached blocks evictable, children before parents.

  The caller has made room with `compact_queue`.
  """
  return index.replace(ring=ring.push(index.ring, block_ids, mask))


def dequeue(index: PrefixIndex, block_ids: Array) -> PrefixIndex:
  """Makes adopted blocks not evictable. Ids may repeat; others are ignored."""
  return index.replace(ring=ring.remove(index.ring, block_ids))


def compact_queue(index: PrefixIndex, num_pushes: Array) -> PrefixIndex:
  """Makes room for `num_pushes <= N` blocks that become evictable."""
  return index.replace(ring=ring.make_room(index.ring, num_pushes))


def pop(
  index: PrefixIndex, count: Array, *, num_entries: int
) -> tuple[PrefixIndex, Array, Array]:
  """Evicts up to `count` blocks from the ring's next `num_entries` slots.

  Returns:
    `(index, block_ids [E], mask [E])`: the evicted blocks, which are no longer cached.
  """
  waiting, block_ids, mask = ring.pop(index.ring, count, num_entries=num_entries)
  return remove(index.replace(ring=waiting), block_ids, mask), block_ids, mask
