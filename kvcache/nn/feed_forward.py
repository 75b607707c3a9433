"""The gated feed-forward layer."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.nn.linear import Linear

_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nnx.Module):
  """`down(activation(gate(x)) * up(x))`, gate and up in one product; SwiGLU by default.

  Reference: Shazeer, "GLU Variants Improve Transformer", 2020.

  Attributes:
    gate_up: Joint projection to gate and up, in this order.
    down: Projection back to the features.
    activation: `"silu"` or `"gelu_tanh"`.
  """

  def __init__(
    self,
    features: int,
    hidden_features: int,
    *,
    rngs: nnx.Rngs,
    activation: str = "silu",
    dtype: DTypeLike = jnp.float32,
  ):
    if activation not in _ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}"
      )
    self.activation = activation
    linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
    self.gate_up = linear(features, 2 * hidden_features)
    self.down = linear(hidden_features, features)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[T, features]` to `[T, features]`."""
    gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
    return self.down(_ACTIVATIONS[self.activation](gate) * up)
