"""The verbs that come and go with sequences, one host call each."""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import Context

TITLE = "Verbs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`.
    width: `P`.
    pools: `N`, one after another.
    num_prompts: That are admitted or forked at once.
    prompt_len: Tokens of each.
    num_published: Blocks that are published at once.
    num_evicted: Blocks that are evicted at once.
    iterations: Of the longest loop; those of dearer verbs are a part of it.
    repeats: Of each measurement.
  """

  rows: int
  width: int
  pools: tuple[int, ...]
  num_prompts: int
  prompt_len: int
  num_published: int
  num_evicted: int
  iterations: int
  repeats: int


_FULL = Sizes(
  rows=256,
  width=64,
  pools=(1 << 12, 1 << 16, 1 << 20),
  num_prompts=8,
  prompt_len=1000,
  num_published=1000,
  num_evicted=32,
  iterations=2048,
  repeats=15,
)
SIZES = {
  Size.FULL: _FULL,
  Size.QUICK: dataclasses.replace(_FULL, pools=(1 << 16,), repeats=5),
  Size.TINY: Sizes(
    rows=2,
    width=8,
    pools=(32,),
    num_prompts=1,
    prompt_len=49,
    num_published=3,
    num_evicted=2,
    iterations=64,
    repeats=1,
  ),
}


def publish_in_loop(ctx: Context, num: jax.Array) -> Context:
  """`publish` again and again, with nothing to do."""
  return lax.fori_loop(0, num, lambda _, ctx: kvcache.publish(ctx), ctx)


def evict_in_loop(ctx: Context, num: jax.Array, *, num_evicted: int) -> Context:
  """Evicts some blocks per iteration."""

  def body(_, ctx: Context) -> Context:
    return kvcache.evict(ctx, jnp.int32(num_evicted))[0]

  return lax.fori_loop(0, num, body, ctx)


def rewind_in_loop(ctx: Context, num: jax.Array) -> Context:
  """Drops a token of each row and computes one again."""
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)

  def body(_, ctx: Context) -> Context:
    ctx, _ = kvcache.rewind(ctx, ones)
    ctx, _ = kvcache.extend(ctx, ones)
    return kvcache.commit(ctx, ones, kvcache.step_metadata(ctx, ones))

  return lax.fori_loop(0, num, body, ctx)


def fork_in_loop(ctx: Context, num: jax.Array, *, num_rows: int) -> Context:
  """Forks a few rows and ends the branches."""
  src = jnp.arange(num_rows, dtype=jnp.int32)
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)

  def body(_, ctx: Context) -> Context:
    ctx, branches, _ = kvcache.fork(ctx, src)
    is_branch = jnp.any(rows[:, None] == branches[None], axis=1)
    return kvcache.finish(ctx, is_branch)

  return lax.fori_loop(0, num, body, ctx)


def admit_in_loop(ctx: Context, num: jax.Array, *, tokens: jax.Array) -> Context:
  """Admits cached prompts and ends them."""
  lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)

  def body(_, ctx: Context) -> Context:
    ctx, admission = kvcache.admit(ctx, tokens, lengths)
    is_new = jnp.any(rows[:, None] == admission.seq_ids[None], axis=1)
    return kvcache.finish(ctx, is_new)

  return lax.fori_loop(0, num, body, ctx)


def _settled(ctx: Context) -> Context:
  """The context with every full block published."""
  return jax.jit(kvcache.publish, donate_argnums=0)(ctx)


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  wanted = SIZES[size]
  S, repeats, prompt_len = wanted.rows, wanted.repeats, wanted.prompt_len
  num_prompts, num_evicted = wanted.num_prompts, wanted.num_evicted

  def program(run, **static: Any):
    # What is jitted elsewhere, too, is compiled once.
    run = functools.partial(run, **static) if static else run
    return jax.jit(run, donate_argnums=0)

  for N in wanted.pools:
    config = scenes.make_config(S, N, wanted.width)
    base = functools.partial(
      Row, section=TITLE, sizes=scenes.label(config), unit="us", repeats=repeats
    )

    def called(what: str, run, ctx: Context, *arguments: Any, base=base) -> Row:
      value = timing.call_seconds(run, ctx, *arguments, repeats=repeats)
      return base(what=what, value=seconds(value, "us"))

    def looped(what: str, run, ctx: Context, *, num: int, base=base) -> Row:
      value = timing.step_seconds(run, ctx, repeats=repeats, num=num)
      return base(what=f"{what}, in a loop", value=seconds(value, "us"))

    def touch(ctx: Context) -> Context:
      counters = ctx.counters
      return ctx.replace(
        counters=counters.replace(num_evicted=counters.num_evicted + 1)
      )

    # S live rows, each with one full block and a partial one.
    live, _ = scenes.decoding(config)
    yield called("a call that does nothing", program(touch), live)
    yield called("publish, 1 block per row", program(kvcache.publish), live)
    live = _settled(live)
    yield called("publish, nothing pending", program(kvcache.publish), live)
    num = wanted.iterations
    yield looped("publish, nothing pending", program(publish_in_loop), live, num=num)
    ones = jnp.ones(S, jnp.int32)
    yield called("rewind, 1 token of each row", program(kvcache.rewind), live, ones)
    yield looped("rewind + decode step", program(rewind_in_loop), live, num=num // 4)
    rows = jnp.arange(S, dtype=jnp.int32)
    finish = program(kvcache.finish)
    yield called("finish, 1 row", finish, live, rows == S - 1)
    yield called("finish, all rows", finish, live, rows >= 0)

    # A few live rows of long prompts; as many more rows as are wanted.
    tokens = scenes.prompts(num_prompts, prompt_len)
    lengths = np.full(num_prompts, prompt_len)
    some = _settled(scenes.filled(scenes.empty(config), tokens, lengths))
    sizes = (tokens, jnp.asarray(lengths, jnp.int32))
    admit, name = program(kvcache.admit), f"{num_prompts} prompts of {prompt_len}"
    yield called(f"admit, {name}, hit", admit, some, *sizes)
    others = scenes.prompts(num_prompts, prompt_len, seed=1)
    yield called(f"admit, {name}, miss", admit, some, others, sizes[1])
    again = program(admit_in_loop, tokens=tokens)
    num = wanted.iterations // 64
    yield looped(f"admit + finish, {name}, hit", again, some, num=num)
    src = jnp.arange(num_prompts, dtype=jnp.int32)
    yield called(f"fork, {name}", program(kvcache.fork), some, src)
    again = program(fork_in_loop, num_rows=num_prompts)
    yield looped(f"fork + finish, {name}", again, some, num=num)

    # Many blocks to publish, then many to evict.
    num_published, per_row = wanted.num_published, prompt_len // scenes.BLOCK_SIZE
    num_rows = -(-num_published // per_row)
    tokens = scenes.prompts(num_rows, prompt_len, seed=2)
    lengths = np.full(num_rows, prompt_len)
    lengths[-1] = (num_published - (num_rows - 1) * per_row) * scenes.BLOCK_SIZE
    many = scenes.filled(scenes.empty(config), tokens, lengths)
    yield called(f"publish, {num_published} blocks", program(kvcache.publish), many)
    idle = finish(many, jnp.ones(S, bool))
    count = jnp.int32(num_evicted)
    yield called(f"evict, {num_evicted} blocks", program(kvcache.evict), idle, count)
    num = num_published // num_evicted
    evict = program(evict_in_loop, num_evicted=num_evicted)
    yield looped(f"evict, {num_evicted} blocks", evict, idle, num=num)
