"""What quantised keys and values save with a real model, and what they cost."""

from collections.abc import Iterator
import functools
from pathlib import Path

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np

from benchmarks import generation, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import CacheConfig, Context, nn

TITLE = "Quantised keys and values with SmolLM2-135M"
DTYPES = ("float32", "int8", "float8_e4m3fn")
S, PROMPT_LEN, NUM_NEW, MAX_LEN = 4, 128, 64, 256
NUM_TIMED = 16
SLOWER = 2.0
TEXT = Path(__file__).parent.parent / "README.md"


def _step(
  model: Partial, ctx: Context, tokens: Array, *, num_tokens: int | None
) -> tuple[Array, Context]:
  """Computes the same number of tokens of every row; `[S, vocab]` logits."""
  query_lens = jnp.full(S, tokens.size // S, jnp.int32)
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  logits, ctx = model(tokens, metadata, ctx)
  return logits, kvcache.commit(ctx, tokens, metadata)


@functools.partial(jax.jit, static_argnames="config")
def forced_logits(model: Partial, tokens: Array, *, config: CacheConfig) -> Array:
  """Logits `[NUM_NEW, S, vocab]` of decode steps that are told their tokens.

  Args:
    model: The model.
    tokens: `[S, PROMPT_LEN + NUM_NEW]` int32 text of each row.
    config: Of the cache.
  """
  ctx, _ = kvcache.admit(
    kvcache.init(config), tokens[:, :PROMPT_LEN], jnp.full(S, PROMPT_LEN, jnp.int32)
  )
  prompts = tokens[:, :PROMPT_LEN].reshape(-1)
  _, ctx = _step(model, ctx, prompts, num_tokens=prompts.size)

  def decode(ctx: Context, column: Array) -> tuple[Context, Array]:
    logits, ctx = _step(model, ctx, column, num_tokens=None)
    return ctx, logits

  return lax.scan(decode, ctx, tokens[:, PROMPT_LEN:].T)[1]


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  loaded = generation.load()
  if loaded.tokenizer is None:
    raise generation.NoModelError("the model has no tokenizer")
  model = nn.as_function(loaded.model)
  text = loaded.tokenizer.encode(TEXT.read_text())
  size = S * (PROMPT_LEN + NUM_NEW)
  tokens = jnp.asarray(np.resize(text, size), jnp.int32).reshape(S, -1)
  exact = alone = None
  repeats = 4 if is_quick else 8
  for dtype in DTYPES:
    config = CacheConfig(
      layers=loaded.config.cache_layers(),
      num_blocks=1 + S * MAX_LEN // 16,
      max_seqs=S,
      max_seq_len=MAX_LEN,
      dtype=dtype,
    )
    row = functools.partial(Row, section=TITLE, sizes=dtype)
    yield row(what="bytes of a block", value=config.bytes_per_block, unit="bytes")
    logits = np.asarray(forced_logits(model, tokens, config=config))
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
    state = generation.next_step(_filled(config, tokens[:, :PROMPT_LEN]))
    time = timing.step_seconds(run, state, repeats=repeats, shortest=1, num=NUM_TIMED)
    alone = alone or time
    yield row(
      what=f"decode step of the model, {PROMPT_LEN} tokens",
      value=seconds(time, "ms"),
      unit="ms",
      target=None if dtype == DTYPES[0] else SLOWER * seconds(alone, "ms"),
      repeats=repeats,
    )


@functools.partial(jax.jit, static_argnums=0)
def _filled(config: CacheConfig, prompts: Array) -> Context:
  """A context whose rows hold prompts, with zeros for keys and values."""
  lengths = jnp.full(S, PROMPT_LEN, jnp.int32)
  ctx, _ = kvcache.admit(kvcache.init(config), prompts, lengths)
  ctx, _ = kvcache.extend(ctx, lengths, num_tokens=prompts.size)
  metadata = kvcache.step_metadata(ctx, lengths, num_tokens=prompts.size)
  return kvcache.commit(ctx, prompts.reshape(-1), metadata)
