"""The recurrences of a step: what a model does between `read_state` and `write_state`.

    state = kvcache.read_state(ctx, layer, metadata)
    x, conv = recurrent.causal_conv1d(x, weight, state["conv"], metadata)
    y, ssm = recurrent.ssd(x, dt, a, b, c, state["ssm"], metadata)
    ctx = kvcache.write_state(ctx, layer, {"conv": conv, "ssm": ssm}, metadata)

States are float32, whatever the activations are. In a draft step (`num_logits > 1`) the
states returned are `[S, num_logits, ...]`: entry `i` stands after the row's token `i`,
or after its last one.
"""

import functools

from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kvcache import sharding
from kvcache.metadata import StepMetadata
from pallas_kernels import ssm


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

  def run(
    x: Array, weight: Array, state: Array, bias: Array | None, cu_seqlens: Array
  ) -> tuple[Array, Array]:
    return ssm.causal_conv1d(
      x,
      weight,
      state,
      cu_seqlens,
      bias=bias,
      max_query_len=1 if metadata.is_decode else None,
      num_states=_num_states(metadata),
      implementation=implementation,
    )

  split = sharding.split(metadata.head_axes)
  at = functools.partial(split.spec, x.shape[1])
  specs = (at(axis=1), at(axis=0), at(axis=1), at(axis=0), P())
  out_specs = (at(axis=1), at(axis=2 if _num_states(metadata) else 1))
  return split.over(run, in_specs=specs, out_specs=out_specs)(
    x, weight, state, bias, metadata.cu_seqlens
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

  def run(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    state: Array,
    d: Array | None,
    cu_seqlens: Array,
  ) -> tuple[Array, Array]:
    return ssm.ssd(
      x,
      dt,
      a,
      b,
      c,
      state,
      cu_seqlens,
      d=d,
      max_query_len=1 if metadata.is_decode else None,
      num_states=_num_states(metadata),
      implementation=implementation,
    )

  split = sharding.split(metadata.head_axes)
  num_heads, num_groups = x.shape[1], b.shape[1]
  is_apart = split.axes(num_groups) != split.axes(num_heads)
  if is_apart and split.num_local(num_groups) > 1:
    # A device's heads would lie across groups that it does not have.
    b, c = (jnp.repeat(g, num_heads // num_groups, axis=1) for g in (b, c))
  at = functools.partial(split.spec, num_heads)
  groups = split.spec(b.shape[1], axis=1)
  tokens, heads = at(axis=1), at(axis=0)
  specs = (tokens, tokens, heads, groups, groups, tokens, heads, P())
  out_specs = (tokens, at(axis=2 if _num_states(metadata) else 1))
  return split.over(run, in_specs=specs, out_specs=out_specs)(
    x, dt, a, b, c, state, d, metadata.cu_seqlens
  )


def _num_states(metadata: StepMetadata) -> int | None:
  return metadata.num_logits if metadata.num_logits > 1 else None


def _check_tokens(x: Array, metadata: StepMetadata) -> None:
  if x.shape[0] != metadata.num_tokens:
    raise ValueError(f"x must have {metadata.num_tokens} tokens, got {x.shape}")
