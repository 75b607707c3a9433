"""EvictionRing: which blocks to give up first, in the order they were let go.

Blocks enter at the end when their last holder lets go. An entry counts while its
block's `queue_pos` still names it, so taking a block out of the middle is one store,
and the order is least recently used without a tree and without a sort.
"""

from jax import Array, lax
import jax.numpy as jnp

from kvcache.parts import ragged
from kvcache.printing import Node

_SLOTS_PER_BLOCK = 3
_MARK = -(1 << 30)


class EvictionRing(Node, kw_only=True):
  """A queue over `N` blocks.

  Attributes:
    queue: `[3 N]` int32. Block ids; entries from `head` up to `tail` may count.
    queue_pos: `[N]` int32. One plus a block's place in the queue, 0 if it is not in it.
    head: `[]` int32.
    tail: `[]` int32.
    num_waiting: `[]` int32. Entries that count.
  """

  queue: Array
  queue_pos: Array
  head: Array
  tail: Array
  num_waiting: Array

  @property
  def num_blocks(self) -> int:
    """`N`."""
    return self.queue_pos.shape[-1]

  @property
  def size(self) -> int:
    """Slots of the queue. The factor makes its compaction amortised O(1)."""
    return self.queue.shape[-1]


def init(num_blocks: int) -> EvictionRing:
  """Makes an empty ring."""

  def zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.int32)

  return EvictionRing(
    queue=zeros(_SLOTS_PER_BLOCK * num_blocks),
    queue_pos=zeros(num_blocks),
    head=zeros(),
    tail=zeros(),
    num_waiting=zeros(),
  )


def make_room(ring: EvictionRing, num_pushes: Array) -> EvictionRing:
  """Makes room at the end for `num_pushes <= N` blocks.

  Costs the queue's size, but only once per at least `N` pushes: afterwards it holds at
  most `N` entries in its `3 N` slots.
  """

  def compact(ring: EvictionRing) -> EvictionRing:
    at = jnp.arange(ring.size, dtype=jnp.int32)
    counts = (at >= ring.head) & (at < ring.tail)
    # Not `at + 1` on the other side: it would be hoisted and computed in every call.
    counts &= ring.queue_pos[ring.queue] - 1 == at
    to = ragged.masked(ragged.ranks(counts), counts, ring.size)
    block = ragged.masked(ring.queue, counts, ring.num_blocks)
    return ring.replace(
      queue=jnp.zeros_like(ring.queue).at[to].set(ring.queue, mode="drop"),
      queue_pos=ring.queue_pos.at[block].set(to + 1, mode="drop"),
      head=jnp.zeros_like(ring.head),
      tail=ragged.sum_int(counts),
    )

  # Runs at most once: afterwards the tail is at most N, and 2 N slots are free. A
  # `while` instead of a `cond` because the arrays are then updated in place.
  return lax.while_loop(lambda ring: ring.tail + num_pushes > ring.size, compact, ring)


def push(ring: EvictionRing, block_ids: Array, mask: Array) -> EvictionRing:
  """Puts distinct blocks at the end, in list order; `make_room` came before."""
  at = ring.tail + ragged.ranks(mask)
  num = ragged.sum_int(mask)
  to = ragged.masked(at, mask, ring.size)
  block = ragged.masked(block_ids, mask, ring.num_blocks)
  return ring.replace(
    queue=ring.queue.at[to].set(block_ids, mode="drop"),
    queue_pos=ring.queue_pos.at[block].set(at + 1, mode="drop"),
    tail=ring.tail + num,
    num_waiting=ring.num_waiting + num,
  )


def remove(ring: EvictionRing, block_ids: Array) -> EvictionRing:
  """Takes blocks out. Ids may repeat; those that are not in it are ignored."""
  before, queue_pos = ragged.read(ring.queue_pos, block_ids)
  waits = before > 0
  block = ragged.masked(block_ids, waits, ring.num_blocks)
  marks = _MARK - jnp.arange(block_ids.shape[0], dtype=jnp.int32)
  found, queue_pos = ragged.read(queue_pos.at[block].min(marks, mode="drop"), block_ids)
  is_last = waits & (found == marks)
  return ring.replace(
    queue_pos=queue_pos.at[block].max(0, mode="drop"),
    num_waiting=ring.num_waiting - ragged.sum_int(is_last),
  )


def pop(
  ring: EvictionRing, count: Array, *, num_entries: int
) -> tuple[EvictionRing, Array, Array]:
  """Takes up to `count` blocks out of the next `num_entries` slots.

  Returns:
    `(ring, block_ids [E], mask [E])`.
  """
  entry = jnp.arange(num_entries, dtype=jnp.int32)
  at = ring.head + entry
  block_ids = ring.queue[jnp.minimum(at, ring.size - 1)]
  places, queue_pos = ragged.read(ring.queue_pos, block_ids)
  counts = (at < ring.tail) & (places == at + 1)
  mask = counts & (ragged.ranks(counts) < count)
  num = ragged.sum_int(mask)
  # The head moves past every slot looked at, but not past the entry after the last one
  # taken.
  num_seen = jnp.where(
    num == count, jnp.max(jnp.where(mask, entry + 1, 0)), jnp.int32(num_entries)
  )
  block = ragged.masked(block_ids, mask, ring.num_blocks)
  ring = ring.replace(
    queue_pos=queue_pos.at[block].set(0, mode="drop"),
    head=jnp.minimum(ring.head + num_seen, ring.tail),
    num_waiting=ring.num_waiting - num,
  )
  return ring, block_ids, mask
