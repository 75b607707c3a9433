"""A thousand sequences at once, and the lookup of one long prompt."""

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.bookkeeping import BLOCK_SIZE, config, live
from benchmarks.report import Report
import kvcache as kv
from kvcache.context import Context

NUM_SEQS, NUM_TOKENS = 1000, 1000


def measure(report: Report) -> None:
  """Reserving, storing, publishing and releasing 1000 x 1000 tokens."""
  ctx = live(config(NUM_SEQS, 1 << 17, 64))
  query_lens = jnp.full(NUM_SEQS, NUM_TOKENS, jnp.int32)
  total = NUM_SEQS * NUM_TOKENS
  everyone = jnp.ones(NUM_SEQS, bool)
  setting = "1000 x 1000 tokens"

  def add(name: str, seconds: float, target: str = "") -> None:
    report.add(name, setting, seconds * 1e3, "ms", target)

  def reserve(ctx: Context) -> Context:
    return kv.extend(ctx, query_lens, num_tokens=total)[0]

  seconds, reserved = timing.seconds_per_call(reserve, ctx)
  add("reserve", seconds, "<= 4")
  seconds, _ = timing.seconds_per_call(kv.finish, reserved, everyone)
  add("release what was reserved", seconds, "<= 1.5")
  metadata = jax.jit(kv.step_metadata, static_argnames="num_tokens")(
    reserved, query_lens, num_tokens=total
  )
  tokens = jax.random.randint(jax.random.key(0), (total,), 0, 1000, dtype=jnp.int32)
  seconds, stored = timing.seconds_per_call(kv.commit, reserved, tokens, metadata)
  add("commit", seconds)
  seconds, published = timing.seconds_per_call(kv.publish, stored)
  add("publish 62,000 blocks", seconds)
  seconds, cached = timing.seconds_per_call(kv.finish, published, everyone)
  add("release when published", seconds)
  seconds, _ = timing.seconds_per_call(kv.evict, cached, jnp.int32(60_000))
  add("evict 60,000 blocks", seconds)


def measure_lookup(report: Report) -> None:
  """Finding the cached prefix of a prompt of 1000 blocks, hashing included."""
  length = 1000 * BLOCK_SIZE
  prompt = jax.random.randint(jax.random.key(0), (1, length), 0, 1000, dtype=jnp.int32)
  lengths = jnp.array([length])
  for num_blocks in (1 << 12, 1 << 16, 1 << 20):
    ctx = kv.init(config(4, num_blocks, 1024))
    ctx, _ = jax.jit(kv.admit)(ctx, prompt, lengths)

    @jax.jit
    def compute(ctx: Context) -> Context:
      query_lens = jnp.zeros(4, jnp.int32).at[0].set(length)
      ctx, _ = kv.extend(ctx, query_lens, num_tokens=length)
      metadata = kv.step_metadata(ctx, query_lens, num_tokens=length)
      return kv.publish(kv.commit(ctx, prompt[0], metadata))

    ctx = compute(ctx)
    found = kv.find(ctx, prompt, lengths)[1]
    assert found[0] == 999, f"only {found[0]} blocks found"
    seconds = timing.seconds_per_read(kv.find, ctx, prompt, lengths)
    report.add(
      "lookup of 1000 blocks", f"N={num_blocks}", seconds * 1e3, "ms", "<= 0.2"
    )
