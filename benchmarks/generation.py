"""Tokens per second of the demo model, and the share of a step outside of the model."""

import functools
import time

import jax
from jax import Array, lax
import jax.numpy as jnp

from benchmarks.report import Report
import kvcache as kv
from kvcache import sampling
from kvcache.context import Context
from kvcache.serve import Model

PROMPT_LEN, NEW_TOKENS = 64, 64


def measure(report: Report) -> None:
  """Serves 1, 4 and 16 prompts at a time."""
  from kvcache.models import load
  from kvcache.nn import as_function

  loaded = load()
  model = as_function(loaded.model)
  for num in (1, 4, 16):
    config = kv.CacheConfig(
      layers=loaded.config.cache_layers(),
      num_blocks=num * 16 + 1,
      max_seqs=num,
      max_seq_len=256,
    )
    prompts = jax.random.randint(jax.random.key(0), (num, PROMPT_LEN), 100, 40_000)
    requests = kv.make_requests(prompts.tolist(), max_new_tokens=NEW_TOKENS + 1)
    runs = serve_seconds(model, config, requests, repeats=3)
    prefill, decode = map(min, zip(*runs, strict=True))
    alone = model_seconds(model, config)
    setting = f"{num} prompts of {PROMPT_LEN}"
    per_step = decode / NEW_TOKENS
    report.add("generation", setting, num * NEW_TOKENS / decode, "tokens/s")
    report.add("prompts", setting, num * PROMPT_LEN / prefill, "tokens/s")
    report.add("decode step", setting, per_step * 1e3, "ms")
    report.add("decode step, model alone", setting, alone * 1e3, "ms")
    outside = max(0.0, 100 * (per_step - alone) / per_step)
    report.add("share outside of the model", setting, outside, "%")


def serve_seconds(
  model: Model, config: kv.CacheConfig, requests: kv.Requests, *, repeats: int
) -> list[tuple[float, float]]:
  """Seconds of the prompts, and of the decode steps after them, of each run."""
  serve = jax.jit(
    functools.partial(kv.serve, sampler=sampling.greedy), donate_argnums=(1, 2)
  )
  num_tokens = requests.num_requests * PROMPT_LEN
  num_mixed = -(-num_tokens // kv.SchedulerConfig().token_budget)
  seconds = []
  for _ in range(repeats + 1):
    state = kv.init(config), jax.tree.map(jnp.copy, requests)
    jax.block_until_ready(state)
    start = time.perf_counter()
    state = serve(model, *state, max_steps=jnp.int32(num_mixed))
    jax.block_until_ready(state)
    middle = time.perf_counter()
    _, served = serve(model, *state, max_steps=jnp.int32(10**6))
    jax.block_until_ready(served)
    seconds.append((middle - start, time.perf_counter() - middle))
    assert (served.lengths == PROMPT_LEN + NEW_TOKENS + 1).all()
  return seconds[1:]  # The first one compiled.


def model_seconds(model: Model, config: kv.CacheConfig) -> float:
  """Seconds of one decode step of the model alone, at the mean length of a run."""
  steps = 16
  ctx = kv.init(config)
  length = PROMPT_LEN + NEW_TOKENS // 2
  prompts = jnp.ones((config.max_seqs, length), jnp.int32)
  prompts += jnp.arange(config.max_seqs, dtype=jnp.int32)[:, None]
  lengths = jnp.full(config.max_seqs, length)
  ctx, _ = jax.jit(kv.admit)(ctx, prompts, lengths)
  total = config.max_seqs * length
  ctx, _ = jax.jit(kv.extend, static_argnames="num_tokens")(
    ctx, lengths, num_tokens=total
  )
  table = ctx.sequences.replace(seq_lens=lengths - 1)
  ctx = ctx.replace(sequences=table)

  @functools.partial(jax.jit, donate_argnums=1)
  def loop(model: Model, ctx: Context) -> tuple[Context, Array]:
    ones = jnp.ones(config.max_seqs, jnp.int32)
    metadata = kv.step_metadata(ctx, ones)

    def body(_: Array, state: tuple[Context, Array]) -> tuple[Context, Array]:
      ctx, tokens = state
      logits, ctx = model(tokens, metadata, ctx)
      return ctx, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.fori_loop(0, steps, body, (ctx, ones))

  best = float("inf")
  for _ in range(4):
    start = time.perf_counter()
    ctx, _ = jax.block_until_ready(loop(model, ctx))
    best = min(best, time.perf_counter() - start)
  return best / steps
