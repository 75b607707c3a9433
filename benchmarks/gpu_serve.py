"""Decode steps of the whole loop on a GPU: with a model of 8B, and without one.

The model is shaped like Llama 3 8B and has random weights. What a step costs outside of
the model is the same step over a model that does nothing but hand out logits: the loop,
bookkeeping, and sampling from a whole vocabulary.
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

from flax import nnx
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from benchmarks import bookkeeping, scenes
from benchmarks.gpu_rows import failed, Row, Run
import kvcache
from kvcache import AttentionLayer, CacheConfig, Context, Requests, SchedulerConfig
from kvcache import attention as attention_module
from kvcache.models.llama import Llama, LlamaConfig
from kvcache.nn import as_function
from kvcache.nn import attention as layer_module

_WARM_UP = 3
_PAIRS = 3
_SHORT = 2
_FILL_TOKENS = 8192
WITH_WHILE = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
"""What XLA may record into a CUDA graph: its defaults, and loops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
  """A batch of rows that decode.

  Attributes:
    layers: What is kept per token.
    dtype: Of keys and values.
    vocab_size: Of the logits.
    num_rows: `S`.
    context: Tokens of each row.
    num_new: Tokens that each row may still decode.
    block_size: Tokens per block.
  """

  layers: tuple[AttentionLayer, ...]
  dtype: str
  vocab_size: int
  num_rows: int
  context: int
  num_new: int
  block_size: int = 64

  @property
  def name(self) -> str:
    """For the table."""
    return f"{self.num_rows} rows of {self.context} tokens"

  @property
  def config(self) -> CacheConfig:
    """A cache with room for all rows."""
    per_row = -(-(self.context + self.num_new) // self.block_size)
    return CacheConfig(
      layers=self.layers,
      num_blocks=1 + self.num_rows * (per_row + 1),
      block_size=self.block_size,
      max_seqs=self.num_rows,
      max_seq_len=(per_row + 1) * self.block_size,
      dtype=self.dtype,
    )

  @property
  def kv_bytes(self) -> int:
    """Of the keys and values that a step reads."""
    config = self.config
    per_token = config.num_bytes / (config.num_blocks * self.block_size)
    return round(self.num_rows * self.context * per_token)

  def program(self, token_budget: int) -> Callable[..., Any]:
    """`run((ctx, requests), max_steps, model)`; all requests are admitted at once."""
    scheduler = SchedulerConfig(
      token_budget=token_budget, max_admissions=self.num_rows, defer_shared=False
    )
    return bookkeeping.serve_program(scheduler)

  def requests(self) -> Requests:
    """No two prompts begin alike, so none shares blocks."""
    rng = np.random.default_rng(0)
    shape = (self.num_rows, self.context)
    prompts = rng.integers(self.vocab_size, size=shape).tolist()
    return kvcache.make_requests(prompts, max_new_tokens=self.num_new)


def llama(run: Run, *, scan_layers: bool) -> LlamaConfig:
  """The shape of Llama 3 8B, or of something tiny."""
  hidden, layers, vocab = run.sizes.model
  head_dim = min(128, hidden // 2)
  return LlamaConfig(
    vocab_size=vocab,
    hidden_size=hidden,
    intermediate_size=hidden * 7 // 2,
    num_layers=layers,
    num_heads=hidden // head_dim,
    num_kv_heads=max(1, hidden // head_dim // 4),
    head_dim=head_dim,
    dtype=jnp.float32 if run.interpret else jnp.bfloat16,
    scan_layers=scan_layers,
  )


def abstract(model: LlamaConfig) -> Partial:
  """The model as a function whose arrays are shapes."""
  return as_function(nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0))))


def with_weights(function: Partial) -> Partial:
  """The function with random weights, of about the size that training leaves."""
  arrays, structure = jax.tree.flatten(function)
  made = [_noise(x.shape, x.dtype, i) for i, x in enumerate(arrays)]
  return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
  """Numbers in +-0.03 by a hash of their place, made without temporary memory."""
  value = jnp.full(shape, seed + 1, jnp.uint32)
  for axis in range(len(shape)):
    place = lax.broadcasted_iota(jnp.uint32, shape, axis)
    value = (value ^ place) * jnp.uint32(0x9E3779B1)
    value = value ^ (value >> 15)
  unit = (value >> 8).astype(jnp.float32) / (1 << 24)
  return ((unit - 0.5) * 0.06).astype(dtype)


def no_model(tokens: Array, metadata: Any, ctx: Context, *, logits: Array) -> Any:
  """Hands out `[S, vocab]` of `logits [S + 8, vocab]`, other ones each step."""
  num_rows = ctx.config.max_seqs
  start = tokens[metadata.logits_indices[0]] % 8
  return lax.dynamic_slice_in_dim(logits, start, num_rows), ctx


def fill(scene: Scene) -> tuple[Context, Requests]:
  """All rows live and decoding, over keys and values that are noise."""
  num_tokens = scene.num_rows * scene.context
  budget = max(scene.num_rows, min(_FILL_TOKENS, num_tokens))
  model = Partial(no_model, logits=jnp.zeros((scene.num_rows + 8, 8), jnp.float32))
  state = (jax.jit(kvcache.init, static_argnums=0)(scene.config), scene.requests())
  max_steps = jnp.int32(-(-num_tokens // budget) + 1)
  ctx, requests = scene.program(budget)(state, max_steps, model)
  if int(ctx.sequences.seq_lens.min()) < scene.context:
    raise RuntimeError(f"not all rows decode: {ctx.sequences.seq_lens}")
  return ctx.replace(kv=tuple(map(_with_noise, ctx.kv))), requests


def _with_noise(store: Any) -> Any:
  """The old pools go first: there is no room for both."""
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (store.k, store.v))
  for pool in (store.k, store.v):
    pool.delete()
  (k, v) = shapes
  return store.replace(k=_noise(*k, 7), v=_noise(*v, 8))


@contextlib.contextmanager
def implementation(by: str | None) -> Iterator[None]:
  """Layers that are traced within use it for decode steps; None as by default."""

  def attend(ctx: Context, layer: Any, q: Array, metadata: Any, **options: Any) -> Array:
    name = by if metadata.is_decode else None
    return attention_module.attend(
      ctx, layer, q, metadata, implementation=name, **options
    )

  with mock.patch.object(layer_module, "attend", attend):
    yield


def shapes(scene: Scene, model: Partial) -> tuple[Any, ...]:
  """Shapes of the arguments of `scene.program(...)`."""
  ctx = jax.eval_shape(functools.partial(kvcache.init, scene.config))
  state = (ctx, jax.eval_shape(scene.requests))
  return jax.eval_shape(lambda *x: x, state, jnp.int32(0), model)


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
    logits = _noise((scene.num_rows + 8, scene.vocab_size), jnp.float32, 3)
    model = Partial(no_model, logits=logits)
    loop = Loop(small, model, None).compile()
    seconds = loop.step_seconds(fill(small), model, run.sizes.steps)
  except Exception as problem:
    return failed("serve", what, "no model", problem), float("nan")
  row = Row(section="serve", what=what, by="no model", microseconds=seconds * 1e6)
  return row, seconds


def time_bookkeeping(run: Run) -> Iterator[Row]:
  """Times what a decode step costs beside a model, with and without loops recorded."""
  what = f"decode step, {run.sizes.rows} rows"
  config = scenes.make_config(run.sizes.rows, max(64, 16 * run.sizes.rows), 64)
  repeats = 1 if run.interpret else 8
  by = "serve, no model"
  try:
    seconds = bookkeeping.serve_seconds(config, repeats=repeats)
    yield Row(section="bookkeeping", what=what, by=by, microseconds=seconds * 1e6)
  except Exception as problem:
    yield failed("bookkeeping", what, by, problem)
  by = "serve, no model, loops recorded"
  try:
    if run.interpret:
      raise NotImplementedError("loops are recorded on a GPU alone")
    options = {"xla_gpu_enable_command_buffer": WITH_WHILE}
    seconds = bookkeeping.serve_seconds(
      config, repeats=repeats, compiler_options=options
    )
    yield Row(section="bookkeeping", what=what, by=by, microseconds=seconds * 1e6)
  except Exception as problem:
    yield failed("bookkeeping", what, by, problem, is_bad=False)
  by = "extend, metadata, commit"
  try:
    ctx, length = scenes.decoding(config)
    seconds = bookkeeping.round_seconds(
      bookkeeping.decode_step,
      ctx,
      repeats=repeats,
      length=min(length, run.sizes.steps),
      restart=bookkeeping.restart,
    )
    yield Row(section="bookkeeping", what=what, by=by, microseconds=seconds * 1e6)
  except Exception as problem:
    yield failed("bookkeeping", what, by, problem)
