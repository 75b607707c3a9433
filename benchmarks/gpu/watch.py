"""Work in a process of its own, which may die or hang without taking others along.

A kernel that never ends, or that reads what is not there, spoils the process that ran
it: no later call on the device means anything.
"""

from collections.abc import Callable, Iterator
import dataclasses
import multiprocessing
from multiprocessing.connection import Connection
import os
import signal
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp

PATIENCE = 150.0
"""Seconds without a message: starting, and compiling the largest program."""
Send = Callable[[Any], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
  """What a process is about to do, sent before it does.

  Attributes:
    name: Of what is tried; it is blamed if nothing more is heard.
    seconds: It is over by then.
  """

  name: tuple[str, ...]
  seconds: float = 30.0


class LostError(RuntimeError):
  """The process died, or was killed because it said nothing."""


def watch(
  work: Callable[..., None],
  *arguments: Any,
  seconds: float,
  patience: float = PATIENCE,
) -> Iterator[Any]:
  """Yields what `work(send, *arguments)` sends.

  Args:
    work: A function of a module, run in a new process.
    *arguments: What can be pickled.
    seconds: When the process is killed at the latest.
    patience: How long it may say nothing, unless it has `Begun` something.

  Raises:
    LostError: It died, or was killed.
  """
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
  process.start()
  theirs.close()
  end, allowed = time.monotonic() + seconds, patience
  try:
    while True:
      left = end - time.monotonic()
      if not ours.poll(max(0.0, min(allowed, left))):
        why = f"hung: killed after {allowed:.0f} s" if allowed < left else "cut short"
        raise LostError(why)
      try:
        message = ours.recv()
      except EOFError:
        break
      yield message
      allowed = message.seconds if isinstance(message, Begun) else patience
    process.join(10)  # What hangs now does no harm.
    if code := process.exitcode:
      name = signal.Signals(-code).name if code < 0 else f"code {code}"
      raise LostError(f"died of {name}")
  finally:
    process.kill()
    process.join()
    ours.close()


def why_not_here() -> str | None:
  """Why kernels cannot run in this process; None if they can."""
  if jax.default_backend() == "gpu":
    return None
  return f"needs a GPU, and jax sees {jax.devices()}; try --dry-run"


def check_alive() -> None:
  """Ends the process if the device computes no more, as after a kernel read amiss."""
  try:
    jax.block_until_ready(jnp.arange(8) + 1)
  except Exception:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # without waiting for the device


def _run(
  work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]
) -> None:
  with pipe:
    work(pipe.send, *arguments)
