"""How kernels are set up for a device: as was best there, or else as compiled best.

What was measured stands in `tuned.json`, by kind of device, kernel and class of shapes;
`python -m benchmarks.gpu.tune` writes it on a GPU. Everything else is set up by the
rules of the kernels: few registers, no spills, two programs on a multiprocessor.

Settings decide in which order sums are taken, so they depend on static shapes and on
the kind of device alone: never on what is in a batch.
"""

from collections.abc import Generator, Mapping
import contextlib
import contextvars
import dataclasses
import functools
import json
from pathlib import Path

from pallas_kernels import device
from pallas_kernels.paged_attention.call import Shaped

PATH = Path(__file__).with_name("tuned.json")
KERNELS = ("triton split", "triton fill", "mosaic split")
type Table = dict[str, dict[str, dict[str, dict[str, int]]]]
"""Device kind, kernel, shape class, field of `Settings`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How a kernel is set up. Not every kernel can be set up in every way.

  Attributes:
    tile_kv: Tokens per tile of keys.
    num_stages: Tiles in flight.
    min_split: Least tokens of a piece of a row.
    num_programs: Of the grid that works off the pieces.
    max_tile_q: Most queries per tile.
    num_warps: Of a program; by the size of its tiles if None.
  """

  tile_kv: int
  num_stages: int
  min_split: int
  num_programs: int
  max_tile_q: int = 64
  num_warps: int | None = None


_trial: contextvars.ContextVar[tuple[str, Mapping[str, int]]] = contextvars.ContextVar(
  "trial", default=("", {})
)


def shape_class(k: Shaped, v: Shaped | None) -> str:
  """What settings are looked up by: a token's elements, such as `128x128 bfloat16`."""
  values = "latent" if v is None else str(v.shape[-1])
  return f"{k.shape[-1]}x{values} {k.dtype.name}"


def settle(kernel: str, k: Shaped, v: Shaped | None, default: Settings) -> Settings:
  """The settings of a kernel: what was measured, where it was, in place of `default`.

  Args:
    kernel: One of `KERNELS`.
    k: `[N, K, block_size, D]`, or its shape and dtype.
    v: `[N, K, block_size, Dv]`, or None for latent keys.
    default: Where nothing was measured.
  """
  tried, changes = _trial.get()
  if tried != kernel:
    classes = measured().get(device.kind(), {}).get(kernel, {})
    changes = classes.get(shape_class(k, v), {})
  return dataclasses.replace(default, **changes)


@contextlib.contextmanager
def trying(kernel: str, changes: Mapping[str, int]) -> Generator[None]:
  """Within, a kernel that is traced is set up by its rules but for some fields."""
  token = _trial.set((kernel, changes))
  try:
    yield
  finally:
    _trial.reset(token)


@functools.cache
def measured() -> Table:
  """The table as it is installed."""
  return json.loads(PATH.read_text("utf-8"))
