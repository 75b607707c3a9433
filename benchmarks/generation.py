"""Tokens per second with a real model, and what of a step is not the model's."""

from collections.abc import Iterator
import functools

import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from benchmarks import bookkeeping, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import CacheConfig, Context, models, nn, SchedulerConfig, StepMetadata

TITLE = "Generation with SmolLM2-135M, float32"
CONCURRENCY = (1, 4, 16)
QUICK_CONCURRENCY = (4,)
PROMPT_LEN, NUM_NEW, MAX_LEN = 64, 64, 256
NUM_TIMED = 16
SCHEDULER = SchedulerConfig(token_budget=128, max_admissions=16)


class NoModelError(RuntimeError):
  """The model is not installed."""


def load() -> models.Loaded:
  """The demo model."""
  try:
    return models.load(None)
  except models.LoadError as error:
    raise NoModelError(str(error)) from error


@functools.partial(jax.jit, donate_argnums=0)
def model_only(state: tuple, num: Array, model: jax.tree_util.Partial) -> tuple:
  """The model's own work of `num` decode steps, all at the same positions."""

  def body(_, state: tuple) -> tuple:
    ctx, tokens, metadata = state
    logits, ctx = lax.optimization_barrier(model(tokens, metadata, ctx))
    # The next tokens depend on the logits, or the steps would be left out.
    return ctx, jnp.where(logits[:, 0] > 1e9, 0, tokens), metadata

  return lax.fori_loop(0, num, body, state)


@functools.partial(jax.jit, donate_argnums=0)
def next_step(ctx: Context) -> tuple[Context, Array, StepMetadata]:
  """The arguments of a model in the next decode step; any tokens will do."""
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)
  ctx, _ = kvcache.extend(ctx, ones)
  metadata = kvcache.step_metadata(ctx, ones)
  return ctx, metadata.positions, metadata


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  loaded = load()
  model = nn.as_function(loaded.model)
  repeats = 4 if is_quick else 8
  for S in QUICK_CONCURRENCY if is_quick else CONCURRENCY:
    yield from _measure_one(loaded, model, S, repeats)


def _measure_one(
  loaded: models.Loaded, model: jax.tree_util.Partial, S: int, repeats: int
) -> Iterator[Row]:
  config = CacheConfig(
    layers=loaded.config.cache_layers(),
    num_blocks=1 + S * MAX_LEN // 16,
    max_seqs=S,
    max_seq_len=MAX_LEN,
  )
  row = functools.partial(Row, section=TITLE, repeats=repeats, sizes=f"{S} prompts")
  rng = np.random.default_rng(S)
  prompts = rng.integers(100, loaded.config.vocab_size, size=(S, PROMPT_LEN)).tolist()

  def rate() -> float:
    """Tokens per second of all requests together; the time includes the prompts."""
    slices = []
    _, completions = kvcache.generate(
      model,
      kvcache.init(config),
      prompts,
      max_new_tokens=NUM_NEW,
      scheduler=SCHEDULER,
      slice_steps=1000,
      on_slice=slices.append,
    )
    num_tokens = sum(len(completion.tokens) for completion in completions)
    return num_tokens / slices[-1].seconds

  rate()  # Compiles.
  what = f"generate {NUM_NEW} tokens each from prompts of {PROMPT_LEN}"
  yield row(what=what, value=max(rate() for _ in range(repeats)), unit="tokens/s")

  num_prefill = 3 + S * PROMPT_LEN // (SCHEDULER.token_budget - S)
  requests = kvcache.make_requests(prompts, max_new_tokens=MAX_LEN - PROMPT_LEN)
  run = functools.partial(bookkeeping.serve_program(SCHEDULER), model=model)
  state = run((kvcache.init(config), requests), jnp.int32(num_prefill))
  kwargs = {"repeats": repeats, "shortest": 1, "num": NUM_TIMED}
  whole = timing.step_seconds(run, state, **kwargs)
  yield row(what="decode step of serve", value=seconds(whole, "ms"), unit="ms")
  run = functools.partial(model_only, model=model)
  alone = timing.step_seconds(run, next_step(state[0]), **kwargs)
  yield row(what="the model alone", value=seconds(alone, "ms"), unit="ms")
  outside = 100 * (1 - alone / whole)
  yield row(
    what="share outside of the model, sampling included", value=outside, unit="%"
  )
