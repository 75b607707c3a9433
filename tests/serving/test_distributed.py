"""Two processes serve one model over loopback; one is killed, and the work goes on."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.fixtures.places import ROOT
from tests.serving import pair

LIMIT = 420
"""Seconds that a pair may take, compiling included."""


def run_pair(folder, *, last_slice):
  """Exit codes, output and errors of both, and the seconds that the first outlived."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  names = [folder / f"{i}.{kind}" for i in (0, 1) for kind in ("out", "err")]
  processes = []
  with contextlib.ExitStack() as stack:
    logs = [stack.enter_context(open(name, "w")) for name in names]
    for i in (0, 1):
      arguments = [str(port), str(i), str(folder / "saved"), str(last_slice)]
      process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.pair", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=logs[2 * i],
        stderr=logs[2 * i + 1],
      )
      stack.callback(process.wait)
      stack.callback(process.kill)
      processes.append(process)
    second = processes[1].wait(LIMIT)
    ended = time.monotonic()
    first = processes[0].wait(LIMIT)
    outlived = time.monotonic() - ended
  texts = [name.read_text("utf-8") for name in names]
  return (first, second), texts, outlived


def steps(text):
  return [int(line.split()[1]) for line in text.splitlines() if line[:5] == "steps"]


@pytest.mark.thorough
def test_a_pair_serves_and_goes_on_after_one_was_killed(tmp_path):
  codes, texts, outlived = run_pair(tmp_path, last_slice=3)
  out, errors, killed = texts[:3]
  assert codes[1] == -9, texts
  assert steps(killed) == [5, 10, 15], texts
  # The other one ends, soon, and says why.
  assert codes[0] != 0 and steps(out)[-1] == 15, texts
  assert "JaxRuntimeError" in errors or "another task died" in errors, errors
  assert "[[" not in out
  assert outlived < 4 * pair.HEARTBEAT + 30

  codes, texts, _ = run_pair(tmp_path, last_slice=0)
  assert codes == (0, 0), texts
  wanted = pair.alone()
  for text in (texts[0], texts[2]):
    assert steps(text)[0] == 20  # goes on from where it was saved
    assert json.loads(text.splitlines()[-1]) == wanted
