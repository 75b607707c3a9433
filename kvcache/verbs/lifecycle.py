"""Sequences come and go: admit, find, fork, rewind, finish and reset."""

from collections.abc import Sequence
from typing import ClassVar

from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvcache.config import NULL_BLOCK, NULL_STATE
from kvcache.context import as_context, Context, init, publish, shortage, total
from kvcache.errors import Status
from kvcache.parts import (
  arguments,
  blocks,
  kv,
  prefix,
  ragged,
  releasing,
  sequences,
  state_rows,
  states,
  windows,
)
from kvcache.parts.blocks import BlockPool
from kvcache.parts.kv import KVStore
from kvcache.parts.publishing import Tables
from kvcache.parts.state_rows import StateRows
from kvcache.parts.windows import WindowBlocks
from kvcache.printing import Node
from kvcache.verbs import scrubbing


class Admission(Node, kw_only=True):
  """What became of each prompt of one `admit`.

  Attributes:
    seq_ids: `[A]` int32. The prompt's row, -1 if refused.
    num_cached: `[A]` int32. Leading tokens already computed, a multiple of the block
      size.
    status: `[A]` int32 `Status`.
  """

  codes: ClassVar = {"status": Status}
  seq_ids: Array
  num_cached: Array
  status: Array


def admit(
  ctx: Context,
  tokens: ArrayLike,
  lengths: ArrayLike,
  *,
  namespace: ArrayLike = 0,
  block_budget: ArrayLike | None = None,
) -> tuple[Context, Admission]:
  """Gives each prompt a row that starts with its longest cached prefix.

  A row adopts whole blocks, and at most `length - 1` tokens, since the last one must be
  computed to have logits. With recurrent layers the prefix ends where a snapshot of the
  state stands, and the row starts from it; with sliding windows, where all that the
  windows need is cached. Prompts of one call do not see each other's
  tokens: nothing is computed yet. Prompts are served in order; the row is the lowest
  one free.

  Args:
    ctx: The context.
    tokens: `[A, max_len]` int32, padded with anything.
    lengths: `[A]` int32.
    namespace: `[]` or `[A]` int32. Prefixes are shared within a namespace only: a
      tenant, a LoRA adapter.
    block_budget: `[]` int32. Admits only while the blocks that the prompts will take
      from the free and the evictable ones add up to at most this; no limit if omitted.
      `admit` itself takes no free block, `extend` does.

  Returns:
    The context after, and the `Admission`. Refused with `TOO_LONG`: more blocks than a
    row or the pool has; `EMPTY`; `INVALID`: longer than `max_len`; `NO_ROW`;
    `NO_BLOCKS`: past `block_budget`.

  Raises:
    ValueError: Shapes or dtypes do not fit.

  Example:
    >>> ctx, admission = admit(started, prompt, length)
    >>> admission.seq_ids.tolist(), admission.num_cached.tolist()
    ([1], [8])
    >>> _, full = admit(ctx, prompt, length)
    >>> kv.Status(int(full.status[0])).name
    'NO_ROW'
  """
  return admit_published(
    publish(ctx), tokens, lengths, namespace=namespace, block_budget=block_budget
  )


def admit_published(
  ctx: Context,
  tokens: ArrayLike,
  lengths: ArrayLike,
  *,
  namespace: ArrayLike = 0,
  block_budget: ArrayLike | None = None,
) -> tuple[Context, Admission]:
  """`admit` without its `publish`, for a caller that has just published."""
  ctx = as_context(ctx)
  config = ctx.config
  tokens = arguments.as_int32("tokens", tokens, ndim=2)
  num_prompts, max_len = tokens.shape
  lengths = arguments.as_int32("lengths", lengths, shape=(num_prompts,))
  namespaces = arguments.as_namespaces(namespace, num_prompts)

  pool, table, index, live_states, window_blocks = ctx.tables
  status = jnp.full(num_prompts, Status.OK, jnp.int32)
  status = jnp.where(lengths > max_len, Status.INVALID, status)
  status = jnp.where(lengths > config.max_tokens_per_seq, Status.TOO_LONG, status)
  status = jnp.where(lengths <= 0, Status.EMPTY, status)
  has_tokens = status == Status.OK

  num_full = jnp.where(has_tokens, (lengths - 1) // config.block_size, 0)
  block_ids, num_hits, num_lost = _find(ctx, tokens, num_full, namespaces)

  rank = ragged.ranks(has_tokens)
  has_row = has_tokens & (rank < ragged.sum_int(~table.is_active))
  status = jnp.where(has_tokens & ~has_row, Status.NO_ROW, status)
  if block_budget is not None:
    num_held = jnp.sum(pool.ref_counts[block_ids] > 0, axis=1, dtype=jnp.int32)
    need = (lengths + (config.block_size - 1)) // config.block_size - num_held
    budget = arguments.as_int32("block_budget", block_budget, shape=())
    _, fits = ragged.first_come(jnp.where(has_row, need, 0), budget)
    status = jnp.where(fits, status, Status.NO_BLOCKS)
  status = status.astype(jnp.int32)
  ok = status == Status.OK
  rows = sequences.inactive_rows(table, num_prompts)[ragged.ranks(ok)]
  rows = ragged.masked(rows, ok, config.max_seqs)
  block_ids = jnp.where(ok[:, None], block_ids, NULL_BLOCK)
  num_hits = jnp.where(ok, num_hits, 0)

  adopted = block_ids.reshape(-1)
  pool = blocks.share(pool, adopted)
  index = prefix.dequeue(index, adopted)
  num_cached = num_hits * config.block_size
  table = sequences.start(
    table,
    rows,
    block_ids=block_ids,
    num_blocks=num_hits,
    seq_lens=num_cached,
    namespaces=namespaces,
    num_published=num_hits,
    num_frozen=num_hits,
    is_sealed=jnp.zeros_like(ok),
  )
  if live_states is not None:
    last = jnp.take_along_axis(block_ids, jnp.maximum(num_hits - 1, 0)[:, None], axis=1)
    live_states = state_rows.start(
      live_states,
      rows,
      ok,
      last_blocks=jnp.where(num_hits > 0, last[:, 0], NULL_BLOCK),
      wanted_lens=num_full * config.block_size,
    )
  window_blocks = tuple(
    windows.start(window, rows, block_ids, num_hits) for window in window_blocks
  )
  counters = ctx.counters
  counters = counters.replace(
    num_admitted=counters.num_admitted + total(ok),
    prompt_tokens=counters.prompt_tokens + total(jnp.where(ok, lengths, 0)),
    hit_tokens=counters.hit_tokens + total(num_cached),
    num_complete=counters.num_complete + total(ok & (num_hits == num_full)),
    num_cut=counters.num_cut + total(ok & (num_hits < num_full)),
    lost_tokens=counters.lost_tokens
    + total(jnp.where(ok, num_lost * config.block_size, 0)),
  )
  tables = Tables(pool, table, index, live_states, window_blocks)
  after = ctx.with_tables(tables).replace(counters=counters)
  num_states = num_prompts * (1 + config.max_drafts)
  ctx = scrubbing.clear_states(after, ctx, num_entries=num_states)
  seq_ids = jnp.where(ok, rows, -1)
  return ctx, Admission(seq_ids=seq_ids, num_cached=num_cached, status=status)


def find(
  ctx: Context, tokens: ArrayLike, lengths: ArrayLike, *, namespace: ArrayLike = 0
) -> tuple[Array, Array]:
  """Finds the published prefix that each prompt would adopt if it were admitted.

  Args:
    ctx: The context.
    tokens: `[A, max_len]` int32.
    lengths: `[A]` int32.
    namespace: `[]` or `[A]` int32.

  Returns:
    `(block_ids [A, C], num_hits [A])`: the first `num_hits[a]` ids of each row are
    cached blocks, the others `NULL_BLOCK`.

  Example:
    >>> block_ids, num_hits = kv.find(kv.publish(started), prompt, length)
    >>> num_hits.tolist()
    [2]
  """
  ctx = as_context(ctx)
  tokens = arguments.as_int32("tokens", tokens, ndim=2)
  lengths = arguments.as_int32("lengths", lengths, shape=(tokens.shape[0],))
  namespaces = arguments.as_namespaces(namespace, tokens.shape[0])
  num_full = jnp.maximum(lengths - 1, 0) // ctx.config.block_size
  block_ids, num_hits, _ = _find(ctx, tokens, num_full, namespaces)
  return block_ids, num_hits


def _find(
  ctx: Context, tokens: Array, num_full: Array, namespaces: Array
) -> tuple[Array, Array, Array]:
  """Blocks to adopt, how many, and how many more are cached but of no use.

  A hit ends where everything stands that the next token needs: the recurrent state and
  the keys and values of sliding windows.
  """
  block_ids, num_cached = match(ctx, tokens, num_full, namespaces)
  if ctx.state_rows is None and not ctx.windows:
    return block_ids, num_cached, jnp.zeros_like(num_cached)
  column = jnp.arange(block_ids.shape[1], dtype=jnp.int32)[None]
  is_end = column < num_cached[:, None]
  for window in ctx.windows:
    is_end &= windows.may_end(window, block_ids)
  if ctx.state_rows is not None:
    is_end &= state_rows.may_end(ctx.state_rows, block_ids)
  num_hits = jnp.max(jnp.where(is_end, column + 1, 0), axis=1, initial=0)
  block_ids = jnp.where(column < num_hits[:, None], block_ids, NULL_BLOCK)
  return block_ids, num_hits, num_cached - num_hits


def match(
  ctx: Context, tokens: Array, num_full: Array, namespaces: Array
) -> tuple[Array, Array]:
  """The cached blocks that texts `[A, max_len]` begin with, recurrent state or not.

  Returns:
    `(block_ids [A, C], num_hits [A])`, at most `num_full` of each.
  """
  config, (num_prompts, max_len) = ctx.config, tokens.shape
  num_columns = max(1, min(max_len // config.block_size, config.max_blocks_per_seq))
  width = num_columns * config.block_size
  padding = max(0, width - max_len)
  prompts = jnp.pad(tokens, ((0, 0), (0, padding)))[:, :width]
  prompts = prompts.reshape(num_prompts, num_columns, config.block_size)
  return prefix.match(ctx.prefix, prompts, num_full, namespaces)


def fork(ctx: Context, src: ArrayLike) -> tuple[Context, Array, Array]:
  """Starts new sequences that continue existing ones.

  A fork shares the full blocks of its source and gets a copy of the partial one and of
  the recurrent state, so each branch writes only what is its own. Blocks reserved by
  `extend` are not shared.

  Args:
    ctx: The context.
    src: `[F]` int32. Row to branch from; may repeat.

  Returns:
    `(ctx, seq_ids [F], status [F])`: the new rows, -1 where refused (`INACTIVE`,
    `NO_ROW`, `NO_BLOCKS`, `NO_WINDOW_BLOCKS`).

  Example:
    >>> ctx, seq_ids, status = jax.jit(kv.fork)(started, jnp.array([0]))
    >>> seq_ids.tolist()
    [1]
    >>> tables = ctx.sequences.block_tables
    >>> (tables[0] == tables[1]).tolist()[:3]  # two blocks are shared, one was copied
    [True, True, False]
  """
  ctx = publish(ctx)
  config = ctx.config
  src = arguments.as_int32("src", src, ndim=1)
  pool, table, index, live_states, window_blocks = ctx.tables
  in_range = (src >= 0) & (src < config.max_seqs)
  source = jnp.where(in_range, src, 0)
  live = in_range & table.is_active[source]
  rank = ragged.ranks(live)
  has_row = live & (rank < ragged.sum_int(~table.is_active))
  seq_lens = table.seq_lens[source]
  num_full = seq_lens // config.block_size
  is_partial = seq_lens % config.block_size > 0
  copies_last = has_row & is_partial
  is_enough = _fits(copies_last, pool)
  fits = is_enough & _all_fit(window_blocks, copies_last)
  ok = has_row & fits
  status = jnp.where(fits, Status.OK, shortage(ctx, is_enough))
  status = jnp.where(has_row, status, Status.NO_ROW)
  status = jnp.where(live, status, Status.INACTIVE).astype(jnp.int32)
  rows = sequences.inactive_rows(table, src.shape[0])[rank]
  rows = ragged.masked(rows, ok, config.max_seqs)

  pool, copies = blocks.allocate_one_each(pool, ok & is_partial)
  column = jnp.arange(config.max_blocks_per_seq, dtype=jnp.int32)[None]
  shared = jnp.where(column < num_full[:, None], table.block_tables[source], NULL_BLOCK)
  partial = table.block_tables[source, jnp.minimum(num_full, column.size - 1)]
  shared, partial = ragged.hold(shared, partial)
  pool = blocks.share(pool, jnp.where(ok[:, None], shared, NULL_BLOCK).reshape(-1))
  to = ragged.masked(copies, ok & is_partial, config.num_blocks)
  index = prefix.copy_tokens(index, partial, to)
  parents = ragged.masked(source, ok, config.max_seqs)
  table = table.replace(
    num_frozen=table.num_frozen.at[parents].max(num_full, mode="drop")
  )
  table = sequences.start(
    table,
    rows,
    block_ids=jnp.where((column == num_full[:, None]), copies[:, None], shared),
    num_blocks=num_full + is_partial.astype(jnp.int32),
    seq_lens=seq_lens,
    namespaces=table.namespaces[source],
    num_published=jnp.minimum(table.num_published[source], num_full),
    num_frozen=num_full,
    is_sealed=table.is_sealed[source],
  )
  forked = [
    windows.fork(window, source, rows, ok, num_full=num_full, copies=ok & is_partial)
    for window in window_blocks
  ]
  window_blocks = tuple(window for window, *_ in forked)
  stores = _copy_blocks(ctx, (partial, to), [copied for _, *copied in forked])
  if live_states is not None and ctx.states is not None:
    live_states, copies = state_rows.fork(live_states, source, rows, ok)
    num_states = src.shape[0] * (1 + config.max_drafts)
    after = ctx.replace(state_rows=live_states)
    ctx = scrubbing.clear_states(after, ctx, num_entries=num_states)
    assert ctx.states is not None
    ctx = ctx.replace(states=states.copy(ctx.states, *copies))
  tables = Tables(pool, table, index, live_states, window_blocks)
  ctx = ctx.with_tables(tables).replace(kv=stores)
  return ctx, jnp.where(ok, rows, -1), status


def _fits(wants: Array, pool: BlockPool) -> Array:
  """Whether each of those who want one block gets it, first come, first served."""
  return ragged.first_come(wants.astype(jnp.int32), pool.num_free)[1]


def _all_fit(window_blocks: Sequence[WindowBlocks], wants: Array) -> Array:
  """Whether they get one in each of the windows' pools."""
  fits = jnp.ones_like(wants)
  for window in window_blocks:
    fits &= _fits(wants, window.pool)
  return fits


def _copy_blocks(
  ctx: Context,
  copied: tuple[Array, Array],
  window_copied: Sequence[Sequence[Array]],
) -> tuple[KVStore, ...]:
  """Copies keys and values `from, to`, in the pool and in each of the windows'."""
  stores = []
  for group, store in zip(ctx.config.groups, ctx.kv, strict=True):
    window = group.layer.sliding_window
    at = copied
    if window is not None:
      at = window_copied[ctx.config.windows.index(window)]
    stores.append(kv.copy_blocks(store, at[0], at[1]))
  return tuple(stores)


def rewind(ctx: Context, num_tokens: ArrayLike) -> tuple[Context, Array]:
  """Drops the last tokens of each sequence, and the blocks reserved past them.

  A last block that is then partial is copied if it is shared or cached, since it will
  be written again. A recurrent state has no way back: with recurrent layers a row can
  only return to length 0, or to the end of a block that has a snapshot. With sliding
  windows it can only return to where its windows are still held or cached.

  Args:
    ctx: The context.
    num_tokens: `[S]` int32. Tokens to drop; 0 leaves a row alone.

  Returns:
    `(ctx, status [S])`. `INVALID` (negative, or more than stored), `INACTIVE`,
    `NO_STATE` where no recurrent state stands at the length wanted, or what a sliding
    window needs there is gone, `NO_BLOCKS` or `NO_WINDOW_BLOCKS` where the copy found
    no free block: those rows are unchanged.

  Example:
    >>> ctx, status = jax.jit(kv.rewind)(started, jnp.array([3, 0]))
    >>> ctx.sequences.seq_lens.tolist(), status.tolist()
    ([7, 0], [0, 0])
  """
  ctx = as_context(ctx)
  config = ctx.config
  pool, table, index, live_states, window_blocks = ctx.tables
  num_tokens = arguments.as_int32("num_tokens", num_tokens, shape=(config.max_seqs,))
  status = jnp.full(config.max_seqs, Status.OK, jnp.int32)
  invalid = (num_tokens < 0) | (num_tokens > table.seq_lens)
  status = jnp.where(invalid, Status.INVALID, status)
  inactive = (num_tokens > 0) & ~table.is_active
  status = jnp.where(inactive, Status.INACTIVE, status)
  drops = (status == Status.OK) & (num_tokens > 0)
  source_ids = jnp.zeros_like(num_tokens)
  if live_states is not None:
    source_ids, stands = _state_at(ctx, live_states, table.seq_lens - num_tokens)
    status = jnp.where(drops & ~stands, Status.NO_STATE, status)
    drops &= stands
  for window in window_blocks:
    stands = windows.can_return(window, table, table.seq_lens - num_tokens)
    status = jnp.where(drops & ~stands, Status.NO_STATE, status)
    drops &= stands
  seq_lens = jnp.where(drops, table.seq_lens - num_tokens, table.seq_lens)
  num_full = seq_lens // config.block_size
  rows = jnp.arange(config.max_seqs, dtype=jnp.int32)
  column = jnp.minimum(num_full, table.max_blocks_per_seq - 1)
  last = ragged.hold(table.block_tables[rows, column])
  is_partial = seq_lens % config.block_size > 0
  is_frozen = (pool.ref_counts[last] > 1) | index.is_cached(last)
  copies = ragged.hold(drops & is_partial & is_frozen)
  is_enough = _fits(copies, pool)
  fits = is_enough
  window_last, window_copies = [], []
  for window in window_blocks:
    ids = ragged.hold(windows.block_at(window, table, column))
    is_frozen = (window.pool.ref_counts[ids] != 1) | (window.owner_ids[ids] > 0)
    window_last.append(ids)
    window_copies.append(ragged.hold(drops & is_partial & is_frozen))
    fits &= _fits(window_copies[-1], window.pool)
  status = jnp.where(fits, status, shortage(ctx, is_enough))
  drops, copies = drops & fits, copies & fits
  window_copies = [wants & fits for wants in window_copies]
  seq_lens = jnp.where(drops, seq_lens, table.seq_lens)

  pool, targets = blocks.allocate_one_each(pool, copies)
  to = ragged.masked(targets, copies, config.num_blocks)
  index = prefix.copy_tokens(index, last, to)
  num_kept = num_full + (is_partial & ~copies).astype(jnp.int32)
  num_kept = jnp.where(drops, num_kept, table.num_blocks)
  returned, window_copied = [], []
  for window, ids, wants in zip(window_blocks, window_last, window_copies, strict=True):
    kept = num_full + (is_partial & ~wants).astype(jnp.int32)
    kept = jnp.where(drops, kept, table.num_blocks)
    window, copied = windows.go_back(
      window,
      table,
      seq_lens,
      kept,
      copies=wants,
      chunk_size=config.chunk_size,
    )
    returned.append(window)
    window_copied.append((ids, copied))
  stores = _copy_blocks(ctx, (last, to), window_copied)
  if live_states is not None:
    source_ids = jnp.where(drops, source_ids, live_states.source_ids)
    live_states = live_states.replace(source_ids=source_ids)
  pool, table, index, live_states, _ = releasing.release(
    Tables(pool, table, index, live_states, ()),
    num_kept,
    chunk_size=config.chunk_size,
  )
  table = sequences.set_blocks(table, rows, table.num_blocks, targets, copies)
  cut = jnp.where(drops, num_full, table.num_frozen)
  num_published = jnp.minimum(table.num_published, cut)
  num_frozen = jnp.minimum(table.num_frozen, cut)
  table = table.replace(
    seq_lens=seq_lens,
    num_blocks=table.num_blocks + copies.astype(jnp.int32),
    num_published=num_published,
    num_frozen=num_frozen,
    # A row that still shares unpublished blocks stays sealed: were it to publish them
    # under another parent, the other holders would not hold that parent.
    is_sealed=table.is_sealed & ~(drops & (num_published == num_frozen)),
  )
  tables = Tables(pool, table, index, live_states, tuple(returned))
  return ctx.with_tables(tables).replace(kv=stores), status


def _state_at(ctx: Context, rows: StateRows, seq_lens: Array) -> tuple[Array, Array]:
  """`[S]` int32: the state that stands at these lengths; `[S]` bool: whether one does.

  The snapshot may stand in a block that the row has yet to publish; it stays the row's.
  """
  size, table = ctx.config.block_size, ctx.sequences
  column = jnp.clip(seq_lens // size - 1, 0, table.max_blocks_per_seq - 1)
  row = jnp.arange(table.max_seqs, dtype=jnp.int32)
  snapshots = rows.snapshot_ids[table.block_tables[row, column]]
  is_end = (seq_lens > 0) & (seq_lens % size == 0)
  found = jnp.where(is_end, snapshots, NULL_STATE)
  return found, (seq_lens == 0) | (found != NULL_STATE)


def finish(ctx: Context, mask: ArrayLike, *, keep_prefix: bool = True) -> Context:
  """Ends sequences and gives their blocks back.

  Args:
    ctx: The context.
    mask: `[S]` bool. Rows to end; inactive ones are ignored.
    keep_prefix: Whether the sequences' full blocks stay cached, until evicted, for
      later prompts that begin alike. If not, whatever only these sequences brought into
      the cache is free at once.

  Example:
    >>> ctx = jax.jit(kv.finish)(started, jnp.array([True, False]))
    >>> int(ctx.pool.num_free), int(ctx.prefix.num_evictable)
    (6, 2)
  """
  if keep_prefix:
    ctx = publish(ctx)
  return finish_published(ctx, mask, keep_prefix=keep_prefix)


def finish_published(
  ctx: Context, mask: ArrayLike, *, keep_prefix: bool = True
) -> Context:
  """`finish` without its `publish`, for a caller that has just published."""
  ctx = as_context(ctx)
  config = ctx.config
  mask = arguments.as_mask("mask", mask, config.max_seqs)
  mask &= ctx.sequences.is_active
  num_kept = jnp.where(mask, 0, ctx.sequences.num_blocks)
  tables = releasing.release(
    ctx.tables, num_kept, chunk_size=config.chunk_size, keep_prefix=keep_prefix
  )
  if tables.state_rows is not None:
    tables = tables._replace(state_rows=state_rows.clear(tables.state_rows, mask))
  table = sequences.clear(tables.sequences, mask)
  return ctx.with_tables(tables._replace(sequences=table))


def reset(ctx: Context, *, keep_prefix: bool = False) -> Context:
  """Ends all sequences; forgets cached prefixes and counters, or keeps them.

  Keys, values and states are left in place, unreachable.

  Example:
    >>> int(jax.jit(kv.reset)(started).pool.num_free)
    8
  """
  ctx = as_context(ctx)
  if keep_prefix:
    return finish(ctx, jnp.ones(ctx.config.max_seqs, bool))
  fresh = init(ctx.config)
  index = fresh.prefix.replace(salt=ctx.prefix.salt)
  return fresh.replace(prefix=index, kv=ctx.kv, states=ctx.states)
