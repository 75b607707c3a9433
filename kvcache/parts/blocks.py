"""BlockPool: which blocks are free, and how many sequences share each.

Allocation is a prefix sum over what each row needs, sharing is a scatter-add, releasing
costs what is released. The pool knows nothing of tokens or of the prefix index: whoever
releases says which blocks shall stay resident.
"""

from jax import Array
import jax.numpy as jnp

from kvcache.config import NULL_BLOCK
from kvcache.parts import ragged
from kvcache.printing import Node

_MARK = -(1 << 30)


class BlockPool(Node, kw_only=True):
  """A pool of `N` blocks, of which `NULL_BLOCK` is never handed out.

  Attributes:
    free_list: `[N]` int32. A stack of free block ids; only the first `num_free` entries
      count.
    num_free: `[]` int32. Height of the stack.
    ref_counts: `[N]` int32. How many table entries name each block.
  """

  free_list: Array
  num_free: Array
  ref_counts: Array

  @property
  def num_blocks(self) -> int:
    """`N`, the null block included."""
    return self.free_list.shape[-1]


class Allocation(Node, kw_only=True):
  """Blocks handed out by one `allocate`, as a flat list.

  Attributes:
    block_ids: `[E]` int32, `NULL_BLOCK` past the last one.
    rows: `[E]` int32. The row that owns each.
    offsets: `[E]` int32. Which of the row's new blocks it is.
    is_valid: `[E]` bool.
  """

  block_ids: Array
  rows: Array
  offsets: Array
  is_valid: Array


def init(num_blocks: int) -> BlockPool:
  """Makes a pool in which every block but the null block is free; low ids go first."""
  ids = jnp.arange(num_blocks, dtype=jnp.int32)
  return BlockPool(
    free_list=num_blocks - 1 - ids,  # past the top stands NULL_BLOCK
    num_free=jnp.int32(num_blocks - 1),
    ref_counts=jnp.zeros(num_blocks, jnp.int32),
  )


def allocate(
  pool: BlockPool, counts: Array, *, num_entries: int
) -> tuple[BlockPool, Allocation]:
  """Hands out `counts[s]` blocks to each row, with one reference each.

  Args:
    pool: The pool.
    counts: `[S]` int32. The caller has made sure that their sum is at most `num_free`
      and `num_entries` (`ragged.first_come`).
    num_entries: `E`, static bound on the sum.

  Returns:
    The pool after, and the blocks.
  """
  entries = ragged.expand(counts, num_entries)
  entry = jnp.arange(num_entries, dtype=jnp.int32)
  at = jnp.maximum(pool.num_free - 1 - entry, 0)
  block_ids = jnp.where(entries.is_valid, pool.free_list[at], NULL_BLOCK)
  to = ragged.masked(block_ids, entries.is_valid, pool.num_blocks)
  pool = pool.replace(
    num_free=pool.num_free - entries.total,
    ref_counts=pool.ref_counts.at[to].set(1, mode="drop"),
  )
  return pool, Allocation(
    block_ids=block_ids,
    rows=entries.rows,
    offsets=entries.offsets,
    is_valid=entries.is_valid,
  )


def allocate_one_each(
  pool: BlockPool, wants: Array, *, ranks: Array | None = None
) -> tuple[BlockPool, Array]:
  """Hands out one block to each row that wants one: `allocate` in a straight line.

  Args:
    pool: The pool.
    wants: `[S]` bool. The caller has made sure that at most `num_free` are set.
    ranks: `[S]` int32. How many of the others that want one come before each, if the
      caller knows already.

  Returns:
    The pool after, and `[S]` int32 block ids, `NULL_BLOCK` where none was wanted.
  """
  if ranks is None:
    ranks = ragged.ranks(wants)
  at = jnp.maximum(pool.num_free - 1 - ranks, 0)
  block_ids = jnp.where(wants, pool.free_list[at], NULL_BLOCK)
  to = ragged.masked(block_ids, wants, pool.num_blocks)
  pool = pool.replace(
    num_free=pool.num_free - ragged.sum_int(wants),
    ref_counts=pool.ref_counts.at[to].set(1, mode="drop"),
  )
  return pool, block_ids


def taken(before: BlockPool, after: BlockPool, *, num_entries: int) -> Array:
  """The blocks handed out between two states of a pool, if none came back meanwhile.

  Args:
    before: The pool before.
    after: The pool after, of which `before` had more free.
    num_entries: `E`, static bound on their number.

  Returns:
    `[E]` int32 block ids, `N` past the last one.
  """
  at = after.num_free + jnp.arange(num_entries, dtype=jnp.int32)
  block_ids = before.free_list[jnp.minimum(at, before.num_blocks - 1)]
  return ragged.masked(block_ids, at < before.num_free, before.num_blocks)


def share(pool: BlockPool, block_ids: Array) -> BlockPool:
  """Adds one reference per listed block. Ids may repeat; `NULL_BLOCK` is ignored."""
  to = ragged.masked(block_ids, block_ids != NULL_BLOCK, pool.num_blocks)
  return pool.replace(ref_counts=pool.ref_counts.at[to].add(1, mode="drop"))


def release(
  pool: BlockPool, block_ids: Array, *, keep: Array
) -> tuple[BlockPool, Array]:
  """Gives back one reference to each listed block.

  Blocks that reach zero references return to the free list, except where `keep` is set:
  those stay resident so that a later sequence with the same prefix can adopt them. Ids
  may repeat; each occurrence gives back one reference. `NULL_BLOCK` and blocks without
  references are ignored.

  Args:
    pool: The pool that owns the blocks.
    block_ids: `[E]` int32.
    keep: `[E]` bool. Entries whose block stays out of the free list.

  Returns:
    The pool after, and `[E]` bool: set at the last occurrence of each block that
      reached zero
    references.
  """
  before, refs = ragged.read(pool.ref_counts, block_ids)
  held = (block_ids != NULL_BLOCK) & (before > 0)
  to = ragged.masked(block_ids, held, pool.num_blocks)
  after, refs = ragged.read(refs.at[to].add(-1, mode="drop"), block_ids)
  is_zero = held & (after <= 0)
  # Equal ids find their last occurrence by a scatter-min of marks into the counts
  # themselves; the same clamp that wipes the marks also stops a count from going below
  # zero.
  marks = _MARK - jnp.arange(block_ids.shape[0], dtype=jnp.int32)
  to_zero = ragged.masked(block_ids, is_zero, pool.num_blocks)
  found, refs = ragged.read(refs.at[to_zero].min(marks, mode="drop"), block_ids)
  is_last = is_zero & (found == marks)
  refs = refs.at[to_zero].max(0, mode="drop")
  pool = push(pool.replace(ref_counts=refs), block_ids, is_last & ~keep)
  return pool, is_last


def release_exclusive(pool: BlockPool, block_ids: Array, ranks: Array) -> BlockPool:
  """Frees blocks that have one reference and are named once: a cheap `release`.

  Args:
    pool: The pool.
    block_ids: `[E]` int32. `NULL_BLOCK` is ignored.
    ranks: `[E]` int32. How many blocks stand before each one in the list.
  """
  mask = block_ids != NULL_BLOCK
  to = ragged.masked(block_ids, mask, pool.num_blocks)
  at = ragged.masked(pool.num_free + ranks, mask, pool.num_blocks)
  return pool.replace(
    free_list=pool.free_list.at[at].set(block_ids, mode="drop"),
    num_free=pool.num_free + ragged.sum_int(mask),
    ref_counts=pool.ref_counts.at[to].set(0, mode="drop"),
  )


def push(pool: BlockPool, block_ids: Array, mask: Array) -> BlockPool:
  """Puts the blocks in `mask` on the free list: distinct ones without references."""
  at = ragged.masked(pool.num_free + ragged.ranks(mask), mask, pool.num_blocks)
  return pool.replace(
    free_list=pool.free_list.at[at].set(block_ids, mode="drop"),
    num_free=pool.num_free + ragged.sum_int(mask),
  )
