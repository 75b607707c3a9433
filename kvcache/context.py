"""Context: the memory of an inference program as one immutable pytree, and its verbs.

Every verb takes a `Context` and returns a new one. All are pure, total and jittable: a
row that cannot be served is returned as it was, with a `Status` that says why. Users
own `jax.jit`; with `donate_argnums=0` nothing the size of the cache is ever copied.
"""

from collections.abc import Callable
import dataclasses
import functools

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kvcache import printing
from kvcache.config import CacheConfig
from kvcache.errors import Status
from kvcache.parts import (
  arguments,
  blocks,
  kv,
  loops,
  prefix,
  publishing,
  ragged,
  sequences,
  state_rows,
  states,
  windows,
)
from kvcache.parts.blocks import BlockPool
from kvcache.parts.kv import KVStore
from kvcache.parts.prefix import PrefixIndex
from kvcache.parts.publishing import Tables
from kvcache.parts.sequences import SequenceTable
from kvcache.parts.state_rows import StateRows
from kvcache.parts.states import StateStore
from kvcache.parts.windows import WindowBlocks
from kvcache.printing import Node


class Counters(Node, kw_only=True):
  """What happened since `init` or `reset`. All `[]` uint32, wrapping.

  Attributes:
    num_admitted: Prompts that got a row.
    prompt_tokens: Tokens of those prompts.
    hit_tokens: Tokens of those prompts found in the prefix index.
    num_complete: Prompts whose hit reached the last block that may be adopted.
    num_cut: Prompts whose hit ended earlier, because the next block was not cached.
    num_evicted: Blocks evicted.
    lost_tokens: Tokens of those prompts that were cached and yet had to be computed,
      because no snapshot of the recurrent state stood there, or the keys and values of
      a sliding window were gone.
  """

  num_admitted: Array
  prompt_tokens: Array
  hit_tokens: Array
  num_complete: Array
  num_cut: Array
  num_evicted: Array
  lost_tokens: Array


class Context(Node, kw_only=True):
  """The whole memory: its parts, composed.

  Attributes:
    pool: Which blocks are free, how many table entries name each.
    sequences: Which blocks each sequence owns; lengths.
    prefix: Which blocks hold which tokens; eviction order.
    kv: Keys and values of each of `config.groups`.
    windows: The blocks of each of `config.windows`.
    state_rows: Which recurrent states are free, live or snapshots; None if no layer is
      recurrent.
    states: The recurrent states, or None.
    counters: Running totals for `stats`.
    config: Static sizes.
  """

  pool: BlockPool
  sequences: SequenceTable
  prefix: PrefixIndex
  kv: tuple[KVStore, ...]
  windows: tuple[WindowBlocks, ...]
  state_rows: StateRows | None
  states: StateStore | None
  counters: Counters
  config: CacheConfig = flax.struct.field(pytree_node=False)

  @property
  def tables(self) -> Tables:
    """Everything but keys, values and states: what the bookkeeping loops carry."""
    return Tables(self.pool, self.sequences, self.prefix, self.state_rows, self.windows)

  def with_tables(self, tables: Tables) -> "Context":
    """The same context with other bookkeeping."""
    return self.replace(**tables._asdict())

  def __repr__(self) -> str:
    return _VIEWS["text"](self)

  def _repr_html_(self) -> str:
    """What a notebook shows: a map of the blocks."""
    return _VIEWS["html"](self)


def check_context(ctx: object) -> None:
  """Refuses what is no context, such as its configuration; `ValueError`."""
  if not isinstance(ctx, Context):
    raise ValueError(
      f"ctx must be a Context, as kvcache.init makes it, got {type(ctx).__name__}"
    )


def as_context(ctx: Context) -> Context:
  """Returns the context, with arrays of JAX if it has numpy's (`jax.device_get`).

  Raises:
    ValueError: It is no context, such as its configuration, or holds shapes only, or a
      batch of several.
    RuntimeError: It was donated.
  """
  check_context(ctx)
  leaves = jax.tree.leaves(ctx)
  if printing.obstacle(leaves) == "donated":
    raise RuntimeError(
      "Array has been deleted: ctx was donated to an earlier call; go on with the"
      " context that it returned"
    )
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
    raise ValueError("ctx holds shapes only: call this in jax.eval_shape")
  if batch := getattr(ctx.pool.num_free, "shape", ()):
    raise ValueError(
      f"ctx is a batch {batch} of contexts: call this in jax.vmap, or pick one with"
      " jax.tree.map(lambda x: x[0], ctx)"
    )
  if any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
    return jax.tree.map(jnp.asarray, ctx)
  return ctx


_VIEWS: dict[str, Callable[[Context], str]] = {}


def register_view(name: str, view: Callable[[Context], str]) -> None:
  """Says how a context is shown, as `"text"` or `"html"`.

  `kvcache.observe` calls it: pictures know contexts, and not the other way around.
  """
  _VIEWS[name] = view


def init(config: CacheConfig, *, salt: ArrayLike = 0) -> Context:
  """Makes an empty context.

  Args:
    config: Static sizes.
    salt: `[]` integer. Contexts with different salts hash the same prompt differently,
      so that nobody can aim at buckets from outside. May be traced.

  Example:
    >>> ctx.kv[0].k.shape  # [L, N, K, block_size, D]
    (2, 9, 1, 4, 4)
    >>> int(ctx.pool.num_free)  # all but the null block
    8
  """
  if not isinstance(config, CacheConfig):
    raise ValueError(f"config must be a CacheConfig, got {type(config).__name__}")
  words = arguments.as_int32("salt", salt, shape=()).astype(jnp.uint32)
  salts = jnp.stack([words, words ^ np.uint32(0x9E3779B9)])
  rows, store, recurrent = None, None, config.recurrent_layer
  if recurrent is not None:
    rows = state_rows.init(
      num_states=config.num_states,
      num_blocks=config.num_blocks,
      max_seqs=config.max_seqs,
      max_drafts=config.max_drafts,
    )
    store = states.init(
      recurrent, num_layers=config.num_recurrent_layers, num_states=config.num_states
    )
  return Context(
    pool=blocks.init(config.num_blocks),
    sequences=sequences.init(config.max_seqs, config.max_blocks_per_seq),
    prefix=prefix.init(
      num_blocks=config.num_blocks,
      block_size=config.block_size,
      num_buckets=config.num_buckets,
      num_ways=config.index_ways,
      salt=salts,
    ),
    kv=tuple(
      kv.init(
        group.layer,
        num_layers=group.num_layers,
        num_blocks=_pool_size(config, group.layer.sliding_window),
        block_size=config.block_size,
      )
      for group in config.groups
    ),
    windows=tuple(
      windows.init(
        sliding_window=window,
        num_window_blocks=config.window_pool_size(window),
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_seqs=config.max_seqs,
        max_blocks_per_seq=config.max_blocks_per_seq,
      )
      for window in config.windows
    ),
    state_rows=rows,
    states=store,
    counters=Counters(
      **{field.name: jnp.uint32(0) for field in dataclasses.fields(Counters)}
    ),
    config=config,
  )


def _pool_size(config: CacheConfig, window: int | None) -> int:
  return config.num_blocks if window is None else config.window_pool_size(window)


def bookkeeping_bytes(config: CacheConfig) -> int:
  """Bytes of every array that `init` makes except keys, values and states.

  Example:
    >>> kv.bookkeeping_bytes(config) < config.num_bytes
    True
  """
  shapes = jax.tree.leaves(jax.eval_shape(functools.partial(init, config)))
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
  return total - config.num_bytes


def recurrent_parts(ctx: Context) -> tuple[StateRows, StateStore]:
  """The bookkeeping of recurrent states and their store; `ValueError` without any."""
  if ctx.state_rows is None or ctx.states is None:
    raise ValueError("the context has no recurrent layer; name it in config.layers")
  return ctx.state_rows, ctx.states


# --- The prefix index -----------------------------------------------------------------


def publish(ctx: Context) -> Context:
  """Puts every full block into the prefix index, and lets sliding windows move on.

  `admit`, `fork` and `finish` do it first. Blocks behind a window stay cached until
  evicted.

  Example:
    >>> _, num_hits = kv.find(kv.publish(started), prompt, length)
    >>> num_hits.tolist()  # two full blocks of four tokens
    [2]
  """
  ctx = as_context(ctx)
  size = ctx.config.chunk_size
  ctx = ctx.with_tables(publishing.publish(ctx.tables, chunk_size=size))
  return ctx.replace(
    windows=tuple(
      windows.trim(window, ctx.sequences, chunk_size=size) for window in ctx.windows
    )
  )


def evict(ctx: Context, count: ArrayLike) -> tuple[Context, Array]:
  """Frees up to `count` cached blocks that nobody holds, least recently used first.

  What is kept beside them, in sliding windows and as snapshots, goes with them.

  Returns:
    `(ctx, num_evicted [])`.

  Example:
    >>> cached = jax.jit(kv.finish)(started, jnp.array([True, False]))
    >>> after, num_evicted = jax.jit(kv.evict)(cached, 1)
    >>> int(num_evicted), int(after.pool.num_free) - int(cached.pool.num_free)
    (1, 1)
  """
  ctx = as_context(ctx)
  count = arguments.as_int32("count", count, shape=())
  tables, num = _evict(ctx.tables, count, num_entries=ctx.config.chunk_size)
  counters = ctx.counters.replace(num_evicted=ctx.counters.num_evicted + total(num))
  return ctx.with_tables(tables).replace(counters=counters), num


@loops.compiled("num_entries")
def _evict(tables: Tables, count: Array, *, num_entries: int) -> tuple[Tables, Array]:
  """`evict` of the tables."""

  def go(state: tuple[Tables, Array]) -> tuple[Tables, Array]:
    (pool, table, index, rows, window_blocks), left = state
    index, block_ids, mask = prefix.pop(index, left, num_entries=num_entries)
    if rows is not None:
      rows = state_rows.drop(rows, block_ids, mask)
    window_blocks = tuple(windows.detach(w, block_ids, mask) for w in window_blocks)
    pool = blocks.push(pool, block_ids, mask)
    tables = Tables(pool, table, index, rows, window_blocks)
    return tables, left - ragged.sum_int(mask)

  # Ends because every round frees a block or moves the ring's head on.
  tables, left = jax.lax.while_loop(
    lambda state: (state[1] > 0) & (state[0].prefix.num_evictable > 0),
    go,
    (tables, count),
  )
  return tables, jnp.maximum(count, 0) - jnp.maximum(left, 0)


def evict_window_blocks(ctx: Context, counts: ArrayLike) -> tuple[Context, Array]:
  """Frees cached blocks of sliding windows that no row holds, oldest first.

  The blocks of the context that stand for the same tokens stay cached; prefix hits that
  need what is gone end earlier.

  Args:
    ctx: The context.
    counts: `[W]` int32. How many to free at most, for each of `config.windows`.

  Returns:
    `(ctx, num_evicted [W])`.
  """
  ctx = as_context(ctx)
  counts = arguments.as_int32("counts", counts, shape=(len(ctx.windows),))
  results = [
    windows.evict(window, counts[i], num_entries=ctx.config.chunk_size)
    for i, window in enumerate(ctx.windows)
  ]
  ctx = ctx.replace(windows=tuple(window for window, _ in results))
  return ctx, jnp.array([num for _, num in results], jnp.int32)


def make_room(ctx: Context, num_blocks: ArrayLike) -> Context:
  """Evicts until `num_blocks` are free in every pool, or no more can be."""
  num_blocks = jnp.asarray(num_blocks, jnp.int32)
  ctx, _ = evict(ctx, jnp.maximum(num_blocks - ctx.pool.num_free, 0))
  if ctx.windows:
    free = jnp.stack([window.pool.num_free for window in ctx.windows])
    ctx, _ = evict_window_blocks(ctx, jnp.maximum(num_blocks - free, 0))
  return ctx


def num_free(ctx: Context) -> Array:
  """`[1 + W]` int32: free blocks of the context's pool and of each window's."""
  pools = [ctx.pool, *(window.pool for window in ctx.windows)]
  return jnp.stack([pool.num_free for pool in pools])


def shortage(ctx: Context, is_enough: Array) -> ArrayLike:
  """`Status` of those who lack blocks.

  Args:
    ctx: The context.
    is_enough: `[...]` bool. Whether its own pool has what each needs, so that it is a
      sliding window's which has not.
  """
  if not ctx.windows:
    return Status.NO_BLOCKS
  return jnp.where(is_enough, Status.NO_WINDOW_BLOCKS, Status.NO_BLOCKS)


def evict_snapshots(ctx: Context, count: ArrayLike) -> tuple[Context, Array]:
  """Frees up to `count` snapshots that no sequence reads, least recently used first.

  Their blocks stay cached; a hit on them ends at an earlier snapshot.

  Returns:
    `(ctx, num_evicted [])`.
  """
  ctx = as_context(ctx)
  count = arguments.as_int32("count", count, shape=())
  rows, num = state_rows.evict(recurrent_parts(ctx)[0], count)
  return ctx.replace(state_rows=rows), num


def total(values: Array) -> Array:
  """`[]` uint32 sum, for the counters."""
  return jnp.sum(values, dtype=jnp.int32).astype(jnp.uint32)
