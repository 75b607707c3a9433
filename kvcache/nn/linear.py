"""The matrix product of a step: few rows, big weights.

Weights are `[out, in]`, the order of checkpoints: loading transposes nothing, a tied
embedding serves as the output matrix as it is, and XLA:CPU gives a row the same bits
wherever it stands and whatever stands beside it.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_PACKING_THRESHOLD = 16
"""Up to so many rows XLA:CPU spends longer packing the weights than multiplying."""


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns `x @ weight.T`, accumulated in float32.

  XLA:CPU repacks its right operand. For a handful of rows that is most of the time, so
  there the product is computed as `(weight @ x.T).T`, which is 1.6 times faster for 2
  to 8 rows and rounds differently.

  Args:
    x: `[rows, in]`.
    weight: `[out, in]`.

  Returns:
    `[rows, out]` float32.
  """
  if not 1 < x.shape[0] <= _PACKING_THRESHOLD:
    return _row_major(x, weight)
  return jax.lax.platform_dependent(x, weight, cpu=_column_major, default=_row_major)


def _row_major(x: jax.Array, weight: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )


def _column_major(x: jax.Array, weight: jax.Array) -> jax.Array:
  # The barrier keeps XLA from folding the transposition back into the product.
  return jax.lax.optimization_barrier(_row_major(weight, x)).T


class Linear(nnx.Module):
  """`y = x W^T + b` on `[tokens, features]`.

  Attributes:
    weight: `[out_features, in_features]`.
    bias: `[out_features]`, or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
  ):
    init = nnx.initializers.normal(in_features**-0.5)
    self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), dtype))
    self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[tokens, in_features]` to `[tokens, out_features]` in the dtype of `x`."""
    y = multiply(x, self.weight[...])
    if self.bias is not None:
      y = y + self.bias[...].astype(y.dtype)[None, :]
    return y.astype(x.dtype)
