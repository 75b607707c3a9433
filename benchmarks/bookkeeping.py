"""The bookkeeping of a step: what the cache adds to every token of a model."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax import Array, lax
import jax.numpy as jnp

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import CacheConfig, Context, SchedulerConfig
from kvcache.serving import sampling

TITLE = "Bookkeeping of a step"
MIXED_TOKENS = 256
MODEL_VOCAB = 16
NUM_STEPS = 1024  # that a long call repeats: milliseconds

# Targets hold for two CPU cores and S = 256.
TARGET_S = 256
IN_LOOP_US, CALL_US, SERVE_US, GROWTH = 20.0, 150.0, 40.0, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`, one after another.
    pools: `(N, P)` for each of them, the smallest and the largest among them.
    in_parts: Pools for which the verbs of a step are measured one by one, too.
    chains: Of calls from the host.
    repeats: Of all else.
  """

  rows: tuple[int, ...]
  pools: tuple[tuple[int, int], ...]
  in_parts: tuple[tuple[int, int], ...]
  chains: int
  repeats: int


_ENDS = ((1 << 12, 64), (1 << 20, 2048))
_BETWEEN = ((1 << 12, 2048), (1 << 16, 64), (1 << 16, 2048), (1 << 20, 64))
SIZES = {
  Size.FULL: Sizes(
    rows=(64, TARGET_S, 1024),
    pools=(_ENDS[0], *_BETWEEN, _ENDS[1]),
    in_parts=_ENDS,
    chains=8,
    repeats=30,
  ),
  Size.QUICK: Sizes(
    rows=(TARGET_S,), pools=_ENDS, in_parts=_ENDS, chains=8, repeats=10
  ),
  Size.TINY: Sizes(
    rows=(2,), pools=((32, 8),), in_parts=((32, 8),), chains=1, repeats=1
  ),
}


def decode_step(ctx: Context, index: Array) -> Context:
  """What one decode step costs beside the model and the loop."""
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)
  ctx, _ = kvcache.extend(ctx, ones)
  metadata = kvcache.step_metadata(ctx, ones)
  return kvcache.commit(ctx, metadata.positions + index, metadata)


def extend_only(ctx: Context, index: Array) -> Context:
  """`extend`, and the least that makes the next one allocate again."""
  del index
  table = ctx.sequences
  ctx, _ = kvcache.extend(ctx, jnp.ones_like(table.seq_lens))
  table = ctx.sequences.replace(seq_lens=table.seq_lens + 1)
  return ctx.replace(sequences=table)


def commit_only(ctx: Context, index: Array) -> Context:
  """`commit` of one token per row, to an address that costs nothing to compute."""
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)
  slots = rows * scenes.BLOCK_SIZE + index % scenes.BLOCK_SIZE
  zeros, ones = jnp.zeros_like(rows), jnp.ones_like(rows)
  metadata = kvcache.StepMetadata(
    seq_ids=rows,
    positions=zeros,
    slot_mapping=slots,
    query_lens=ones,
    seq_lens=ones,
    cu_seqlens=jnp.arange(rows.size + 1, dtype=jnp.int32),
    logits_indices=rows,
    block_tables=ctx.sequences.block_tables,
    is_decode=True,
  )
  return kvcache.commit(ctx, rows + index, metadata)


def mixed_lens(S: int, num_tokens: int | None) -> Array:
  """`[S]` int32: one token per row, or a chunk for one row and most others decode."""
  rows = jnp.arange(S, dtype=jnp.int32)
  if num_tokens is None:
    return jnp.ones_like(rows)
  decodes = (rows % 4 > 0).astype(jnp.int32)
  return jnp.where(rows == S // 2, num_tokens // 4, decodes)


def metadata_only(
  state: tuple[Context, Array], index: Array, *, num_tokens: int | None
) -> tuple[Context, Array]:
  """`step_metadata` of a context that differs a little from step to step."""
  ctx, _ = state
  table = ctx.sequences
  seq_lens = table.seq_lens + jnp.where(index % 2 == 0, -1, 1)
  ctx = ctx.replace(sequences=table.replace(seq_lens=seq_lens))
  query_lens = mixed_lens(seq_lens.size, num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  fields = (metadata.slot_mapping, metadata.positions, metadata.seq_ids)
  fields += (metadata.cu_seqlens, metadata.seq_lens, metadata.logits_indices)
  return ctx, jnp.concatenate(fields)


def restart(ctx: Context, start: Context) -> Context:
  """The context as it was, except for what the next steps overwrite. Costs nothing."""
  table, first = ctx.sequences, start.sequences
  return ctx.replace(
    sequences=table.replace(seq_lens=first.seq_lens, num_blocks=first.num_blocks),
    pool=ctx.pool.replace(num_free=start.pool.num_free),
  )


def rounds(step: Callable, length: int, *, restart: Callable | None = None) -> Callable:
  """`run(state, num)`: `num` rounds of `length` steps, each from the same start."""

  def run(state, num: Array):
    def one(_, now):
      now = now if restart is None else restart(now, state)
      return lax.fori_loop(0, length, lambda index, now: step(now, index), now)

    return lax.fori_loop(0, num, one, state)

  return jax.jit(run, donate_argnums=0)


def round_seconds(
  step: Callable,
  state,
  *,
  repeats: int,
  length: int,
  restart: Callable | None = None,
) -> float:
  """Time of a step that may be repeated `length` times from the state given."""
  run = rounds(step, length, restart=restart)
  num = max(1, NUM_STEPS // length)
  return timing.step_seconds(run, state, repeats=repeats, num=num) / length


def thin_model(tokens: Array, metadata, ctx: Context) -> tuple[Array, Context]:
  """As little of a model as can be: logits that depend on the tokens."""
  vocab = jnp.arange(MODEL_VOCAB, dtype=jnp.int32)
  last = tokens[metadata.logits_indices]
  logits = ((last[:, None] + vocab[None]) % 7).astype(jnp.float32)
  return logits, as_written(ctx)


def as_written(ctx: Context) -> Context:
  """The context as a model returns it that writes all layers, for nothing.

  `serve` refuses a model that returns the keys, values or states that it was given.
  """
  kv, states = lax.optimization_barrier((ctx.kv, ctx.states))
  return ctx.replace(kv=kv, states=states)


def serve_program(scheduler: SchedulerConfig, **options: Any) -> Callable:
  """`run((ctx, requests), max_steps, model)`, jitted; the model is a pytree."""

  def run(state, max_steps: Array, model: Callable):
    ctx, requests = state
    return kvcache.serve(
      model,
      ctx,
      requests,
      scheduler=scheduler,
      sampler=sampling.greedy,
      max_steps=max_steps,
    )

  return jax.jit(run, donate_argnums=0, **options)


def serve_seconds(config: CacheConfig, *, repeats: int, **options: Any) -> float:
  """Time of a whole decode step of the loop, over a model that does nothing.

  Options are those of `jax.jit`.
  """
  S = config.max_seqs
  per_row = min(config.max_blocks_per_seq, (config.num_blocks - 1) // S)
  num_tokens = min(200, per_row * scenes.BLOCK_SIZE - 2)
  requests = kvcache.make_requests(
    [[row % MODEL_VOCAB] for row in range(S)], max_new_tokens=num_tokens
  )
  scheduler = SchedulerConfig(
    token_budget=max(S, MIXED_TOKENS), max_admissions=S, defer_shared=False
  )
  model = jax.tree_util.Partial(thin_model)
  run = functools.partial(serve_program(scheduler, **options), model=model)
  state = run((scenes.empty(config), requests), jnp.int32(2))
  # The rest of the steps happen in one go: nobody waits, ends or lacks a block.
  num = num_tokens - 6
  return timing.step_seconds(run, state, repeats=repeats, shortest=1, num=num)


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes = SIZES[size]
  repeats = sizes.repeats
  decode: dict[tuple[int, int, int], float] = {}
  serve: dict[tuple[int, int, int], float] = {}
  for S in sizes.rows:
    for N, P in sizes.pools:
      config = scenes.make_config(S, N, P)
      is_target = S == TARGET_S
      row = functools.partial(
        Row, section=TITLE, sizes=scenes.label(config), repeats=repeats
      )

      def us(value: float, what: str, *, target: float | None = None, row=row) -> Row:
        return row(what=what, value=seconds(value, "us"), unit="us", target=target)

      ctx, length = scenes.decoding(config)
      kwargs = {"repeats": repeats, "length": length}
      decode[S, N, P] = round_seconds(decode_step, ctx, **kwargs, restart=restart)
      target = IN_LOOP_US if is_target else None
      yield us(decode[S, N, P], "decode step, in a loop", target=target)
      one = jax.jit(decode_step, donate_argnums=0)
      value = timing.chain_seconds(
        one, ctx, jnp.int32(0), repeats=sizes.chains, length=length
      )
      target = CALL_US if is_target else None
      yield us(value, "decode step, one host call", target=target)

      if (N, P) in sizes.in_parts:
        for name, step in (("extend", extend_only), ("commit", commit_only)):
          value = round_seconds(step, ctx, **kwargs, restart=restart)
          yield us(value, f"{name}, in a loop")
        for name, num in (("decode", None), (f"mixed T={MIXED_TOKENS}", MIXED_TOKENS)):
          step = functools.partial(metadata_only, num_tokens=num)
          roomy, _ = kvcache.extend(ctx, mixed_lens(S, num), num_tokens=num or S)
          state = (roomy, jnp.zeros(3 * (num or S) + 3 * S + 1, jnp.int32))
          value = round_seconds(step, state, **kwargs)
          yield us(value, f"step_metadata ({name}), in a loop")

      serve[S, N, P] = serve_seconds(config, repeats=repeats)
      target = SERVE_US if is_target else None
      yield us(serve[S, N, P], "decode step of serve, no model", target=target)
  yield from _growth(decode, "decode step, in a loop", repeats)
  yield from _growth(serve, "decode step of serve, no model", repeats)


def _growth(
  times: dict[tuple[int, int, int], float], what: str, repeats: int
) -> Iterator[Row]:
  """How much longer the largest cache takes than the smallest."""
  for S in sorted({key[0] for key in times}):
    keys = sorted(key for key in times if key[0] == S)
    smallest, largest = keys[0], keys[-1]
    yield Row(
      section=TITLE,
      what=f"{what}: growth",
      sizes=f"S={S} {_pool(smallest)} to {_pool(largest)}",
      value=times[largest] / times[smallest],
      unit="x",
      target=GROWTH if S == TARGET_S else None,
      repeats=repeats,
    )


def _pool(key: tuple[int, int, int]) -> str:
  return f"{scenes.short(key[1])}/{key[2]}"
