"""BlockMap: what every block is at one moment, on the host.

All pictures, and the differences between two contexts, are made from it. It holds the
bookkeeping as numpy arrays and no keys, values or states, so it stays when the context
is donated to the next step.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import numpy as np

from kvcache import printing
from kvcache.config import CacheConfig, NULL_STATE
from kvcache.context import check_context, Context
from kvcache.observe.palette import Kind, LOOKS
from kvcache.parts.blocks import BlockPool
from kvcache.parts.publishing import Tables


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PoolMap:
  """One pool of blocks, or of states.

  Attributes:
    name: `"blocks"`, `"window 128"` or `"states"`.
    kinds: `[N]` int8 `Kind`.
    ref_counts: `[N]` int32.
    block_tables: `[S, P]` int32 ids that each row holds, 0 where it holds none.
    tokens_in: `[N]` int32. Tokens stored in each block; 0 for states.
    owners: `[N]` int32. For a window's pool and for states the block that each one is
      attached to, else 0.
  """

  name: str
  kinds: np.ndarray
  ref_counts: np.ndarray
  block_tables: np.ndarray
  tokens_in: np.ndarray
  owners: np.ndarray

  def __repr__(self) -> str:
    return f"PoolMap({self.name}: {self.summary})"

  @property
  def summary(self) -> str:
    """How many blocks are of each kind, `"3 shared, 9 free"`."""
    return ", ".join(f"{num:,} {LOOKS[kind].name}" for kind, num in self.counts.items())

  @functools.cached_property
  def counts(self) -> dict[Kind, int]:
    """How many blocks are of each kind; kinds without any are left out."""
    found = np.bincount(self.kinds, minlength=len(Kind))
    return {kind: int(found[kind]) for kind in LOOKS if found[kind]}

  @functools.cached_property
  def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table entries sorted by block: its first entry `[N + 1]`, rows and columns."""
    rows, columns = np.nonzero(self.block_tables)
    ids = self.block_tables[rows, columns]
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(self.kinds.size + 1))
    return starts, rows[order], columns[order]

  def holders(self, block_id: int) -> list[tuple[int, int]]:
    """`(row, column)` of every table entry that names a block."""
    starts, rows, columns = self._entries
    span = slice(starts[block_id], starts[block_id + 1])
    return list(zip(rows[span].tolist(), columns[span].tolist(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockMap:
  """A context's bookkeeping at one moment.

  Attributes:
    config: Static sizes.
    tables: The bookkeeping, with numpy arrays.
    pools: The context's blocks, then those of each window, then its states.
  """

  config: CacheConfig
  tables: Tables
  pools: tuple[PoolMap, ...]

  def __repr__(self) -> str:
    rows = f"{len(self.rows):,} of {self.config.max_seqs:,} rows"
    pools = (f"{pool.name}: {pool.summary}" for pool in self.pools)
    return f"BlockMap({'; '.join([rows, *pools])})"

  @property
  def blocks(self) -> PoolMap:
    """The context's own blocks, without those of windows."""
    return self.pools[0]

  @functools.cached_property
  def rows(self) -> list[int]:
    """Live rows."""
    return np.flatnonzero(self.tables.sequences.is_active).tolist()

  def seq_len(self, row: int) -> int:
    """Tokens that a row stores."""
    return int(self.tables.sequences.seq_lens[row])

  def row_blocks(self, row: int) -> np.ndarray:
    """Ids of a row's blocks, in order."""
    table = self.tables.sequences
    return np.asarray(table.block_tables[row, : table.num_blocks[row]])

  def tokens(self, block_id: int) -> list[int]:
    """Tokens that a block holds."""
    num = self.blocks.tokens_in[block_id]
    return np.asarray(self.tables.prefix.block_tokens[block_id, :num]).tolist()

  def row_tokens(self, row: int) -> np.ndarray:
    """Tokens of a row."""
    stored = np.asarray(self.tables.prefix.block_tokens)[self.row_blocks(row)]
    return stored.reshape(-1)[: self.seq_len(row)]

  def prefix_hash(self, block_id: int) -> str | None:
    """Hash of the tokens up to a block's end, if it is cached."""
    index = self.tables.prefix
    if not index.way_of[block_id]:
      return None
    return "".join(f"{int(word):08x}" for word in index.prefix_hash[block_id])

  def depth(self, block_id: int) -> int | None:
    """A block's column in every row; None if it is in no row and not cached."""
    index, holders = self.tables.prefix, self.blocks.holders(block_id)
    if holders:
      return holders[0][1]
    return int(index.depth[block_id]) if index.way_of[block_id] else None


def obstacle(ctx: Context) -> str | None:
  """Why a context's bookkeeping cannot be read on the host; None if it can."""
  leaves = jax.tree.leaves((ctx.tables, ctx.counters))
  if (reason := printing.obstacle(leaves)) is not None:
    return reason
  if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
    return "shapes only"
  if not all(isinstance(leaf, Array | np.ndarray | np.generic) for leaf in leaves):
    return "not arrays"
  if np.ndim(ctx.pool.num_free):
    return f"a batch of {np.shape(ctx.pool.num_free)}"
  return None


def map_blocks(ctx: Context) -> BlockMap:
  """Reads a context's bookkeeping and classifies its blocks.

  Costs the transfer of the bookkeeping to the host. The result stays valid when the
  context is donated.

  Args:
    ctx: The context, outside `jax.jit`.

  Raises:
    ValueError: The context is traced, donated, batched, or holds no arrays.
  """
  check_context(ctx)
  reason = obstacle(ctx)
  if reason is not None:
    raise ValueError(f"ctx cannot be read on the host: {reason}")
  tables = jax.device_get(ctx.tables)
  return BlockMap(config=ctx.config, tables=tables, pools=_pools(ctx.config, tables))


def as_block_map(value: Context | BlockMap) -> BlockMap:
  """A block map, of a context if it is not one already."""
  return value if isinstance(value, BlockMap) else map_blocks(value)


def count_bins(kinds: np.ndarray, num_bins: int) -> np.ndarray:
  """Splits blocks into runs of equal length, but for the last, and counts the kinds.

  Args:
    kinds: `[E]` of `Kind`.
    num_bins: Most bins.

  Returns:
    `[bins, len(Kind)]` counts; every bin but the last one has as many blocks as the
    first. One bin per block if there are no more than `num_bins`.
  """
  width = bin_width(kinds.size, num_bins)
  bins = np.arange(kinds.size) // width
  flat = np.bincount(
    bins * len(Kind) + kinds, minlength=(-(-kinds.size // width)) * len(Kind)
  )
  return flat.reshape(-1, len(Kind))


def bin_width(num: int, num_bins: int) -> int:
  """Blocks in each bin."""
  return max(1, -(-num // num_bins))


def _pools(config: CacheConfig, tables: Tables) -> tuple[PoolMap, ...]:
  sequences, index, size = tables.sequences, tables.prefix, config.block_size
  column = np.arange(sequences.max_blocks_per_seq)
  filled = np.clip(np.asarray(sequences.seq_lens)[:, None] - column * size, 0, size)
  cached = np.asarray(index.way_of) > 0
  main = _pool_map(
    "blocks",
    tables.pool,
    block_tables=np.asarray(sequences.block_tables),
    filled=filled,
    cached=cached,
    tokens_of_cached=size,
    owners=np.zeros(config.num_blocks, np.int32),
  )
  pools = [main]
  for window in tables.windows:
    # Columns before the row's first one were given back.
    is_kept = column >= np.asarray(window.first_blocks)[:, None]
    pools.append(
      _pool_map(
        f"window {window.sliding_window}",
        window.pool,
        block_tables=np.asarray(window.block_tables),
        filled=np.where(is_kept, filled, 0),
        cached=np.asarray(window.owner_ids) > 0,
        tokens_of_cached=size,
        owners=np.asarray(window.owner_ids),
      )
    )
  rows = tables.state_rows
  if rows is not None:
    snapshots = np.asarray(rows.block_ids) > 0
    states = _pool_map(
      "states",
      rows.pool,
      block_tables=np.asarray(rows.state_ids),
      filled=np.zeros_like(np.asarray(rows.state_ids)),
      cached=snapshots,
      tokens_of_cached=0,
      owners=np.asarray(rows.block_ids),
    )
    kinds = np.where(snapshots, np.int8(Kind.SNAPSHOT), states.kinds)
    kinds[NULL_STATE] = Kind.NULL
    pools.append(dataclasses.replace(states, kinds=kinds))
  return tuple(pools)


def _pool_map(
  name: str,
  pool: BlockPool,
  *,
  block_tables: np.ndarray,
  filled: np.ndarray,
  cached: np.ndarray,
  tokens_of_cached: int,
  owners: np.ndarray,
) -> PoolMap:
  refs: Any = np.asarray(pool.ref_counts)
  free = np.zeros(refs.size, bool)
  free[np.asarray(pool.free_list)[: max(int(pool.num_free), 0)]] = True
  kinds = np.select(
    [refs > 1, refs == 1, cached, free],
    [Kind.SHARED, Kind.EXCLUSIVE, Kind.CACHED, Kind.FREE],
    Kind.LOST,
  ).astype(np.int8)
  kinds[0] = Kind.NULL
  tokens_in = np.where(cached, tokens_of_cached, 0).astype(np.int32)
  np.maximum.at(tokens_in, block_tables, filled)
  tokens_in[0] = 0
  return PoolMap(
    name=name,
    kinds=kinds,
    ref_counts=refs,
    block_tables=block_tables,
    tokens_in=tokens_in,
    owners=owners,
  )
