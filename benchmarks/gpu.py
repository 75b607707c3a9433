"""Checks and times kernels and the loop on the GPU that jax sees: `make gpu`.

Needs jax, flax, chex and numpy alone: `PYTHONPATH=. python -m benchmarks.gpu`. Shapes
are compared with plain XLA in float32, and times are taken beside the device's own copy
bandwidth and matmul rate. A case that fails is a row that says why. The table is
written anew after each row, so a run that is cut off leaves what it has measured.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
import sys
import time

import jax

from benchmarks import (
  gpu_attention,
  gpu_bookkeeping,
  gpu_serve,
  gpu_ssm,
  gpu_table,
  gpu_torch,
)
from benchmarks.gpu_loop import call_seconds, Chain, copy_chain, matmul_chain
from benchmarks.gpu_rows import failed, Row, Run, Section
from benchmarks.gpu_sizes import FULL, TINY

ROOT = Path(__file__).parent
MINUTES = 7.5


def measure_device(run: Run) -> Iterator[Row]:
  """Copy bandwidth in GB/s, and the rate of a bfloat16 matmul in TFLOP/s."""
  sizes = run.sizes

  def measured(what: str, chain: Chain, work: float) -> Row:
    seconds = call_seconds(chain, sizes.seconds)
    rate = work / seconds
    return Row(
      section="device", what=what, by="xla", microseconds=seconds * 1e6, rate=rate
    )

  n = sizes.copy_elements
  yield measured("copy", copy_chain(n), 2 * 4 * n / 1e9)
  n = sizes.matmul
  yield measured(f"matmul {n}", matmul_chain(n), 2 * n**3 / 1e12)


SECTIONS = (
  Section(name="device", measure=measure_device),
  Section(name="check", measure=lambda run: gpu_attention.check(run, run.sizes.first)),
  Section(name="decode", measure=gpu_attention.time_decode),
  Section(name="bookkeeping", measure=gpu_bookkeeping.time_steps),
  Section(name="prefill", measure=gpu_attention.time_prefill),
  Section(name="states", measure=gpu_ssm.measure),
  Section(name="layout", measure=gpu_attention.time_layouts),
  Section(name="serve", measure=gpu_serve.time_serve, seconds=100.0),
  Section(
    name="check-rest", measure=lambda run: gpu_attention.check(run, run.sizes.rest)
  ),
  # Last, since it compiles for as long as it likes.
  Section(name="torch", measure=gpu_torch.time_decode, seconds=20.0),
)
"""In order of worth: what comes late is left out first. Another kernel's times are one
more line."""


def measure(run: Run, names: set[str], seconds: float) -> Iterator[Row]:
  """All rows of the sections named; begins none when the time is up."""
  end = time.monotonic() + seconds
  for section in SECTIONS:
    if section.name not in names:
      continue
    left = end - time.monotonic()
    if left < section.seconds:
      yield _left_out(section.name, "all of it", left)
      continue
    try:
      for row in section.measure(run):
        yield row
        if time.monotonic() > end:
          yield _left_out(section.name, "what would follow", end - time.monotonic())
          break
    except Exception as problem:
      yield failed(section.name, "all of it", "", problem)


def main(arguments: list[str] | None = None) -> None:
  """Runs everything; ends with an error if a comparison failed."""
  names = [section.name for section in SECTIONS]
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
  parser.add_argument(
    "--dry-run", action="store_true", help="tiny shapes, interpreted, on any device"
  )
  parser.add_argument(
    "--only",
    action="append",
    choices=names,
    help="a section, and the device's own rates; may be repeated",
  )
  parser.add_argument(
    "--minutes",
    type=float,
    default=MINUTES,
    help=f"time to spend, {MINUTES} if omitted",
  )
  parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR")
  options = parser.parse_args(arguments)
  is_dry = options.dry_run
  if not is_dry and jax.default_backend() != "gpu":
    sys.exit(f"needs a GPU, and jax sees {jax.devices()}; try --dry-run")
  run = Run(sizes=TINY if is_dry else FULL, interpret=is_dry)
  chosen = {"device", *(options.only or names)}
  start, paths = time.monotonic(), []
  for row in measure(run, chosen, 60 * options.minutes):
    run.rows.append(row)
    print(f"{time.monotonic() - start:5.0f} s {gpu_table.line(row)}", flush=True)
    paths = gpu_table.save(run.rows, options.out, is_dry=is_dry)
  for path in paths:
    print(f"wrote {path}")
  bad = [f"{row.section} {row.what}" for row in run.rows if row.is_bad]
  if bad:
    sys.exit(
      f"{len(bad)} of {len(run.rows)} rows are wrong or failed: {', '.join(bad)}"
    )


def _left_out(section: str, what: str, left: float) -> Row:
  text = f"left out: {max(left, 0.0):.0f} s are left"
  return Row(section=section, what=what, by="", error=text)


if __name__ == "__main__":
  main()
