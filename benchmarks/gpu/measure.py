"""Checks and times kernels and the loop on the GPU that jax sees: `make gpu`.

Needs jax, flax, chex and numpy alone: `PYTHONPATH=. python -m benchmarks.gpu`. Shapes
are compared with plain XLA in float32, and times are taken beside the device's own copy
bandwidth and matmul rate. A case that fails is a row that says why; one that hangs, or
takes its process down, is too, and a new process goes on without what is like it. The
table is written anew after each row, so a run that is cut off leaves what it has
measured; `--only` keeps the rows of an earlier run and replaces its own.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
from pathlib import Path
import sys
import time

from benchmarks.gpu import table, worker
from benchmarks.gpu.rows import Row
from benchmarks.gpu.table import Facts
from benchmarks.gpu.watch import Begun, LostError, watch
from benchmarks.gpu.worker import Finished, left_out, Task

ROOT = Path(__file__).parent
MINUTES = 7.5
_GRACE = 20.0
"""Seconds that a worker may need to end."""


def measure(
  task: Task, work: Callable[..., None] = worker.work
) -> Iterator[Row | Facts]:
  """Rows of the sections of a task, and first what they depend on.

  Workers are started one after another, as long as they get lost.
  """
  end, is_known = time.monotonic() + task.seconds, False
  while task.sections:
    left = end - time.monotonic()
    task = dataclasses.replace(task, seconds=left)
    last = None
    try:
      for message in watch(work, task, seconds=left + _GRACE):
        if isinstance(message, Begun):
          last = message.name
        elif isinstance(message, Row):
          last = None
          task = dataclasses.replace(task, rows=(*task.rows, message))
          yield message
        elif isinstance(message, Finished):
          task = _without(task, message.section)
        elif isinstance(message, dict):
          if not is_known:
            yield message
          is_known = True
        else:
          sys.exit(message)
      return
    except LostError as problem:
      row, task = _blame(task, last, problem)
      task = dataclasses.replace(task, rows=(*task.rows, row))
      yield row
    if end - time.monotonic() <= 0:
      yield from (left_out(name, "what would follow", 0.0) for name in task.sections)
      return


def _blame(
  task: Task, last: tuple[str, ...] | None, problem: LostError
) -> tuple[Row, Task]:
  """What took a worker down, and what is left to do without it."""
  if last is not None and (last[0], last[2]) not in task.lost:
    section, what, by = last
    row = Row(section=section, what=what, by=by, error=str(problem), is_bad=True)
    for known in task.rows:
      if known.key == last:  # After that failure the device computed no more.
        text = f"{problem} after {known.error}"
        row = dataclasses.replace(row, error=text[:200], details=known.details)
    return row, dataclasses.replace(task, lost=task.lost | {(section, by)})
  section, text = task.sections[0], str(problem)
  row = Row(section=section, what="compiling", by="", error=text, is_bad=True)
  if task.is_careful:
    return row, _without(task, section)
  return row, dataclasses.replace(task, is_careful=True)


def _without(task: Task, section: str) -> Task:
  names = tuple(name for name in task.sections if name != section)
  return dataclasses.replace(task, sections=names, is_careful=False)


def main(arguments: list[str] | None = None) -> None:
  """Runs everything; ends with an error if a comparison failed."""
  names = [section.name for section in worker.SECTIONS]
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
  wanted = {"device", *(options.only or names)}
  task = Task(
    sections=tuple(name for name in names if name in wanted),
    is_dry=options.dry_run,
    seconds=60 * options.minutes,
  )
  start, rows, facts, old, paths = time.monotonic(), [], None, [], []
  for found in measure(task):
    if not isinstance(found, Row):
      facts = found
      old = table.load(options.out, facts) if options.only else []
      continue
    rows.append(found)
    print(f"{time.monotonic() - start:5.0f} s {table.line(found)}", flush=True)
    if facts is not None:
      paths = table.save(table.merged(old, rows), options.out, facts)
  for path in paths:
    print(f"wrote {path}")
  if bad := [f"{row.section} {row.what}" for row in rows if row.is_bad]:
    sys.exit(f"{len(bad)} of {len(rows)} rows are wrong or failed: {', '.join(bad)}")
