"""The programs whose memory and traces are tested: every verb, a step, and the loop.

Each is `program(ctx, *arguments) -> ctx` or `(ctx, ...)`, so that all are jitted alike.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

import kvcache
from kvcache import CacheConfig, Context, Requests, SchedulerConfig, StepMetadata

VOCAB = 32
MODEL_SCOPE = "layered_model"
"""Named scope of the model: tells its instructions from the loop's around it."""


def layered_model(
  tokens: Array, metadata: StepMetadata, ctx: Context
) -> tuple[Array, Context]:
  """Writes and reads the cache in each layer, with K/V as the carry of a scan."""
  config = ctx.config
  with jax.named_scope(MODEL_SCOPE):
    spec = config.attention_layers[0]
    shape = (metadata.num_tokens, spec.num_kv_heads, spec.head_dim)
    angle = (tokens + metadata.positions).astype(jnp.float32) * 0.1
    lane = jnp.arange(spec.head_dim, dtype=jnp.float32) + 1.0
    x = jnp.broadcast_to(jnp.sin(angle[:, None] * lane[None])[:, None], shape)

    def layer(carry, index):
      x, ctx = carry
      if config.num_recurrent_layers:
        state = kvcache.read_state(ctx, index, metadata)
        state = jax.tree.map(lambda x: 0.5 * x + 1.0, state)
        if metadata.num_logits > 1:
          each = (metadata.num_logits,)
          state = {
            name: jnp.broadcast_to(x[:, None], (*x.shape[:1], *each, *x.shape[1:]))
            for name, x in state.items()
          }
        ctx = kvcache.write_state(ctx, index, state, metadata)
      ctx = kvcache.write_kv(ctx, index, x, 0.5 * x, metadata)
      return (x + kvcache.attend(ctx, index, x, metadata), ctx), None

    if len(config.groups) == 1:
      indices = jnp.arange(config.num_layers, dtype=jnp.int32)
      (x, ctx), _ = jax.lax.scan(layer, (x, ctx), indices)
    else:  # which group a layer is in must be known
      for index in range(config.num_layers):
        (x, ctx), _ = layer((x, ctx), index)
    hidden = x.reshape(x.shape[0], -1)[metadata.logits_indices]
    mix = jnp.cos(jnp.arange(hidden.shape[1] * VOCAB, dtype=jnp.float32))
    return hidden @ mix.reshape(-1, VOCAB), ctx


def decode_step(ctx: Context, query_lens: Array, tokens: Array) -> Context:
  """The bookkeeping of one decode step."""
  ctx, _ = kvcache.extend(ctx, query_lens)
  metadata = kvcache.step_metadata(ctx, query_lens)
  return kvcache.commit(ctx, tokens, metadata)


def mixed_step(
  ctx: Context, query_lens: Array, order: Array, tokens: Array
) -> tuple[Context, Array]:
  """The bookkeeping of one mixed step, and its positions."""
  size = tokens.shape[0]
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=size, order=order)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=size)
  accepted = None if ctx.config.num_recurrent_layers else query_lens
  ctx = kvcache.commit(ctx, tokens, metadata, accepted=accepted)
  return ctx, metadata.positions


def write_all(ctx: Context, query_lens: Array, k: Array) -> Context:
  """Writes keys and values to every layer, by a loop."""
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=k.shape[0])

  def write(layer: Array, ctx: Context) -> Context:
    return kvcache.write_kv(ctx, layer, k, k, metadata, group=0)

  num_layers = ctx.config.groups[0].num_layers
  return jax.lax.fori_loop(0, num_layers, write, ctx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A function of a context, and the shapes of its other arguments."""

  run: Callable[..., Any]
  arguments: tuple[jax.ShapeDtypeStruct, ...]


def verbs(config: CacheConfig, *, num_tokens: int = 32) -> dict[str, Program]:
  """Every verb that changes a context, by name."""
  S, A = config.max_seqs, 4

  def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  mask = jax.ShapeDtypeStruct((S,), jnp.bool_)
  spec = config.attention_layers[0]
  keys = (num_tokens, spec.num_kv_heads, spec.head_dim)
  k = jax.ShapeDtypeStruct(keys, config.dtype)
  abandon = functools.partial(kvcache.finish, keep_prefix=False)
  shapes = {
    "admit": (kvcache.admit, ints(A, config.max_seq_len), ints(A)),
    "fork": (kvcache.fork, ints(A)),
    "rewind": (kvcache.rewind, ints(S)),
    "finish": (kvcache.finish, mask),
    "abandon": (abandon, mask),
    "reset": (kvcache.reset,),
    "reset_keep": (functools.partial(kvcache.reset, keep_prefix=True),),
    "publish": (kvcache.publish,),
    "evict": (kvcache.evict, ints()),
    "decode_step": (decode_step, ints(S), ints(S)),
    "mixed_step": (mixed_step, ints(S), ints(S), ints(num_tokens)),
    "write_all": (write_all, ints(S), k),
  }
  if config.num_recurrent_layers:
    shapes["evict_snapshots"] = (kvcache.evict_snapshots, ints())
  if config.windows:
    counts = ints(len(config.windows))
    shapes["evict_window_blocks"] = (kvcache.evict_window_blocks, counts)
  return {
    name: Program(run=run, arguments=arguments)
    for name, (run, *arguments) in shapes.items()
  }


def step(
  ctx: Context, requests: Requests, *, scheduler: SchedulerConfig
) -> tuple[Context, Requests]:
  """One step of the loop over the model."""
  return kvcache.step(layered_model, ctx, requests, scheduler)


def serve(
  ctx: Context,
  requests: Requests,
  max_steps: Array | None = None,
  *,
  scheduler: SchedulerConfig,
) -> tuple[Context, Requests]:
  """The loop over the model."""
  return kvcache.serve(
    layered_model, ctx, requests, scheduler=scheduler, max_steps=max_steps
  )
