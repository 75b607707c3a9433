"""The public recurrent operations; pick an implementation by name."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.ssm import xla

IMPLEMENTATIONS = ("xla",)


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
    implementation: `"xla"`, or None for the best that can serve.

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
  if x.ndim != 2:
    raise ValueError(f"x must be [T, C], got {x.shape}")
  channels = x.shape[1]
  if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 2:
    raise ValueError(f"weight must be [{channels}, W >= 2], got {weight.shape}")
  wanted = (state.shape[0], channels, weight.shape[1] - 1)
  if state.shape != wanted:
    raise ValueError(f"state must be {wanted}, got {state.shape}")
  if bias is not None and bias.shape != (channels,):
    raise ValueError(f"bias must be [{channels}], got {bias.shape}")
  _check_num_states(num_states)
  _check_implementation(implementation)
  return xla.causal_conv1d(
    x,
    weight,
    state,
    cu_seqlens,
    bias=bias,
    num_states=num_states,
    is_decode=num_states is None and _is_decode(x, state, max_query_len),
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
    cu_seqlens: `[S + 1]` int32, first entry 0.
    d: `[H]` weights of the skip connection, or None.
    max_query_len: Static bound on the rows' tokens. 1 with `T == S` is a decode step.
    num_states: `E`, static. If given, rows have at most `E` tokens, and the states
      after each of them are returned.
    chunk_size: Tokens per chunk, static.
    implementation: `"xla"`, or None for the best that can serve.

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
  if x.ndim != 3 or b.ndim != 3:
    raise ValueError(f"x must be [T, H, P] and b [T, G, N], got {x.shape}, {b.shape}")
  num_tokens, num_heads, head_dim = x.shape
  num_groups, state_size = b.shape[1:]
  wanted = {
    "dt": (dt, (num_tokens, num_heads)),
    "a": (a, (num_heads,)),
    "b": (b, (num_tokens, num_groups, state_size)),
    "c": (c, (num_tokens, num_groups, state_size)),
    "state": (state, (state.shape[0], num_heads, head_dim, state_size)),
    "d": (d, (num_heads,)),
  }
  for name, (array, shape) in wanted.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} must be {shape}, got {array.shape}")
  if num_heads % num_groups:
    raise ValueError(f"x has {num_heads} heads, not a multiple of {num_groups}")
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  _check_num_states(num_states)
  _check_implementation(implementation)
  y, state = xla.ssd(
    x,
    dt,
    a,
    b,
    c,
    state,
    cu_seqlens,
    chunk_size=chunk_size,
    num_states=num_states,
    is_decode=num_states is None and _is_decode(x, state, max_query_len),
  )
  if d is not None:
    y = y + d.astype(jnp.float32)[None, :, None] * x.astype(jnp.float32)
  return y.astype(x.dtype), state


def _check_rows(state: Array, cu_seqlens: Array) -> None:
  if cu_seqlens.shape != (state.shape[0] + 1,) or cu_seqlens.dtype != jnp.int32:
    raise ValueError(
      f"cu_seqlens must be int32[{state.shape[0] + 1}], got"
      f" {cu_seqlens.dtype}{list(cu_seqlens.shape)}"
    )


def _check_num_states(num_states: int | None) -> None:
  if num_states is not None and num_states < 1:
    raise ValueError(f"num_states must be at least 1, got {num_states}")


def _check_implementation(implementation: str | None) -> None:
  if implementation not in (None, *IMPLEMENTATIONS):
    raise NotImplementedError(
      f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}"
    )


def _is_decode(x: Array, state: Array, max_query_len: int | None) -> bool:
  return max_query_len == 1 and x.shape[0] == state.shape[0]
