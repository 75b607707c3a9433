"""Paged attention in plain XLA operations: runs wherever XLA does.

Queries are cut into tiles of one row each, and every tile walks its row's K/V in tiles
of fixed size from the first token on with an online softmax. All query tiles walk in
step, so the cost is that of the longest live row, never of the table's width. The order
of every sum depends on a row's own length alone: a row's bits do not depend on its
neighbours.
"""

import functools

import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.call import Call

NEG = float(np.finfo(np.float32).min) / 2
"""Logit of masked positions: finite, so that rows without any K/V stay free of NaN."""

_TILE_KV = 128
_TILE_Q = 16


# Compiled once where it is called outside `jax.jit`: its loop's body is a new function
# in each call, which XLA would compile anew.
@functools.partial(jax.jit, inline=True)
def paged_attention(call: Call) -> tuple[Array, Array]:
  """Causal attention of packed queries over paged keys and values.

  See `pallas_kernels.paged_attention.paged_attention`, whose `out` and `lse` are the
  results.
  """
  q, v, block_tables, cu_seqlens = call.q, call.v, call.block_tables, call.cu_seqlens
  seq_lens, sliding_window = call.seq_lens, call.sliding_window
  k_scale, v_scale, cap = call.k_scale, call.v_scale, call.logits_soft_cap
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, group, block_size = call.num_kv_heads, call.group, call.block_size
  num_seqs, max_blocks = block_tables.shape
  tile_q = 1 if call.max_query_len == 1 else min(_TILE_Q, num_tokens)
  blocks_per_tile = max(1, min(_TILE_KV // block_size, max_blocks))
  tile_kv = blocks_per_tile * block_size

  # Query tiles: `rows[i]` is the sequence of tile `i`, `first[i]` its first token in
  # `q`.
  query_lens = cu_seqlens[1:] - cu_seqlens[:-1]
  if tile_q == 1 and num_tokens == num_seqs:
    num_tiles = num_seqs
    rows = jnp.arange(num_seqs, dtype=jnp.int32)
    first, is_live = rows, seq_lens > 0
    tile_of_token, place = rows, jnp.zeros_like(rows)
  else:
    num_tiles = num_seqs + num_tokens // tile_q
    counts = (query_lens + (tile_q - 1)) // tile_q
    ends = jnp.cumsum(counts)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    rows = _row_of(ends, tile)
    is_live = (tile < ends[-1]) & (seq_lens[rows] > 0)
    first = cu_seqlens[rows] + (tile - (ends - counts)[rows]) * tile_q
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of_token = _row_of(cu_seqlens[1:], token)
    offset = token - cu_seqlens[row_of_token]
    tile_of_token = (ends - counts)[row_of_token] + offset // tile_q
    tile_of_token = jnp.clip(tile_of_token, 0, num_tiles - 1)
    place = offset % tile_q
  lane = jnp.arange(tile_q, dtype=jnp.int32)
  tokens = first[:, None] + lane[None]
  # Position of query token `t` of row `s`: seq_len - query_len + (t - cu_seqlens[s]).
  shift = (seq_lens - cu_seqlens[1:])[rows]
  positions = tokens + shift[:, None]
  if not call.is_causal:
    positions = jnp.broadcast_to(seq_lens[rows][:, None] - 1, positions.shape)
  is_query = (tokens < cu_seqlens[rows + 1][:, None]) & is_live[:, None]
  kv_lens = jnp.max(jnp.where(is_query, positions + 1, 0), axis=1)

  queries = q[jnp.minimum(tokens, num_tokens - 1)]
  queries = queries.reshape(num_tiles, tile_q, num_kv_heads, group, head_dim)
  queries = queries.transpose(0, 2, 1, 3, 4)
  queries = queries.reshape(num_tiles, num_kv_heads, tile_q * group, head_dim)
  query_positions = jnp.repeat(jnp.where(is_query, positions, -1), group, axis=1)

  # The first tile of K/V that a query tile needs, and the first position in it.
  if sliding_window is None:
    begin, first_tile = None, None
  else:
    begin = jnp.maximum(positions[:, 0] - (sliding_window - 1), 0)
    first_tile = begin // tile_kv

  def gather(pool: Array, ids: Array) -> Array:
    """`[num_tiles, K, tile_kv, ...]` of a pool `[N, K, block_size, ...]`."""
    tiles = jnp.moveaxis(pool[ids], 2, 1)
    return tiles.reshape(num_tiles, num_kv_heads, tile_kv, *pool.shape[3:])

  def elements(tile: Array, scale: Array | None) -> Array:
    """What a tile holds, in a type to compute with; scales are applied elsewhere."""
    if tile.dtype == jnp.uint8:
      tile = lax.bitcast_convert_type(tile, jnp.float8_e4m3fn)
    return tile if scale is None else tile.astype(q.dtype)

  def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
    index, acc, top, total = state
    columns = index * blocks_per_tile + jnp.arange(blocks_per_tile, dtype=jnp.int32)
    kv_positions = index * tile_kv + jnp.arange(tile_kv, dtype=jnp.int32)
    columns, kv_positions = columns[None], kv_positions[None]
    if first_tile is not None:
      columns = columns + (first_tile * blocks_per_tile)[:, None]
      kv_positions = kv_positions + (first_tile * tile_kv)[:, None]
    ids = block_tables[rows[:, None], jnp.minimum(columns, max_blocks - 1)]
    is_needed = kv_positions < kv_lens[:, None]
    mask = kv_positions[:, None] <= query_positions[:, :, None]
    if begin is not None and sliding_window is not None:
      is_needed &= kv_positions >= begin[:, None]
      mask &= kv_positions[:, None] > query_positions[:, :, None] - sliding_window

    keys = elements(gather(call.k, ids), k_scale)
    if v is None:
      values = keys[..., : call.v_head_dim]
    else:
      values = elements(gather(v, ids), v_scale)
    values = jnp.where(is_needed[:, None, :, None], values, jnp.zeros((), values.dtype))
    logits = jnp.einsum(
      "nkqd,nktd->nkqt", queries, keys, preferred_element_type=jnp.float32
    )
    if k_scale is not None:
      logits = logits * gather(k_scale, ids)[:, :, None]
    logits = logits * call.sm_scale
    if cap is not None:
      logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(mask[:, None], logits, NEG)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    scale = jnp.exp(top - new_top)
    weights = jnp.where(mask[:, None], jnp.exp(logits - new_top[..., None]), 0.0)
    total = total * scale + jnp.sum(weights, axis=-1)
    of_values = k_scale if v is None else v_scale
    if of_values is not None:
      factors = jnp.where(is_needed[:, None], gather(of_values, ids), 0.0)
      weights = weights * factors[:, :, None]
    part = jnp.einsum(
      "nkqt,nktd->nkqd",
      weights.astype(values.dtype),
      values,
      preferred_element_type=jnp.float32,
    )
    return index + 1, acc * scale[..., None] + part, new_top, total

  shape = (num_tiles, num_kv_heads, tile_q * group)
  if call.sinks is None:
    top, total = jnp.full(shape, NEG, jnp.float32), jnp.zeros(shape, jnp.float32)
  else:
    # A sink is a logit that is always seen and has no value.
    top = call.sinks.astype(jnp.float32).reshape(1, num_kv_heads, 1, group)
    top = jnp.broadcast_to(top, (*shape[:2], tile_q, group)).reshape(shape)
    total = jnp.ones(shape, jnp.float32)
  num_steps = (kv_lens + (tile_kv - 1)) // tile_kv
  if first_tile is not None:
    num_steps = num_steps - first_tile
  num_steps = jnp.max(num_steps)
  # Ends because the index counts up to the longest walk of a live row.
  _, acc, top, total = lax.while_loop(
    lambda state: state[0] < num_steps,
    step,
    (jnp.int32(0), jnp.zeros((*shape, call.value_dim), jnp.float32), top, total),
  )
  is_empty = total == 0.0
  out = acc / jnp.where(is_empty, 1.0, total)[..., None]
  lse = jnp.where(is_empty, -jnp.inf, top + jnp.log(jnp.where(is_empty, 1.0, total)))

  def unpack(x: Array) -> Array:
    """`[T, H, ...]` of what is `[num_tiles, K, tile_q * group, ...]`."""
    x = x.reshape(num_tiles, num_kv_heads, tile_q, group, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1).reshape(num_tiles, tile_q, num_heads, *x.shape[4:])
    return x[tile_of_token, place]

  out, lse = unpack(out), unpack(lse)
  is_token = unpack(
    jnp.broadcast_to(
      is_query[:, None, :, None], (num_tiles, num_kv_heads, tile_q, group)
    ).reshape(shape)
  )
  if not (tile_q == 1 and num_tokens == num_seqs):
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_token &= (token < cu_seqlens[-1])[:, None]
    out = jnp.where(is_token[..., None], out, 0.0)
  return out.astype(q.dtype), jnp.where(is_token, lse, -jnp.inf)


def _row_of(ends: Array, index: Array) -> Array:
  """Row of each flat index, given the rows' ends; the last row past the end."""
  rows = jnp.searchsorted(ends, index, side="right", method="scan_unrolled")
  return jnp.minimum(rows.astype(jnp.int32), ends.shape[0] - 1)
