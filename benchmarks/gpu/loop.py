"""Time on the device of one call: a compiled chain of calls, timed as a whole.

Dispatch does not count. A chain is a loop whose number of rounds is static, so the host
sends off all of it without reading anything back, and each round has calls one after
the other, which XLA records as one CUDA graph. The result of a call is an argument of
the next one, so none can be left out, moved or run beside another. What calls compute
from arguments that stay the same (lengths, say) is computed once, as it is in a scan
over the layers of a model. Each call of a round may have arguments of its own, such as
tables that name other blocks, so that a round goes over more memory than a cache holds.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

CACHE_BYTES = 256 << 20
"""A round goes over so much: four times the L2 cache of an H100 or H200."""
MAX_TURNS = 64
NUM_PAIRS = 5
Step = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
  """Calls that are timed.

  Attributes:
    step: `step(state, constants, turn) -> state`, one call.
    state: What a call hands to the next one. It is donated.
    constants: What all calls read.
    turns: What the calls of a round read, each its own. A round has as many calls.
    estimate: Seconds of a call, roughly; it sets the number of rounds.
  """

  step: Step
  state: Any
  constants: Any
  turns: Sequence[Any]
  estimate: float

  def num_rounds(self, seconds: float) -> int:
    """Rounds that take about so long."""
    wanted = seconds / (len(self.turns) * self.estimate)
    return max(2, min(20_000, round(wanted)))

  def program(self, num_rounds: int) -> Callable[[Any, Any, Any], Any]:
    """`run(state, constants, turns) -> state`, not compiled."""
    # Traced and lowered once, however often it is called.
    step = jax.jit(self.step)

    def run(state: Any, constants: Any, turns: Any) -> Any:
      def one_round(_: Any, state: Any) -> Any:
        for turn in turns:
          state = step(state, constants, turn)
        return state

      return lax.fori_loop(0, num_rounds, one_round, state)

    return run


class Timer:
  """Measures a chain, in steps that may be taken on different threads."""

  def __init__(self, chain: Chain, seconds: float):
    """Of chains that take about `seconds` each."""
    self.chain = chain
    self.target = seconds
    self.num_rounds = chain.num_rounds(seconds)
    # The chain's own state is not donated.
    self._state = jax.tree.map(jnp.copy, chain.state)
    self._arguments = (chain.constants, tuple(chain.turns))

  def lower(self) -> "Timer":
    """Traces and lowers; returns itself."""
    run = jax.jit(self.chain.program(self.num_rounds), donate_argnums=0)
    self._lowered = run.lower(self._state, *self._arguments)
    return self

  def compile(self) -> "Timer":
    """Compiles what was lowered; returns itself."""
    self._run = self._lowered.compile()
    return self

  def seconds(self) -> float:
    """Median time of one call.

    What a chain costs beside its calls is taken off: the difference between three
    chains sent off together and one is the time of two.
    """
    num_calls = self.num_rounds * len(self.chain.turns)
    self._timed(1)  # also records the graphs
    first = self._timed(1)
    if first > 20 * self.target + 0.1:  # much slower than thought: no repeats
      return first / num_calls
    pairs = [(self._timed(1), self._timed(3)) for _ in range(NUM_PAIRS)]
    median = statistics.median(long - short for short, long in pairs)
    return max(median, 1e-9) / (2 * num_calls)

  def _timed(self, num: int) -> float:
    """Time of so many chains, sent off together."""
    start = time.perf_counter()
    for _ in range(num):
      self._state = self._run(self._state, *self._arguments)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start


def begin_to_compile(
  lower: Callable[[], Callable[[], Any]], pool: Executor, *, waits: bool = False
) -> Callable[[], Any]:
  """Lowers here, and compiles in the pool.

  Args:
    lower: Lowers, and returns what compiles.
    pool: Compiles side by side.
    waits: Whether to return when it is compiled.

  Returns:
    What waits for the program, or raises what went wrong in either part.
  """
  try:
    compiled = pool.submit(lower())
  except Exception as problem:
    return functools.partial(_raise, problem)
  if waits:
    compiled.exception()
  return compiled.result


def _raise(problem: Exception) -> Any:
  raise problem


def call_seconds(chain: Chain, seconds: float) -> float:
  """Median time of one call, from chains that take about `seconds` each."""
  return Timer(chain, seconds).lower().compile().seconds()


def num_turns(num_bytes: int) -> int:
  """Calls of a round, each with memory of its own, that go over a cache's worth."""
  return max(1, min(MAX_TURNS, -(-CACHE_BYTES // max(num_bytes, 1))))


def copy_chain(num_elements: int) -> Chain:
  """Reads and writes an array."""
  x = jnp.zeros(num_elements, jnp.float32)
  return Chain(
    step=lambda x, _, __: x + 1.0,
    state=x,
    constants=(),
    turns=((),),
    estimate=2 * x.nbytes / 3e12,
  )


def matmul_chain(size: int) -> Chain:
  """Multiplies bfloat16 matrices of random numbers; zeros would be faster."""
  keys = jax.random.split(jax.random.key(0))
  make = functools.partial(jax.random.normal, shape=(size, size), dtype=jnp.bfloat16)
  return Chain(
    step=lambda x, w, _: x @ w,
    state=make(keys[0]),
    constants=make(keys[1]) * jnp.bfloat16(size**-0.5),
    turns=((),) * 4,
    estimate=2 * size**3 / 600e12,
  )
