"""Context: the memory of an inference program as one immutable pytree, and its verbs.

Every verb takes a `Context` and returns a new one. All are pure, total and jittable: a
row that cannot be served is returned as it was, with a `Status` that says why. Users
own `jax.jit`; with `donate_argnums=0` nothing the size of the cache is ever copied.
"""

from collections.abc import Mapping
import functools

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kvcache import (
  arguments,
  blocks,
  kv,
  metadata,
  prefix,
  publishing,
  ragged,
  sequences,
  state_rows,
  states,
  windows,
)
from kvcache.blocks import BlockPool
from kvcache.config import CacheConfig, NULL_STATE
from kvcache.errors import Status
from kvcache.kv import KVStore
from kvcache.metadata import StepMetadata, WindowView
from kvcache.prefix import PrefixIndex
from kvcache.publishing import Tables
from kvcache.sequences import SequenceTable
from kvcache.state_rows import StateRows
from kvcache.states import StateStore
from kvcache.windows import WindowBlocks


class Counters(flax.struct.PyTreeNode, kw_only=True):
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


class Context(flax.struct.PyTreeNode, kw_only=True):
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


def init(config: CacheConfig, *, salt: ArrayLike = 0) -> Context:
  """Makes an empty context.

  Args:
    config: Static sizes.
    salt: `[]` integer. Contexts with different salts hash the same prompt differently,
      so that nobody can aim at buckets from outside. May be traced.
  """
  words = jnp.asarray(salt).astype(jnp.uint32)
  salts = jnp.stack([words, words ^ np.uint32(0x9E3779B9)])
  rows, store, recurrent = None, None, config.recurrent_layer
  if recurrent is not None:
    rows = state_rows.init(
      num_states=config.num_states,
      num_blocks=config.num_blocks,
      max_seqs=config.max_seqs,
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
      **{name: jnp.uint32(0) for name in Counters.__dataclass_fields__}
    ),
    config=config,
  )


def _pool_size(config: CacheConfig, window: int | None) -> int:
  return config.num_blocks if window is None else config.window_pool_size(window)


def bookkeeping_bytes(config: CacheConfig) -> int:
  """Bytes of every array that `init` makes except keys, values and states."""
  shapes = jax.tree.leaves(jax.eval_shape(functools.partial(init, config)))
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
  return total - config.num_bytes


# --- A step ---------------------------------------------------------------------------


def extend(
  ctx: Context,
  query_lens: ArrayLike,
  *,
  num_tokens: int | None = None,
  order: ArrayLike | None = None,
) -> tuple[Context, Array]:
  """Makes room for each row's next tokens. Never evicts.

  Args:
    ctx: The context.
    query_lens: `[S]` int32. New tokens of each row; 0 for rows not in the step.
    num_tokens: Static bound on their sum. The work is `S + num_tokens // block_size`
      entries. Omitted for a decode step: at most one token per row.
    order: `[S]` int32 permutation. The row served first, second and so on; row order if
      omitted.

  Returns:
    `(ctx, status [S])`. Rows are served first come, first served: one that does not
    fit, in the context's pool or in a sliding window's, and every later one that needs
    a block, gets `NO_BLOCKS`; likewise
    `OVER_BUDGET` for tokens past `num_tokens`. `TOO_LONG`, `INACTIVE` and `INVALID`
    (negative) rows take nothing from others.
  """
  config, table = ctx.config, ctx.sequences
  query_lens = arguments.as_int32("query_lens", query_lens, shape=(config.max_seqs,))
  if order is not None:
    order = arguments.as_int32("order", order, shape=(config.max_seqs,))
  asks = query_lens > 0
  room = config.max_tokens_per_seq - table.seq_lens
  status = jnp.full(config.max_seqs, Status.OK, jnp.int32)
  status = jnp.where(asks & (query_lens > room), Status.TOO_LONG, status)
  status = jnp.where(asks & ~table.is_active, Status.INACTIVE, status)
  status = jnp.where(query_lens < 0, Status.INVALID, status)
  if num_tokens is None:
    in_budget = query_lens <= 1
  else:
    wanted = jnp.where(status == Status.OK, query_lens, 0)
    _, in_budget = ragged.first_come(wanted, jnp.int32(num_tokens), order=order)
  status = jnp.where((status == Status.OK) & ~in_budget, Status.OVER_BUDGET, status)

  num_wanted = (table.seq_lens + query_lens + (config.block_size - 1)) // (
    config.block_size
  )
  need = jnp.maximum(num_wanted - table.num_blocks, 0)
  need = jnp.where((status == Status.OK) & asks, need, 0)
  takes, recycles = [need], []
  for window in ctx.windows:
    own = jnp.zeros(config.max_seqs, bool)
    if num_tokens is None:
      own = windows.can_recycle(window, table.seq_lens)
    recycles.append(own)
    takes.append(jnp.where(own, 0, need))
  free = [ctx.pool.num_free, *(window.pool.num_free for window in ctx.windows)]
  ranks, fits = ragged.first_come(jnp.stack(takes), jnp.stack(free), order=order)
  status = jnp.where(fits, status, Status.NO_BLOCKS)
  need = jnp.where(fits, need, 0)

  rows = jnp.arange(config.max_seqs, dtype=jnp.int32)
  if num_tokens is None:
    wants = need > 0
    pool, block_ids = blocks.allocate_one_each(ctx.pool, wants, ranks=ranks[0])
    columns, block_rows = table.num_blocks, rows
    window_blocks = tuple(
      windows.extend_one_each(window, table, wants, own, ranks=before)
      for window, own, before in zip(ctx.windows, recycles, ranks[1:], strict=True)
    )
  else:
    num_entries = config.max_seqs + num_tokens // config.block_size
    pool, given = blocks.allocate(ctx.pool, need, num_entries=num_entries)
    block_rows, block_ids, wants = given.rows, given.block_ids, given.is_valid
    columns = table.num_blocks[block_rows] + given.offsets
    window_blocks = tuple(
      windows.extend(window, rows, table.num_blocks, need, num_entries=num_entries)
      for window in ctx.windows
    )
  table = sequences.set_blocks(table, block_rows, columns, block_ids, wants)
  table = table.replace(num_blocks=table.num_blocks + need)
  return ctx.replace(pool=pool, sequences=table, windows=window_blocks), status


def step_metadata(
  ctx: Context,
  query_lens: ArrayLike,
  *,
  num_tokens: int | None = None,
  num_logits: int = 1,
) -> StepMetadata:
  """Builds the view of the context that one model step needs.

  Args:
    ctx: The context, after `extend`.
    query_lens: `[S]` int32. New tokens of each row. Rows get no more than they have
      room for.
    num_tokens: `T`, static: the rows' tokens are packed into it. Omitted for a decode
      step: `T = S` and token `s` belongs to row `s`.
    num_logits: Static. Logits wanted of each row: of its last token, or of its first
      `num_logits` tokens, to check drafts. More than 1 needs `num_tokens`.

  Raises:
    ValueError: Shapes or dtypes do not fit, or `num_logits` is out of range.
  """
  config = ctx.config
  if num_logits < 1 or (num_logits > 1 and num_tokens is None):
    raise ValueError(
      f"num_logits must be 1 in a decode step and at least 1 else, got {num_logits}"
    )
  return metadata.build(
    ctx.sequences,
    ctx.windows,
    arguments.as_int32("query_lens", query_lens, shape=(config.max_seqs,)),
    num_tokens=num_tokens,
    num_blocks=config.num_blocks,
    block_size=config.block_size,
    num_logits=num_logits,
  )


def locate(
  config: CacheConfig, layer: ArrayLike, group: int | None = None
) -> tuple[int, Array]:
  """Finds an attention layer: its group, and its place in the group's store.

  Args:
    config: Static sizes.
    layer: `[]` int32, index among the attention layers in model order.
    group: Its index in `config.groups`. Needed only if `layer` is traced and there are
      several.

  Raises:
    ValueError: There is no such layer, it is in another group, or which group it is in
      cannot be known.
  """
  num_groups = len(config.groups)
  if group is not None and not 0 <= group < num_groups:
    raise ValueError(f"group must be from 0 to {num_groups - 1}, got {group}")
  if isinstance(layer, int | np.integer):
    if not 0 <= layer < config.num_layers:
      raise ValueError(
        f"layer must be the index of one of {config.num_layers} attention layers, got"
        f" {layer}"
      )
    found, place = config.places[layer]
    if group not in (None, found):
      raise ValueError(f"layer {layer} is in group {found}, got group={group}")
    return found, jnp.int32(place)
  if group is None and num_groups != 1:
    raise ValueError(
      f"group must be given with a traced layer where there are {num_groups} groups of"
      " attention layers"
    )
  layer = jnp.asarray(layer, jnp.int32)
  places = [place for _, place in config.places]
  is_in_order = places == list(range(config.num_layers))
  return group or 0, layer if is_in_order else jnp.asarray(places, jnp.int32)[layer]


def write_kv(
  ctx: Context,
  layer: ArrayLike,
  k: Array,
  v: Array | None,
  metadata: StepMetadata,
  *,
  group: int | None = None,
) -> Context:
  """Stores the keys and values of a step's tokens in one layer.

  Args:
    ctx: The context.
    layer: `[]` int32, index among the attention layers in model order. May be traced.
    k: `[T, K, D]`, cast or quantised to the layer's dtype.
    v: `[T, K, Dv]`; None for latent layers, whose values are the first part of `k`.
    metadata: Of this step.
    group: Index in `config.groups`, only for a traced layer where there are several.

  Raises:
    ValueError: Shapes do not fit, or the layer has no keys and values of its own.
  """
  config = ctx.config
  at, place = locate(config, layer, group)
  spec = config.groups[at].layer
  if isinstance(layer, int):
    owner = config.attention_layers[layer].shared_with
    if owner is not None:
      raise ValueError(f"layer {layer} reads the keys and values of layer {owner}")
  shape = (metadata.num_tokens, spec.num_kv_heads)
  if k.shape != (*shape, spec.head_dim):
    raise ValueError(f"k must have shape {(*shape, spec.head_dim)}, got {k.shape}")
  if spec.is_latent:
    if v is not None:
      raise ValueError("v must be None: values of latent layers are part of k")
  elif v is None or v.shape != (*shape, spec.v_dim):
    got = None if v is None else v.shape
    raise ValueError(f"v must have shape {(*shape, spec.v_dim)}, got {got}")
  slots = view_of(config, at, metadata).slot_mapping
  store = kv.write(ctx.kv[at], place, k, v, slots)
  return ctx.replace(kv=(*ctx.kv[:at], store, *ctx.kv[at + 1 :]))


def view_of(
  config: CacheConfig, group: int, metadata: StepMetadata
) -> StepMetadata | WindowView:
  """Where a step's tokens stand in the pool of a group."""
  window = config.groups[group].layer.sliding_window
  return metadata if window is None else metadata.windows[config.windows.index(window)]


def read_state(
  ctx: Context, layer: ArrayLike, metadata: StepMetadata
) -> dict[str, Array]:
  """Reads the states of one recurrent layer that a step starts from.

  Args:
    ctx: The context, after `extend` and before `commit`.
    layer: `[]` int32, may be traced: index of the recurrent layer.
    metadata: Of this step.

  Returns:
    Name -> `[S, ...]`: each row's state before its new tokens; zeros where it has none.
  """
  rows, store = _recurrent(ctx)
  in_step = metadata.query_lens > 0
  return states.read(store, layer, jnp.where(in_step, rows.source_ids, NULL_STATE))


def write_state(
  ctx: Context, layer: ArrayLike, state: Mapping[str, Array], metadata: StepMetadata
) -> Context:
  """Stores the states of one recurrent layer after a step's tokens.

  Every recurrent layer must be written in every step before `commit`.

  Args:
    ctx: The context.
    layer: `[]` int32, may be traced: index of the recurrent layer.
    state: Name -> `[S, ...]`, cast to the layer's dtypes. Rows that are not in the step
      are ignored.
    metadata: Of this step.

  Raises:
    ValueError: Names or shapes are not those of the layer.
  """
  rows, store = _recurrent(ctx)
  wanted = {
    name: (ctx.config.max_seqs, *pool.shape[2:]) for name, pool in store.arrays.items()
  }
  got = {name: jnp.shape(array) for name, array in state.items()}
  if got != wanted:
    raise ValueError(f"state must have shapes {wanted}, got {got}")
  in_step = metadata.query_lens > 0
  state_ids = ragged.masked(rows.state_ids, in_step, store.num_states)
  return ctx.replace(states=states.write(store, layer, state, state_ids))


def _recurrent(ctx: Context) -> tuple[StateRows, StateStore]:
  if ctx.state_rows is None or ctx.states is None:
    raise ValueError("the context has no recurrent layer; name it in config.layers")
  return ctx.state_rows, ctx.states


def commit(
  ctx: Context,
  tokens: ArrayLike,
  metadata: StepMetadata,
  *,
  accepted: ArrayLike | None = None,
) -> Context:
  """Makes a step's tokens part of their sequences.

  A row that comes to a length where a snapshot of its recurrent state is wanted (every
  `config.snapshot_tokens`, and after the last block of its prompt that an equal prompt
  could adopt) leaves one behind if a state is spare; `evict_snapshots` makes some so.

  Args:
    ctx: The context.
    tokens: `[T]` int32, the tokens the model computed.
    metadata: Of this step.
    accepted: `[S]` int32. How many of each row's tokens stay; all if omitted. The next
      step overwrites the others. Not with recurrent layers, whose states stand behind
      the last token.

  Raises:
    ValueError: `accepted` is given, and a layer is recurrent.
  """
  tokens = arguments.as_int32("tokens", tokens, shape=(metadata.num_tokens,))
  num_new = metadata.query_lens
  if accepted is not None:
    if ctx.state_rows is not None:
      raise ValueError("accepted cannot be given: a recurrent state has no way back")
    accepted = arguments.as_int32("accepted", accepted, shape=(ctx.config.max_seqs,))
    num_new = jnp.clip(accepted, 0, num_new)
  index = prefix.store_tokens(ctx.prefix, metadata.slot_mapping, tokens)
  table = ctx.sequences.replace(seq_lens=ctx.sequences.seq_lens + num_new)
  rows = ctx.state_rows
  if rows is not None:
    rows = _advance_states(ctx, rows, table.seq_lens)
  return ctx.replace(sequences=table, prefix=index, state_rows=rows)


def tokens_to_snapshot(ctx: Context) -> Array:
  """`[S]` int32: tokens from each row's length to where its state is wanted next.

  A loop ends its chunks there, since states are kept between steps only. Without
  recurrent layers they are many.
  """
  seq_lens = ctx.sequences.seq_lens
  if ctx.state_rows is None:
    return jnp.full_like(seq_lens, 2**31 - 1)
  interval = ctx.config.snapshot_tokens
  return state_rows.next_wanted(ctx.state_rows, seq_lens, interval=interval) - seq_lens


def _advance_states(ctx: Context, rows: StateRows, seq_lens: Array) -> StateRows:
  """Lets sequences go on from the states just written; keeps some as snapshots."""
  config, before = ctx.config, ctx.sequences.seq_lens
  moved = seq_lens > before
  wanted = state_rows.next_wanted(rows, before, interval=config.snapshot_tokens)
  column = jnp.maximum(seq_lens // config.block_size - 1, 0)
  row = jnp.arange(config.max_seqs, dtype=jnp.int32)
  ends = ctx.sequences.block_tables[row, column]
  return state_rows.advance(rows, moved, moved & (seq_lens == wanted), ends)


# --- The prefix index -----------------------------------------------------------------


def publish(ctx: Context) -> Context:
  """Puts every full block into the prefix index, and lets sliding windows move on.

  `admit`, `fork` and `finish` do it first. Blocks behind a window stay cached until
  evicted.
  """
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
  """
  count = arguments.as_int32("count", count, shape=())

  def go(state: tuple[Tables, Array]) -> tuple[Tables, Array]:
    (pool, table, index, rows, window_blocks), left = state
    index, block_ids, mask = prefix.pop(index, left, num_entries=ctx.config.chunk_size)
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
    (ctx.tables, count),
  )
  num = jnp.maximum(count, 0) - jnp.maximum(left, 0)
  counters = ctx.counters.replace(num_evicted=ctx.counters.num_evicted + total(num))
  return ctx.with_tables(tables).replace(counters=counters), num


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
  counts = arguments.as_int32("counts", counts, shape=(len(ctx.windows),))
  results = [
    windows.evict(window, counts[i], num_entries=ctx.config.chunk_size)
    for i, window in enumerate(ctx.windows)
  ]
  ctx = ctx.replace(windows=tuple(window for window, _ in results))
  return ctx, jnp.array([num for _, num in results], jnp.int32)


def evict_snapshots(ctx: Context, count: ArrayLike) -> tuple[Context, Array]:
  """Frees up to `count` snapshots that no sequence reads, least recently used first.

  Their blocks stay cached; a hit on them ends at an earlier snapshot.

  Returns:
    `(ctx, num_evicted [])`.
  """
  count = arguments.as_int32("count", count, shape=())
  rows, num = state_rows.evict(_recurrent(ctx)[0], count)
  return ctx.replace(state_rows=rows), num


def total(values: Array) -> Array:
  """`[]` uint32 sum, for the counters."""
  return jnp.sum(values, dtype=jnp.int32).astype(jnp.uint32)
