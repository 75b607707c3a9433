"""The verbs that come and go with sequences, one host call each."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import Context

TITLE = "Verbs"
S, P = 256, 64
SIZES = (1 << 12, 1 << 16, 1 << 20)
QUICK_SIZES = (1 << 16,)
NUM_PROMPTS, PROMPT_LEN = 8, 1000
NUM_EVICTED = 32
NUM_PUBLISHED = 1000


def publish_in_loop(ctx: Context, num: jax.Array) -> Context:
  """`publish` again and again, with nothing to do."""
  return lax.fori_loop(0, num, lambda _, ctx: kvcache.publish(ctx), ctx)


def evict_in_loop(ctx: Context, num: jax.Array) -> Context:
  """Evicts some blocks per iteration."""

  def body(_, ctx: Context) -> Context:
    return kvcache.evict(ctx, jnp.int32(NUM_EVICTED))[0]

  return lax.fori_loop(0, num, body, ctx)


def rewind_in_loop(ctx: Context, num: jax.Array) -> Context:
  """Drops a token of each row and computes one again."""
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)

  def body(_, ctx: Context) -> Context:
    ctx, _ = kvcache.rewind(ctx, ones)
    ctx, _ = kvcache.extend(ctx, ones)
    return kvcache.commit(ctx, ones, kvcache.step_metadata(ctx, ones))

  return lax.fori_loop(0, num, body, ctx)


def fork_in_loop(ctx: Context, num: jax.Array) -> Context:
  """Forks a few rows and ends the branches."""
  src = jnp.arange(NUM_PROMPTS, dtype=jnp.int32)
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


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  repeats = 5 if is_quick else 15

  def program(run, **static: Any):
    return jax.jit(functools.partial(run, **static), donate_argnums=0)

  for N in QUICK_SIZES if is_quick else SIZES:
    config = scenes.make_config(S, N, P)
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
    yield looped("publish, nothing pending", program(publish_in_loop), live, num=2048)
    yield called("rewind, 1 token of each row", program(kvcache.rewind), live, _ones())
    yield looped("rewind + decode step", program(rewind_in_loop), live, num=512)
    rows = jnp.arange(S, dtype=jnp.int32)
    finish = program(kvcache.finish)
    yield called("finish, 1 row", finish, live, rows == 7)
    yield called("finish, all rows", finish, live, rows >= 0)

    # A few live rows of 1000 tokens; as many more rows as are wanted.
    tokens = scenes.prompts(NUM_PROMPTS, PROMPT_LEN)
    lengths = np.full(NUM_PROMPTS, PROMPT_LEN)
    some = _settled(scenes.filled(scenes.empty(config), tokens, lengths))
    sizes = (tokens, jnp.asarray(lengths, jnp.int32))
    admit, name = program(kvcache.admit), f"{NUM_PROMPTS} prompts of {PROMPT_LEN}"
    yield called(f"admit, {name}, hit", admit, some, *sizes)
    others = scenes.prompts(NUM_PROMPTS, PROMPT_LEN, seed=1)
    yield called(f"admit, {name}, miss", admit, some, others, sizes[1])
    again = program(admit_in_loop, tokens=tokens)
    yield looped(f"admit + finish, {name}, hit", again, some, num=32)
    src = jnp.arange(NUM_PROMPTS, dtype=jnp.int32)
    yield called(f"fork, {name}", program(kvcache.fork), some, src)
    yield looped(f"fork + finish, {name}", program(fork_in_loop), some, num=32)

    # Many blocks to publish, then many to evict.
    num_rows = -(-NUM_PUBLISHED // (PROMPT_LEN // scenes.BLOCK_SIZE))
    tokens = scenes.prompts(num_rows, PROMPT_LEN, seed=2)
    lengths = np.full(num_rows, PROMPT_LEN)
    lengths[-1] = (NUM_PUBLISHED % (PROMPT_LEN // scenes.BLOCK_SIZE)) * 16
    many = scenes.filled(scenes.empty(config), tokens, lengths)
    yield called(f"publish, {NUM_PUBLISHED} blocks", program(kvcache.publish), many)
    idle = finish(many, jnp.ones(S, bool))
    count = jnp.int32(NUM_EVICTED)
    yield called(f"evict, {NUM_EVICTED} blocks", program(kvcache.evict), idle, count)
    num = NUM_PUBLISHED // NUM_EVICTED
    evict = program(evict_in_loop)
    yield looped(f"evict, {NUM_EVICTED} blocks", evict, idle, num=num)


def _ones() -> jax.Array:
  return jnp.ones(S, jnp.int32)
