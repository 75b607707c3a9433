"""A thousand sequences of a thousand tokens: everything at once."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import Context

TITLE = "1000 rows of 1000 tokens"
RESERVE_MS, RELEASE_MS = 4.0, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`.
    num_tokens: Of each row.
    pool: `(N, P)`.
    repeats: Of each measurement.
  """

  rows: int
  num_tokens: int
  pool: tuple[int, int]
  repeats: int


_QUICK = Sizes(rows=1000, num_tokens=1000, pool=(1 << 16, 64), repeats=5)
SIZES = {
  Size.FULL: dataclasses.replace(_QUICK, repeats=20),
  Size.QUICK: _QUICK,
  Size.TINY: Sizes(rows=2, num_tokens=18, pool=(32, 8), repeats=1),
}


def commit(ctx: Context, tokens: Array, query_lens: Array) -> Context:
  """All tokens of all rows."""
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=tokens.size)
  return kvcache.commit(ctx, tokens, metadata)


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes = SIZES[size]
  S, (N, P) = sizes.rows, sizes.pool
  config = scenes.make_config(S, N, P)

  def timed(
    what: str, run, ctx: Context, *arguments: Array, target: float | None = None
  ):
    run = jax.jit(run, donate_argnums=0)
    value = timing.call_seconds(run, ctx, *arguments, repeats=sizes.repeats)
    row = Row(
      section=TITLE,
      what=what,
      sizes=scenes.label(config),
      value=seconds(value, "ms"),
      unit="ms",
      target=target,
      repeats=sizes.repeats,
    )
    return row, run(timing.copy(ctx), *arguments)

  tokens = scenes.prompts(S, sizes.num_tokens)
  lengths = jnp.full(S, sizes.num_tokens, jnp.int32)
  everyone = jnp.ones(S, bool)
  ctx = scenes.admitted(scenes.empty(config), tokens, lengths)

  # Room for all tokens of all rows.
  reserve = functools.partial(kvcache.extend, num_tokens=tokens.size)
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

  num_full = S * (sizes.num_tokens // scenes.BLOCK_SIZE)
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
