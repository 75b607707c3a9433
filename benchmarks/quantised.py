"""What quantised keys and values save with a real model, and what they cost."""

from collections.abc import Iterator
import dataclasses
import functools
from pathlib import Path

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from benchmarks import generation, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import CacheConfig, Context, models, nn

TITLE = "Quantised keys and values with SmolLM2-135M"
SLOWER = 2.0
TEXT = Path(__file__).parent.parent / "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    dtypes: Of keys and values; the first is what the others are compared with.
    rows: `S`.
    prompt_len: Tokens that each row begins with.
    num_new: Tokens that each row is told.
    max_len: Tokens that the cache has room for, of each row.
    steps: That are timed.
    repeats: Of what is timed.
  """

  dtypes: tuple[str, ...]
  rows: int
  prompt_len: int
  num_new: int
  max_len: int
  steps: int
  repeats: int


_FULL = Sizes(
  dtypes=("float32", "int8", "float8_e4m3fn"),
  rows=4,
  prompt_len=128,
  num_new=64,
  max_len=256,
  steps=16,
  repeats=8,
)
SIZES = {
  Size.FULL: _FULL,
  Size.QUICK: dataclasses.replace(_FULL, repeats=4),
  Size.TINY: Sizes(
    dtypes=("float32", "int8"),
    rows=2,
    prompt_len=8,
    num_new=3,
    max_len=32,
    steps=2,
    repeats=1,
  ),
}


def _step(
  model: Partial, ctx: Context, tokens: Array, *, num_tokens: int | None
) -> tuple[Array, Context]:
  """Computes the same number of tokens of every row; `[S, vocab]` logits."""
  S = ctx.config.max_seqs
  query_lens = jnp.full(S, tokens.size // S, jnp.int32)
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = model(tokens, metadata, ctx)
  return logits, kvcache.commit(ctx, tokens, metadata)


@functools.partial(jax.jit, static_argnames="config")
def prefilled(model: Partial, prompts: Array, *, config: CacheConfig) -> Context:
  """A context whose rows hold `prompts [S, prompt_len]`."""
  lengths = jnp.full(*prompts.shape, jnp.int32)
  ctx, _ = kvcache.admit(kvcache.init(config), prompts, lengths)
  return _step(model, ctx, prompts.reshape(-1), num_tokens=prompts.size)[1]


@jax.jit
def forced_logits(model: Partial, ctx: Context, rest: Array) -> Array:
  """Logits `[num_new, S, vocab]` of decode steps that are told `rest [S, num_new]`."""

  def decode(ctx: Context, column: Array) -> tuple[Context, Array]:
    logits, ctx = _step(model, ctx, column, num_tokens=None)
    return ctx, logits

  return lax.scan(decode, ctx, rest.T)[1]


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes, loaded = SIZES[size], generation.load(size)
  S, prompt_len, max_len = sizes.rows, sizes.prompt_len, sizes.max_len
  model = nn.as_function(loaded.model)
  tokens = np.resize(_text(loaded), (S, prompt_len + sizes.num_new))
  tokens = jnp.asarray(tokens, jnp.int32)
  prompts, rest = tokens[:, :prompt_len], tokens[:, prompt_len:]
  exact = alone = None
  for dtype in sizes.dtypes:
    config = CacheConfig(
      layers=loaded.config.cache_layers(),
      num_blocks=1 + S * max_len // 16,
      max_seqs=S,
      max_seq_len=max_len,
      dtype=dtype,
    )
    row = functools.partial(Row, section=TITLE, sizes=dtype)
    yield row(what="bytes of a block", value=config.bytes_per_block, unit="bytes")
    ctx = prefilled(model, prompts, config=config)
    logits = np.asarray(forced_logits(model, ctx, rest))
    if exact is None:
      exact = logits
      what = "logits, standard deviation"
      yield row(what=what, value=float(exact.std()), unit="")
    else:
      error = np.abs(logits - exact)
      agree = 100 * (logits.argmax(-1) == exact.argmax(-1)).mean()
      yield row(what="error of the logits, mean", value=float(error.mean()), unit="")
      yield row(what="error of the logits, largest", value=float(error.max()), unit="")
      yield row(what="most likely token is the same", value=float(agree), unit="%")
    run = functools.partial(generation.model_only, model=model)
    state = generation.next_step(ctx)
    time = timing.step_seconds(
      run, state, repeats=sizes.repeats, shortest=1, num=sizes.steps
    )
    alone = alone or time
    yield row(
      what=f"decode step of the model, {prompt_len} tokens",
      value=seconds(time, "ms"),
      unit="ms",
      target=None if dtype == sizes.dtypes[0] else SLOWER * seconds(alone, "ms"),
      repeats=sizes.repeats,
    )


def _text(loaded: models.Loaded) -> list[int]:
  """Tokens of a text in English, for which the model was trained."""
  text = TEXT.read_text("utf-8")
  if loaded.tokenizer is None:
    return list(text.encode())
  return loaded.tokenizer.encode(text)
