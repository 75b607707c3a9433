"""The walk that the Triton kernels share: some queries of a row over some of its keys.

Keys and values are loaded by token, so any block size goes with any tile. What is
loaded is always a token that some query sees: positions are clamped into the row, ids
into the pool. Nothing dead is ever read, so there is nothing to mask in the values, and
no table can lead outside of the pool.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.tuning import Settings

NEG = float(np.finfo(np.float32).min) / 2
"""Logit of what is masked: finite, so that a walk without any key stays free of NaN."""

LOG2_E = math.log2(math.e)
type Ref = Any
"""A Pallas reference; jax has no public name for it."""
type Parts = tuple[tuple[int, int], ...]


class Memory(NamedTuple):
  """What every walk reads; None where a layer has no such thing.

  Keys, values and their scales are flat: token `(block * K + head) * block_size + i`.
  Two elements of one byte may stand as one of two bytes, which halves all offsets.
  """

  q: Ref  # [T * H, D]
  k: Ref  # [N * K * block_size, D]
  v: Ref  # [N * K * block_size, Dv]
  k_scale: Ref  # [N * K * block_size]
  v_scale: Ref  # [N * K * block_size]
  sinks: Ref  # [H]
  block_tables: Ref  # [S, P]
  seq_lens: Ref  # [S]
  cu_seqlens: Ref  # [S + 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """What kernels are specialised for.

  Attributes:
    num_kv_heads: `K`.
    group: Query heads per kv head.
    block_size: Tokens per block.
    key_parts: Columns `(start, stop)` of the keys, see `_parts`.
    value_parts: Columns of the values.
    dtype: Of the operands of products.
    stored: Of the elements of keys and values, one byte each, if they are quantised.
    has_float8: Whether the device converts `float8_e4m3fn`.
    settings: How the kernel is set up.
    is_causal, sm_scale, sliding_window, logits_soft_cap: As in `paged_attention`.
  """

  num_kv_heads: int
  group: int
  block_size: int
  key_parts: Parts
  value_parts: Parts
  dtype: np.dtype
  stored: np.dtype | None
  has_float8: bool
  settings: Settings
  is_causal: bool
  sm_scale: float
  sliding_window: int | None
  logits_soft_cap: float | None

  @property
  def v_head_dim(self) -> int:
    """`Dv`."""
    return self.value_parts[-1][1]

  @property
  def tile_kv(self) -> int:
    """Tokens per tile."""
    return self.settings.tile_kv


def walk(
  memory: Memory,
  layer: Layer,
  *,
  row: Array,
  head: Array,
  queries: Array,
  tiles: tuple[Array, Array] | None,
  with_sinks: bool,
) -> tuple[list[Array], Array]:
  """Attention of some queries of a row over some tiles of its keys.

  Args:
    memory: Where everything is.
    layer: Static facts.
    row: `[]`.
    head: `[]`, of the keys.
    queries: `[tile_q]` rising `token * group + head`, counted in the row.
    tiles: The first tile and one past the last; all that the queries see if None.
    with_sinks: Whether sinks are to be counted in.

  Returns:
    The parts of `[tile_q, Dv]` float32, and the logarithm to base 2 of the softmax's
    denominator, `[tile_q]`. `NEG` and zeros where a query sees nothing.
  """
  group, size = layer.group, layer.block_size
  start, stop = memory.cu_seqlens[row], memory.cu_seqlens[row + 1]
  max_len = memory.block_tables.shape[1] * size
  length = jnp.minimum(memory.seq_lens[row], max_len)
  queries = jnp.minimum(queries, (stop - start) * group - 1)
  token = lax.div(queries, group)
  heads = head * group + lax.rem(queries, group)
  position = length - (stop - start) + token if layer.is_causal else None
  num_heads = layer.num_kv_heads * group
  num_tokens = memory.q.shape[0] // num_heads
  at = jnp.clip(start + token, 0, num_tokens - 1) * num_heads + heads
  q = [memory.q[at, a:b].astype(layer.dtype) for a, b in layer.key_parts]

  begin, end = jnp.int32(0), length
  if position is not None:
    end = jnp.clip(jnp.max(position) + 1, 1, length)
    if layer.sliding_window is not None:
      begin = jnp.maximum(jnp.min(position) - (layer.sliding_window - 1), 0)
  if tiles is None:
    tile_kv = layer.tile_kv
    tiles = lax.div(begin, tile_kv), lax.div(end + (tile_kv - 1), tile_kv)

  def step(index: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
    sums, top, total = state
    place = index * layer.tile_kv + jnp.arange(layer.tile_kv, dtype=jnp.int32)
    mask = jnp.broadcast_to((place < end)[None], (queries.size, place.size))
    if position is not None:
      mask &= place[None] <= position[:, None]
      if layer.sliding_window is not None:
        mask &= place[None] > position[:, None] - layer.sliding_window
    # Only what some query sees is read.
    slot = _slots(memory, layer, row, head, jnp.clip(place, begin, end - 1))
    keys = [_load(memory.k, slot, part, layer) for part in layer.key_parts]
    logits = sum(
      (_dot(x, y.T) for x, y in zip(q, keys, strict=True)),
      start=jnp.zeros(mask.shape, jnp.float32),
    )
    if memory.k_scale is not None:
      logits = logits * memory.k_scale[slot][None]
    if layer.logits_soft_cap is None:
      logits = logits * (layer.sm_scale * LOG2_E)
    else:
      cap = layer.logits_soft_cap
      logits = jnp.tanh(logits * (layer.sm_scale / cap)) * (cap * LOG2_E)
    logits = jnp.where(mask, logits, NEG)
    new_top = jnp.maximum(top, jnp.max(logits, axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.where(mask, jnp.exp2(logits - new_top[:, None]), 0.0)
    total = total * shrink + jnp.sum(weights, axis=1)
    scale = memory.k_scale if memory.v is None else memory.v_scale
    if scale is not None:
      weights = weights * scale[slot][None]
    weights = weights.astype(layer.dtype)
    if memory.v is None:  # the first parts of the keys
      pool, loaded = memory.k, dict(zip(layer.key_parts, keys, strict=True))
    else:
      pool, loaded = memory.v, {}
    sums = [
      x * shrink[:, None]
      + _dot(
        weights,
        loaded[part] if part in loaded else _load(pool, slot, part, layer),
      )
      for x, part in zip(sums, layer.value_parts, strict=True)
    ]
    return sums, new_top, total

  top = jnp.full(queries.shape, NEG, jnp.float32)
  total = jnp.zeros(queries.shape, jnp.float32)
  if with_sinks and memory.sinks is not None:
    top, total = memory.sinks[heads] * LOG2_E, total + 1.0
  sums = [jnp.zeros((queries.size, b - a), jnp.float32) for a, b in layer.value_parts]
  sums, top, total = lax.fori_loop(*tiles, step, (sums, top, total))
  safe = jnp.where(total == 0.0, 1.0, total)
  lse = jnp.where(total == 0.0, NEG, top + jnp.log2(safe))
  return [x / safe[:, None] for x in sums], lse


def _slots(
  memory: Memory, layer: Layer, row: Array, head: Array, place: Array
) -> Array:
  """Index of each position of a row in the flat pools."""
  size, num_kv_heads = layer.block_size, layer.num_kv_heads
  block = memory.block_tables[row, lax.div(place, size)]
  num_blocks = memory.k.shape[0] // (num_kv_heads * size)
  block = jnp.clip(block, 0, num_blocks - 1)
  return (block * num_kv_heads + head) * size + lax.rem(place, size)


def pairs(pool: Array) -> Array:
  """Views elements of one byte, `[n, D]`, as pairs `[n, D // 2]`; nothing is moved."""
  return lax.bitcast_convert_type(pool.reshape(pool.shape[0], -1, 2), jnp.uint16)


def _load(pool: Ref, slot: Array, part: tuple[int, int], layer: Layer) -> Array:
  """Some columns of some tokens, in a type to compute with."""
  start, stop = part
  if layer.stored is None:
    return pool[slot, start:stop].astype(layer.dtype)
  if pool.dtype == jnp.uint16:
    two = pool[slot, start // 2 : stop // 2]
    tile = jnp.stack([two & 0xFF, two >> 8], axis=-1).reshape(slot.size, stop - start)
    tile = tile.astype(jnp.uint8)
  else:
    tile = pool[slot, start:stop]
  if layer.stored == jnp.int8:
    if tile.dtype != jnp.int8:
      tile = lax.bitcast_convert_type(tile, jnp.int8)
    return tile.astype(layer.dtype)
  if layer.has_float8:
    return lax.bitcast_convert_type(tile, jnp.float8_e4m3fn).astype(layer.dtype)
  return float8(tile).astype(layer.dtype)


def float8(bits: Array) -> Array:
  """The numbers whose bits as `float8_e4m3fn` are given in uint8, exactly, as float16.

  Their exponent is shorter than that of float16 and their mantissa too, so that bits
  in their places are a number that is only too small, also where it is subnormal.
  """
  bits = bits.astype(jnp.uint16)
  magnitude = bits & 0x7F
  half = lax.bitcast_convert_type(((bits & 0x80) << 8) | (magnitude << 7), jnp.float16)
  # 0x7F is NaN: there is no infinity.
  nan = jnp.full(bits.shape, jnp.nan, jnp.float16)
  return jnp.where(magnitude == 0x7F, nan, half * jnp.float16(256))


def _dot(x: Array, y: Array) -> Array:
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def store(
  at: Callable[[Any, Array], Any],
  rows: Any,
  start: int,
  stop: int,
  value: Array,
  mask: Array,
) -> None:
  """Stores `value [n, stop - start]` into these columns of rows that the mask has.

  Rows that it has not may be out of range, but never repeat others: interpret mode
  writes back what it read there.
  """
  columns = jnp.arange(start, stop, dtype=jnp.int32)
  spread = functools.partial(jnp.broadcast_to, shape=value.shape)
  rows = jax.tree.map(lambda x: spread(x[:, None]), rows)
  plt.store(at(rows, spread(columns[None])), value, mask=spread(mask[:, None]))
