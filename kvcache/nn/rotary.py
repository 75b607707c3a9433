"""Rotary position embedding, with the frequency scalings that Llama models use.

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
  2021.
The two halves of a head are the two coordinates of its planes (the order of Hugging
Face weights).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
  """Angles for each position; hashable, owns no array.

  Attributes:
    head_dim: `D`, even.
    theta: Base of the geometric row of frequencies.
    factors: One divisor per frequency (`D // 2` of them), or None for the plain row.
      Every scaling that only changes frequencies can be written so.
    scale: Factor of cosines and sines: turned heads become longer by it (YaRN).
  """

  head_dim: int
  theta: float = 10000.0
  factors: tuple[float, ...] | None = None
  scale: float = 1.0

  def __post_init__(self):
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}")
    if self.factors is not None and len(self.factors) != self.head_dim // 2:
      raise ValueError(
        f"factors must hold head_dim // 2 = {self.head_dim // 2} numbers,"
        f" got {len(self.factors)}"
      )

  @property
  def frequencies(self) -> np.ndarray:
    """`[D // 2]` float32, radians per position."""
    powers = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
    frequencies = np.float32(1.0) / np.power(np.float32(self.theta), powers)
    if self.factors is not None:
      frequencies = frequencies / np.asarray(self.factors, np.float32)
    return frequencies.astype(np.float32)

  def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, `[T, D // 2]` float32 each, of `positions` `[T]`."""
    frequencies = jnp.asarray(self.frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)


def apply_rotary(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns each plane of `x` `[T, heads, D]` by the angles of its token.

  Args:
    x: Queries or keys.
    rotation: Cosines and sines, `[T, D // 2]` each, as `Rotary` returns them.

  Returns:
    The rotated heads in the dtype of `x`; computed in float32.
  """
  cos, sin = (part[:, None, :] for part in rotation)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def llama3_factors(
  *,
  head_dim: int,
  theta: float,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_max_position: int,
) -> tuple[float, ...]:
  """Returns the divisors of Llama 3's long-context scaling, for `Rotary.factors`.

  Frequencies that turn more than `high_freq_factor` times within the original context
  stay; those that turn less than `low_freq_factor` times are divided by `factor`;
  between them the reciprocals blend linearly.
  """
  wavelengths = 2 * math.pi / Rotary(head_dim=head_dim, theta=theta).frequencies
  turns = original_max_position / wavelengths.astype(np.float64)
  blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
  blend = np.clip(blend, 0.0, 1.0)
  return tuple((1.0 / ((1.0 - blend) / factor + blend)).tolist())


def yarn_factors(
  *,
  head_dim: int,
  theta: float,
  factor: float,
  original_max_position: int,
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  truncate: bool = True,
) -> tuple[float, ...]:
  """Returns the divisors of YaRN's long-context scaling, for `Rotary.factors`.

  Planes that turn more than `beta_fast` times within the original context stay; those
  that turn less than `beta_slow` times are divided by `factor`; between them the
  reciprocals blend linearly in the number of the plane.

  Reference: Peng et al., "YaRN: Efficient Context Window Extension of Large Language
  Models", 2023.

  Args:
    head_dim: `D`.
    theta: Base of the frequencies.
    factor: How much longer the context becomes.
    original_max_position: Length of the context before that.
    beta_fast: See above.
    beta_slow: See above.
    truncate: Whether the blend begins and ends at whole planes.
  """

  def plane(turns: float) -> float:
    wavelength = original_max_position / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(theta))

  low, high = plane(beta_fast), plane(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  width = high - low or 0.001  # a step, as other implementations make it
  blend = 1.0 - np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
  return tuple((1.0 / ((1.0 - blend) / factor + blend)).tolist())


def yarn_scale(factor: float, weight: float = 1.0) -> float:
  """Returns by how much YaRN lengthens queries and keys in a context grown `factor`."""
  return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
