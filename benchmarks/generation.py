"""Tokens per second with a real model, and what of a step is not the model's."""

from collections.abc import Iterator
import dataclasses
import functools

from flax import nnx
import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from benchmarks import bookkeeping, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import CacheConfig, Context, models, nn, SchedulerConfig, StepMetadata

TITLE = "Generation with SmolLM2-135M, float32"
SCHEDULER = SchedulerConfig(token_budget=128, max_admissions=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`, one after another; as many prompts.
    prompt_len: Tokens of each prompt.
    num_new: Tokens that each gets.
    max_len: Tokens that the cache has room for, of each.
    steps: That are timed.
    repeats: Of each measurement.
  """

  rows: tuple[int, ...]
  prompt_len: int
  num_new: int
  max_len: int
  steps: int
  repeats: int


_FULL = Sizes(
  rows=(1, 4, 16), prompt_len=64, num_new=64, max_len=256, steps=16, repeats=8
)
SIZES = {
  Size.FULL: _FULL,
  Size.QUICK: dataclasses.replace(_FULL, rows=(4,), repeats=4),
  Size.TINY: Sizes(rows=(2,), prompt_len=8, num_new=4, max_len=32, steps=2, repeats=1),
}


class NoModelError(RuntimeError):
  """The model is not installed."""


def load(size: Size) -> models.Loaded:
  """The demo model, or one of random weights for which nothing is installed."""
  if size is Size.TINY:
    return _random_model()
  try:
    return models.load(None)
  except models.LoadError as error:
    raise NoModelError(str(error)) from error


def _random_model() -> models.Loaded:
  config = models.LlamaConfig(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
  )
  return models.Loaded(
    model=models.Llama(config, rngs=nnx.Rngs(0)),
    config=config,
    tokenizer=None,
    stop_tokens=(),
    source="random weights",
  )


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


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes, loaded = SIZES[size], load(size)
  model = nn.as_function(loaded.model)
  for S in sizes.rows:
    yield from _measure_one(loaded, model, S, sizes)


def _measure_one(
  loaded: models.Loaded, model: jax.tree_util.Partial, S: int, sizes: Sizes
) -> Iterator[Row]:
  repeats, num_new, max_len = sizes.repeats, sizes.num_new, sizes.max_len
  config = CacheConfig(
    layers=loaded.config.cache_layers(),
    num_blocks=1 + S * max_len // 16,
    max_seqs=S,
    max_seq_len=max_len,
  )
  row = functools.partial(Row, section=TITLE, repeats=repeats, sizes=f"{S} prompts")
  rng = np.random.default_rng(S)
  tokens = rng.integers(100, loaded.config.vocab_size, size=(S, sizes.prompt_len))
  prompts = tokens.tolist()

  def rate() -> float:
    """Tokens per second of all requests together; the time includes the prompts."""
    slices = []
    _, completions = kvcache.generate(
      model,
      kvcache.init(config),
      prompts,
      max_new_tokens=num_new,
      scheduler=SCHEDULER,
      slice_steps=1000,
      on_slice=slices.append,
    )
    num_tokens = sum(len(completion.tokens) for completion in completions)
    return num_tokens / slices[-1].seconds

  rate()  # Compiles.
  what = f"generate {num_new} tokens each from prompts of {sizes.prompt_len}"
  yield row(what=what, value=max(rate() for _ in range(repeats)), unit="tokens/s")

  num_prefill = 3 + tokens.size // (SCHEDULER.token_budget - S)
  room = max_len - sizes.prompt_len
  requests = kvcache.make_requests(prompts, max_new_tokens=room)
  run = functools.partial(bookkeeping.serve_program(SCHEDULER), model=model)
  state = run((kvcache.init(config), requests), jnp.int32(num_prefill))
  kwargs = {"repeats": repeats, "shortest": 1, "num": sizes.steps}
  whole = timing.step_seconds(run, state, **kwargs)
  yield row(what="decode step of serve", value=seconds(whole, "ms"), unit="ms")
  run = functools.partial(model_only, model=model)
  alone = timing.step_seconds(run, next_step(state[0]), **kwargs)
  yield row(what="the model alone", value=seconds(alone, "ms"), unit="ms")
  outside = 100 * (1 - alone / whole)
  yield row(
    what="share outside of the model, sampling included", value=outside, unit="%"
  )
