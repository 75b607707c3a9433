"""The public recurrent operations; pick an implementation by name.

`causal_conv1d` and `ssd` take states and return states. `step_conv1d` and `step_ssd` do
the same to states where they stand in a pool, so that a step on a GPU reads and writes
each of them once.
"""

from collections.abc import Callable
import functools
from typing import Any

from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import choice
from pallas_kernels.ssm import xla
from pallas_kernels.ssm.rows import Rows

IMPLEMENTATIONS = ("xla", "triton")
type _Kernel = str | choice.Run
"""How to run a kernel, or why it cannot serve."""


def causal_conv1d(
  x: Array,
  weight: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  bias: Array | None = None,
  max_query_len: int | None = None,
  num_states: int | None = None,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """Depthwise causal convolution of packed rows that go on from given inputs.

  Row `s` has the tokens `cu_seqlens[s]` up to `cu_seqlens[s + 1]`.

  Args:
    x: `[T, C]`.
    weight: `[C, W]`. The last column meets the token itself.
    state: `[S, C, W - 1]`. The inputs before each row's first token, the oldest first.
    cu_seqlens: `[S + 1]` int32, first entry 0.
    bias: `[C]`, or None.
    max_query_len: Static bound on the rows' tokens. 1 with `T == S` is a decode step.
    num_states: `E`, static. If given, rows have at most `E` tokens, and the states
      after each of them are returned.
    implementation: `"xla"`, `"triton"` (a CUDA GPU, a decode step), or None for the
      best that can serve.

  Returns:
    `(y [T, C]` in `x`'s dtype, computed in float32, and without meaning past the last
    row`, state [S, C, W - 1]` float32 after the rows' tokens`)`. A row without tokens
    keeps its state. With `num_states` the state is `[S, E, C, W - 1]`, entry `i` after
    the row's token `i`, or after its last one.

  Raises:
    ValueError: Shapes or dtypes do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_rows(state, cu_seqlens)
  _check_conv1d(x, weight, bias, state, "state")
  return _over_states(
    *(xla.causal_conv1d, "step_conv1d", (x, weight), state, cu_seqlens),
    num_states=num_states,
    max_query_len=max_query_len,
    implementation=implementation,
    bias=bias,
  )


def ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  state: Array,
  cu_seqlens: Array,
  *,
  d: Array | None = None,
  max_query_len: int | None = None,
  num_states: int | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """The Mamba-2 recurrence of packed rows that go on from given states.

  With `h` the state of a head, each token of a row does

      h = exp(dt * a) * h + dt * outer(x, b)
      y = h @ c + d * x

  Reference: Dao and Gu, "Transformers are SSMs", 2024. Rows of more than one token are
  computed in chunks by matrix products, each from its own first token on, so that a
  row's bits do not depend on its neighbours.

  Args:
    x: `[T, H, P]`.
    dt: `[T, H]`. Step sizes, positive: after bias and softplus.
    a: `[H]`. Decay rates, negative.
    b: `[T, G, N]`, `H` a multiple of `G`.
    c: `[T, G, N]`.
    state: `[S, H, P, N]`. The state before each row's first token.
    cu_seqlens: `[S + 1]` int32, as in `causal_conv1d`.
    d: `[H]` weights of the skip connection, or None.
    max_query_len: As in `causal_conv1d`.
    num_states: `E`, as in `causal_conv1d`.
    chunk_size: Tokens per chunk, static.
    implementation: `"xla"`, `"triton"` (a CUDA GPU, without `num_states`), or None for
      the best that can serve.

  Returns:
    `(y [T, H, P]` in `x`'s dtype, computed in float32, and without meaning past the
    last row`, state [S, H, P, N]` float32 after the rows' tokens`)`. A row without
    tokens keeps its state. With `num_states` the state is `[S, E, H, P, N]`, entry `i`
    after the row's token `i`, or after its last one, and rows are computed a token at a
    time instead of in chunks.

  Raises:
    ValueError: Shapes or dtypes do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_rows(state, cu_seqlens)
  _check_ssd(x, dt, a, b, c, d, state, "state", chunk_size)
  return _over_states(
    *(xla.ssd, "step_ssd", (x, dt, a, b, c), state, cu_seqlens),
    num_states=num_states,
    max_query_len=max_query_len,
    implementation=implementation,
    d=d,
    chunk_size=chunk_size,
  )


def step_conv1d(
  x: Array,
  weight: Array,
  pool: Array,
  layer: ArrayLike,
  read_ids: Array,
  write_ids: Array,
  cu_seqlens: Array,
  *,
  bias: Array | None = None,
  max_query_len: int | None = None,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """As `causal_conv1d`, with states that stand in a pool and are updated there.

  Args:
    x: `[T, C]`; like all that is not said here, as in `causal_conv1d`.
    weight: `[C, W]`.
    pool: `[R, M, C, W - 1]` floating. In place if it is donated.
    layer: `[]` int32, which of `R`; may be traced.
    read_ids: `[S]` int32 in range. The state before each row's first token.
    write_ids: `[S]` int32, distinct: where the state after the row's tokens goes. Or
      `[S, E]`: rows have at most `E` tokens, and the state after token `i` goes to
      entry `i`. Those at or past `M` are dropped, and must be for rows and entries
      without a token. No row writes what another one reads.
    cu_seqlens: `[S + 1]` int32.
    bias: `[C]`, or None.
    max_query_len: As in `causal_conv1d`.
    implementation: `"xla"`, `"triton"` (a CUDA GPU, a decode step or `[S, E]` states),
      or None for the best that can serve.

  Returns:
    `(y [T, C], pool)`. What `y` holds for tokens of no row, and for rows that write no
    state, is finite if their inputs are, and without meaning.

  Raises:
    ValueError: Shapes or dtypes do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  rows = Rows(jnp.asarray(layer, jnp.int32), read_ids, write_ids, cu_seqlens)
  _check_pool(pool, 4, rows)
  _check_conv1d(x, weight, bias, pool, "pool")
  return _over_pool(
    *(xla.causal_conv1d, "step_conv1d", (x, weight), pool, rows),
    max_query_len=max_query_len,
    implementation=implementation,
    bias=bias,
  )


def step_ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  pool: Array,
  layer: ArrayLike,
  read_ids: Array,
  write_ids: Array,
  cu_seqlens: Array,
  *,
  d: Array | None = None,
  max_query_len: int | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """As `ssd`, with states that stand in a pool and are updated there.

  Args:
    x: `[T, H, P]`; like all that is not said here, as in `ssd`.
    dt: `[T, H]`.
    a: `[H]`.
    b: `[T, G, N]`.
    c: `[T, G, N]`.
    pool: `[R, M, H, P, N]` floating. In place if it is donated.
    layer: As in `step_conv1d`, like `read_ids` and `write_ids`.
    read_ids: `[S]` int32.
    write_ids: `[S]` or `[S, E]` int32.
    cu_seqlens: `[S + 1]` int32.
    d: `[H]`, or None.
    max_query_len: As in `ssd`.
    chunk_size: Tokens per chunk, static; kernels may take less.
    implementation: `"xla"`, `"triton"` (a CUDA GPU; rows of several tokens are computed
      in products as narrow as `x`, `b` and `c`, with float32 sums), or None for the
      best that can serve.

  Returns:
    `(y [T, H, P], pool)`, as `step_conv1d` does.

  Raises:
    ValueError: Shapes or dtypes do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  rows = Rows(jnp.asarray(layer, jnp.int32), read_ids, write_ids, cu_seqlens)
  _check_pool(pool, 5, rows)
  _check_ssd(x, dt, a, b, c, d, pool, "pool", chunk_size)
  return _over_pool(
    *(xla.ssd, "step_ssd", (x, dt, a, b, c), pool, rows),
    max_query_len=max_query_len,
    implementation=implementation,
    d=d,
    chunk_size=chunk_size,
  )


# --- Choice ---------------------------------------------------------------------------


def _over_pool(
  operation: Callable[..., tuple[Array, Array]],
  kernel: str,
  inputs: tuple[Array, ...],
  pool: Array,
  rows: Rows,
  *,
  max_query_len: int | None,
  implementation: str | None,
  **options: Any,
) -> tuple[Array, Array]:
  """Runs an operation in XLA or its kernel, on states of a pool."""
  fallback = functools.partial(
    xla.over_pool,
    *(operation, inputs, pool, rows),
    num_states=rows.num_entries,
    is_decode=rows.is_decode(inputs[0].shape[0], max_query_len),
    **options,
  )
  step = functools.partial(
    _step, kernel, *inputs, pool, rows, max_query_len=max_query_len, **options
  )
  return _choose(implementation, fallback, step)


def _over_states(
  operation: Callable[..., tuple[Array, Array]],
  kernel: str,
  inputs: tuple[Array, ...],
  state: Array,
  cu_seqlens: Array,
  *,
  num_states: int | None,
  max_query_len: int | None,
  implementation: str | None,
  **options: Any,
) -> tuple[Array, Array]:
  """Runs an operation in XLA, or its kernel on states that are a pool of their own."""
  if num_states is not None and num_states < 1:
    raise ValueError(f"num_states must be at least 1, got {num_states}")
  num_seqs, has_one = state.shape[0], num_states is None and max_query_len == 1
  fallback = functools.partial(
    operation,
    *(*inputs, state, cu_seqlens),
    num_states=num_states,
    is_decode=has_one and inputs[0].shape[0] == num_seqs,
    **options,
  )

  def step() -> _Kernel:
    if num_states is not None:
      return "the states after each token can only be kept in a pool"
    seqs = jnp.arange(num_seqs, dtype=jnp.int32)
    rows = Rows(jnp.int32(0), seqs, seqs, cu_seqlens)
    pool = state.astype(jnp.float32)[None]
    run = _step(kernel, *inputs, pool, rows, max_query_len=max_query_len, **options)
    if isinstance(run, str):
      return run

    def without_layer() -> tuple[Array, Array]:
      y, pool = run()
      return y, pool[0]

    return without_layer

  return _choose(implementation, fallback, step)


def _choose(
  implementation: str | None, fallback: choice.Run, kernel: Callable[[], _Kernel]
) -> tuple[Array, Array]:
  return choice.run(
    implementation, IMPLEMENTATIONS, fallback=fallback, kernel=lambda _: kernel()
  )


def _step(kernel: str, *arguments: Any, **options: Any) -> _Kernel:
  """How to run the kernel of that name on a pool, or why not."""
  from pallas_kernels.ssm import triton

  reason = triton.why_not(kernel, *arguments, **options)
  return reason or functools.partial(getattr(triton, kernel), *arguments, **options)


# --- Checks ---------------------------------------------------------------------------


def _check_conv1d(
  x: Array, weight: Array, bias: Array | None, state: Array, name: str
) -> None:
  if x.ndim != 2:
    raise ValueError(f"x must be [T, C], got {x.shape}")
  channels = x.shape[1]
  if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 2:
    raise ValueError(f"weight must be [{channels}, W >= 2], got {weight.shape}")
  wanted = (*state.shape[:-2], channels, weight.shape[1] - 1)
  if state.shape != wanted:
    raise ValueError(f"{name} must be {wanted}, got {state.shape}")
  if bias is not None and bias.shape != (channels,):
    raise ValueError(f"bias must be [{channels}], got {bias.shape}")


def _check_ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  d: Array | None,
  state: Array,
  name: str,
  chunk_size: int,
) -> None:
  if x.ndim != 3 or b.ndim != 3:
    raise ValueError(f"x must be [T, H, P] and b [T, G, N], got {x.shape}, {b.shape}")
  num_tokens, num_heads, head_dim = x.shape
  num_groups, state_size = b.shape[1:]
  wanted = {
    "dt": (dt, (num_tokens, num_heads)),
    "a": (a, (num_heads,)),
    "b": (b, (num_tokens, num_groups, state_size)),
    "c": (c, (num_tokens, num_groups, state_size)),
    name: (state, (*state.shape[:-3], num_heads, head_dim, state_size)),
    "d": (d, (num_heads,)),
  }
  for key, (array, shape) in wanted.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{key} must be {shape}, got {array.shape}")
  if num_heads % num_groups:
    raise ValueError(f"x has {num_heads} heads, not a multiple of {num_groups}")
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_pool(pool: Array, rank: int, rows: Rows) -> None:
  read_ids, write_ids = rows.read_ids, rows.write_ids
  if pool.ndim != rank or not jnp.issubdtype(pool.dtype, jnp.floating):
    raise ValueError(
      f"pool must be floating and have {rank} axes, got {pool.dtype}{list(pool.shape)}"
    )
  for name, ids, ranks in (
    ("read_ids", read_ids, (1,)),
    ("write_ids", write_ids, (1, 2)),
  ):
    if ids.ndim not in ranks or ids.dtype != jnp.int32:
      raise ValueError(
        f"{name} must be int32 and have {ranks[-1]} axes at most, got"
        f" {ids.dtype}{list(ids.shape)}"
      )
  if write_ids.shape[0] != read_ids.shape[0] or not write_ids.size:
    raise ValueError(f"write_ids must be [{read_ids.size}, ...], got {write_ids.shape}")
  _check_rows(read_ids, rows.cu_seqlens)


def _check_rows(state: Array, cu_seqlens: Array) -> None:
  if cu_seqlens.shape != (state.shape[0] + 1,) or cu_seqlens.dtype != jnp.int32:
    raise ValueError(
      f"cu_seqlens must be int32[{state.shape[0] + 1}], got"
      f" {cu_seqlens.dtype}{list(cu_seqlens.shape)}"
    )
