"""Runs the benchmarks and writes `results/<device>.md` and `.json`."""

import argparse
import pathlib

from benchmarks import bookkeeping, bulk, generation
from benchmarks.report import Report

RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
  """Parses the command line and runs what it names."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  parser.add_argument("--quick", action="store_true", help="fewer sizes, no model")
  parser.add_argument("--only", choices=("decode", "bulk", "lookup", "verbs", "model"))
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
  options = parser.parse_args()
  report = Report()
  parts = {
    "decode": lambda: bookkeeping.measure_decode(report, quick=options.quick),
    "bulk": lambda: bulk.measure(report),
    "lookup": lambda: bulk.measure_lookup(report),
    "verbs": lambda: bookkeeping.measure_verbs(report, quick=options.quick),
    "model": lambda: generation.measure(report),
  }
  if options.only:
    parts = {options.only: parts[options.only]}
  elif options.quick:
    del parts["model"]
  for name, part in parts.items():
    print(f"{name}:", flush=True)
    part()
  print("written:", report.write(options.out))


if __name__ == "__main__":
  main()
