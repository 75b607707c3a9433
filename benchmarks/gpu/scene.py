"""Batches of rows that decode with a model of 8B on a GPU, and that model.

It is shaped like Llama 3 8B and has random weights; keys and values are noise. Filling
them in takes a scheduler and no model: a model that does nothing hands out logits.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from benchmarks import bookkeeping
from benchmarks.gpu.rows import Run
import kvcache
from kvcache import AttentionLayer, CacheConfig, Context, Requests, SchedulerConfig
from kvcache.models.llama import Llama, LlamaConfig
from kvcache.nn import as_function

_FILL_TOKENS = 8192


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

  def program(self) -> Callable[..., Any]:
    """A fresh `run((ctx, requests), max_steps, model)`, jitted."""
    return _program(self.num_rows, self.num_rows)

  def without_layers(self) -> "Scene":
    """The same rows, of which next to nothing is kept."""
    layers = (AttentionLayer(num_kv_heads=1, head_dim=1),)
    return dataclasses.replace(self, layers=layers, dtype="float32")

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
  made = [noise(x.shape, x.dtype, i) for i, x in enumerate(arrays)]
  return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def noise(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
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
  logits = lax.dynamic_slice_in_dim(logits, start, num_rows)
  return logits, bookkeeping.as_written(ctx)


def fill(scene: Scene) -> tuple[Context, Requests]:
  """All rows live and decoding, over keys and values that are noise."""
  bare = scene.without_layers()
  num_tokens = scene.num_rows * scene.context
  budget = max(scene.num_rows, min(_FILL_TOKENS, num_tokens))
  model = Partial(no_model, logits=jnp.zeros((scene.num_rows + 8, 8), jnp.float32))
  state = (jax.jit(kvcache.init, static_argnums=0)(bare.config), bare.requests())
  max_steps = jnp.int32(-(-num_tokens // budget) + 1)
  ctx, requests = _filler(scene.num_rows, budget)(state, max_steps, model)
  if int(ctx.sequences.seq_lens.min()) < scene.context:
    raise RuntimeError(f"not all rows decode: {ctx.sequences.seq_lens}")
  # The bookkeeping is that of any layers.
  wanted, _ = shapes(scene, model)[0]
  kv = jax.tree.map(lambda x: noise(x.shape, x.dtype, 7), wanted.kv)
  return ctx.replace(kv=kv, config=wanted.config), requests


@functools.cache
def _filler(num_rows: int, token_budget: int) -> Callable[..., Any]:
  """Kept, so that it is compiled once for each shape."""
  return _program(num_rows, token_budget)


def _program(num_rows: int, token_budget: int) -> Callable[..., Any]:
  scheduler = SchedulerConfig(
    token_budget=token_budget, max_admissions=num_rows, defer_shared=False
  )
  return bookkeeping.serve_program(scheduler)


def shapes(scene: Scene, model: Partial) -> tuple[Any, ...]:
  """Shapes of the arguments of `scene.program()`."""
  ctx = jax.eval_shape(functools.partial(kvcache.init, scene.config))
  state = (ctx, jax.eval_shape(scene.requests))
  return jax.eval_shape(lambda *x: x, state, jnp.int32(0), model)
