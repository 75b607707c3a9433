"""A thousand sequences of a thousand tokens: everything at once."""

from collections.abc import Iterator

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import Context

TITLE = "1000 rows of 1000 tokens"
S = NUM_TOKENS = 1000
N, P = 1 << 16, 64
RESERVE_MS, RELEASE_MS = 4.0, 1.5
TOTAL = S * NUM_TOKENS


def reserve(ctx: Context, query_lens: Array) -> tuple[Context, Array]:
  """Room for all tokens of all rows."""
  return kvcache.extend(ctx, query_lens, num_tokens=TOTAL)


def commit(ctx: Context, tokens: Array, query_lens: Array) -> Context:
  """All tokens of all rows."""
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=TOTAL)
  return kvcache.commit(ctx, tokens, metadata)


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  repeats = 5 if is_quick else 20
  config = scenes.make_config(S, N, P)

  def timed(
    what: str, run, ctx: Context, *arguments: Array, target: float | None = None
  ):
    run = jax.jit(run, donate_argnums=0)
    value = timing.call_seconds(run, ctx, *arguments, repeats=repeats)
    row = Row(
      section=TITLE,
      what=what,
      sizes=scenes.label(config),
      value=seconds(value, "ms"),
      unit="ms",
      target=target,
      repeats=repeats,
    )
    return row, run(timing.copy(ctx), *arguments)

  tokens = scenes.prompts(S, NUM_TOKENS)
  lengths = jnp.full(S, NUM_TOKENS, jnp.int32)
  everyone = jnp.ones(S, bool)
  admit = jax.jit(kvcache.admit, donate_argnums=0)
  ctx, admission = admit(scenes.empty(config), tokens, lengths)
  scenes.require_ok(admission.status)

  what = "reserve, one extend"
  row, (ctx, status) = timed(what, reserve, ctx, lengths, target=RESERVE_MS)
  scenes.require_ok(status)
  yield row
  what = "release what is only reserved, one finish"
  row, released = timed(what, kvcache.finish, ctx, everyone, target=RELEASE_MS)
  _require(released, num_free=N - 1, num_evictable=0)
  yield row
  row, ctx = timed("commit, one step", commit, ctx, tokens.reshape(-1), lengths)
  yield row

  num_full = S * (NUM_TOKENS // scenes.BLOCK_SIZE)
  row, published = timed(f"publish {num_full} blocks", kvcache.publish, ctx)
  yield row
  what = "release what is cached, one finish"
  row, released = timed(what, kvcache.finish, published, everyone)
  _require(released, num_free=N - 1 - num_full, num_evictable=num_full)
  yield row
  what = f"evict {num_full} blocks"
  row, (evicted, _) = timed(what, kvcache.evict, released, jnp.int32(num_full))
  _require(evicted, num_free=N - 1, num_evictable=0)
  yield row


def _require(ctx: Context, *, num_free: int, num_evictable: int) -> None:
  found = (int(ctx.pool.num_free), int(ctx.prefix.num_evictable))
  if found != (num_free, num_evictable):
    expected = (num_free, num_evictable)
    raise RuntimeError(f"free and evictable blocks are {found}, not {expected}")
