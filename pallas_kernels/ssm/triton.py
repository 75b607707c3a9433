"""The recurrences in Pallas for GPUs through Triton: portable, Ampere and later.

A step reads each state once and writes it once, where it stands in its pool: a program
owns some channels of a row, or some columns of a head, takes their state into registers
and goes through the row's tokens. Nothing is gathered or scattered beside it. Rows of
more tokens go in chunks, by matrix products, and only the state is handed on between
them. Reference: Dao and Gu, "Transformers are SSMs", 2024.

States are read and written through the same memory, by different programs in any order.
That is right as long as no row writes a state that another one reads.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssm.rows import Rows

type Ref = Any
"""A Pallas reference; jax has no public name for it."""

_FLOATS = ("bfloat16", "float16", "float32")
_STEP_ELEMENTS = 4096
"""Of a state in one program: 16 KiB, eight vector loads of each thread in flight."""
_CONV_TILE = 256
_MAX_TAPS = 16
_STATE_SIZES = (16, 32, 64, 128, 256)
_NUM_CORES = 132
"""Multiprocessors of an H100: a prompt alone should give each of them work."""
_MAX_CHUNK = 64
_DEAD = -1e30
"""Logarithm of a decay to nothing; finite, so that differences stay free of NaN."""


class _Inputs(NamedTuple):
  """What the tokens bring to the recurrence."""

  x: Ref  # [T, H, P]
  dt: Ref  # [T, H]
  a: Ref  # [H]
  b: Ref  # [T, G, N]
  c: Ref  # [T, G, N]
  d: Ref  # [H]


def why_not(name: str, *arguments: Any, **options: Any) -> str | None:
  """Says why the operation of that name cannot serve; None if it can."""
  check = {"step_conv1d": _why_not_conv1d, "step_ssd": _why_not_ssd}[name]
  return check(*arguments, **options)


def _why_not_conv1d(
  x: Array,
  weight: Array,
  pool: Array,
  rows: Rows,
  *,
  max_query_len: int | None,
  **_: Any,
) -> str | None:
  if rows.num_entries is None and not rows.is_decode(x.shape[0], max_query_len):
    return "rows must have one token each, or keep the states after all of theirs"
  if weight.shape[1] > _MAX_TAPS:
    return f"weight must have at most {_MAX_TAPS} taps, got {weight.shape}"
  return _why_not_pool(pool, x, weight)


def _why_not_ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  pool: Array,
  rows: Rows,
  *,
  chunk_size: int,
  **_: Any,
) -> str | None:
  del dt, a, rows
  head_dim, state_size = pool.shape[-2:]
  if head_dim % 16:
    return f"x must have a multiple of 16 elements per head, got {x.shape}"
  if state_size not in _STATE_SIZES:
    return f"b must have one of {_STATE_SIZES} elements, got {b.shape}"
  if chunk_size < 16 or chunk_size & (chunk_size - 1):
    return f"chunk_size must be a power of two from 16 on, got {chunk_size}"
  return _why_not_pool(pool, x, b, c)


def _why_not_pool(pool: Array, *arrays: Array) -> str | None:
  for array in (pool, *arrays):
    if array.dtype.name not in _FLOATS:
      return f"arrays must be of {_FLOATS}, got {array.dtype}"
  if math.prod(pool.shape[:-1]) >= 2**31:
    return f"pool must have less than 2^31 rows of its last axis, got {pool.shape}"
  return None


# --- The convolution ------------------------------------------------------------------


def step_conv1d(
  x: Array,
  weight: Array,
  pool: Array,
  rows: Rows,
  *,
  bias: Array | None,
  max_query_len: int | None = None,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.step_conv1d`; `interpret` runs on any device."""
  del max_query_len  # `why_not` has looked at it
  is_decode = rows.num_entries is None
  ids = _ids(rows)
  num_seqs, num_entries = ids.write_ids.shape
  (num_tokens, channels), num_taps = x.shape, weight.shape[1]
  num_states = pool.shape[1]
  tile = min(_CONV_TILE, 1 << (channels - 1).bit_length())

  def kernel(
    pool_in: Ref, y_in: Ref, ids: Any, x: Ref, weight: Ref, bias: Ref, pool: Ref, y: Ref
  ) -> None:
    del pool_in, y_in  # the same memory as `pool` and `y`
    row = pl.program_id(0)
    channel = pl.program_id(1) * tile + jnp.arange(tile, dtype=jnp.int32)
    is_ours = channel < channels
    safe = jnp.minimum(channel, channels - 1)
    start, count, has_any = _tokens(
      ids, row, num_states, num_entries, is_decode=is_decode
    )

    @pl.when(has_any)
    def _() -> None:
      taps = [weight[safe, k].astype(jnp.float32) for k in range(num_taps)]
      at = (ids.layer[0] * num_states + ids.read_ids[row]) * channels + safe
      before = tuple(pool[at, k].astype(jnp.float32) for k in range(num_taps - 1))

      def token(i: Any, before: tuple[Array, ...]) -> tuple[Array, ...]:
        now = jnp.minimum(start + i, num_tokens - 1)
        window = (*before, x[now, safe].astype(jnp.float32))
        out = window[0] * taps[0]
        for tap, value in zip(taps[1:], window[1:], strict=True):
          out = out + value * tap
        if bias is not None:
          out = out + bias[safe].astype(jnp.float32)
        plt.store(y.at[now, channel], out.astype(y.dtype), mask=is_ours)
        target, is_kept = _target(ids, row, i, num_states)
        to = target * channels + channel
        for k, value in enumerate(window[1:]):
          plt.store(pool.at[to, k], value.astype(pool.dtype), mask=is_ours & is_kept)
        return window[1:]

      _repeat(count, num_entries, token, before)

    if is_decode:

      @pl.when(jnp.logical_not(has_any))
      def _() -> None:
        zeros = jnp.zeros((tile,), y.dtype)
        plt.store(y.at[row, channel], zeros, mask=is_ours)

  flat = pool.reshape(-1, num_taps - 1)
  y_in = None if is_decode else jnp.zeros(x.shape, x.dtype)
  flat, y = pl.pallas_call(
    kernel,
    grid=(num_seqs, pl.cdiv(channels, tile)),
    out_shape=(
      jax.ShapeDtypeStruct(flat.shape, flat.dtype),
      jax.ShapeDtypeStruct(x.shape, x.dtype),
    ),
    input_output_aliases={0: 0} if is_decode else {0: 0, 1: 1},
    compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
    interpret=interpret,
    name="ssm_conv1d_step",
  )(flat, y_in, ids, x, weight, bias)
  return y, flat.reshape(pool.shape)


# --- The recurrence -------------------------------------------------------------------


def step_ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  pool: Array,
  rows: Rows,
  *,
  d: Array | None,
  max_query_len: int | None = None,
  chunk_size: int = _MAX_CHUNK,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """See `pallas_kernels.ssm.step_ssd`; `interpret` runs on any device."""
  is_decode = rows.is_decode(x.shape[0], max_query_len)
  ids = _ids(rows)
  inputs = _Inputs(x, dt, a, b, c, d)
  flat = pool.reshape(-1, pool.shape[-1])
  y = None if is_decode else jnp.zeros(x.shape, x.dtype)
  num_states = pool.shape[1]
  flat, y = _one_by_one(
    flat,
    y,
    ids,
    inputs,
    num_states=num_states,
    is_decode=is_decode,
    is_packed=rows.num_entries is None and not is_decode,
    interpret=interpret,
  )
  if rows.num_entries is None and max_query_len != 1:
    flat, y = _in_chunks(
      flat,
      y,
      ids,
      inputs,
      num_states=num_states,
      chunk_size=chunk_size,
      interpret=interpret,
    )
  return y, flat.reshape(pool.shape)


def _one_by_one(
  pool: Array,
  y: Array | None,
  ids: Rows,
  inputs: _Inputs,
  *,
  num_states: int,
  is_decode: bool,
  is_packed: bool,
  interpret: bool,
) -> tuple[Array, Array]:
  """Rows of one token, or of a few after each of which the state is kept.

  Args:
    pool: `[R * M * H * P, N]`.
    y: `[T, H, P]` to write into, or None in a decode step.
    ids: The rows.
    inputs: Of their tokens.
    num_states: `M`.
    is_decode: Whether token `s` belongs to row `s`.
    is_packed: Whether rows of several tokens are left to `_in_chunks`.
    interpret: As in `step_ssd`.
  """
  (num_tokens, num_heads, head_dim), state_size = inputs.x.shape, pool.shape[1]
  num_seqs, num_entries = ids.write_ids.shape
  group = num_heads // inputs.b.shape[1]
  tile = _divisor(head_dim, _STEP_ELEMENTS // state_size)

  def kernel(pool_in: Ref, y_in: Ref, ids: Any, inputs: Any, pool: Ref, y: Ref) -> None:
    del pool_in, y_in  # the same memory as `pool` and `y`
    row, head = pl.program_id(0), pl.program_id(1)
    column = pl.program_id(2) * tile
    columns = pl.ds(column, tile)
    start, count, has_any = _tokens(
      ids, row, num_states, num_entries, is_decode=is_decode, is_packed=is_packed
    )

    def place(state: Any) -> Any:
      first = (state * num_heads + head) * head_dim + column
      return pl.ds(pl.multiple_of(first, tile), tile)

    @pl.when(has_any)
    def _() -> None:
      h = pool[place(ids.layer[0] * num_states + ids.read_ids[row]), :]

      def token(i: Any, h: Array) -> Array:
        now = jnp.minimum(start + i, num_tokens - 1)
        x = inputs.x[now, head, columns].astype(jnp.float32)
        b, c = (
          ref[now, lax.div(head, group), :].astype(jnp.float32)
          for ref in (inputs.b, inputs.c)
        )
        dt = inputs.dt[now, head].astype(jnp.float32)
        rate = inputs.a[head].astype(jnp.float32)
        h = jnp.exp(dt * rate) * h + (dt * x)[:, None] * b[None]
        out = jnp.sum(h * c[None], axis=1)
        if inputs.d is not None:
          out = out + inputs.d[head].astype(jnp.float32) * x
        y[now, head, columns] = out.astype(y.dtype)
        target, is_kept = _target(ids, row, i, num_states)

        @pl.when(is_kept)
        def _() -> None:
          pool[place(target), :] = h.astype(pool.dtype)

        return h

      _repeat(count, num_entries, token, h.astype(jnp.float32))

    if is_decode:

      @pl.when(jnp.logical_not(has_any))
      def _() -> None:
        y[row, head, columns] = jnp.zeros((tile,), y.dtype)

  return pl.pallas_call(
    kernel,
    grid=(num_seqs, num_heads, head_dim // tile),
    out_shape=_like(pool, inputs.x),
    input_output_aliases={0: 0} if y is None else {0: 0, 1: 1},
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="ssm_ssd_step",
  )(pool, y, ids, inputs)


def _in_chunks(
  pool: Array,
  y: Array,
  ids: Rows,
  inputs: _Inputs,
  *,
  num_states: int,
  chunk_size: int,
  interpret: bool,
) -> tuple[Array, Array]:
  """Rows of several tokens; a program goes through those of a row, for some columns.

  Within a chunk the recurrence is matrix products under a lower-triangular mask. Their
  operands are as narrow as the inputs are, their sums and the state are float32.
  """
  (num_tokens, num_heads, head_dim), state_size = inputs.x.shape, pool.shape[1]
  num_seqs = ids.write_ids.shape[0]
  group = num_heads // inputs.b.shape[1]
  dtypes = {array.dtype for array in (inputs.x, inputs.b, inputs.c)}
  dtype = np.dtype(dtypes.pop() if len(dtypes) == 1 else jnp.float32)
  # Float32 products are sums in registers, which hold only little of them.
  is_wide = dtype == jnp.float32
  chunk = min(chunk_size, 16 if is_wide else _MAX_CHUNK)
  tile = _divisor(head_dim, 16 if is_wide else 32)
  while tile > 16 and num_heads * (head_dim // tile) < _NUM_CORES:
    tile //= 2

  def kernel(pool_in: Ref, y_in: Ref, ids: Any, inputs: Any, pool: Ref, y: Ref) -> None:
    del pool_in, y_in  # the same memory as `pool` and `y`
    row, head = pl.program_id(0), pl.program_id(1)
    column = pl.program_id(2) * tile
    columns = column + jnp.arange(tile, dtype=jnp.int32)
    lane = jnp.arange(chunk, dtype=jnp.int32)
    is_past = lane[:, None] >= lane[None]
    start, stop = ids.cu_seqlens[row], ids.cu_seqlens[row + 1]
    stop = jnp.minimum(stop, num_tokens)
    target, is_kept = _target(ids, row, 0, num_states)
    side = lax.div(head, group)
    elements = jnp.arange(state_size, dtype=jnp.int32)

    def load(ref: Ref, token: Array, at: Any, last: Array) -> Array:
      """Some elements of the chunk's tokens; zeros past the row's end."""
      shape = (chunk, last.size)
      token = jnp.broadcast_to(token[:, None], shape)
      last = jnp.broadcast_to(last[None], shape)
      values = plt.load(ref.at[token, at, last], mask=token < stop, other=0.0)
      return values.astype(dtype)

    def compute(index: Array, state: Array) -> Array:  # [N, tile]
      token = start + index * chunk + lane
      is_valid = token < stop
      x = load(inputs.x, token, head, columns)
      b = load(inputs.b, token, side, elements)
      c = load(inputs.c, token, side, elements)
      # Lanes past the row's end do nothing: no decay, no input.
      dt = plt.load(inputs.dt.at[token, head], mask=is_valid, other=0.0)
      dt = dt.astype(jnp.float32)
      rate = dt * inputs.a[head].astype(jnp.float32)
      decay = jnp.sum(jnp.where(is_past, rate[None], 0.0), axis=1)  # up to each token
      total = jnp.sum(rate)
      gap = jnp.where(is_past, decay[:, None] - decay[None], _DEAD)
      weight = jnp.exp(gap) * dt[None] * _dot(c, b.T)
      out = _dot(weight.astype(dtype), x)
      out += jnp.exp(decay)[:, None] * _dot(c, state.astype(dtype))
      wide = x.astype(jnp.float32)
      if inputs.d is not None:
        out += inputs.d[head].astype(jnp.float32) * wide
      to = jnp.broadcast_to(token[:, None], out.shape)
      at = jnp.broadcast_to(columns[None], out.shape)
      plt.store(y.at[to, head, at], out.astype(y.dtype), mask=to < stop)
      left = jnp.exp(total - decay) * dt  # what of each token is left at the end
      gained = _dot(b.T, (wide * left[:, None]).astype(dtype))
      return jnp.exp(total) * state + gained

    def place(state: Any) -> Any:
      first = (state * num_heads + head) * head_dim + column
      return pl.ds(pl.multiple_of(first, tile), tile)

    @pl.when((stop - start > 1) & is_kept)
    def _() -> None:
      state = pool[place(ids.layer[0] * num_states + ids.read_ids[row]), :]
      turns = lax.div(stop - start + (chunk - 1), chunk)
      state = lax.fori_loop(0, turns, compute, state.T.astype(jnp.float32))
      pool[place(target), :] = state.T.astype(pool.dtype)

  return pl.pallas_call(
    kernel,
    grid=(num_seqs, num_heads, head_dim // tile),
    out_shape=_like(pool, inputs.x),
    input_output_aliases={0: 0, 1: 1},
    compiler_params=plt.CompilerParams(num_warps=8 if is_wide else 4, num_stages=2),
    interpret=interpret,
    name="ssm_ssd_chunks",
  )(pool, y, ids, inputs)


# --- What the kernels share -----------------------------------------------------------


def _ids(rows: Rows) -> Rows:
  """The rows as kernels see them."""
  return rows._replace(
    layer=jnp.asarray(rows.layer, jnp.int32).reshape(1),
    write_ids=rows.write_ids.reshape(rows.write_ids.shape[0], -1),
  )


def _tokens(
  ids: Any,
  row: Array,
  num_states: int,
  num_entries: int,
  *,
  is_decode: bool,
  is_packed: bool = False,
) -> tuple[Array, Any, Array]:
  """First token of a row, how many to compute one by one, and whether there are any."""
  if is_decode:
    _, is_in_step = _target(ids, row, 0, num_states)
    return row, 1, is_in_step
  start = ids.cu_seqlens[row]
  length = ids.cu_seqlens[row + 1] - start
  if is_packed:
    return start, 1, length == 1
  return start, jnp.minimum(length, num_entries), length > 0


def _target(ids: Any, row: Array, entry: Any, num_states: int) -> tuple[Array, Array]:
  """The state that a row writes, and whether it writes one."""
  write = ids.write_ids[row, entry]
  return ids.layer[0] * num_states + write, (write >= 0) & (write < num_states)


def _repeat(count: Any, most: int, body: Any, state: Any) -> None:
  """Runs `count` turns, of which there is at least one, without a loop for one."""
  if most == 1:
    body(0, state)
  else:
    lax.fori_loop(0, count, body, state)


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
  return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def _divisor(size: int, most: int) -> int:
  """The largest power of two up to `most` that divides `size`."""
  return min(size & -size, 1 << (most.bit_length() - 1))


def _dot(x: Array, y: Array) -> Array:
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
