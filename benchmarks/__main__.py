"""Runs the benchmarks: `python -m benchmarks [--quick] [--only NAME] [--out DIR]`."""

import argparse
from pathlib import Path
import sys
import time
import traceback

import jax

from benchmarks import (
  bookkeeping,
  bulk,
  cascade,
  checks,
  footprint,
  generation,
  lookup,
  quantised,
  recurrent,
  report,
  verbs,
)
from benchmarks.report import Section
from benchmarks.sizes import Size

ROOT = Path(__file__).parent
SECTIONS = tuple(
  Section(name=module.__name__.rpartition(".")[2], title=module.TITLE, measure=measure)
  for module in (
    bookkeeping,
    verbs,
    checks,
    bulk,
    lookup,
    footprint,
    cascade,
    recurrent,
    generation,
    quantised,
  )
  for measure in (module.measure,)
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  names = [section.name for section in SECTIONS]
  parser.add_argument("--quick", action="store_true", help="a few sizes, few repeats")
  parser.add_argument(
    "--only",
    action="append",
    choices=names,
    metavar="NAME",
    help=f"only this section, may be given again: {', '.join(names)}",
  )
  parser.add_argument(
    "--out",
    type=Path,
    default=ROOT / "results",
    metavar="DIR",
    help="where <device>.md and <device>.json are written",
  )
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  """Measures, prints each row as it comes, and writes the report.

  A section that fails is told when it does and again at the end, with exit code 1.
  """
  options = parse(arguments)
  size = Size.QUICK if options.quick else Size.FULL
  # Compiled programs are kept between runs; no compilation is ever timed.
  jax.config.update("jax_compilation_cache_dir", str(ROOT.parent / ".cache" / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  wanted = [s for s in SECTIONS if not options.only or s.name in options.only]
  facts = report.environment(is_quick=options.quick)
  print(f"{facts['device']}, jax {facts['jax']}, python {facts['python']}", flush=True)
  rows, failed = [], []
  for number, section in enumerate(wanted, start=1):
    start = time.perf_counter()
    print(f"\n[{number}/{len(wanted)}] {section.title}", flush=True)
    try:
      for row in section.measure(size):
        rows.append(row)
        print(row, flush=True)
    except generation.NoModelError as error:
      print(f"  skipped: {error}", flush=True)
    except Exception:  # The rows of the others are worth having.
      failed.append(section.name)
      traceback.print_exc()
    print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
  if rows:
    for path in report.save(rows, facts, options.out):
      print(f"wrote {path}")
    num_missed = sum(row.is_met is False for row in rows)
    print(f"{len(rows)} rows, {num_missed} above their target")
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")
  if not rows:
    sys.exit("nothing was measured")


if __name__ == "__main__":
  main()
