"""Finds the best settings of the attention kernels on the GPU that jax sees.

`make tune`, or `PYTHONPATH=. python -m benchmarks.gpu.tune`. For every class of shapes
one setting after another is tried, and kept where calls become faster; what is better
than the rules of the kernels goes into the table that is installed with them, by kind
of device (`pallas_kernels.paged_attention.tuning`). A search begins with what is in the
table, if that is still better than the rules, and the table is written after each
improvement: a run may be cut short, and `--kernel` and `--only` go on with others. A
setting that hangs, or takes its process down, ends the search of its kernel and class.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import loop
from benchmarks.gpu.batch import Arrays, Batch, make_batch, run_attention
from benchmarks.gpu.watch import (
  Begun,
  check_alive,
  LostError,
  Send,
  watch,
  why_not_here,
)
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
Begin = Callable[[Changes], None]
Programs = tuple[Callable[[], Any], Callable[[], Any]]
"""What waits for the program that computes results, and for a timer."""
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
  times: Callable[[Sequence[Changes]], Sequence[float]],
  choices: Choices,
  start: Changes,
) -> Iterator[tuple[Changes, float]]:
  """Tries one setting after another, and keeps what is faster.

  Args:
    times: Seconds under each of some changes to the settings; infinite if it cannot be.
    choices: Values of each setting.
    start: Changes to begin with, if they are faster than none.

  Yields:
    At first, and after each setting, the best changes so far and the share of time that
    they save.

  Raises:
    RuntimeError: It cannot be without changes, so nothing can be compared.
  """
  best: Changes = {}
  (first,) = times([best])
  if not math.isfinite(first):
    raise RuntimeError("the kernel fails as it is")
  least = first

  def rounds() -> Iterator[list[Changes]]:
    if start:
      yield [start]
    for field, values in choices.items():
      yield [{**best, field: value} for value in values]

  for trials in rounds():
    for trial, seconds in zip(trials, times(trials), strict=True):
      if seconds < least * (1 - LEAST_GAIN):
        best, least = trial, seconds
    yield best, 1 - least / first


class Case:
  """A kernel on some batches: its time under any settings."""

  def __init__(self, kernel: str, batches: Sequence[Batch], sizes: Sizes, begin: Begin):
    """Of calls that run the kernel; `begin` is told what is about to run."""
    self.kernel, self.batches, self.sizes = kernel, batches, sizes
    self._begin = begin
    self._wanted = [self._lower(batch).compile()(batch.arrays) for batch in batches]

  def times(self, trials: Sequence[Changes]) -> list[float]:
    """Of each, the mean of the logarithms of the batches' times, as a time.

    Infinite where it fails or computes something else. Programs are compiled side by
    side.
    """
    with ThreadPoolExecutor() as pool:
      begun = [self._begin_trial(changes, pool) for changes in trials]
    pairs = zip(trials, begun, strict=True)
    return [self._seconds(changes, programs) for changes, programs in pairs]

  def _begin_trial(self, changes: Changes, pool: ThreadPoolExecutor) -> list[Programs]:
    """Programs of each batch, being compiled."""
    begin = functools.partial(loop.begin_to_compile, pool=pool)
    with tuning.trying(self.kernel, changes):
      return [
        (
          begin(lambda x=batch: self._lower(x).compile),
          begin(lambda x=batch: self._timer(x).lower().compile),
        )
        for batch in self.batches
      ]

  def _seconds(self, changes: Changes, programs: Sequence[Programs]) -> float:
    times: list[float] = []
    try:
      begun = zip(self.batches, self._wanted, programs, strict=True)
      for batch, want, (results, times_it) in begun:
        run, timer = results(), times_it()
        self._begin(changes)
        if not np.allclose(run(batch.arrays), want, rtol=0.05, atol=0.05):
          raise ValueError("wrong results")
        times.append(timer.seconds())
    except Exception as problem:
      print(f"    {dict(changes)}: {type(problem).__name__}: {problem}"[:500])
      check_alive()
      return math.inf
    return math.exp(sum(map(math.log, times)) / len(times))

  def _call(self, batch: Batch) -> Callable[[Arrays], tuple[Any, Any]]:
    by = self.kernel.split()[0]
    return run_attention(batch, by, interpret=self.sizes.interpret)

  def _lower(self, batch: Batch) -> Any:
    # A function of its own: settings are no arguments, so none may be found compiled.
    call = self._call(batch)
    run = jax.jit(lambda arrays: call(arrays)[0].astype(jnp.float32))
    return run.lower(batch.arrays)

  def _timer(self, batch: Batch) -> loop.Timer:
    call, names = self._call(batch), {"q", "block_tables"}
    tables = batch.arrays["block_tables"]
    turns = [tables + i * batch.blocks_per_copy for i in range(batch.num_copies)]

    def step(q: Any, constants: Arrays, tables: Any) -> Any:
      out, _ = call({**constants, "q": q, "block_tables": tables})
      rest = q[..., out.shape[-1] :]  # of latent layers
      return lax.concatenate([out, rest], 2) if rest.size else out

    chain = loop.Chain(
      step=step,
      state=batch.arrays["q"],
      constants={name: x for name, x in batch.arrays.items() if name not in names},
      turns=turns,
      estimate=max(5e-6, _num_bytes(batch) / 2e12, _num_flops(batch) / 400e12),
    )
    return loop.Timer(chain, self.sizes.seconds)


def _num_bytes(batch: Batch) -> int:
  """Bytes of the keys and values of one copy."""
  tokens = batch.blocks_per_copy * batch.spec.block_size
  return tokens * batch.spec.bytes_per_token


def _num_flops(batch: Batch) -> float:
  """Floating-point operations of a call, causal."""
  lens, spec = np.asarray(batch.arrays["seq_lens"], float), batch.spec
  starts = batch.arrays.get("cu_seqlens")
  queries = np.ones_like(lens) if starts is None else np.diff(np.asarray(starts))
  pairs = float(np.sum(queries * (lens - queries / 2)))
  return 4 * pairs * spec.num_heads * spec.head_dim


def _batches(
  specs: Sequence[ArgSpec], sizes: Sizes, *, is_decode: bool
) -> Iterator[Batch]:
  """Every batch of every shape, as often in the pool as no cache holds it."""
  for spec in specs:
    for rows in sizes.decode if is_decode else sizes.prefill:
      num_bytes = sum(stored for stored, _ in rows) * spec.bytes_per_token
      copies = 1
      if is_decode and not sizes.interpret:
        copies = loop.num_turns(num_bytes)
      yield make_batch(spec, rows, is_decode=is_decode, num_copies=copies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """The best so far of a kernel and class on a kind of device."""

  device: str
  kernel: str
  name: str
  changes: Changes
  gain: float


Job = tuple[str, str]
"""A kernel and a class of shapes."""


def jobs(sizes: Sizes, *, kernel: str = "", only: str = "") -> list[Job]:
  """What is to be tuned: kernels and classes whose names contain these."""
  return [
    (k, name)
    for k in sizes.choices
    for name in classes(sizes.specs)
    if kernel in k and only in name
  ]


def work(send: Send, is_dry: bool, todo: Sequence[Job], table: tuning.Table) -> None:
  """Sends what is best of each job, and `(job, why it ended)`."""
  if not is_dry and (why := why_not_here()) is not None:
    send(why)
    return
  sizes = TINY if is_dry else FULL
  for kernel, name in todo:

    def begin(changes: Changes, job: Job = (kernel, name)) -> None:
      send(Begun(name=(*job, str(dict(changes)))))

    try:
      specs, is_decode = classes(sizes.specs)[name], kernel.endswith("split")
      batches = list(_batches(specs, sizes, is_decode=is_decode))
      case = Case(kernel, batches, sizes, begin)
      on = device.kind()
      start = table.get(on, {}).get(kernel, {}).get(name, {})
      for changes, gain in search(case.times, sizes.choices[kernel], start):
        send(Found(device=on, kernel=kernel, name=name, changes=changes, gain=gain))
      send(((kernel, name), "done"))
    except Exception as problem:
      check_alive()
      send(((kernel, name), f"{type(problem).__name__}: {problem}"[:500]))


def tune(
  todo: Sequence[Job], table: tuning.Table, *, is_dry: bool, seconds: float
) -> Iterator[Found]:
  """Yields what is best of everything that can be served, until the time is up.

  Args:
    todo: What is to be tuned.
    table: What was found before.
    is_dry: Whether kernels are interpreted.
    seconds: The time.
  """
  end, left = time.monotonic() + seconds, list(todo)
  while left and (rest := end - time.monotonic()) > 0:
    print(f"{left[0][0]}, {left[0][1]}", flush=True)
    last = ""
    try:
      for message in watch(work, is_dry, left, table, seconds=rest):
        if isinstance(message, Begun):
          last = message.name[-1]
        elif isinstance(message, Found):
          yield message
        elif isinstance(message, str):
          sys.exit(message)
        else:
          job, why = message
          print(f"  {why}", flush=True)
          left.remove(job)
          if left:
            print(f"{left[0][0]}, {left[0][1]}", flush=True)
    except LostError as problem:
      print(f"  {last}: {problem}", flush=True)
      left.pop(0)
  for kernel, name in left:
    print(f"{kernel}, {name}: left out, the time is up")


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
    prog="python -m benchmarks.gpu.tune", description=__doc__
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="tiny shapes, interpreted, on any device"
  )
  parser.add_argument("--kernel", default="", metavar="TEXT", help="kernels with this")
  parser.add_argument("--only", default="", metavar="TEXT", help="classes with this")
  parser.add_argument("--minutes", type=float, default=60.0, help="60 if omitted")
  parser.add_argument(
    "--out", type=Path, default=tuning.PATH, metavar="FILE", help="the table"
  )
  options = parser.parse_args(arguments)
  if options.dry_run and options.out == tuning.PATH:
    sys.exit("a dry run needs --out: its table is good for nothing")
  path: Path = options.out
  table = json.loads(path.read_text("utf-8")) if path.exists() else {}
  todo = jobs(
    TINY if options.dry_run else FULL, kernel=options.kernel, only=options.only
  )
  is_written = False
  seconds = 60 * options.minutes
  for found in tune(todo, table, is_dry=options.dry_run, seconds=seconds):
    print(f"  {dict(found.changes) or 'as it is'}, {found.gain:.0%} faster", flush=True)
    enter(table, found.device, found.kernel, found.name, found.changes)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", "utf-8")
    is_written = True
  if not is_written:
    sys.exit("nothing was tuned")
  print(f"wrote {path}")


if __name__ == "__main__":
  main()
