"""Finds the best settings of the attention kernels on the GPU that jax sees.

`make tune`, or `PYTHONPATH=. python -m benchmarks.tune`. For every class of shapes one
setting after another is tried, and kept where calls become faster; what is better than
the rules of the kernels goes into the table that is installed with them, by kind of
device (`pallas_kernels.paged_attention.tuning`). The table is written after each class,
so a run may be cut short, and `--only` goes on with others. What is in it does not
count while it is made.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
import sys
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_loop
from benchmarks.gpu_batch import Arrays, Batch, make_batch, run_attention
from pallas_kernels import device
from pallas_kernels.paged_attention import tuning
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, ArgSpec, named

LEAST_GAIN = 0.02
"""Less is noise."""
_SEARCHED: dict[str, tuple[int, ...]] = {
  "tile_kv": (16, 32, 64, 128),
  "num_stages": (2, 3, 4, 5, 6, 7),
  "num_warps": (2, 4, 8),
  "max_tile_q": (16, 32, 64, 128),
  "min_split": (128, 256, 512, 1024),
  "num_programs": (132, 264, 396, 528),
}
_FIELDS = {
  "triton split": ("tile_kv", "num_stages", "num_warps", "min_split", "num_programs"),
  "triton fill": ("max_tile_q", "tile_kv", "num_stages", "num_warps"),
  "mosaic split": ("num_stages", "min_split", "num_programs"),
}
Changes = Mapping[str, int]
"""Settings that differ from those by rule."""
type Choices = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How large a run is.

  Attributes:
    specs: Shapes whose classes are tuned.
    decode: Rows `(tokens stored, of these queries)` of the batches that decode.
    prefill: Rows of the batches with prompts.
    choices: What is tried, by kernel.
    seconds: That a timed chain of calls takes.
    interpret: Whether kernels are interpreted, on any device.
  """

  specs: tuple[ArgSpec, ...]
  decode: tuple[tuple[tuple[int, int], ...], ...]
  prefill: tuple[tuple[tuple[int, int], ...], ...]
  choices: Mapping[str, Choices]
  seconds: float
  interpret: bool


FULL = Sizes(
  specs=ARG_SPECS,
  decode=(((32_768, 1),), ((4096, 1),) * 64),
  prefill=(((4096, 4096),), ((8192, 512),) * 4),
  choices={
    kernel: {field: _SEARCHED[field] for field in fields}
    for kernel, fields in _FIELDS.items()
  },
  seconds=0.02,
  interpret=False,
)
TINY = Sizes(
  specs=(named("qwen-2.5-0.5b"),),
  decode=(((70, 1), (5, 1)),),
  prefill=(((40, 40),),),
  choices={"triton split": {"tile_kv": (32,)}, "triton fill": {"tile_kv": (32,)}},
  seconds=0.0,
  interpret=True,
)


def classes(specs: Sequence[ArgSpec]) -> dict[str, list[ArgSpec]]:
  """Shapes by class: of each the first, and the one with the most heads per kv head."""
  found: dict[str, list[ArgSpec]] = {}
  for spec in specs:
    shapes = spec.shapes(num_seqs=1, num_blocks=1, max_blocks=1, num_tokens=1)
    name = tuning.shape_class(shapes["k"], shapes["v"])
    found.setdefault(name, []).append(spec)
  return {
    name: list({x.name: x for x in (all_[0], max(all_, key=_group))}.values())
    for name, all_ in found.items()
  }


def _group(spec: ArgSpec) -> int:
  return spec.group


def search(
  seconds: Callable[[Changes], float], choices: Choices
) -> tuple[Changes, float]:
  """Tries one setting after another, and keeps what is faster.

  Args:
    seconds: Time under some changes to the settings; infinite if it cannot be.
    choices: Values of each setting.

  Returns:
    The changes, and the share of time that they save.
  """
  best: Changes = {}
  first = least = seconds(best)
  for field, values in choices.items():
    base = best
    for value in values:
      trial = {**base, field: value}
      if (time := seconds(trial)) < least * (1 - LEAST_GAIN):
        best, least = trial, time
  return best, 1 - least / first if math.isfinite(first) else 0.0


class Case:
  """A kernel on some batches: its time under any settings."""

  def __init__(self, kernel: str, batches: Sequence[Batch], sizes: Sizes):
    """Of calls that run the kernel."""
    self.kernel, self.batches, self.sizes = kernel, batches, sizes
    self._wanted = [self._results(batch) for batch in batches]

  def seconds(self, changes: Changes) -> float:
    """Mean of the logarithms of the batches' times, as a time; infinite if it fails."""
    try:
      with tuning.trying(self.kernel, changes):
        for batch, want in zip(self.batches, self._wanted, strict=True):
          got = self._results(batch)
          if not np.allclose(got, want, rtol=0.05, atol=0.05):
            raise ValueError("wrong results")
        times = [self._time(batch) for batch in self.batches]
    except Exception as problem:
      print(f"    {dict(changes)}: {type(problem).__name__}: {problem}"[:150])
      return math.inf
    return math.exp(sum(map(math.log, times)) / len(times))

  def _call(self, batch: Batch) -> Callable[[Arrays], tuple[Any, Any]]:
    by = self.kernel.split()[0]
    return run_attention(batch, by, interpret=self.sizes.interpret)

  def _results(self, batch: Batch) -> Any:
    # A function of its own: settings are no arguments, so none may be found compiled.
    call = self._call(batch)
    return jax.jit(lambda arrays: call(arrays)[0].astype(jnp.float32))(batch.arrays)

  def _time(self, batch: Batch) -> float:
    call, names = self._call(batch), {"q", "block_tables"}
    tables = batch.arrays["block_tables"]
    turns = [tables + i * batch.blocks_per_copy for i in range(batch.num_copies)]

    def step(q: Any, constants: Arrays, tables: Any) -> Any:
      out, _ = call({**constants, "q": q, "block_tables": tables})
      rest = q[..., out.shape[-1] :]  # of latent layers
      return lax.concatenate([out, rest], 2) if rest.size else out

    chain = gpu_loop.Chain(
      step=step,
      state=batch.arrays["q"],
      constants={name: x for name, x in batch.arrays.items() if name not in names},
      turns=turns,
      estimate=max(5e-6, _num_bytes(batch) / 2e12),
    )
    return gpu_loop.call_seconds(chain, self.sizes.seconds)


def _num_bytes(batch: Batch) -> int:
  """Bytes of the keys and values of one copy."""
  tokens = batch.blocks_per_copy * batch.spec.block_size
  return tokens * batch.spec.bytes_per_token


def _batches(
  specs: Sequence[ArgSpec], sizes: Sizes, *, is_decode: bool
) -> Iterator[Batch]:
  """Every batch of every shape, as often in the pool as no cache holds it."""
  for spec in specs:
    for rows in sizes.decode if is_decode else sizes.prefill:
      num_bytes = sum(stored for stored, _ in rows) * spec.bytes_per_token
      copies = 1
      if is_decode and not sizes.interpret:
        copies = gpu_loop.num_turns(num_bytes)
      yield make_batch(spec, rows, is_decode=is_decode, num_copies=copies)


def tune(sizes: Sizes, *, only: str = "") -> Iterator[tuple[str, str, Changes, float]]:
  """Yields kernel, class, changes and gain of everything that can be served."""
  for name, specs in classes(sizes.specs).items():
    if only not in name:
      continue
    for kernel, choices in sizes.choices.items():
      print(f"{kernel}, {name}", flush=True)
      is_decode = kernel.endswith("split")
      try:
        case = Case(kernel, list(_batches(specs, sizes, is_decode=is_decode)), sizes)
      except Exception as problem:
        print(f"  {type(problem).__name__}: {problem}"[:150])
        continue
      yield kernel, name, *search(case.seconds, choices)


def enter(
  table: tuning.Table, kind: str, kernel: str, name: str, changes: Changes
) -> None:
  """Puts changes into a table in place of those that were there."""
  entries = table.setdefault(kind, {}).setdefault(kernel, {})
  entries.pop(name, None)
  if changes:
    entries[name] = dict(changes)


def main(arguments: list[str] | None = None) -> None:
  """Tunes everything and writes the table."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.tune", description=__doc__
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="tiny shapes, interpreted, on any device"
  )
  parser.add_argument("--only", default="", metavar="TEXT", help="classes with this")
  parser.add_argument(
    "--out", type=Path, default=tuning.PATH, metavar="FILE", help="the table"
  )
  options = parser.parse_args(arguments)
  if not options.dry_run and jax.default_backend() != "gpu":
    sys.exit(f"needs a GPU, and jax sees {jax.devices()}; try --dry-run")
  if options.dry_run and options.out == tuning.PATH:
    sys.exit("a dry run needs --out: its table is good for nothing")
  path: Path = options.out
  table = json.loads(path.read_text("utf-8")) if path.exists() else {}
  sizes = TINY if options.dry_run else FULL
  for kernel, name, changes, gain in tune(sizes, only=options.only):
    print(f"  {dict(changes) or 'as it is'}, {gain:.0%} faster", flush=True)
    enter(table, device.kind(), kernel, name, changes)
    text = json.dumps(table, indent=2, sort_keys=True)
    path.write_text(text + "\n", "utf-8")
  print(f"wrote {path}")


if __name__ == "__main__":
  main()
