"""The recurrences of a step: what a model does between `read_state` and `write_state`.

    state = kvcache.read_state(ctx, layer, metadata)
    x, conv = recurrent.causal_conv1d(x, weight, state["conv"], metadata)
    y, ssm = recurrent.ssd(x, dt, a, b, c, state["ssm"], metadata)
    ctx = kvcache.write_state(ctx, layer, {"conv": conv, "ssm": ssm}, metadata)

States are float32, whatever the activations are. In a draft step (`num_logits > 1`) the
states returned are `[S, num_logits, ...]`: entry `i` stands after the row's token `i`,
or after its last one.
"""

from jax import Array

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
