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

type _Inputs = dict[str, Array | None]
_AXES = {
  **dict.fromkeys(("weight", "bias", "a", "d"), 0),
  **dict.fromkeys(("x", "dt", "state"), 1),
  "pool": 2,
}
"""Of the heads or channels that devices share, by argument."""


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
  inputs = {"weight": weight, "bias": bias}
  run = functools.partial(ssm.step_conv1d, implementation=implementation)
  return _in_context(run, as_context(ctx), layer, name, metadata, x, inputs)


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
    ctx: As in `step_conv1d`, like `layer`, `metadata` and `implementation`.
    layer: `[]` int32.
    x: `[T, H, P]`.
    dt: `[T, H]`. Step sizes, positive: after bias and softplus.
    a: `[H]`. Decay rates, negative.
    b: `[T, G, N]`, `H` a multiple of `G`.
    c: `[T, G, N]`.
    metadata: Of this step.
    d: `[H]` weights of the skip connection, or None.
    name: Of the layer's state, `(H, P, N)`.
    implementation: Name of an implementation of `pallas_kernels.ssm`, or None.

  Returns:
    `(ctx, y [T, H, P])`; this state of the layer is written, as by `write_state`.

  Raises:
    ValueError: There is no such recurrent layer, or shapes do not fit each other, the
      state or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  inputs = {"dt": dt, "a": a, "b": b, "c": c, "d": d}
  run = functools.partial(ssm.step_ssd, implementation=implementation)
  return _in_context(run, as_context(ctx), layer, name, metadata, x, inputs)


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
    x: `[T, C]`; like all that is not said here, as in `step_conv1d`.
    weight: `[C, W]`.
    state: `[S, C, W - 1]`, as `read_state` returns it.
    metadata: Of this step.
    bias: `[C]`, or None.
    implementation: As in `step_conv1d`.

  Returns:
    `(y [T, C], state [S, C, W - 1])`, the latter for `write_state`; `[S, num_logits, C,
    W - 1]` in a draft step.

  Raises:
    ValueError: Shapes do not fit each other or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  inputs = {"weight": weight, "bias": bias}
  run = functools.partial(ssm.causal_conv1d, implementation=implementation)
  return _on_states(run, state, metadata, x, inputs)


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
    x: `[T, H, P]`; like all that is not said here, as in `step_ssd`.
    dt: `[T, H]`.
    a: `[H]`.
    b: `[T, G, N]`.
    c: `[T, G, N]`.
    state: `[S, H, P, N]`, as `read_state` returns it.
    metadata: Of this step.
    d: `[H]`, or None.
    implementation: As in `step_conv1d`.

  Returns:
    `(y [T, H, P], state [S, H, P, N])`, the latter for `write_state`; `[S, num_logits,
    H, P, N]` in a draft step.

  Raises:
    ValueError: Shapes do not fit each other or the step.
    NotImplementedError: The named implementation cannot serve.
  """
  inputs = {"dt": dt, "a": a, "b": b, "c": c, "d": d}
  run = functools.partial(ssm.ssd, implementation=implementation)
  return _on_states(run, state, metadata, x, inputs)


def _in_context(
  operation: Callable[..., tuple[Array, Array]],
  ctx: Context,
  layer: ArrayLike,
  name: str,
  metadata: StepMetadata,
  x: Array,
  inputs: _Inputs,
) -> tuple[Context, Array]:
  """Runs an operation on the states of that name where the context keeps them."""
  _check_tokens(x, metadata)
  read_ids, write_ids = state_ids(ctx, metadata)
  _, store = recurrent_parts(ctx)
  if name not in store.arrays:
    raise ValueError(f"name must be one of {sorted(store.arrays)}, got {name!r}")
  places = {
    "pool": store.arrays[name],
    "layer": locate_state(ctx.config, layer),
    "read_ids": read_ids,
    "write_ids": write_ids,
  }
  y, pool = _over(operation, metadata, x, inputs | places, state_axis=2)
  return ctx.replace(states=store.replace(arrays=store.arrays | {name: pool})), y


def _on_states(
  operation: Callable[..., tuple[Array, Array]],
  state: Array,
  metadata: StepMetadata,
  x: Array,
  inputs: _Inputs,
) -> tuple[Array, Array]:
  """Runs an operation on states that the caller holds."""
  _check_tokens(x, metadata)
  num_states = metadata.num_logits if metadata.num_logits > 1 else None
  run = functools.partial(operation, num_states=num_states)
  return _over(
    run, metadata, x, inputs | {"state": state}, state_axis=2 if num_states else 1
  )


def _over(
  operation: Callable[..., tuple[Array, Array]],
  metadata: StepMetadata,
  x: Array,
  inputs: _Inputs,
  *,
  state_axis: int,
) -> tuple[Array, Array]:
  """Runs an operation of a step on each device's part of its arguments.

  Returns `y` and the states, whose heads or channels are on `state_axis`.
  """
  split = sharding.split(metadata.head_axes)
  at = functools.partial(split.spec, x.shape[1])
  arrays = inputs | {"x": x, "cu_seqlens": metadata.cu_seqlens}
  specs = {name: at(axis=_AXES[name]) if name in _AXES else P() for name in arrays}
  if (b := inputs.get("b")) is not None and (c := inputs["c"]) is not None:
    arrays["b"], arrays["c"] = b, c = _spread(split, x.shape[1], b, c)
    specs["b"] = specs["c"] = split.spec(b.shape[1], axis=1)
  most = 1 if metadata.is_decode else None
  run = split.over(
    lambda arrays: operation(**arrays, max_query_len=most),
    in_specs=(specs,),
    out_specs=(at(axis=1), at(axis=state_axis)),
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


def _check_tokens(x: Array, metadata: StepMetadata) -> None:
  if x.shape[0] != metadata.num_tokens:
    raise ValueError(f"x must have {metadata.num_tokens} tokens, got {x.shape}")
