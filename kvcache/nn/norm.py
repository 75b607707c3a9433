"""Root-mean-square normalisation."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
  """Scales the last axis to unit root mean square, then by learned weights.

  Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. The mean
  is taken in float32 whatever the input is.

  Attributes:
    scale: `[features]` learned weights.
    epsilon: Added to the mean square.
    offset: Added to the weights.
  """

  def __init__(
    self,
    features: int,
    *,
    epsilon: float = 1e-5,
    offset: float = 0.0,
    dtype: DTypeLike = jnp.float32,
  ):
    self.scale = nnx.Param(jnp.full((features,), 1.0 - offset, dtype))
    self.epsilon = epsilon
    self.offset = offset

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises `x` `[..., features]`; keeps its dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
    scale = self.scale[...].astype(x.dtype)
    if self.offset:
      scale = scale + jnp.asarray(self.offset, x.dtype)
    return normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))
