"""Reading the arguments of verbs: what cannot be right is refused at trace time."""

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

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
  array = jnp.asarray(value)
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
