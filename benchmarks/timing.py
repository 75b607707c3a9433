"""Timing of compiled programs that consume their arguments.

The best of many repeats is reported: what a shared machine adds is never negative. Each
repeat gets a fresh copy of the state, made before the clock starts.
"""

from collections.abc import Callable
import statistics
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
  times = []
  for _ in range(repeats + 1):
    fresh = jax.block_until_ready(copy(state))
    start = time.perf_counter()
    jax.block_until_ready(run(fresh, *arguments))
    times.append(time.perf_counter() - start)
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
    fresh = jax.block_until_ready(run(copy(state), *arguments))
    for _ in range(length - 1):
      start = time.perf_counter()
      fresh = jax.block_until_ready(run(fresh, *arguments))
      times.append(time.perf_counter() - start)
  return min(times)


def step_seconds(
  run: Callable[..., Any],
  state: Any,
  *,
  repeats: int,
  length: int,
  start: int = 0,
) -> float:
  """Time per iteration of `run(state, num)`, which repeats a step `num` times.

  The difference of two calls, so that what happens once per call does not count.

  Args:
    run: Jitted, with the state donated and the number traced.
    state: Copied for each call.
    repeats: Timed pairs of calls.
    length: Iterations of the longer call.
    start: Iterations of the shorter one.
  """
  counts = [jnp.int32(start), jnp.int32(length)]
  times: list[list[float]] = [[], []]
  for _ in range(repeats + 1):
    for num, seconds in zip(counts, times, strict=True):
      fresh = jax.block_until_ready(copy(state))
      begin = time.perf_counter()
      jax.block_until_ready(run(fresh, num))
      seconds.append(time.perf_counter() - begin)
  short, long = (min(seconds[1:]) for seconds in times)
  return max(long - short, 0.0) / (length - start)


def median_seconds(run: Callable[[], Any], *, repeats: int) -> float:
  """Median time of `run()`, which waits for its results itself."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return statistics.median(times)
