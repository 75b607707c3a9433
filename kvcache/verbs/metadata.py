"""StepMetadata: the read-only view of a Context that one model step needs.

Computed once per step and shared by all layers. Two layouts, one meaning: token `t`
belongs to row `seq_ids[t]` and stands at `positions[t]`.

*   Packed (`num_tokens` given): the rows' new tokens lie end to end, in row order.
*   Decode (`num_tokens` omitted): token `s` belongs to row `s`; rows that are not in
    the step leave a gap, which padding rules make harmless. There is no packing to
    compute.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
from jax import Array
import jax.numpy as jnp

from kvcache.parts import ragged
from kvcache.parts.sequences import SequenceTable
from kvcache.parts.windows import WindowBlocks
from kvcache.printing import Node


class WindowView(Node, kw_only=True):
  """Where a step's tokens stand in the pool of one sliding window.

  Attributes:
    block_tables: `[S, P]` int32. Columns behind the window are `NULL_BLOCK`.
    slot_mapping: `[T]` int32. As in `StepMetadata`, padding is `Nw * block_size`.
  """

  block_tables: Array
  slot_mapping: Array


class SharedPrefix(Node, kw_only=True):
  """First blocks that rows of a step have in common, so that they are read once.

  Attributes:
    num_blocks: `[]` int32. How many.
    shares: `[S]` bool. Rows of the step that hold them and stand behind them.
  """

  num_blocks: Array
  shares: Array


class StepMetadata(Node, kw_only=True):
  """Where each token of a step comes from and goes to.

  Attributes:
    seq_ids: `[T]` int32. Row of each token, 0 for padding in the packed layout.
    positions: `[T]` int32. Place of each token in its sequence, counted from 0.
    slot_mapping: `[T]` int32. Flat write address `block * block_size + offset`; padding
      is one past the end, `N * block_size`.
    query_lens: `[S]` int32. New tokens of each row.
    seq_lens: `[S]` int32. Tokens of each row after this step; 0 for rows not in it.
    cu_seqlens: `[S + 1]` int32. Row `s` owns tokens `cu_seqlens[s]` up to `cu_seqlens[s
      + 1]` (in the decode layout one each, which is padding where `seq_lens[s] == 0`).
    logits_indices: `[S * num_logits]` int32. Each row's last token, anything in range
      for rows not in it; with `num_logits` above 1, each row's first so many tokens.
    block_tables: `[S, P]` int32. Of the context.
    shared_prefix: What `attend` reads once for several rows; None if not looked for.
    windows: For each of `config.windows`, where the tokens stand in its pool.
    plans: For each of `config.groups`, what its layers' attention would else compute
      once per layer, see `kvcache.verbs.attention_plans`. May be empty.
    is_decode: Whether the layout is the decode layout. Static.
    num_logits: Logits of each row. Above 1 the step is a draft step: recurrent layers
      keep the state after each of a row's tokens. Static.
    head_axes: As in `CacheConfig`. Static.
  """

  seq_ids: Array
  positions: Array
  slot_mapping: Array
  query_lens: Array
  seq_lens: Array
  cu_seqlens: Array
  logits_indices: Array
  block_tables: Array
  shared_prefix: SharedPrefix | None = None
  windows: tuple[WindowView, ...] = ()
  plans: tuple[Any, ...] = ()
  is_decode: bool = flax.struct.field(pytree_node=False, default=False)
  num_logits: int = flax.struct.field(pytree_node=False, default=1)
  head_axes: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

  @property
  def num_tokens(self) -> int:
    """`T`."""
    return self.positions.shape[-1]

  @property
  def is_padding(self) -> Array:
    """`[T]` bool: tokens that belong to no row."""
    if self.is_decode:
      return self.query_lens == 0
    token = jnp.arange(self.num_tokens, dtype=jnp.int32)
    return token >= self.cu_seqlens[-1]


def build(
  table: SequenceTable,
  query_lens: Array,
  *,
  num_tokens: int | None,
  num_blocks: int,
  block_size: int,
  num_logits: int = 1,
  windows: Sequence[WindowBlocks] = (),
  head_axes: tuple[str, ...] = (),
) -> StepMetadata:
  """Builds the view; see `kvcache.step_metadata`."""
  room = table.num_blocks * block_size - table.seq_lens
  query_lens = jnp.clip(query_lens, 0, room)
  if num_tokens is None:
    query_lens = jnp.minimum(query_lens, 1)
    row = jnp.arange(table.max_seqs, dtype=jnp.int32)
    rows, positions, is_valid = row, table.seq_lens, query_lens > 0
    cu_seqlens = jnp.arange(table.max_seqs + 1, dtype=jnp.int32)
    logits_indices = row
  else:
    starts = jnp.cumsum(query_lens) - query_lens
    query_lens = jnp.clip(num_tokens - starts, 0, query_lens)
    entries = ragged.expand(query_lens, num_tokens)
    rows, is_valid = entries.rows, entries.is_valid
    positions = jnp.where(is_valid, table.seq_lens[rows] + entries.offsets, 0)
    ends = starts + query_lens
    cu_seqlens = jnp.pad(jnp.minimum(ends, num_tokens), (1, 0))
    at = (ends - 1)[:, None]
    if num_logits > 1:
      at = starts[:, None] + jnp.arange(num_logits, dtype=jnp.int32)[None]
    logits_indices = jnp.clip(at.reshape(-1), 0, num_tokens - 1)
  column = jnp.minimum(positions // block_size, table.max_blocks_per_seq - 1)

  def slots(block_tables: Array, num_blocks: int) -> Array:
    at = block_tables[rows, column] * block_size + positions % block_size
    return ragged.masked(at, is_valid, num_blocks * block_size)

  return StepMetadata(
    seq_ids=rows,
    positions=positions,
    slot_mapping=slots(table.block_tables, num_blocks),
    query_lens=query_lens,
    seq_lens=jnp.where(query_lens > 0, table.seq_lens + query_lens, 0),
    cu_seqlens=cu_seqlens,
    logits_indices=logits_indices,
    block_tables=table.block_tables,
    windows=tuple(
      WindowView(
        block_tables=window.block_tables,
        slot_mapping=slots(window.block_tables, window.num_blocks),
      )
      for window in windows
    ),
    is_decode=num_tokens is None,
    num_logits=num_logits,
    head_axes=head_axes,
  )


def find_shared_prefix(metadata: StepMetadata, *, block_size: int) -> SharedPrefix:
  """Finds the blocks that are worth reading once for all rows that have them.

  Compares every row of the step with its first one, and takes the prefix that saves
  most: its length times the rows that share it. Costs one pass over `[S, P]` ids.
  """
  tables, is_in_step = metadata.block_tables, metadata.query_lens > 0
  num_columns = tables.shape[1]
  first = tables[jnp.argmax(is_in_step)][None]
  column = jnp.arange(num_columns, dtype=jnp.int32)[None]
  num_same = jnp.min(jnp.where(tables == first, num_columns, column), axis=1)
  behind = (metadata.seq_lens - metadata.query_lens) // block_size
  num_same = jnp.where(is_in_step, jnp.minimum(num_same, behind), 0)
  num_rows = jnp.sum(num_same[None] >= num_same[:, None], axis=1, dtype=jnp.int32)
  saved = num_same * (num_rows - 1)
  num_blocks = jnp.where(jnp.max(saved) > 0, num_same[jnp.argmax(saved)], 0)
  shares = (num_same >= num_blocks) & (num_blocks > 0)
  return SharedPrefix(num_blocks=num_blocks.astype(jnp.int32), shares=shares)
