"""Arguments of real models, by name: what tests lower, compile and benchmarks time."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """What one Mamba-2 layer of a model hands to the operations on one device.

  Attributes:
    name: Of the model, and of how many devices share its heads (`tp8`).
    num_heads: `H` on one device.
    head_dim: `P`.
    state_size: `N`.
    num_groups: `G` on one device.
    conv_width: `W`.
    dtype: Of activations; states are float32.
  """

  name: str
  num_heads: int
  head_dim: int = 64
  state_size: int = 128
  num_groups: int = 1
  conv_width: int = 4
  dtype: DTypeLike = jnp.bfloat16

  @property
  def num_channels(self) -> int:
    """`C`, what is convolved: `x`, `b` and `c`."""
    return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_size

  @property
  def ssd_bytes(self) -> int:
    """Bytes of one sequence's state of the recurrence."""
    return 4 * self.num_heads * self.head_dim * self.state_size

  @property
  def conv_bytes(self) -> int:
    """Bytes of one sequence's state of the convolution."""
    return 4 * self.num_channels * (self.conv_width - 1)

  def conv_shapes(
    self,
    *,
    num_seqs: int,
    num_tokens: int,
    num_states: int,
    num_layers: int = 1,
    num_entries: int | None = None,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """The array arguments of `step_conv1d`, by name.

    Args:
      num_seqs: `S`.
      num_tokens: `T`.
      num_states: `M`.
      num_layers: `R`.
      num_entries: `E` of a draft step, or None.
    """
    channels, width = self.num_channels, self.conv_width
    pool = (num_layers, num_states, channels, width - 1)
    return {
      "x": jax.ShapeDtypeStruct((num_tokens, channels), self.dtype),
      "weight": jax.ShapeDtypeStruct((channels, width), self.dtype),
      "bias": jax.ShapeDtypeStruct((channels,), self.dtype),
      "pool": jax.ShapeDtypeStruct(pool, jnp.float32),
      **_ids(num_seqs, num_entries),
    }

  def ssd_shapes(
    self,
    *,
    num_seqs: int,
    num_tokens: int,
    num_states: int,
    num_layers: int = 1,
    num_entries: int | None = None,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """The array arguments of `step_ssd`, by name; as `conv_shapes`."""
    heads = (self.num_heads,)
    pool = (num_layers, num_states, *heads, self.head_dim, self.state_size)
    side = jax.ShapeDtypeStruct(
      (num_tokens, self.num_groups, self.state_size), self.dtype
    )
    return {
      "x": jax.ShapeDtypeStruct((num_tokens, *heads, self.head_dim), self.dtype),
      "dt": jax.ShapeDtypeStruct((num_tokens, *heads), jnp.float32),
      "a": jax.ShapeDtypeStruct(heads, jnp.float32),
      "b": side,
      "c": side,
      "d": jax.ShapeDtypeStruct(heads, self.dtype),
      "pool": jax.ShapeDtypeStruct(pool, jnp.float32),
      **_ids(num_seqs, num_entries),
    }


def _ids(num_seqs: int, num_entries: int | None) -> dict[str, jax.ShapeDtypeStruct]:
  entries = () if num_entries is None else (num_entries,)
  shapes = {
    "layer": (),
    "read_ids": (num_seqs,),
    "write_ids": (num_seqs, *entries),
    "cu_seqlens": (num_seqs + 1,),
  }
  return {
    name: jax.ShapeDtypeStruct(shape, np.dtype(np.int32))
    for name, shape in shapes.items()
  }


ARG_SPECS = (
  ArgSpec(name="mamba2-130m", num_heads=24),
  ArgSpec(name="mamba2-130m float16", num_heads=24, dtype=jnp.float16),
  ArgSpec(name="mamba2-130m float32", num_heads=24, dtype=jnp.float32),
  ArgSpec(name="mamba2-2.7b", num_heads=80),
  ArgSpec(name="granite-4-h-350m", num_heads=48, head_dim=32),
  ArgSpec(name="granite-4-h-tiny", num_heads=48),
  ArgSpec(name="granite-4-h-small", num_heads=128),
  ArgSpec(name="granite-4-h-small tp8", num_heads=16),
  ArgSpec(name="nemotron-h-8b", num_heads=128, num_groups=8),
  ArgSpec(name="nemotron-h-56b", num_heads=256, num_groups=8, state_size=256),
  ArgSpec(name="nemotron-nano-9b-v2", num_heads=128, head_dim=80, num_groups=8),
  ArgSpec(name="zamba2-7b", num_heads=112, num_groups=2, state_size=64),
)


def named(name: str) -> ArgSpec:
  """The one with a name."""
  for spec in ARG_SPECS:
    if spec.name == name:
      return spec
  raise ValueError(f"name must be one of ARG_SPECS, got {name!r}")
