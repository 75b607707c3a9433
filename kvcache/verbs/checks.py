"""Invariants of a Context, checked eagerly and inside `jax.jit`.

Each invariant is a pure function of the context that yields one boolean, so the same
code runs on the host, in a trace and under `vmap`. They look at every block and every
table entry: for tests and debugging, not for every step of a service.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
from jax.core import Tracer
from jax.experimental import checkify
import jax.numpy as jnp

from kvcache.context import as_context, Context
from kvcache.errors import InvariantError
from kvcache.parts import ragged, windows
from kvcache.parts.blocks import BlockPool
from kvcache.parts.ring import EvictionRing
from kvcache.parts.state_rows import StateRows
from kvcache.parts.windows import WindowBlocks


def invariants(ctx: Context) -> dict[str, Array]:
  """Evaluates every invariant: sentence -> `[]` bool, True where it holds."""
  held: dict[str, Array] = {}
  pool, table, index, config = ctx.pool, ctx.sequences, ctx.prefix, ctx.config
  block = jnp.arange(config.num_blocks, dtype=jnp.int32)
  usable = block > 0
  refs = pool.ref_counts

  is_free = _times_free(pool) > 0
  held |= _pool_invariants(pool)
  is_cached = index.way_of > 0
  kinds = (
    is_free.astype(jnp.int32)
    + (is_cached & (refs == 0)).astype(jnp.int32)
    + (refs > 0).astype(jnp.int32)
  )
  held["every usable block is free, cached and unheld, or referenced"] = jnp.all(
    (kinds == 1) | ~usable
  )

  tables = table.block_tables
  column = jnp.arange(config.max_blocks_per_seq, dtype=jnp.int32)[None]
  used = column < table.num_blocks[:, None]
  safe = jnp.clip(tables, 0, config.num_blocks - 1)
  held["table entries are in range"] = jnp.all(safe == tables)
  held["tables are dense"] = jnp.all((tables > 0) == used)
  counts = _times_named(safe, used, refs.size)
  held["ref_counts equal the table entries naming each block"] = jnp.all(
    (counts == refs) & (usable | (refs == 0))
  )
  ordered = jnp.sort(tables, axis=1)
  held["ids in a row are distinct"] = ~jnp.any(
    (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
  )
  size = config.block_size
  full = table.seq_lens // size
  held["rows have blocks for their tokens"] = jnp.all(
    (table.seq_lens >= 0) & (-(-table.seq_lens // size) <= table.num_blocks)
  )
  is_tail = used & (column >= full[:, None])
  held["blocks being written have one reference and are not cached"] = ~jnp.any(
    is_tail & ((refs[safe] != 1) | is_cached[safe])
  )
  empty = (
    (table.num_blocks == 0)
    & (table.seq_lens == 0)
    & (table.num_published == 0)
    & (table.num_frozen == 0)
    & ~table.is_sealed
  )
  held["inactive rows are empty"] = jnp.all(table.is_active | empty)
  held["published <= frozen <= full blocks"] = jnp.all(
    (table.num_published <= table.num_frozen) & (table.num_frozen <= full)
  )
  published = used & (column < table.num_published[:, None])
  before = jnp.pad(safe[:, :-1], ((0, 0), (1, 0)))
  held["published blocks are cached"] = jnp.all(is_cached[safe] | ~published)
  beyond = used & (column >= table.num_frozen[:, None])
  held["blocks that are not frozen have one reference and are not cached"] = ~jnp.any(
    beyond & ((refs[safe] != 1) | is_cached[safe])
  )
  shared = used & (refs[safe] > 1) & ~is_cached[safe]
  held["a shared block is cached, or its rows are sealed"] = jnp.all(
    table.is_sealed[:, None] | ~shared
  )
  cached_here = used & is_cached[safe]
  held["depth of a cached block is its column"] = jnp.all(
    (index.depth[safe] == column) | ~cached_here
  )
  held["parent of a cached block is the block one column before"] = jnp.all(
    (index.parent[safe] == before) | ~cached_here
  )
  held["namespace of a cached block is its row's"] = jnp.all(
    (index.namespace[safe] == table.namespaces[:, None]) | ~cached_here
  )

  parent = jnp.clip(index.parent, 0, config.num_blocks - 1)
  has_parent = is_cached & (parent > 0)
  held["parents of cached blocks are cached"] = jnp.all(is_cached[parent] | ~has_parent)
  held["roots have depth 0, children one more than their parent"] = jnp.all(
    jnp.where(has_parent, index.depth == index.depth[parent] + 1, index.depth == 0)
    | ~is_cached
  )
  to_parent = ragged.masked(parent, has_parent, config.num_blocks)
  children = jnp.zeros_like(refs).at[to_parent].add(1, mode="drop")
  held["num_children counts the cached children"] = jnp.all(
    (children == index.num_children) | ~is_cached
  )
  held["a parent has at least the references of a child"] = jnp.all(
    (refs[parent] >= (refs > 0).astype(refs.dtype)) | ~has_parent
  )
  ways = index.way_ids.reshape(-1)
  way = jnp.arange(ways.shape[0], dtype=jnp.int32)
  safe_ways = jnp.clip(ways, 0, config.num_blocks - 1)
  held["ways and blocks name each other"] = jnp.all(
    (ways == 0) | (index.way_of[safe_ways] == way + 1)
  ) & jnp.all(~is_cached | (ways[jnp.maximum(index.way_of - 1, 0)] == block))
  held["equal full prefixes have one block"] = _no_twins(ctx, is_cached)

  ring = index.ring
  held |= _ring_invariants(ring, is_cached & (refs == 0))
  waits = ring.queue_pos > 0
  held["in the ring a child stands before its parent"] = jnp.all(
    ~(waits & has_parent & waits[parent]) | (ring.queue_pos < ring.queue_pos[parent])
  )
  in_use = ragged.sum_int(refs > 0)
  held["capacity is conserved"] = (
    pool.num_free + index.num_evictable + in_use == config.num_blocks - 1
  )
  if ctx.state_rows is not None:
    for sentence, holds in _state_invariants(ctx, ctx.state_rows, is_free).items():
      held[f"states: {sentence}"] = holds
  for window in ctx.windows:
    for sentence, holds in _window_invariants(ctx, window).items():
      held[f"sliding window of {window.sliding_window}: {sentence}"] = holds
  return held


def _pool_invariants(pool: BlockPool) -> dict[str, Array]:
  listed = jnp.arange(pool.num_blocks, dtype=jnp.int32) < pool.num_free
  in_range = (pool.free_list > 0) & (pool.free_list < pool.num_blocks)
  times_free = _times_free(pool)
  return {
    "num_free is between 0 and N - 1": (pool.num_free >= 0)
    & (pool.num_free < pool.num_blocks),
    "free ids are in range": jnp.all(in_range | ~listed),
    "free ids are distinct": jnp.all(times_free <= 1),
    "free blocks have no references": ~jnp.any(
      (times_free > 0) & (pool.ref_counts > 0)
    ),
  }


def _times_free(pool: BlockPool) -> Array:
  """`[N]` int32: how often the free list names each block."""
  listed = jnp.arange(pool.num_blocks, dtype=jnp.int32) < pool.num_free
  ids = jnp.clip(pool.free_list, 0, pool.num_blocks)
  at = ragged.masked(ids, listed, pool.num_blocks)
  return jnp.zeros_like(pool.ref_counts).at[at].add(1, mode="drop")


def _ring_invariants(ring: EvictionRing, belongs: Array) -> dict[str, Array]:
  """Args: the ring, and `[N]` bool, what is to be in it."""
  waits = ring.queue_pos > 0
  slot = jnp.clip(ring.queue_pos - 1, 0, ring.size - 1)
  block = jnp.arange(waits.shape[0], dtype=jnp.int32)
  is_named = (ring.queue[slot] == block) & (slot >= ring.head) & (slot < ring.tail)
  return {
    "exactly what is cached and held by nobody is in the ring": jnp.all(
      waits == belongs
    ),
    "num_evictable counts it": ring.num_waiting == ragged.sum_int(waits),
    "ring entries name their blocks": jnp.all(~waits | is_named),
  }


def _window_invariants(ctx: Context, window: WindowBlocks) -> dict[str, Array]:
  table, index, pool = ctx.sequences, ctx.prefix, window.pool
  num, refs = window.num_blocks, window.pool.ref_counts
  block = jnp.arange(num, dtype=jnp.int32)
  is_attached = window.owner_ids > 0
  held = _pool_invariants(pool)
  held |= _ring_invariants(window.ring, is_attached & (refs == 0))
  kinds = (
    _times_free(pool)
    + (is_attached & (refs == 0)).astype(jnp.int32)
    + (refs > 0).astype(jnp.int32)
  )
  held["every block is free, attached and unheld, or referenced"] = jnp.all(
    (kinds == 1) | (block == 0)
  )
  column = jnp.arange(window.block_tables.shape[1], dtype=jnp.int32)[None]
  used = (column >= window.first_blocks[:, None]) & (column < table.num_blocks[:, None])
  safe = jnp.clip(window.block_tables, 0, num - 1)
  held["tables are in range and dense from their first block on"] = jnp.all(
    (safe == window.block_tables) & ((safe > 0) == used)
  )
  counts = _times_named(safe, used, refs.size)
  held["ref_counts equal the table entries naming each block"] = jnp.all(counts == refs)
  needed = windows.first_needed(window, table.seq_lens)
  held["rows hold what their next token needs"] = jnp.all(window.first_blocks <= needed)
  held["blocks being written have one reference and are not attached"] = ~jnp.any(
    used
    & (column >= (table.seq_lens // window.block_size)[:, None])
    & ((refs[safe] != 1) | is_attached[safe])
  )
  owner = jnp.clip(window.owner_ids, 0, ctx.config.num_blocks - 1)
  attached = jnp.clip(window.attached_ids, 0, num - 1)
  cached = jnp.arange(ctx.config.num_blocks, dtype=jnp.int32)
  held["attached blocks and their owners name each other"] = jnp.all(
    ~is_attached | (window.attached_ids[owner] == block)
  ) & jnp.all((attached == 0) | (window.owner_ids[attached] == cached))
  held["owners are cached"] = jnp.all((attached == 0) | (index.way_of > 0))
  held["who holds an attached block holds its owner in that column"] = jnp.all(
    ~used | ~is_attached[safe] | (owner[safe] == table.block_tables)
  )
  return held


def _state_invariants(
  ctx: Context, rows: StateRows, is_free_block: Array
) -> dict[str, Array]:
  table, config, pool = ctx.sequences, ctx.config, rows.pool
  state = jnp.arange(config.num_states, dtype=jnp.int32)
  held = _pool_invariants(pool)
  own = jnp.clip(rows.state_ids, 0, config.num_states - 1)
  times_live = _times_named(own, own > 0, config.num_states)
  is_snapshot = rows.block_ids > 0
  times = _times_free(pool) + times_live + is_snapshot.astype(jnp.int32)
  held["every state is free, live in one row, or the snapshot of one block"] = jnp.all(
    jnp.where(state == 0, times == times_live, times == 1)
  )
  held["live rows, and they alone, own states"] = jnp.all(
    (rows.state_ids > 0) == table.is_active[:, None]
  ) & jnp.all(own == rows.state_ids)
  held["states in use have one reference"] = jnp.all(
    (pool.ref_counts == 1) == ((times_live > 0) | is_snapshot)
  ) & jnp.all((pool.ref_counts == 0) | (pool.ref_counts == 1))
  block = jnp.arange(config.num_blocks, dtype=jnp.int32)
  snapshots = jnp.clip(rows.snapshot_ids, 0, config.num_states - 1)
  blocks_of = jnp.clip(rows.block_ids, 0, config.num_blocks - 1)
  held["snapshots and blocks name each other"] = jnp.all(
    (snapshots == 0) | (rows.block_ids[snapshots] == block)
  ) & jnp.all(~is_snapshot | (rows.snapshot_ids[blocks_of] == state))
  held["blocks of snapshots are not free"] = ~jnp.any((snapshots > 0) & is_free_block)
  column = jnp.maximum(table.seq_lens // config.block_size - 1, 0)
  row = jnp.arange(config.max_seqs, dtype=jnp.int32)
  last = jnp.clip(table.block_tables[row, column], 0, config.num_blocks - 1)
  ends = (table.seq_lens > 0) & (table.seq_lens % config.block_size == 0)
  reads_snapshot = ends & (rows.source_ids == snapshots[last]) & (rows.source_ids > 0)
  is_own = jnp.any(rows.source_ids[:, None] == rows.state_ids, axis=1)
  reads_own = (table.seq_lens > 0) & is_own
  reads_zeros = (table.seq_lens == 0) & (rows.source_ids == 0)
  held["rows read a state of their own, their last block's snapshot, or zeros"] = (
    jnp.all(reads_snapshot | reads_own | reads_zeros)
  )
  held["every inactive row has states to come"] = rows.num_spare >= 0
  held["the null state is zero"] = jnp.all(
    jnp.stack([jnp.all(x[:, 0] == 0) for x in jax.tree.leaves(ctx.states)])
  )
  return held


def _times_named(ids: Array, mask: Array, num: int) -> Array:
  """`[num]` int32: how many of the entries in `mask` name each id."""
  return jnp.zeros(num, jnp.int32).at[ids].add(mask.astype(jnp.int32))


def _no_twins(ctx: Context, is_cached: Array) -> Array:
  """Whether no two cached blocks have the same parent, namespace and tokens."""
  index = ctx.prefix
  keys = (index.prefix_hash[:, 0], index.prefix_hash[:, 1], index.parent)
  order = jnp.lexsort((*keys, ~is_cached))
  a, b = order[:-1], order[1:]
  same = (
    is_cached[a]
    & is_cached[b]
    & (index.parent[a] == index.parent[b])
    & (index.namespace[a] == index.namespace[b])
    & jnp.all(index.block_tokens[a] == index.block_tokens[b], axis=-1)
  )
  return ~jnp.any(same)


_jitted_invariants = jax.jit(invariants)


def check_invariants(ctx: Context) -> None:
  """Raises if the context is one that no sequence of verbs can make.

  Outside of a trace the error names every broken invariant. Inside, each becomes a
  `checkify.check`; wrap the function with `checked`, or with `checkify.checkify`
  yourself.

  Raises:
    InvariantError: Eagerly, if any invariant is broken.

  Example:
    >>> kv.check_invariants(started)
    >>> wrong = started.replace(pool=started.pool.replace(num_free=jnp.int32(0)))
    >>> kv.check_invariants(wrong)
    Traceback (most recent call last):
    kvcache.errors.InvariantError: ...
  """
  ctx = as_context(ctx)
  if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(ctx)):
    for sentence, holds in invariants(ctx).items():
      checkify.check(holds, f"broken invariant: {sentence}")
    return
  results = jax.device_get(_jitted_invariants(ctx))
  broken = [sentence for sentence, holds in results.items() if not holds]
  if broken:
    raise InvariantError("broken invariants: " + "; ".join(broken))


def checked(transition: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a transition so that every `Context` it returns is verified, inside jit.

  The wrapped function compiles the transition together with the checks and raises with
  the name of the first broken invariant.

  Args:
    transition: A function that takes any arguments and returns a pytree holding
      contexts.

  Raises:
    InvariantError: When a returned context breaks an invariant.
  """

  def is_context(node: object) -> bool:
    return isinstance(node, Context)

  @functools.wraps(transition)
  def verified(*args: Any, **kwargs: Any) -> Any:
    out = transition(*args, **kwargs)
    for node in jax.tree.leaves(out, is_leaf=is_context):
      if is_context(node):
        check_invariants(node)
    return out

  compiled = jax.jit(checkify.checkify(verified, errors=checkify.user_checks))

  @functools.wraps(transition)
  def call(*args: Any, **kwargs: Any) -> Any:
    error, out = compiled(*args, **kwargs)
    message = error.get()
    if message is not None:
      raise InvariantError(message)
    return out

  return call
