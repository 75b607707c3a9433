"""What kernels need to know of the device that programs are traced for."""

import re

import jax

_HAS_FLOAT8 = re.compile(
  r"\b(H100|H200|H800|H20|GH200|B\d00|GB\d00|L4|L40S?|RTX [45]0\d\d|Ada|Blackwell)\b"
)


def kind() -> str:
  """Its name, such as `"NVIDIA H100 80GB HBM3"`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def has_float8() -> bool:
  """Whether it converts `float8_e4m3fn`; GPUs do from compute capability 8.9 on.

  An abstract device does not tell its capability, so it goes by its name. False if
  nothing is known: there is another way that all GPUs can go.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return _HAS_FLOAT8.search(device.device_kind) is not None
  device = jax.devices()[0]
  if device.platform != "gpu":
    return True
  capability = getattr(device, "compute_capability", "0")
  return tuple(int(n) for n in str(capability).split(".")) >= (8, 9)
