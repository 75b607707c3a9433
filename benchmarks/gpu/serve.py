"""Decode steps of the whole loop on a GPU, with a model of 8B.

What of a step is outside of the model is the same step over a model that does nothing
but hand out logits: the loop, bookkeeping, and sampling from a whole vocabulary.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import math
import statistics
import time
from typing import Any
from unittest import mock

import jax
from jax import Array
import jax.numpy as jnp
from jax.tree_util import Partial

from benchmarks.gpu.loop import begin_to_compile
from benchmarks.gpu.rows import failed, Row, Run
from benchmarks.gpu.scene import (
  abstract,
  fill,
  llama,
  no_model,
  noise,
  Scene,
  shapes,
  with_weights,
)
from kvcache import Context, Requests
from kvcache.models.llama import LlamaConfig
from kvcache.nn import attention as layer_module
from kvcache.verbs import attention as attention_module

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
      self._lowered = scene.program().lower(*shapes(scene, model))

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
  """Times decode steps of `serve`, each layer on its own and then scanned."""
  for scan_layers in run.sizes.scans:
    model = llama(run, scan_layers=scan_layers)
    scenes = make_scenes(run, model)
    # Separate layers take long to compile: once is enough.
    names = run.implementations if scan_layers else run.implementations[:1]
    pairs = [
      (scene, by)
      for scene in scenes
      for by in names
      if run.wants("serve", f"{scene.name}: step", _label(by, scan_layers))
    ]
    if not pairs:
      continue
    bare = [
      scene for scene in scenes if run.wants("serve", f"{scene.name}: step", "no model")
    ]
    wanted = [(scene.without_layers(), None, _no_model(scene, None)) for scene in bare]
    wanted += [(scene, by, abstract(model)) for scene, by in pairs]
    loops = _begin_loops(wanted, run)
    for scene in bare:
      run.begin("serve", f"{scene.name}: step", "no model", seconds=60.0)
      yield _time_outside(scene, loops.pop(0), run)
    try:
      function = with_weights(abstract(model))
    except Exception as problem:  # of memory
      yield failed("serve", "weights", "", problem)
      continue
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(function))
    for (scene, by), loop in zip(pairs, loops, strict=True):
      name = _label(by, scan_layers)
      read = num_bytes + scene.kv_bytes
      try:
        run.begin("serve", f"{scene.name}: step", name, seconds=60.0)
        seconds = loop().step_seconds(fill(scene), function, run.sizes.steps)
      except Exception as problem:
        yield failed("serve", f"{scene.name}: step", name, problem)
        continue
      yield Row(
        section="serve",
        what=f"{scene.name}: step",
        by=name,
        microseconds=seconds * 1e6,
        rate=read / seconds / 1e9,
        share=run.share_of("copy", read / seconds / 1e9),
        num_bytes=read,
      )
      rest = _seconds_outside(scene, run)
      yield Row(
        section="serve",
        what=f"{scene.name}: outside the model",
        by=name,
        microseconds=rest * 1e6,
        share=rest / seconds,
      )
    del function


def _seconds_outside(scene: Scene, run: Run) -> float:
  key = ("serve", f"{scene.name}: step", "no model")
  times = [row.microseconds for row in run.rows if row.key == key]
  return (times[0] if times and times[0] else math.nan) / 1e6


def _label(by: str, scan_layers: bool) -> str:
  return f"{by}, {'scanned' if scan_layers else 'separate'} layers"


def _begin_loops(
  wanted: list[tuple[Scene, str | None, Partial]], run: Run
) -> list[Callable[[], Loop]]:
  """The loops, compiled side by side; one may raise when asked for."""

  def lower(scene: Scene, by: str | None, model: Partial) -> Any:
    return Loop(scene, model, None if run.interpret else by).compile

  with ThreadPoolExecutor() as pool:
    return [begin_to_compile(functools.partial(lower, *x), pool) for x in wanted]


def _no_model(scene: Scene, logits: Array | None) -> Partial:
  """A model that does nothing, for logits or their shape."""
  shape = (scene.num_rows + 8, scene.vocab_size)
  logits = jax.ShapeDtypeStruct(shape, jnp.float32) if logits is None else logits
  return Partial(no_model, logits=logits)


def _time_outside(scene: Scene, loop: Callable[[], Loop], run: Run) -> Row:
  """Times a step over a model that does nothing, and keeps next to nothing."""
  what = f"{scene.name}: step"
  try:
    logits = noise((scene.num_rows + 8, scene.vocab_size), jnp.float32, 3)
    state, model = fill(scene.without_layers()), _no_model(scene, logits)
    seconds = loop().step_seconds(state, model, run.sizes.steps)
    return Row(section="serve", what=what, by="no model", microseconds=seconds * 1e6)
  except Exception as problem:
    return failed("serve", what, "no model", problem)
