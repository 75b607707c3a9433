"""Paged attention in plain XLA operations: runs wherever XLA does.

Queries are cut into tiles of one row each, and every tile walks its row's K/V in tiles
of fixed size from the first token on with an online softmax. All query tiles walk in
step, so the cost is that of the longest live row, never of the table's width. The order
of every sum depends on a row's own length alone: a row's bits do not depend on its
neighbours.
"""

from jax import Array, lax
import jax.numpy as jnp
import numpy as np

NEG = float(np.finfo(np.float32).min) / 2
"""Logit of masked positions: finite, so that rows without any K/V stay free of NaN."""

_TILE_KV = 128
_TILE_Q = 16


def paged_attention(
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float,
  max_query_len: int | None = None,
) -> Array:
  """Causal attention of packed queries over paged keys and values.

  See `pallas_kernels.paged_attention.paged_attention` for the arguments.
  """
  num_tokens, num_heads, head_dim = q.shape
  _, num_kv_heads, block_size, _ = k.shape
  num_seqs, max_blocks = block_tables.shape
  group = num_heads // num_kv_heads
  tile_q = 1 if max_query_len == 1 else min(_TILE_Q, num_tokens)
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
  is_query = (tokens < cu_seqlens[rows + 1][:, None]) & is_live[:, None]
  kv_lens = jnp.max(jnp.where(is_query, positions + 1, 0), axis=1)

  queries = q[jnp.minimum(tokens, num_tokens - 1)]
  queries = queries.reshape(num_tiles, tile_q, num_kv_heads, group, head_dim)
  queries = queries.transpose(0, 2, 1, 3, 4)
  queries = queries.reshape(num_tiles, num_kv_heads, tile_q * group, head_dim)
  query_positions = jnp.repeat(jnp.where(is_query, positions, -1), group, axis=1)

  def gather(pool: Array, ids: Array) -> Array:
    tiles = pool[ids].transpose(0, 2, 1, 3, 4)
    return tiles.reshape(num_tiles, num_kv_heads, tile_kv, pool.shape[-1])

  def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
    index, acc, top, total = state
    columns = index * blocks_per_tile + jnp.arange(blocks_per_tile, dtype=jnp.int32)
    ids = block_tables[rows[:, None], jnp.minimum(columns, max_blocks - 1)[None]]
    kv_positions = index * tile_kv + jnp.arange(tile_kv, dtype=jnp.int32)
    is_stored = kv_positions[None] < kv_lens[:, None]
    keys, values = gather(k, ids), gather(v, ids)
    values = jnp.where(is_stored[:, None, :, None], values, jnp.zeros((), v.dtype))
    logits = jnp.einsum(
      "nkqd,nktd->nkqt", queries, keys, preferred_element_type=jnp.float32
    )
    mask = kv_positions[None, None] <= query_positions[:, :, None]
    logits = jnp.where(mask[:, None], logits * sm_scale, NEG)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    scale = jnp.exp(top - new_top)
    weights = jnp.where(mask[:, None], jnp.exp(logits - new_top[..., None]), 0.0)
    total = total * scale + jnp.sum(weights, axis=-1)
    part = jnp.einsum(
      "nkqt,nktd->nkqd",
      weights.astype(v.dtype),
      values,
      preferred_element_type=jnp.float32,
    )
    return index + 1, acc * scale[..., None] + part, new_top, total

  shape = (num_tiles, num_kv_heads, tile_q * group)
  num_steps = (jnp.max(kv_lens) + (tile_kv - 1)) // tile_kv
  # Ends because the index counts up to the longest live row.
  _, acc, _, total = lax.while_loop(
    lambda state: state[0] < num_steps,
    step,
    (
      jnp.int32(0),
      jnp.zeros((*shape, v.shape[-1]), jnp.float32),
      jnp.full(shape, NEG, jnp.float32),
      jnp.zeros(shape, jnp.float32),
    ),
  )
  out = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
  out = out.reshape(num_tiles, num_kv_heads, tile_q, group, v.shape[-1])
  out = out.transpose(0, 2, 1, 3, 4).reshape(num_tiles, tile_q, num_heads, -1)
  out = out[tile_of_token, place]
  if not (tile_q == 1 and num_tokens == num_seqs):
    is_token = jnp.arange(num_tokens, dtype=jnp.int32) < cu_seqlens[-1]
    out = jnp.where(is_token[:, None, None], out, 0.0)
  return out.astype(q.dtype)


def _row_of(ends: Array, index: Array) -> Array:
  """Row of each flat index, given the rows' ends; the last row past the end."""
  rows = jnp.searchsorted(ends, index, side="right", method="scan_unrolled")
  return jnp.minimum(rows.astype(jnp.int32), ends.shape[0] - 1)
