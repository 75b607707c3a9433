"""Sequences leave a context and enter another one, or the same one later.

`export_sequences` copies what a sequence is out of its blocks: tokens, keys, values and
recurrent state, token by token, so that the other context may have other block sizes,
other pools and other neighbours. `import_sequences` gives it a row there; whole blocks
of it that are cached there are adopted instead of written. `offload` is the way to host
memory.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kvcache.context import as_context, Context, publish, shortage
from kvcache.errors import Status
from kvcache.parts import (
  arguments,
  blocks,
  kv,
  prefix,
  ragged,
  sequences,
  state_rows,
  states,
  windows,
)
from kvcache.parts.kv import KVStore
from kvcache.parts.publishing import Tables
from kvcache.printing import Node
from kvcache.verbs import lifecycle, scrubbing


class SequenceState(Node, kw_only=True):
  """`F` sequences of up to `C` tokens, without blocks.

  Attributes:
    tokens: `[F, C]` int32.
    lengths: `[F]` int32.
    namespaces: `[F]` int32.
    is_valid: `[F]` bool. Entries that hold a sequence.
    kv: Of each group, keys, values and scales as the context stores them,
      `[F * C, L, K, ...]` each. Groups with a sliding window of `W` have the last
      `W - 1` tokens of each sequence instead of `C`.
    states: Recurrent states, name -> `[R, F, ...]`; empty without recurrent layers.
  """

  tokens: Array
  lengths: Array
  namespaces: Array
  is_valid: Array
  kv: tuple[KVStore, ...]
  states: dict[str, Array]

  @property
  def num_bytes(self) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def export_sequences(
  ctx: Context, seq_ids: ArrayLike, *, max_len: int | None = None
) -> SequenceState:
  """Copies sequences out of a context, which stays as it is.

  Args:
    ctx: The context.
    seq_ids: `[F]` int32 rows.
    max_len: `C`, static. The longest sequence the context can hold if omitted.

  Returns:
    The sequences; entries that name no live row, or one of more than `C` tokens, are
    not valid and hold nothing. What stands past a sequence's length has no meaning.
  """
  ctx = as_context(ctx)
  config, table = ctx.config, ctx.sequences
  seq_ids = arguments.as_int32("seq_ids", seq_ids, ndim=1)
  max_len = config.max_tokens_per_seq if max_len is None else max_len
  if max_len < 1:
    raise ValueError(f"max_len must be at least 1, got {max_len}")
  in_range = (seq_ids >= 0) & (seq_ids < config.max_seqs)
  rows = jnp.where(in_range, seq_ids, 0)
  lengths = table.seq_lens[rows]
  is_valid = in_range & table.is_active[rows] & (lengths <= max_len)
  lengths = jnp.where(is_valid, lengths, 0)
  live = {}
  if ctx.state_rows is not None and ctx.states is not None:
    ids = jnp.where(is_valid, ctx.state_rows.source_ids[rows], 0)
    live = {name: pool[:, ids] for name, pool in ctx.states.arrays.items()}
  position = jnp.arange(max_len, dtype=jnp.int32)[None]
  slots = _slots(ctx, table.block_tables, rows, position)
  stores = []
  for group, store in zip(config.groups, ctx.kv, strict=True):
    window = group.layer.sliding_window
    at = slots
    if window is not None:
      tables = ctx.windows[config.windows.index(window)].block_tables
      at = _slots(ctx, tables, rows, _window_positions(lengths, window))
    stores.append(kv.read_tokens(store, at))
  return SequenceState(
    tokens=ctx.prefix.block_tokens.reshape(-1)[slots].reshape(-1, max_len),
    lengths=lengths,
    namespaces=jnp.where(is_valid, table.namespaces[rows], 0),
    is_valid=is_valid,
    kv=tuple(stores),
    states=live,
  )


def import_sequences(
  ctx: Context, state: SequenceState
) -> tuple[Context, Array, Array]:
  """Gives exported sequences rows in a context.

  Whole blocks that are cached here already are adopted; for the others blocks are taken
  and written. Nothing is evicted: `evict` first if blocks are short.

  Args:
    ctx: The context, whose layers keep what those of the exporting one do. Block sizes,
      pools and limits may differ.
    state: From `export_sequences`.

  Returns:
    `(ctx, seq_ids [F], status [F])`: the new rows, -1 where refused (`INVALID`,
    `TOO_LONG`, `NO_ROW`, `NO_BLOCKS`, `NO_WINDOW_BLOCKS`).

  Raises:
    ValueError: The layers keep other things than those of the exporting context.
  """
  ctx = publish(ctx)
  _check_layers(ctx, state)
  config, (num_seqs, max_len) = ctx.config, state.tokens.shape
  pool, table, index, live_states, window_blocks = ctx.tables
  lengths, size = state.lengths, config.block_size
  status = jnp.full(num_seqs, Status.OK, jnp.int32)
  status = jnp.where(lengths > config.max_tokens_per_seq, Status.TOO_LONG, status)
  status = jnp.where(~state.is_valid, Status.INVALID, status)
  wanted = status == Status.OK
  block_ids, num_hits = lifecycle.match(
    ctx, state.tokens, jnp.where(wanted, lengths // size, 0), state.namespaces
  )
  rank = ragged.ranks(wanted)
  has_row = wanted & (rank < ragged.sum_int(~table.is_active))
  status = jnp.where(wanted & ~has_row, Status.NO_ROW, status)
  need = jnp.where(has_row, (lengths + (size - 1)) // size - num_hits, 0)
  _, is_enough = ragged.first_come(need, pool.num_free)
  fits = is_enough
  window_needs = []
  for window in window_blocks:
    first = windows.first_needed(window, lengths)
    wanted_here = jnp.where(has_row, (lengths + (size - 1)) // size - first, 0)
    fits &= ragged.first_come(wanted_here, window.pool.num_free)[1]
    window_needs.append(wanted_here)
  short = shortage(ctx, is_enough)
  status = jnp.where(has_row & ~fits, short, status).astype(jnp.int32)
  ok = status == Status.OK
  rows = sequences.inactive_rows(table, num_seqs)[ragged.ranks(ok)]
  rows = ragged.masked(rows, ok, config.max_seqs)

  adopted = jnp.where(ok[:, None], block_ids, 0).reshape(-1)
  pool = blocks.share(pool, adopted)
  index = prefix.dequeue(index, adopted)
  num_hits, need = jnp.where(ok, num_hits, 0), jnp.where(ok, need, 0)
  table = sequences.start(
    table,
    rows,
    block_ids=block_ids,
    num_blocks=num_hits + need,
    seq_lens=jnp.where(ok, lengths, 0),
    namespaces=state.namespaces,
    num_published=num_hits,
    num_frozen=num_hits,
    is_sealed=jnp.zeros_like(ok),
  )
  num_entries = num_seqs * -(-max_len // size)
  pool, given = blocks.allocate(pool, need, num_entries=num_entries)
  columns = num_hits[given.rows] + given.offsets
  table = sequences.set_blocks(
    table, rows[given.rows], columns, given.block_ids, given.is_valid
  )
  window_blocks = tuple(
    windows.begin(
      window,
      rows,
      lengths,
      jnp.where(ok, wanted_here, 0),
      num_entries=num_seqs * min(window.num_columns, -(-max_len // size)),
    )
    for window, wanted_here in zip(window_blocks, window_needs, strict=True)
  )
  to = rows
  if live_states is not None:
    live_states, to = state_rows.adopt(live_states, rows, ok, lengths > 0)
  tables = Tables(pool, table, index, live_states, window_blocks)
  before, ctx = ctx, ctx.with_tables(tables)
  ctx = scrubbing.clear_blocks(ctx, before, num_entries=num_entries)
  num_states = num_seqs * (1 + config.max_drafts)
  ctx = scrubbing.clear_states(ctx, before, num_entries=num_states)
  if ctx.states is not None:
    ctx = ctx.replace(states=states.put(ctx.states, state.states, to))

  here = jnp.minimum(rows, config.max_seqs - 1)
  position = jnp.arange(max_len, dtype=jnp.int32)[None]
  is_new = (position >= (num_hits * size)[:, None]) & (position < lengths[:, None])
  is_new = (is_new & ok[:, None]).reshape(-1)
  slots = _slots(ctx, table.block_tables, here, position)
  slots = ragged.masked(slots, is_new, config.num_blocks * size)
  index = prefix.store_tokens(ctx.prefix, slots, state.tokens.reshape(-1))
  stores = []
  for group, store, tokens in zip(config.groups, ctx.kv, state.kv, strict=True):
    width, at = group.layer.sliding_window, slots
    if width is not None:
      window = window_blocks[config.windows.index(width)]
      position = _window_positions(lengths, width)
      is_kept = ((position >= 0) & ok[:, None]).reshape(-1)
      at = _slots(ctx, window.block_tables, here, position)
      at = ragged.masked(at, is_kept, window.num_blocks * size)
    stores.append(kv.write_tokens(store, tokens, at))
  ctx = ctx.replace(prefix=index, kv=tuple(stores))
  return ctx, jnp.where(ok, rows, -1), status


def offload(ctx: Context, seq_ids: ArrayLike) -> tuple[Context, SequenceState]:
  """Moves sequences to host memory and ends them here; call it outside of jit.

  `import_sequences` brings them back. Their full blocks stay cached until evicted, so
  coming back soon costs little.

  Args:
    ctx: The context. It is donated: use the one returned.
    seq_ids: `[F]` int32 rows.

  Returns:
    The context after, and the sequences as NumPy arrays, no longer than need be.
  """
  rows = np.asarray(seq_ids, np.int32).reshape(-1)
  inside = rows[(rows >= 0) & (rows < ctx.config.max_seqs)]
  longest = int(np.max(np.asarray(ctx.sequences.seq_lens)[inside], initial=1))
  # A power of two, so that few lengths are ever compiled.
  max_len = min(1 << max(longest - 1, 0).bit_length(), ctx.config.max_tokens_per_seq)
  state = jax.device_get(_export(ctx, jnp.asarray(rows), max_len=max_len))
  mask = np.zeros(ctx.config.max_seqs, bool)
  mask[inside] = True
  return _finish(ctx, jnp.asarray(mask)), state


_export = jax.jit(export_sequences, static_argnames="max_len")
_finish = jax.jit(lifecycle.finish, donate_argnums=0)


def _slots(ctx: Context, block_tables: Array, rows: Array, positions: Array) -> Array:
  """`[F * C]` int32: where the tokens at `positions [F or 1, C]` of each row stand."""
  size = ctx.config.block_size
  column = jnp.clip(positions // size, 0, block_tables.shape[1] - 1)
  ids = block_tables[rows[:, None], column]
  return (ids * size + positions % size).reshape(-1)


def _window_positions(lengths: Array, sliding_window: int) -> Array:
  """`[F, W - 1]` int32: what the next token's window sees; negative for nothing."""
  offset = jnp.arange(sliding_window - 1, dtype=jnp.int32)[None]
  return lengths[:, None] - (sliding_window - 1) + offset


def _check_layers(ctx: Context, state: SequenceState) -> None:
  num_seqs, max_len = state.tokens.shape

  def shapes(ctx: Context) -> dict[str, Any]:
    ids = jnp.zeros(num_seqs, jnp.int32)
    mine = export_sequences(ctx, ids, max_len=max_len)
    return {"kv": mine.kv, "states": mine.states}

  wanted = jax.eval_shape(shapes, ctx)
  got = {"kv": state.kv, "states": state.states}
  same = jax.tree.structure(wanted) == jax.tree.structure(got)
  pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=False)
  if not same or any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
    raise ValueError(
      "the sequences come from layers that keep other things:"
      f" {_describe(got)}, not {_describe(wanted)}"
    )


def _describe(tree: object) -> str:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return ", ".join(
    f"{jax.tree_util.keystr(path)} {np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in leaves
  )
