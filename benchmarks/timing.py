"""Timing of compiled programs that consume their arguments.

The best of many repeats is reported: what a shared machine adds is never negative. Each
repeat gets a fresh copy of the state, made before the clock starts.
"""

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp

copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
"""Copies a tree of arrays, so that the copy may be donated."""


def call_seconds(
  run: Callable[..., Any], state: Any, *arguments: Any, repeats: int
) -> float:
  """Best time of `run(state, *arguments)`, called from the host, dispatch included.

  Args:
    run: Jitted, with the state donated.
    state: Copied for each repeat.
    *arguments: Not donated.
    repeats: Timed calls, after one that compiles.
  """
  times = [_timed(run, _fresh(state), *arguments)[0] for _ in range(repeats + 1)]
  return min(times[1:])


def chain_seconds(
  run: Callable[..., Any], state: Any, *arguments: Any, repeats: int, length: int
) -> float:
  """Best time of one call in a chain `state = run(state, *arguments)`.

  Args:
    run: Jitted, with the state donated; returns the next state.
    state: Start of each chain.
    *arguments: Not donated.
    repeats: Chains.
    length: Calls in a chain, as many as leave the state's nature unchanged.
  """
  times = []
  for _ in range(repeats):
    fresh = run(_fresh(state), *arguments)
    for _ in range(length - 1):
      seconds, fresh = _timed(run, fresh, *arguments)
      times.append(seconds)
  return min(times)


def step_seconds(
  run: Callable[..., Any], state: Any, *, repeats: int, num: int, shortest: int = 0
) -> float:
  """Time per iteration of `run(state, num)`, which repeats a step `num` times.

  The difference of a long call and the short one before it, so that what happens once
  per call does not count. A call costs about 0.1 ms, give or take as much on a shared
  machine: a long call should take several milliseconds.

  Args:
    run: Jitted, with the state donated and the number traced; returns the next state.
    state: Start of each pair of calls.
    repeats: Pairs, after one that compiles.
    num: Iterations of a long call beyond those of a short one.
    shortest: Iterations of a short call.
  """
  short, long = jnp.int32(shortest), jnp.int32(shortest + num)
  times: list[tuple[float, float]] = []
  for _ in range(repeats + 1):
    before, fresh = _timed(run, _fresh(state), short)
    after, fresh = _timed(run, fresh, long)
    times.append((before, after))
  before, after = (min(column) for column in zip(*times[1:], strict=True))
  # Of few short steps the difference may be noise, and others divide by it.
  return max(after - before, 1e-9) / num


def steady_seconds(run: Callable[..., Any], *arguments: Any, repeats: int) -> float:
  """Best time of a call that keeps its arguments, dispatch included."""
  times = [_timed(run, *arguments)[0] for _ in range(repeats + 1)]
  return min(times[1:])


def _fresh(state: Any) -> Any:
  return jax.block_until_ready(copy(state))


def _timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
  """The result is handed back, since freeing it takes time as well."""
  jax.block_until_ready(arguments)
  start = time.perf_counter()
  result = jax.block_until_ready(run(*arguments))
  return time.perf_counter() - start, result
