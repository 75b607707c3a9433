"""The recurrences of a step: from the states that it starts from to those it leaves.

    ctx, x = recurrent.step_conv1d(ctx, layer, x, weight, metadata)
    ctx, y = recurrent.step_ssd(ctx, layer, x, dt, a, b, c, metadata)

These go through the states where the context keeps them, on a GPU in place: each is
read once and written once. `causal_conv1d` and `ssd` are the same on states that the
caller holds, between `read_state` and `write_state`:

    state = kvcache.read_state(ctx, layer, metadata)
    x, conv = recurrent.causal_conv1d(x, weight, state["conv"], metadata)
    y, ssm = recurrent.ssd(x, dt, a, b, c, state["ssm"], metadata)
    ctx = kvcache.write_state(ctx, layer, {"conv": conv, "ssm": ssm}, metadata)

States are float32, whatever the activations are. In a draft step (`num_logits > 1`) the
states returned are `[S, num_logits, ...]`: entry `i` stands after the row's token `i`,
or after its last one.
"""

from jax import Array
from jax.typing import ArrayLike

from kvcache.context import Context, recurrent_parts
from kvcache.metadata import StepMetadata
from kvcache.stepping import state_ids
from pallas_kernels import ssm


def step_conv1d(
  ctx: Context,
  layer: ArrayLike,
  x: Array,
  weight: Array,
  metadata: StepMetadata,
  *,
  bias: Array | None = None,
  name: str = "conv",
  implementation: str | None = None,
) -> tuple[Context, Array]:
  """Convolves a step's tokens, each after its own sequence, and stores the states.

  Args:
    ctx: The context, after `extend` and before `commit`.
    layer: `[]` int32, may be traced: index of the recurrent layer.
    x: `[T, C]`.
    weight: `[C, W]`. The last column meets the token itself.
    metadata: Of this step.
    bias: `[C]`, or None.
    name: Of the layer's state, `(C, W - 1)`.
    implementation: Name of an implementation of `pallas_kernels.ssm`, or None for the
      best that can serve.

  Returns:
    `(ctx, y [T, C])`; this state of the layer is written, as by `write_state`.

  Raises:
    ValueError: Shapes do not fit each other, the state or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_tokens(x, metadata)
  y, pool = ssm.step_conv1d(
    x,
    weight,
    _pool(ctx, name),
    layer,
    *state_ids(ctx, metadata),
    metadata.cu_seqlens,
    bias=bias,
    max_query_len=1 if metadata.is_decode else None,
    implementation=implementation,
  )
  return _with_pool(ctx, name, pool), y


def step_ssd(
  ctx: Context,
  layer: ArrayLike,
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  metadata: StepMetadata,
  *,
  d: Array | None = None,
  name: str = "ssm",
  implementation: str | None = None,
) -> tuple[Context, Array]:
  """Runs the Mamba-2 recurrence over a step's tokens, and stores the states.

  Args:
    ctx: The context, after `extend` and before `commit`.
    layer: `[]` int32, may be traced: index of the recurrent layer.
    x: `[T, H, P]`.
    dt: `[T, H]`. Step sizes, positive: after bias and softplus.
    a: `[H]`. Decay rates, negative.
    b: `[T, G, N]`, `H` a multiple of `G`.
    c: `[T, G, N]`.
    metadata: Of this step.
    d: `[H]` weights of the skip connection, or None.
    name: Of the layer's state, `(H, P, N)`.
    implementation: Name of an implementation of `pallas_kernels.ssm`, or None for the
      best that can serve.

  Returns:
    `(ctx, y [T, H, P])`; this state of the layer is written, as by `write_state`.

  Raises:
    ValueError: Shapes do not fit each other, the state or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_tokens(x, metadata)
  y, pool = ssm.step_ssd(
    x,
    dt,
    a,
    b,
    c,
    _pool(ctx, name),
    layer,
    *state_ids(ctx, metadata),
    metadata.cu_seqlens,
    d=d,
    max_query_len=1 if metadata.is_decode else None,
    implementation=implementation,
  )
  return _with_pool(ctx, name, pool), y


def causal_conv1d(
  x: Array,
  weight: Array,
  state: Array,
  metadata: StepMetadata,
  *,
  bias: Array | None = None,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """Depthwise causal convolution of a step's tokens, each after its own sequence.

  Args:
    x: `[T, C]`.
    weight: `[C, W]`. The last column meets the token itself.
    state: `[S, C, W - 1]`, as `read_state` returns it.
    metadata: Of this step.
    bias: `[C]`, or None.
    implementation: Name of an implementation of `pallas_kernels.ssm`, or None for the
      best that can serve.

  Returns:
    `(y [T, C], state [S, C, W - 1])`, the latter for `write_state`; `[S, num_logits, C,
    W - 1]` in a draft step.

  Raises:
    ValueError: Shapes do not fit each other or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_tokens(x, metadata)
  return ssm.causal_conv1d(
    x,
    weight,
    state,
    metadata.cu_seqlens,
    bias=bias,
    max_query_len=1 if metadata.is_decode else None,
    num_states=_num_states(metadata),
    implementation=implementation,
  )


def ssd(
  x: Array,
  dt: Array,
  a: Array,
  b: Array,
  c: Array,
  state: Array,
  metadata: StepMetadata,
  *,
  d: Array | None = None,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """The Mamba-2 recurrence over a step's tokens, each after its own sequence.

  Args:
    x: `[T, H, P]`.
    dt: `[T, H]`. Step sizes, positive: after bias and softplus.
    a: `[H]`. Decay rates, negative.
    b: `[T, G, N]`, `H` a multiple of `G`.
    c: `[T, G, N]`.
    state: `[S, H, P, N]`, as `read_state` returns it.
    metadata: Of this step.
    d: `[H]` weights of the skip connection, or None.
    implementation: Name of an implementation of `pallas_kernels.ssm`, or None for the
      best that can serve.

  Returns:
    `(y [T, H, P], state [S, H, P, N])`, the latter for `write_state`; `[S, num_logits,
    H, P, N]` in a draft step.

  Raises:
    ValueError: Shapes do not fit each other or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  _check_tokens(x, metadata)
  return ssm.ssd(
    x,
    dt,
    a,
    b,
    c,
    state,
    metadata.cu_seqlens,
    d=d,
    max_query_len=1 if metadata.is_decode else None,
    num_states=_num_states(metadata),
    implementation=implementation,
  )


def _num_states(metadata: StepMetadata) -> int | None:
  return metadata.num_logits if metadata.num_logits > 1 else None


def _check_tokens(x: Array, metadata: StepMetadata) -> None:
  if x.shape[0] != metadata.num_tokens:
    raise ValueError(f"x must have {metadata.num_tokens} tokens, got {x.shape}")


def _pool(ctx: Context, name: str) -> Array:
  _, store = recurrent_parts(ctx)
  if name not in store.arrays:
    raise ValueError(f"name must be one of {sorted(store.arrays)}, got {name!r}")
  return store.arrays[name]


def _with_pool(ctx: Context, name: str, pool: Array) -> Context:
  _, store = recurrent_parts(ctx)
  return ctx.replace(states=store.replace(arrays=store.arrays | {name: pool}))
