"""The work of a step, as equal pieces that any number of programs can share.

A row with few queries is cut along its keys (split-K, as in flash-decoding), a row with
many along its queries. The pieces of all rows stand in one queue, so that a grid whose
size knows nothing of the batch serves ragged batches evenly. Where a row is cut depends
on its own length and on static shapes, never on its neighbours: so do its bits.

Everything here is a few vector operations on `[S]`, `[T]` and the queue: 8 kernels for
a decode step as compiled for an H100, and 11 for a mixed one, where the rest of a Llama
layer has 14 and 15. Where layers are unrolled, XLA finds that they all do the same and
does it once. Where they are scanned it does not: these kernels stand in the body of the
loop and run for every layer. A `Plan` made before the loop takes them out.
"""

import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitQueue:
  """Pieces of the keys of rows with few queries.

  Attributes:
    rows: `[W]` int32. The row of each piece; pieces of a row stand together.
    first: `[W]` int32. Its first tile of keys.
    last: `[W]` int32. One past its last tile.
    num_pieces: `[1]` int32. Pieces that there are; the rest has no meaning.
    token_piece: `[T]` int32. First piece of each token's row.
    token_count: `[T]` int32. Pieces of each token's row; 0 for tokens of other rows.
    token_place: `[T]` int32. Place of each token among the queries of its row.
  """

  rows: Array
  first: Array
  last: Array
  num_pieces: Array
  token_piece: Array
  token_count: Array
  token_place: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TileQueue:
  """Tiles of the queries of rows with many queries.

  Attributes:
    rows: `[W]` int32. The row of each tile, -1 where there is none.
    first: `[W]` int32. Its first query, counted in its row as `token * group + head`.
  """

  rows: Array
  first: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
  """What `split_rows` takes beside arrays; see there."""

  num_tokens: int
  max_len: int
  max_queries: int
  tile_kv: int
  min_tiles: int
  max_splits: int
  sliding_window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """What `tile_rows` takes beside arrays; see there."""

  num_tokens: int
  group: int
  min_queries: int
  tile_q: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Queues of one step, for all layers that cut its rows in the same way.

  A layer that cuts them in another way does not find its queue here and makes one, so
  that a plan can be wrong only by being that of other rows.

  Attributes:
    cuts: What each queue was made with. Static.
    queues: The queues.
  """

  cuts: tuple[Splits | Tiles, ...] = dataclasses.field(metadata={"static": True})
  queues: tuple[SplitQueue | TileQueue, ...]

  def find(self, cut: Splits | Tiles) -> Any:
    """The queue that was made with just these; None if there is none."""
    return dict(zip(self.cuts, self.queues, strict=True)).get(cut)


def plan_rows(
  seq_lens: Array, cu_seqlens: Array, cuts: tuple[Splits | Tiles, ...]
) -> Plan:
  """Makes the queues of some rows ahead."""
  queues = tuple(
    (split_rows if isinstance(cut, Splits) else tile_rows)(
      seq_lens, cu_seqlens, **dataclasses.asdict(cut)
    )
    for cut in cuts
  )
  return Plan(cuts=cuts, queues=queues)


@jax.named_scope("paged_attention_queue")
def split_rows(
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  num_tokens: int,
  max_len: int,
  max_queries: int,
  tile_kv: int,
  min_tiles: int,
  max_splits: int,
  sliding_window: int | None = None,
  plan: Plan | None = None,
) -> SplitQueue:
  """Cuts the keys of rows with few queries into pieces of equal size.

  A row of `n` tiles is cut into at most `max_splits` pieces of at least `min_tiles`.

  Args:
    seq_lens: `[S]` int32.
    cu_seqlens: `[S + 1]` int32.
    num_tokens: `T`.
    max_len: Tokens that a row of the block table can hold.
    max_queries: Rows with more queries are left out.
    tile_kv: Tokens per tile of keys.
    min_tiles: Least size of a piece.
    max_splits: Most pieces of a row.
    sliding_window: Tiles before the window of a row's first query are left out.
    plan: Of these rows: where the queue is, if it was made ahead.
  """
  cut = Splits(
    num_tokens=num_tokens,
    max_len=max_len,
    max_queries=max_queries,
    tile_kv=tile_kv,
    min_tiles=min_tiles,
    max_splits=max_splits,
    sliding_window=sliding_window,
  )
  if plan is not None and (queue := plan.find(cut)) is not None:
    return queue
  query_lens = cu_seqlens[1:] - cu_seqlens[:-1]
  is_in = (query_lens > 0) & (query_lens <= max_queries) & (seq_lens > 0)
  lens = jnp.minimum(seq_lens, max_len)
  begin = jnp.zeros_like(lens)
  if sliding_window is not None:
    begin = jnp.maximum(lens - query_lens - (sliding_window - 1), 0) // tile_kv
  end = (lens + (tile_kv - 1)) // tile_kv
  size = jnp.maximum((end - begin + (max_splits - 1)) // max_splits, min_tiles)
  counts = jnp.where(is_in, (end - begin + size - 1) // size, 0)
  ends = jnp.cumsum(counts)
  starts = ends - counts
  most_tiles = -(-max_len // tile_kv)
  if sliding_window is not None:
    # A window need not begin where a tile does.
    span = sliding_window + max_queries - 1
    most_tiles = min(most_tiles, -(-span // tile_kv) + 1)
  most = min(max_splits, -(-most_tiles // min_tiles))
  piece = jnp.arange(seq_lens.shape[0] * most, dtype=jnp.int32)
  rows = _row_of(ends, piece)
  first = begin[rows] + (piece - starts[rows]) * size[rows]
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  token_row = _row_of(cu_seqlens[1:], token)
  is_token = token < cu_seqlens[-1]
  return SplitQueue(
    rows=rows,
    first=first,
    last=jnp.minimum(first + size[rows], end[rows]),
    num_pieces=ends[-1:],
    token_piece=starts[token_row],
    token_count=jnp.where(is_token, counts[token_row], 0),
    token_place=token - cu_seqlens[token_row],
  )


@jax.named_scope("paged_attention_queue")
def tile_rows(
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  num_tokens: int,
  group: int,
  min_queries: int,
  tile_q: int,
  plan: Plan | None = None,
) -> TileQueue:
  """Cuts the queries of rows with many into tiles; the last of a row come first.

  These see the most keys, so the longest tiles do not come at the very end.

  Args:
    seq_lens: `[S]` int32.
    cu_seqlens: `[S + 1]` int32.
    num_tokens: `T`.
    group: Query heads per kv head; a token has so many queries.
    min_queries: Rows with fewer tokens in the step are left out.
    tile_q: Queries per tile.
    plan: Of these rows: where the queue is, if it was made ahead.
  """
  cut = Tiles(
    num_tokens=num_tokens, group=group, min_queries=min_queries, tile_q=tile_q
  )
  if plan is not None and (queue := plan.find(cut)) is not None:
    return queue
  query_lens = cu_seqlens[1:] - cu_seqlens[:-1]
  is_in = (query_lens >= min_queries) & (seq_lens > 0)
  counts = jnp.where(is_in, (query_lens * group + (tile_q - 1)) // tile_q, 0)
  ends = jnp.cumsum(counts)
  most_rows = min(seq_lens.shape[0], num_tokens // min_queries)
  most = most_rows + num_tokens * group // tile_q
  tile = jnp.arange(most, dtype=jnp.int32)
  rows = _row_of(ends, tile)
  return TileQueue(
    rows=jnp.where(tile < ends[-1], rows, -1),
    first=jnp.maximum(ends[rows] - 1 - tile, 0) * tile_q,
  )


def _row_of(ends: Array, index: Array) -> Array:
  """The row whose part of `[0, ends[-1])` holds each index; the last past the end."""
  rows = jnp.sum(ends[None] <= index[:, None], axis=1, dtype=jnp.int32)
  return jnp.minimum(rows, ends.shape[0] - 1)
