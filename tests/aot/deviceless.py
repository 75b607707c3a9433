"""GPU programs without a GPU: lowered on any machine, and compiled for an H100.

To lower needs jax alone. To compile needs the CUDA plugin's wheels, which `make aot`
installs into an environment of their own.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  Mesh,
  SingleDeviceSharding,
)
import numpy as np

from tests.fixtures.places import ROOT

TARGETS = ROOT / "scripts"
DEVICE = AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)
A100 = AbstractDevice(
  device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"
)
L4 = AbstractDevice(device_kind="NVIDIA L4", num_cores=58, platform="gpu")
_NAMES = {DEVICE: "h100", A100: "a100", L4: "l4"}
_LAUNCH = re.compile(
  r"kCustomKernel .*\] (?P<name>\S+) grid: \[.*\] threads: \[(?P<threads>\d+), 1, 1\]"
  r" +shared_memory: (?P<shared>\d+) bytes"
)
_ENTRY = re.compile(
  r"entry function '(?P<name>\w+)'.*?(?P<spills>\d+) bytes spill stores.*?"
  r"Used (?P<registers>\d+) registers",
  re.DOTALL,
)
_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")
_THREADS = re.compile(r"\.(?:max|req)ntid (\d+)")


@contextlib.contextmanager
def gpu(device: AbstractDevice | None = None) -> Iterator[None]:
  """What is traced and lowered within is for a GPU.

  For an H100 if none is given, or what an outer `gpu` says.
  """
  device = device or jax.sharding.get_abstract_mesh().abstract_device or DEVICE
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    yield


def lower(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """Lowers a function for CUDA; arguments may be `ShapeDtypeStruct`s."""
  with gpu():
    traced = jax.jit(run).trace(*args, **kwargs)
    return traced.lower(lowering_platforms=("cuda",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """One kernel of a compiled program.

  Attributes:
    registers: Per thread.
    spill_bytes: Of registers that went to memory.
    shared_bytes: Of shared memory, per program of the grid.
    threads: Per program.
  """

  registers: int
  spill_bytes: int
  shared_bytes: int
  threads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled program: its HLO, its kernels by name, and its temporaries' bytes."""

  text: str
  kernels: dict[str, Kernel]
  temp_bytes: int


class Compiler:
  """Compiles for a GPU, an H100 if not said, and reads what the assembler says."""

  def __init__(self, folder: Path, *, device: AbstractDevice = DEVICE):
    """Works in a folder of its own."""
    import nvidia.cu13

    self.folder = folder
    self.device = device
    self._log = folder / "ptxas.log"
    (root,) = nvidia.cu13.__path__
    script = folder / "cuda" / "bin" / "ptxas"
    script.parent.mkdir(parents=True)
    # XLA asks the assembler for its version first, by its complaints.
    script.write_text(
      f'#!/bin/bash\nexec "{root}/bin/ptxas" "$@" -v 2> >(tee -a "{self._log}" >&2)\n'
    )
    script.chmod(0o755)
    # Mosaic GPU runs an assembler of its own, and asks the environment.
    (folder / "mosaic").mkdir()
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder / "mosaic")

  @functools.cached_property
  def sharding(self) -> SingleDeviceSharding:
    """Of arguments: all on the one device."""
    return SingleDeviceSharding(_devices(self.device, 1)[0])

  def mesh(self, **sizes: int) -> Mesh:
    """A mesh of the GPUs of one host."""
    devices = np.array(_devices(self.device, math.prod(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    return Mesh(devices.reshape(*sizes.values()), tuple(sizes), axis_types=types)

  def shapes(self, tree: Any) -> Any:
    """Arrays or shapes of a pytree, as they would lie on the device."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding), tree
    )

  def __call__(
    self,
    run: Callable[..., Any],
    *args: Any,
    donate: Any = (),
    mesh: Mesh | None = None,
    **kwargs: Any,
  ) -> Program:
    """Compiles a function of arguments that have shapes, and shardings with a mesh."""
    if mesh is None:
      args, kwargs = self.shapes((args, kwargs))
      where = gpu(self.device)
    else:
      where = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    dump, mosaic = self.folder / "dump", self.folder / "mosaic"
    for path in (self._log, *dump.glob("*"), *mosaic.glob("*")):
      path.unlink(missing_ok=True)
    with where:
      lowered = jax.jit(run, donate_argnums=donate).trace(*args, **kwargs).lower()
    compiled = lowered.compile(
      compiler_options={
        "xla_gpu_cuda_data_dir": str(self.folder / "cuda"),
        "xla_gpu_enable_libnvptxcompiler": False,
        "xla_dump_to": str(dump),
      }
    )
    return Program(
      text=compiled.as_text(),
      kernels=self._kernels(dump) | _mosaic_kernels(mosaic),
      temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )

  def _kernels(self, dump: Path) -> dict[str, Kernel]:
    entries = {m["name"]: m for m in _ENTRY.finditer(self._log.read_text("utf-8"))}
    (thunks,) = dump.glob("*.thunk_sequence.txt")
    return {
      m["name"]: Kernel(
        registers=int(entries[m["name"]]["registers"]),
        spill_bytes=int(entries[m["name"]]["spills"]),
        shared_bytes=int(m["shared"]),
        threads=int(m["threads"]),
      )
      for m in _LAUNCH.finditer(thunks.read_text("utf-8"))
      if m["name"] in entries
    }


def _devices(device: AbstractDevice, num: int) -> list[Any]:
  """The GPUs of one host."""
  name = _NAMES[device]
  topology = topologies.get_topology_desc(
    platform="cuda",
    topology_name=name,
    target_config=(TARGETS / f"{name}.txtpb").read_text("utf-8"),
    topology=f"1x1x{num}",
  )
  return topology.devices


def _mosaic_kernels(folder: Path) -> dict[str, Kernel]:
  """Kernels that were assembled; what was assembled before in this process is not.

  Files end in numbers of which each step of the compiler has its own.
  """
  stems = {path.stem.rpartition("_")[0]: path for path in folder.glob("*.ptxas")}
  resources = {
    path.name.rpartition("_")[0]: path for path in folder.glob("*.resources.txt")
  }
  found = {}
  for stem, path in stems.items():
    entry = _ENTRY.search(path.read_text("utf-8"))
    shared = _SHARED.search(resources[stem].read_text("utf-8"))
    threads = _THREADS.search(path.with_suffix(".ptx").read_text("utf-8"))
    assert entry and shared and threads, path
    found[entry["name"]] = Kernel(
      registers=int(entry["registers"]),
      spill_bytes=int(entry["spills"]),
      shared_bytes=int(shared[1]),
      threads=int(threads[1]),
    )
  return found
