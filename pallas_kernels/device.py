"""What kernels need to know of the device that programs are traced for."""

import re

import jax

# An abstract device does not tell its compute capability, so it goes by its name.
_BY_NAME = {
  (8, 0): re.compile(r"\b(A100|A30|A800)\b"),
  (8, 9): re.compile(r"\b(L4|L40S?|RTX [45]0\d\d|Ada|RTX PRO)\b"),
  (9, 0): re.compile(r"\b(H100|H200|H800|H20|GH200|B\d00|GB\d00)\b"),
}
_UNKNOWN = (8, 6)  # of those that kernels are for, the one that can do least
_LARGE = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}


def platform() -> str:
  """Its platform, as far as one can know before programs are lowered."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def is_gpu() -> bool:
  """Whether it is a GPU."""
  return platform() == "gpu"


def kind() -> str:
  """Its name, such as `"NVIDIA H100 80GB HBM3"`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def has_float8() -> bool:
  """Whether it converts `float8_e4m3fn`, as GPUs do from capability 8.9 on."""
  return _capability() >= (8, 9)


def shared_bytes() -> int:
  """Shared memory that a program may have."""
  return _LARGE.get(_capability(), 99 << 10)


def _capability() -> tuple[int, int]:
  """A GPU's compute capability, no more than is known; the host counts as an H100."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    known = (x for x, name in _BY_NAME.items() if name.search(device.device_kind))
    return next(known, _UNKNOWN)
  device = jax.devices()[0]
  if device.platform != "gpu":
    return (9, 0)
  # That of other makers' GPUs is no number.
  found = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
  return (int(found[1]), int(found[2])) if found else _UNKNOWN
