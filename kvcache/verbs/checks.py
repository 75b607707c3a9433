"""Invariants of a Context in chex's words, checked eagerly and inside `jax.jit`.

Shapes and dtypes are static assertions of chex: they hold of every trace. What values
must satisfy is a value assertion: it needs no preparation outside of a trace, and
`chex.chexify` turns it on inside. `chex.disable_asserts()` silences both.

Each invariant is a pure function of the context that yields one boolean, so the same
code runs on the host, in a trace and under `vmap`. They look at every block and every
table entry: for tests and debugging, not for every step of a service.
"""

from collections.abc import Callable
import functools
from typing import Any

import chex
import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from kvcache import context
from kvcache.config import CacheConfig
from kvcache.context import as_context, Context
from kvcache.errors import InvariantError
from kvcache.parts import ragged, windows
from kvcache.parts.blocks import BlockPool
from kvcache.parts.ring import EvictionRing
from kvcache.parts.state_rows import StateRows
from kvcache.parts.windows import WindowBlocks
from kvcache.verbs import sharding


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
  # What entries say of their blocks, in one gather. All [S, P].
  facts = (refs, is_cached.astype(jnp.int32))
  facts += (index.depth, index.parent, index.namespace)
  entry_refs, entry_cached, entry_depth, entry_parent, entry_namespace = jnp.unstack(
    jnp.stack(facts, axis=-1)[safe], axis=-1
  )
  entry_cached = entry_cached > 0
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
    is_tail & ((entry_refs != 1) | entry_cached)
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
  held["published blocks are cached"] = jnp.all(entry_cached | ~published)
  beyond = used & (column >= table.num_frozen[:, None])
  held["blocks that are not frozen have one reference and are not cached"] = ~jnp.any(
    beyond & ((entry_refs != 1) | entry_cached)
  )
  shared = used & (entry_refs > 1) & ~entry_cached
  held["a shared block is cached, or its rows are sealed"] = jnp.all(
    table.is_sealed[:, None] | ~shared
  )
  cached_here = used & entry_cached
  held["depth of a cached block is its column"] = jnp.all(
    (entry_depth == column) | ~cached_here
  )
  held["parent of a cached block is the block one column before"] = jnp.all(
    (entry_parent == before) | ~cached_here
  )
  held["namespace of a cached block is its row's"] = jnp.all(
    (entry_namespace == table.namespaces[:, None]) | ~cached_here
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


class Verdict(flax.struct.PyTreeNode):
  """Which invariants hold. As text, those that do not.

  Attributes:
    holds: `[num_invariants]` bool.
    sentences: Their names, in this order.
  """

  holds: Array
  sentences: tuple[str, ...] = flax.struct.field(pytree_node=False)

  def __str__(self) -> str:
    told = zip(self.sentences, np.asarray(self.holds), strict=True)
    return "; ".join(sentence for sentence, holds in told if not holds)


@jax.jit
def _judge(ctx: Context) -> Verdict:
  """Evaluates every invariant, in one array: a check of its own for each costs more."""
  held = invariants(ctx)
  holds = jnp.stack(list(held.values()))
  return Verdict(holds=holds, sentences=tuple(held))


@functools.lru_cache(maxsize=64)
def _arrays_of(config: CacheConfig) -> Context:
  """The context that a configuration makes, its arrays as shapes."""
  return jax.eval_shape(functools.partial(context.init, config))


def _check_arrays(ctx: Context) -> None:
  """Asserts shapes and dtypes; in a `shard_map` over heads, those of one device."""
  config = ctx.config
  if sharding.is_within(config.head_axes):
    wanted = _arrays_of(sharding.local_config(config)).replace(config=config)
  else:
    wanted = _arrays_of(config)
  chex.assert_trees_all_equal_comparator(
    lambda x, y: _type(x) == _type(y),
    lambda x, y: f"{_told(x)} instead of {_told(y)}",
    ctx,
    wanted,
    custom_message="tree 0 is ctx, tree 1 what kvcache.init(ctx.config) makes",
    include_default_message=False,
    exception_type=InvariantError,
  )


def _type(leaf: Any) -> tuple[Any, Any]:
  """Shape and dtype; of what is no array, None."""
  return getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def _told(leaf: Any) -> str:
  shape, dtype = _type(leaf)
  return type(leaf).__name__ if dtype is None else f"{dtype}{list(shape)}"


def _asserts_are_on() -> bool:
  """Whether chex asserts anything; it has no other way to ask."""
  try:
    chex.assert_scalar_positive(0)
  except AssertionError:
    return True
  return False


_BROKEN = "broken invariants: "


def check_invariants(ctx: Context) -> None:
  """Raises if the context is one that no sequence of verbs can make.

  Shapes and dtypes are asserted against `ctx.config` wherever it is called, in any
  trace. Values are looked at outside of a trace, and inside of one that chex has made
  ready for it: wrap the outermost function, `chex.chexify(jax.jit(step))`, and call
  this wherever a context is, in loops and under `vmap`, too. `checked` does so for what
  a function returns. `chex.disable_asserts()` turns all of it off; a function compiled
  before stays as it is.

  Under `vmap` the error tells of one context of those that are broken. A loop whose
  end differs from context to context (`vmap` of `publish`, `admit` or `serve`) cannot
  be chexified: check the fleet behind it, with a program of its own,
  `chex.chexify(jax.jit(jax.vmap(kvcache.check_invariants)))`. And no check may come
  before a `shard_map` under `jax.set_mesh` (jax-ml/jax#40907); what `checked` does, at
  the end of a step, may.

  Raises:
    InvariantError: Outside of a trace, naming every broken invariant; anywhere, if a
      shape or dtype is not the configuration's.
    AssertionError: From the chexified function, naming every broken invariant of the
      first context that had any. `ValueError` if that was inside of `shard_map`.
    RuntimeError: Values are traced, and nobody has called `chex.chexify`.

  Example:
    >>> kv.check_invariants(started)
    >>> wrong = started.replace(pool=started.pool.replace(num_free=jnp.int32(0)))
    >>> kv.check_invariants(wrong)
    Traceback (most recent call last):
    kvcache.errors.InvariantError: ...
  """
  ctx = as_context(ctx)
  if not _asserts_are_on():
    return
  _check_arrays(ctx)
  verdict = _judge(ctx)
  try:
    chex.assert_trees_all_equal(
      jnp.all(verdict.holds),
      np.array(True),
      custom_message=_BROKEN + "{}",
      custom_message_format_vars=[verdict],
    )
  except AssertionError:
    raise InvariantError(f"{_BROKEN}{verdict}") from None
  except RuntimeError as error:
    raise RuntimeError(
      "check_invariants reads values, and here they are traced: wrap the outermost"
      " function, chex.chexify(jax.jit(step), async_check=False) or"
      " kvcache.checked(step), or turn assertions off with chex.disable_asserts()"
    ) from error


def checked(transition: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a transition so that every `Context` it returns is verified, inside jit.

  This is `chex.chexify(jax.jit(transition), async_check=False)` with `check_invariants`
  of what is returned, so assertions of chex inside the transition are on as well. After
  `chex.disable_asserts()` it is `jax.jit(transition)`. When a program ends that has
  chexified anything, chex warns of statuses nobody inspected; here, all were.

  Args:
    transition: A function that takes any arguments and returns a pytree holding
      contexts.

  Raises:
    InvariantError: When a returned context breaks invariants; it names them all.

  Example:
    >>> finish = kv.checked(kv.finish)
    >>> after = finish(started, jnp.array([True, False]))
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

  verify = chex.chexify(jax.jit(verified), async_check=False)
  unverified = jax.jit(transition)

  @functools.wraps(transition)
  def call(*args: Any, **kwargs: Any) -> Any:
    if not _asserts_are_on():
      return unverified(*args, **kwargs)
    try:
      return verify(*args, **kwargs)
    except (AssertionError, ValueError) as error:  # the latter from within shard_map
      _, is_ours, broken = str(error).partition(_BROKEN)
      if not is_ours:
        raise
      broken, _, _ = broken.partition(". [failed at")  # chex adds where
      raise InvariantError(_BROKEN + broken) from None

  return call
