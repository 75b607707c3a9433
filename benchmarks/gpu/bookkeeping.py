"""What a decode step costs on a GPU beside a model."""

from collections.abc import Callable, Iterator

from benchmarks import bookkeeping, scenes
from benchmarks.gpu.rows import failed, Row, Run
from kvcache import CacheConfig
from pallas_kernels.choice import NotServedError

WITH_WHILE = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
"""What XLA may record into a CUDA graph: its defaults, and loops."""


def _in_serve(config: CacheConfig, repeats: int, run: Run) -> float:
  """A step of `serve`, which reads the loop's condition back to the host."""
  del run
  return bookkeeping.serve_seconds(config, repeats=repeats)


def _recorded(config: CacheConfig, repeats: int, run: Run) -> float:
  """A step of `serve` as one CUDA graph, loops included."""
  if run.interpret:
    raise NotServedError("loops are recorded on a GPU alone")
  options = {"xla_gpu_enable_command_buffer": WITH_WHILE}
  return bookkeeping.serve_seconds(config, repeats=repeats, compiler_options=options)


def _verbs(config: CacheConfig, repeats: int, run: Run) -> float:
  """What the verbs of a step take, in a loop of a known number of steps."""
  ctx, length = scenes.decoding(config)
  return bookkeeping.round_seconds(
    bookkeeping.decode_step,
    ctx,
    repeats=repeats,
    length=min(length, run.sizes.steps),
    restart=bookkeeping.restart,
  )


Seconds = Callable[[CacheConfig, int, Run], float]
CASES: dict[str, Seconds] = {
  "serve, no model": _in_serve,
  "extend, metadata, commit": _verbs,
}


def time_steps(run: Run) -> Iterator[Row]:
  """Times decode steps without a model."""
  yield from _rows(CASES, run)


def time_recorded(run: Run) -> Iterator[Row]:
  """Times those whose loops are part of a CUDA graph."""
  yield from _rows({"serve, no model, loops recorded": _recorded}, run)


def _rows(cases: dict[str, Seconds], run: Run) -> Iterator[Row]:
  what = f"decode step, {run.sizes.rows} rows"
  config = scenes.make_config(run.sizes.rows, max(64, 16 * run.sizes.rows), 64)
  for by, seconds in cases.items():
    if not run.wants("bookkeeping", what, by):
      continue
    try:
      run.begin("bookkeeping", what, by, seconds=120.0)
      took = seconds(config, 1 if run.interpret else 8, run)
      yield Row(section="bookkeeping", what=what, by=by, microseconds=took * 1e6)
    except Exception as problem:
      # Whether loops can be recorded is up to XLA.
      is_bad = seconds is not _recorded
      yield failed("bookkeeping", what, by, problem, is_bad=is_bad)
