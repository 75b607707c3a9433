"""The Mamba-2 mixer whose states live in a cache."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.config import RecurrentLayer
from kvcache.context import Context
from kvcache.nn.linear import Linear
from kvcache.verbs import recurrent
from kvcache.verbs.metadata import StepMetadata


class Mamba2(nnx.Module):
  """Selective state space mixer: projection, short convolution, recurrence, gate.

  Reference: Dao and Gu, "Transformers are SSMs", 2024. `I = num_heads * head_dim` inner
  features, `C = I + 2 * num_groups * state_size` of which are convolved.

  Attributes:
    in_proj: Joint projection to the gate `I`, the convolved features `C` (`x`, `b` and
      `c`) and the step sizes `H`, in this order.
    conv_weight: `[C, W]`.
    conv_bias: `[C]`, or None.
    dt_bias: `[H]`, added to the step sizes before softplus.
    a_log: `[H]`, logarithms of the negated decay rates.
    d: `[H]`, the skip connection.
    norm_scale: `[I]`, of the normalisation behind the gate, one per group.
    out: Projection back to the features.
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int,
    head_dim: int,
    state_size: int,
    rngs: nnx.Rngs,
    num_groups: int = 1,
    conv_width: int = 4,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_epsilon: float = 1e-5,
    dtype: DTypeLike = jnp.float32,
  ):
    """Makes the layer with random weights.

    Args:
      features: Width of the residual stream.
      num_heads: `H`, a multiple of `num_groups`.
      head_dim: `P`.
      state_size: `N`.
      rngs: Source of the initial weights.
      num_groups: `G`, heads of a group share `b` and `c`.
      conv_width: `W`, taps of the convolution.
      use_bias: Whether the projections have biases.
      use_conv_bias: Whether the convolution has one.
      dt_limit: Bounds of the step sizes.
      norm_epsilon: Epsilon of the normalisation.
      dtype: Of the weights.
    """
    if num_heads % num_groups:
      raise ValueError(
        f"num_heads must be a multiple of num_groups, got {num_heads} and {num_groups}"
      )
    self.num_heads, self.head_dim = num_heads, head_dim
    self.num_groups, self.state_size = num_groups, state_size
    self.conv_width = conv_width
    self.dt_limit, self.norm_epsilon = dt_limit, norm_epsilon
    inner = num_heads * head_dim
    channels = inner + 2 * num_groups * state_size
    size = inner + channels + num_heads
    self.in_proj = Linear(features, size, use_bias=use_bias, dtype=dtype, rngs=rngs)
    init = nnx.initializers.normal(conv_width**-0.5)
    self.conv_weight = nnx.Param(init(rngs.params(), (channels, conv_width), dtype))
    self.conv_bias = nnx.Param(jnp.zeros(channels, dtype)) if use_conv_bias else None
    self.dt_bias = nnx.Param(jnp.ones(num_heads, dtype))
    rates = jnp.arange(1, num_heads + 1, dtype=jnp.float32)
    self.a_log = nnx.Param(jnp.log(rates).astype(dtype))
    self.d = nnx.Param(jnp.ones(num_heads, dtype))
    self.norm_scale = nnx.Param(jnp.ones(inner, dtype))
    self.out = Linear(inner, features, use_bias=use_bias, dtype=dtype, rngs=rngs)

  def cache_layer(self) -> RecurrentLayer:
    """What the layer keeps per sequence, for `CacheConfig(layers=...)`."""
    return RecurrentLayer.mamba2(
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      state_size=self.state_size,
      num_groups=self.num_groups,
      conv_width=self.conv_width,
    )

  def __call__(
    self, x: jax.Array, layer: jax.Array | int, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    """Mixes each token with its sequence's past, and stores the states of the step.

    Args:
      x: `[T, features]`, one row per token of the step.
      layer: Which of the context's recurrent layers this is; may be traced.
      metadata: What the step computes, from `step_metadata`.
      ctx: The cache.

    Returns:
      `[T, features]` and the cache with this layer's states written.
    """
    num_tokens, inner = x.shape[0], self.num_heads * self.head_dim
    side = self.num_groups * self.state_size
    projected = self.in_proj(x)
    cuts = (inner, 2 * inner + 2 * side)
    gate, features, dt = jnp.split(projected, cuts, axis=-1)
    bias = None if self.conv_bias is None else self.conv_bias[...]
    ctx, features = recurrent.step_conv1d(
      ctx, layer, features, self.conv_weight[...], metadata, bias=bias
    )
    features = jax.nn.silu(features)
    inputs, b, c = jnp.split(features, (inner, inner + side), axis=-1)
    dt = dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None]
    ctx, y = recurrent.step_ssd(
      ctx,
      layer,
      inputs.reshape(num_tokens, self.num_heads, self.head_dim),
      jnp.clip(jax.nn.softplus(dt), *self.dt_limit),
      -jnp.exp(self.a_log[...].astype(jnp.float32)),
      b.reshape(num_tokens, self.num_groups, self.state_size),
      c.reshape(num_tokens, self.num_groups, self.state_size),
      metadata,
      d=self.d[...],
    )
    return self.out(self._normalise(y.reshape(num_tokens, inner), gate)), ctx

  def _normalise(self, y: jax.Array, gate: jax.Array) -> jax.Array:
    """Gates `[T, I]`, then scales each group to unit root mean square."""
    wide = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    groups = wide.reshape(y.shape[0], self.num_groups, -1)
    mean_square = jnp.mean(groups * groups, axis=-1, keepdims=True)
    normed = groups * jax.lax.rsqrt(mean_square + self.norm_epsilon)
    normed = normed.reshape(y.shape).astype(y.dtype)
    return normed * self.norm_scale[...].astype(y.dtype)[None]
