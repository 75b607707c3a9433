"""Decode steps of the whole loop on a GPU, with a model of 8B.

What of a step is outside of the model is the same step over a model that does nothing
but hand out logits: the loop, bookkeeping, and sampling from a whole vocabulary.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import statistics
import time
from typing import Any
from unittest import mock

import jax
from jax import Array
import jax.numpy as jnp
from jax.tree_util import Partial

from benchmarks.gpu_rows import failed, Row, Run
from benchmarks.gpu_scene import (
  abstract,
  fill,
  llama,
  no_model,
  noise,
  Scene,
  shapes,
  with_weights,
)
from kvcache import attention as attention_module
from kvcache import AttentionLayer, Context, Requests
from kvcache.models.llama import LlamaConfig
from kvcache.nn import attention as layer_module

_WARM_UP = 3
_PAIRS = 3
_SHORT = 2


@contextlib.contextmanager
def implementation(by: str | None) -> Iterator[None]:
  """Layers that are traced within use it for decode steps; None as by default."""

  def attend(
    ctx: Context, layer: Any, q: Array, metadata: Any, **options: Any
  ) -> Array:
    name = by if metadata.is_decode else None
    return attention_module.attend(
      ctx, layer, q, metadata, implementation=name, **options
    )

  with mock.patch.object(layer_module, "attend", attend):
    yield


class Loop:
  """`serve` over a model, lowered, compiled and timed."""

  def __init__(self, scene: Scene, model: Partial, by: str | None):
    """Lowers, for shapes or arrays of a model."""
    with implementation(by):
      self._lowered = scene.program(scene.num_rows).lower(*shapes(scene, model))

  def compile(self) -> "Loop":
    """Compiles; returns itself."""
    self._run = self._lowered.compile()
    return self

  def step_seconds(
    self, state: tuple[Context, Requests], model: Partial, num: int
  ) -> float:
    """Median time of a decode step; takes over the state.

    Each call goes on from where the last one stopped, and the difference between long
    and short ones counts.
    """

    def timed(num: int) -> float:
      nonlocal state
      start = time.perf_counter()
      state = self._run(state, jnp.int32(num), model)
      jax.block_until_ready(state)
      return time.perf_counter() - start

    before = int(state[1].num_steps)
    timed(_WARM_UP)
    pairs = [(timed(_SHORT), timed(_SHORT + num)) for _ in range(_PAIRS)]
    done = int(state[1].num_steps) - before
    if done != num_steps(num):
      raise RuntimeError(f"the loop made {done} steps instead of {num_steps(num)}")
    return max(statistics.median(b - a for a, b in pairs), 1e-9) / num


def num_steps(num: int) -> int:
  """Steps of one measurement, with `num` in the longer part of a pair."""
  return _WARM_UP + _PAIRS * (2 * _SHORT + num)


def make_scenes(run: Run, model: LlamaConfig) -> list[Scene]:
  """What is timed with a model."""
  return [
    Scene(
      layers=model.cache_layers(),
      dtype=jnp.dtype(model.dtype).name,
      vocab_size=model.vocab_size,
      num_rows=num_rows,
      context=context,
      num_new=num_steps(run.sizes.steps) + 8,
    )
    for num_rows, context in run.sizes.serve
  ]


def time_serve(run: Run) -> Iterator[Row]:
  """Times decode steps of `serve`, layers scanned and then each on its own."""
  outside: dict[Scene, float] = {}
  for scan_layers in run.sizes.scans:
    model = llama(run, scan_layers=scan_layers)
    # Separate layers take long to compile: once is enough.
    names = run.implementations if scan_layers else run.implementations[:1]
    candidates = [(scene, by) for scene in make_scenes(run, model) for by in names]
    loops = _begin_loops(candidates, abstract(model), run)
    for scene in make_scenes(run, model):
      if scene not in outside:
        row, outside[scene] = _time_outside(scene, run)
        yield row
    try:
      function = with_weights(abstract(model))
    except Exception as problem:  # of memory
      yield failed("serve", "weights", "", problem)
      continue
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(function))
    for scene, by, loop in loops:
      name = f"{by}, {'scanned' if scan_layers else 'separate'} layers"
      try:
        seconds = loop().step_seconds(fill(scene), function, run.sizes.steps)
        rate = (num_bytes + scene.kv_bytes) / seconds / 1e9
        rest = outside[scene]
        yield Row(
          section="serve",
          what=f"{scene.name}: step",
          by=name,
          microseconds=seconds * 1e6,
          rate=rate,
          share=run.share_of("copy", rate),
          num_bytes=num_bytes + scene.kv_bytes,
        )
        yield Row(
          section="serve",
          what=f"{scene.name}: outside the model",
          by=name,
          microseconds=rest * 1e6,
          share=rest / seconds,
        )
      except Exception as problem:
        yield failed("serve", f"{scene.name}: step", name, problem)
    del function


def _begin_loops(
  candidates: list[tuple[Scene, str]], model: Partial, run: Run
) -> list[tuple[Scene, str, Callable[[], Loop]]]:
  """The loops, compiled side by side; one may raise when asked for."""
  with ThreadPoolExecutor() as pool:
    begun = []
    for scene, by in candidates:
      try:
        loop = Loop(scene, model, None if run.interpret else by)
        begun.append((scene, by, pool.submit(loop.compile).result))
      except Exception as problem:
        begun.append((scene, by, functools.partial(_raise, problem)))
  return begun


def _raise(problem: Exception) -> Any:
  raise problem


def _time_outside(scene: Scene, run: Run) -> tuple[Row, float]:
  """Times a step over a model that does nothing, and keeps next to nothing."""
  layers = (AttentionLayer(num_kv_heads=1, head_dim=1),)
  small = dataclasses.replace(scene, layers=layers, dtype="float32")
  what = f"{scene.name}: step"
  try:
    logits = noise((scene.num_rows + 8, scene.vocab_size), jnp.float32, 3)
    model = Partial(no_model, logits=logits)
    loop = Loop(small, model, None).compile()
    seconds = loop.step_seconds(fill(small), model, run.sizes.steps)
  except Exception as problem:
    return failed("serve", what, "no model", problem), float("nan")
  row = Row(section="serve", what=what, by="no model", microseconds=seconds * 1e6)
  return row, seconds
