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

from collections.abc import Callable
import functools

from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from kvcache.context import as_context, Context, recurrent_parts
from kvcache.verbs import sharding
from kvcache.verbs.metadata import StepMetadata
from kvcache.verbs.sharding import Split
from kvcache.verbs.stepping import locate_state, state_ids
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
    layer: `[]` int32, may be traced: index among the recurrent layers in model order.
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
    ValueError: There is no such recurrent layer, or shapes do not fit each other, the
      state or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  ctx = as_context(ctx)
  _check_tokens(x, metadata)
  split = sharding.split(metadata.head_axes)
  at = functools.partial(split.spec, x.shape[1])
  read_ids, write_ids = state_ids(ctx, metadata)
  y, pool = _over(
    split,
    functools.partial(
      ssm.step_conv1d,
      max_query_len=1 if metadata.is_decode else None,
      implementation=implementation,
    ),
    out_specs=(at(axis=1), at(axis=2)),
    x=(x, at(axis=1)),
    weight=(weight, at(axis=0)),
    bias=(bias, at(axis=0)),
    pool=(_pool(ctx, name), at(axis=2)),
    layer=(locate_state(ctx.config, layer), P()),
    read_ids=(read_ids, P()),
    write_ids=(write_ids, P()),
    cu_seqlens=(metadata.cu_seqlens, P()),
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
    layer: `[]` int32, may be traced: index among the recurrent layers in model order.
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
    ValueError: There is no such recurrent layer, or shapes do not fit each other, the
      state or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  ctx = as_context(ctx)
  _check_tokens(x, metadata)
  split = sharding.split(metadata.head_axes)
  b, c = _spread(split, x.shape[1], b, c)
  at = functools.partial(split.spec, x.shape[1])
  groups = split.spec(b.shape[1], axis=1)
  read_ids, write_ids = state_ids(ctx, metadata)
  y, pool = _over(
    split,
    functools.partial(
      ssm.step_ssd,
      max_query_len=1 if metadata.is_decode else None,
      implementation=implementation,
    ),
    out_specs=(at(axis=1), at(axis=2)),
    x=(x, at(axis=1)),
    dt=(dt, at(axis=1)),
    a=(a, at(axis=0)),
    b=(b, groups),
    c=(c, groups),
    d=(d, at(axis=0)),
    pool=(_pool(ctx, name), at(axis=2)),
    layer=(locate_state(ctx.config, layer), P()),
    read_ids=(read_ids, P()),
    write_ids=(write_ids, P()),
    cu_seqlens=(metadata.cu_seqlens, P()),
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
  split = sharding.split(metadata.head_axes)
  at = functools.partial(split.spec, x.shape[1])
  return _over(
    split,
    functools.partial(
      ssm.causal_conv1d,
      max_query_len=1 if metadata.is_decode else None,
      num_states=_num_states(metadata),
      implementation=implementation,
    ),
    out_specs=(at(axis=1), at(axis=2 if _num_states(metadata) else 1)),
    x=(x, at(axis=1)),
    weight=(weight, at(axis=0)),
    bias=(bias, at(axis=0)),
    state=(state, at(axis=1)),
    cu_seqlens=(metadata.cu_seqlens, P()),
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
  split = sharding.split(metadata.head_axes)
  b, c = _spread(split, x.shape[1], b, c)
  at = functools.partial(split.spec, x.shape[1])
  groups = split.spec(b.shape[1], axis=1)
  return _over(
    split,
    functools.partial(
      ssm.ssd,
      max_query_len=1 if metadata.is_decode else None,
      num_states=_num_states(metadata),
      implementation=implementation,
    ),
    out_specs=(at(axis=1), at(axis=2 if _num_states(metadata) else 1)),
    x=(x, at(axis=1)),
    dt=(dt, at(axis=1)),
    a=(a, at(axis=0)),
    b=(b, groups),
    c=(c, groups),
    d=(d, at(axis=0)),
    state=(state, at(axis=1)),
    cu_seqlens=(metadata.cu_seqlens, P()),
  )


def _over(
  split: Split,
  operation: Callable[..., tuple[Array, Array]],
  *,
  out_specs: tuple[P, P],
  **arguments: tuple[Array | None, P],
) -> tuple[Array, Array]:
  """Runs an operation on each device's part of its arguments, each with its spec."""
  arrays = {name: array for name, (array, _) in arguments.items()}
  specs = {name: spec for name, (_, spec) in arguments.items()}
  run = split.over(
    lambda arrays: operation(**arrays), in_specs=(specs,), out_specs=out_specs
  )
  return run(arrays)


def _spread(split: Split, num_heads: int, b: Array, c: Array) -> tuple[Array, Array]:
  """`b` and `c` `[T, G, N]` of as many groups as devices can share like their heads."""
  num_groups = b.shape[1]
  is_apart = split.axes(num_groups) != split.axes(num_heads)
  if is_apart and split.num_local(num_groups) > 1:
    # A device's heads would lie across groups that it does not have.
    b, c = (jnp.repeat(g, num_heads // num_groups, axis=1) for g in (b, c))
  return b, c


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
