"""The sections of a run on a GPU, one after another, in a process of its own."""

from collections.abc import Iterator
import dataclasses
import time

from benchmarks import report
from benchmarks.gpu import attention, bookkeeping, serve, ssm
from benchmarks.gpu import torch as gpu_torch
from benchmarks.gpu.loop import call_seconds, Chain, copy_chain, matmul_chain
from benchmarks.gpu.rows import failed, Row, Run, Section
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.gpu.watch import check_alive, Send, why_not_here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
  """A section has no more rows."""

  section: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What a worker is to do.

  Attributes:
    sections: Names of the sections that are left.
    is_dry: Whether shapes are tiny, and kernels interpreted.
    seconds: To spend.
    rows: All rows so far.
    lost: `(section, by)` that took a worker down.
    is_careful: As in `Run`.
  """

  sections: tuple[str, ...]
  is_dry: bool
  seconds: float
  rows: tuple[Row, ...] = ()
  lost: frozenset[tuple[str, str]] = frozenset()
  is_careful: bool = False


def measure_device(run: Run) -> Iterator[Row]:
  """Copy bandwidth in GB/s, and the rate of a bfloat16 matmul in TFLOP/s."""
  sizes = run.sizes

  def measured(what: str, chain: Chain, work: float) -> Iterator[Row]:
    if not run.wants("device", what, "xla"):
      return
    run.begin("device", what, "xla", seconds=60)
    try:
      seconds = call_seconds(chain, sizes.seconds)
      yield Row(
        section="device",
        what=what,
        by="xla",
        microseconds=seconds * 1e6,
        rate=work / seconds,
      )
    except Exception as problem:
      yield failed("device", what, "xla", problem)

  n = sizes.copy_elements
  yield from measured("copy", copy_chain(n), 2 * 4 * n / 1e9)
  n = sizes.matmul
  yield from measured(f"matmul {n}", matmul_chain(n), 2 * n**3 / 1e12)


SECTIONS = (
  Section(name="device", measure=measure_device),
  Section(name="check", measure=lambda run: attention.check(run, run.sizes.first)),
  Section(name="decode", measure=attention.time_decode),
  Section(name="bookkeeping", measure=bookkeeping.time_steps),
  Section(name="prefill", measure=attention.time_prefill),
  Section(name="states", measure=ssm.measure),
  Section(name="layout", measure=attention.time_layouts),
  Section(name="serve", measure=serve.time_serve, seconds=100.0),
  Section(name="recorded", measure=bookkeeping.time_recorded),
  Section(name="check-rest", measure=lambda run: attention.check(run, run.sizes.rest)),
  # Last, since it compiles for as long as it likes.
  Section(name="torch", measure=gpu_torch.time_decode, seconds=20.0),
)
"""In order of worth: what comes late is left out first. Another kernel's times are one
more line."""


def work(send: Send, task: Task) -> None:
  """Sends what the device is, and the rows and ends of sections as they come."""
  if not task.is_dry and (why := why_not_here()) is not None:
    send(why)
    return
  run = Run(
    sizes=TINY if task.is_dry else FULL,
    interpret=task.is_dry,
    rows=list(task.rows),
    lost=task.lost,
    is_careful=task.is_careful,
    send=send,
  )
  send(report.environment(is_quick=task.is_dry))
  for message in measure(run, task):
    send(message)
    if isinstance(message, Row) and message.details:
      # If the device is lost, this is why.
      run.begin(message.section, message.what, message.by)
      check_alive()


def measure(run: Run, task: Task) -> Iterator[Row | Finished]:
  """All rows of the sections of a task; begins none when the time is up."""
  end = time.monotonic() + task.seconds
  for section in SECTIONS:
    if section.name not in task.sections:
      continue
    left = end - time.monotonic()
    if left < section.seconds:
      yield left_out(section.name, "all of it", left)
      yield Finished(section=section.name)
      continue
    try:
      for row in section.measure(run):
        run.rows.append(row)
        yield row
        if time.monotonic() > end:
          yield left_out(section.name, "what would follow", end - time.monotonic())
          break
    except Exception as problem:
      yield failed(section.name, "all of it", "", problem)
    yield Finished(section=section.name)


def left_out(section: str, what: str, left: float) -> Row:
  """A row for what there was no time for."""
  text = f"left out: {max(left, 0.0):.0f} s are left"
  return Row(section=section, what=what, by="", error=text)
