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
)
from kvcache.blocks import BlockPool
from kvcache.config import CacheConfig, NULL_STATE
from kvcache.errors import Status
from kvcache.kv import KVStore
from kvcache.metadata import StepMetadata
from kvcache.prefix import PrefixIndex
from kvcache.sequences import SequenceTable
from kvcache.state_rows import StateRows
from kvcache.states import StateStore


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
      because no snapshot of the recurrent state stood there.
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
    kv: Keys and values.
    state_rows: Which recurrent states are free, live or snapshots; None if no layer is
      recurrent.
    states: The recurrent states, or None.
    counters: Running totals for `stats`.
    config: Static sizes.
  """

  pool: BlockPool
  sequences: SequenceTable
  prefix: PrefixIndex
  kv: KVStore
  state_rows: StateRows | None
  states: StateStore | None
  counters: Counters
  config: CacheConfig = flax.struct.field(pytree_node=False)

  @property
  def tables(self) -> publishing.Tables:
    """Everything but keys, values and states: what the bookkeeping loops carry."""
    return self.pool, self.sequences, self.prefix, self.state_rows

  def with_tables(self, tables: publishing.Tables) -> "Context":
    """The same context with other bookkeeping."""
    pool, table, index, rows = tables
    return self.replace(pool=pool, sequences=table, prefix=index, state_rows=rows)


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
      queue_size=config.queue_size,
      salt=salts,
    ),
    kv=kv.init(
      config.layer,
      num_layers=config.num_layers,
      num_blocks=config.num_blocks,
      block_size=config.block_size,
    ),
    state_rows=rows,
    states=store,
    counters=Counters(
      **{name: jnp.uint32(0) for name in Counters.__dataclass_fields__}
    ),
    config=config,
  )


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
    fit, and every later one that needs a block, gets `NO_BLOCKS`; likewise
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
  _, fits = ragged.first_come(need, ctx.pool.num_free, order=order)
  status = jnp.where(fits, status, Status.NO_BLOCKS)
  need = jnp.where(fits, need, 0)

  if num_tokens is None:
    wants = need > 0
    rows = jnp.arange(config.max_seqs, dtype=jnp.int32)
    pool, block_ids = blocks.allocate_one_each(ctx.pool, wants)
    columns = table.num_blocks
  else:
    num_entries = config.max_seqs + num_tokens // config.block_size
    pool, given = blocks.allocate(ctx.pool, need, num_entries=num_entries)
    rows, block_ids, wants = given.rows, given.block_ids, given.is_valid
    columns = table.num_blocks[rows] + given.offsets
  table = sequences.set_blocks(table, rows, columns, block_ids, wants)
  table = table.replace(num_blocks=table.num_blocks + need)
  return ctx.replace(pool=pool, sequences=table), status


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
      `num_logits` tokens, to check drafts. More than 1 needs `num_tokens`, and with
      recurrent layers rows get no more than `num_logits` tokens.

  Raises:
    ValueError: Shapes or dtypes do not fit, or `num_logits` is out of range: with
      recurrent layers it is at most `1 + config.max_drafts`.
  """
  config = ctx.config
  if num_logits < 1 or (num_logits > 1 and num_tokens is None):
    raise ValueError(
      f"num_logits must be 1 in a decode step and at least 1 else, got {num_logits}"
    )
  query_lens = arguments.as_int32("query_lens", query_lens, shape=(config.max_seqs,))
  if num_logits > 1 and ctx.state_rows is not None:
    if num_logits > 1 + config.max_drafts:
      raise ValueError(
        f"num_logits must be at most 1 + max_drafts = {1 + config.max_drafts} with"
        f" recurrent layers, got {num_logits}"
      )
    query_lens = jnp.minimum(query_lens, num_logits)
  return metadata.build(
    ctx.sequences,
    query_lens,
    num_tokens=num_tokens,
    num_blocks=config.num_blocks,
    block_size=config.block_size,
    num_logits=num_logits,
  )


def write_kv(
  ctx: Context,
  layer: ArrayLike,
  k: Array,
  v: Array | None,
  metadata: StepMetadata,
) -> Context:
  """Stores the keys and values of a step's tokens in one layer.

  Args:
    ctx: The context.
    layer: `[]` int32, may be traced: index of the attention layer.
    k: `[T, K, D]`, cast or quantised to the layer's dtype.
    v: `[T, K, Dv]`; None for latent layers, whose values are the first part of `k`.
    metadata: Of this step.
  """
  config = ctx.config
  shape = (metadata.num_tokens, config.num_kv_heads)
  if k.shape != (*shape, config.head_dim):
    raise ValueError(f"k must have shape {(*shape, config.head_dim)}, got {k.shape}")
  if config.is_latent:
    if v is not None:
      raise ValueError("v must be None: values of latent layers are part of k")
  elif v is None or v.shape != (*shape, config.v_head_dim):
    got = None if v is None else v.shape
    raise ValueError(f"v must have shape {(*shape, config.v_head_dim)}, got {got}")
  return ctx.replace(kv=kv.write(ctx.kv, layer, k, v, metadata.slot_mapping))


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
    state: Name -> `[S, ...]`, cast to the layer's dtypes; in a draft step
      `[S, num_logits, ...]`, entry `i` after the row's token `i`. Rows that are not in
      the step, and entries past a row's tokens, are ignored.
    metadata: Of this step.

  Raises:
    ValueError: Names or shapes are not those of the layer.
  """
  rows, store = _recurrent(ctx)
  in_step, state_ids = metadata.query_lens > 0, rows.state_ids[:, 0]
  if metadata.num_logits > 1:
    entry = jnp.arange(metadata.num_logits, dtype=jnp.int32)[None]
    in_step = entry < metadata.query_lens[:, None]
    state_ids = rows.state_ids[:, : metadata.num_logits]
  wanted = {
    name: (*state_ids.shape, *pool.shape[2:]) for name, pool in store.arrays.items()
  }
  got = {name: jnp.shape(array) for name, array in state.items()}
  if got != wanted:
    raise ValueError(f"state must have shapes {wanted}, got {got}")
  state_ids = ragged.masked(state_ids, in_step, store.num_states)
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
  In a draft step so does a row that passes such a length.

  Args:
    ctx: The context.
    tokens: `[T]` int32, the tokens the model computed.
    metadata: Of this step.
    accepted: `[S]` int32. How many of each row's tokens stay; all if omitted, none if
      negative. The next step overwrites the others. With recurrent layers only in a
      draft step, and there a row in the step keeps its first token in any case: the
      state before it may be overwritten.

  Raises:
    ValueError: `accepted` is given, a layer is recurrent, and the step is no draft
      step: only the states after the rows' last tokens were kept.
  """
  tokens = arguments.as_int32("tokens", tokens, shape=(metadata.num_tokens,))
  num_new = metadata.query_lens
  if accepted is not None:
    least = 0 if ctx.state_rows is None else 1
    if least and metadata.num_logits == 1:
      raise ValueError(
        "accepted needs a draft step (num_logits > 1) with recurrent layers: they keep"
        " the state after a row's last token only"
      )
    accepted = arguments.as_int32("accepted", accepted, shape=(ctx.config.max_seqs,))
    num_new = jnp.minimum(jnp.maximum(accepted, least), num_new)
  index = prefix.store_tokens(ctx.prefix, metadata.slot_mapping, tokens)
  table = ctx.sequences.replace(seq_lens=ctx.sequences.seq_lens + num_new)
  rows = ctx.state_rows
  if rows is not None:
    rows = _advance_states(ctx, rows, num_new, metadata.num_logits)
  return ctx.replace(sequences=table, prefix=index, state_rows=rows)


def tokens_to_snapshot(ctx: Context) -> Array:
  """`[S]` int32: tokens from each row's length to where its state is wanted next.

  A loop ends its chunks there, since states are kept between steps, and in draft steps
  only. Without recurrent layers they are many.
  """
  seq_lens = ctx.sequences.seq_lens
  if ctx.state_rows is None:
    return jnp.full_like(seq_lens, 2**31 - 1)
  interval = ctx.config.snapshot_tokens
  return state_rows.next_wanted(ctx.state_rows, seq_lens, interval=interval) - seq_lens


def _advance_states(
  ctx: Context, rows: StateRows, num_new: Array, num_logits: int
) -> StateRows:
  """Lets sequences go on from the states just written; keeps some as snapshots."""
  config, before = ctx.config, ctx.sequences.seq_lens[:, None]
  ends = before + num_new[:, None]  # [S, W]: the lengths at which states were written
  if num_logits > 1:
    ends = before + jnp.arange(1, num_logits + 1, dtype=jnp.int32)[None]
    before = ends - 1
  wanted = state_rows.next_wanted(rows, before, interval=config.snapshot_tokens)
  stays = (ends > before) & (ends <= (ctx.sequences.seq_lens + num_new)[:, None])
  column = jnp.clip(ends // config.block_size - 1, 0, config.max_blocks_per_seq - 1)
  block_ids = jnp.take_along_axis(ctx.sequences.block_tables, column, axis=1)
  stands_at = jnp.maximum(num_new - 1, 0) if num_logits > 1 else jnp.zeros_like(num_new)
  return state_rows.advance(
    rows, num_new > 0, stands_at, stays & (ends == wanted), block_ids
  )


# --- The prefix index -----------------------------------------------------------------


def publish(ctx: Context) -> Context:
  """Puts every full block into the prefix index.

  `admit`, `fork` and `finish` do it first.
  """
  return ctx.with_tables(
    publishing.publish(ctx.tables, chunk_size=ctx.config.chunk_size)
  )


def evict(ctx: Context, count: ArrayLike) -> tuple[Context, Array]:
  """Frees up to `count` cached blocks that nobody holds, least recently used first.

  Returns:
    `(ctx, num_evicted [])`.
  """
  count = arguments.as_int32("count", count, shape=())

  def go(state: tuple[BlockPool, PrefixIndex, StateRows | None, Array]):
    pool, index, rows, left = state
    index, block_ids, mask = prefix.pop(index, left, num_entries=ctx.config.chunk_size)
    if rows is not None:
      rows = state_rows.drop(rows, block_ids, mask)
    pool = blocks.push(pool, block_ids, mask)
    return pool, index, rows, left - ragged.sum_int(mask)

  # Ends because every round frees a block or moves the ring's head on.
  pool, index, rows, left = jax.lax.while_loop(
    lambda state: (state[3] > 0) & (state[1].num_evictable > 0),
    go,
    (ctx.pool, ctx.prefix, ctx.state_rows, count),
  )
  num = jnp.maximum(count, 0) - jnp.maximum(left, 0)
  counters = ctx.counters.replace(num_evicted=ctx.counters.num_evicted + total(num))
  ctx = ctx.replace(pool=pool, prefix=index, state_rows=rows, counters=counters)
  return ctx, num


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
