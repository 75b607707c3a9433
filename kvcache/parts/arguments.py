"""Reading the arguments of verbs: what cannot be right is refused at trace time."""

from collections.abc import Sequence

import jax
from jax import Array
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kvcache.config import AttentionLayer, CacheConfig, Layer

_INT32 = np.iinfo(np.int32)


def as_int32(
  name: str,
  value: ArrayLike,
  *,
  ndim: int | None = None,
  shape: tuple[int, ...] | None = None,
) -> Array:
  """Returns the value as int32; `ValueError` if it is no integer or misshapen."""
  check_int32(name, value)
  try:
    array = jnp.asarray(value)
  except ValueError as error:  # of lists whose lengths differ
    raise ValueError(f"{name} must be an array: {error}") from error
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {array.dtype}{list(array.shape)}")
  if ndim is not None and array.ndim != ndim:
    raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
  if shape is not None and array.shape != shape:
    raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
  return array.astype(jnp.int32)


def check_int32(name: str, value: object) -> None:
  """Refuses numbers of the host that JAX would wrap around; `ValueError`."""
  for leaf in jax.tree.leaves(value):
    if isinstance(leaf, int | np.integer | np.ndarray) and np.size(leaf):
      host = np.asarray(leaf)
      if host.dtype.kind not in "iuO":
        continue
      for worst in (host.min(), host.max()):
        if not _INT32.min <= worst <= _INT32.max:
          raise ValueError(f"{name} must fit into int32, got {worst}")


def check_static(name: str, value: object) -> None:
  """Refuses what `jax.jit` traces where a shape depends on it; `ValueError`."""
  if isinstance(value, Tracer):
    raise ValueError(
      f"{name} must be static, because shapes depend on it: name the argument of the"
      " jitted function that it comes from in static_argnames"
    )


def check_layers(config: CacheConfig, layers: Sequence[Layer]) -> None:
  """Refuses a context that was made for fewer or more layers; `ValueError`."""
  num = sum(isinstance(layer, AttentionLayer) for layer in layers)
  num_recurrent = len(layers) - num
  if (num, num_recurrent) != (config.num_layers, config.num_recurrent_layers):
    raise ValueError(
      f"the model has {num} attention layers and {num_recurrent} recurrent ones, but"
      f" ctx was made for {config.num_layers} and {config.num_recurrent_layers}: make"
      " it with the model's cache_layers()"
    )


def as_namespaces(namespace: ArrayLike, num: int) -> Array:
  """Returns `[num]` int32 from one namespace or one for each."""
  array = as_int32("namespace", namespace)
  if array.shape not in ((), (num,)):
    raise ValueError(f"namespace must have shape () or ({num},), got {array.shape}")
  return jnp.broadcast_to(array, (num,))


def as_mask(name: str, value: ArrayLike, size: int) -> Array:
  """Returns the value if it is `bool[size]`; `ValueError` otherwise."""
  array = jnp.asarray(value)
  if array.dtype != bool or array.shape != (size,):
    raise ValueError(
      f"{name} must be bool[{size}], got {array.dtype}{list(array.shape)}"
    )
  return array
