"""Recurrent states and layer groups: what they add to a step."""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import bookkeeping, scenes, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import Context, RecurrentLayer
from pallas_kernels import ssm
from pallas_kernels.ssm import reference

TITLE = "Recurrent states and layer groups"
S, N, P = 256, 1 << 16, 64
RATIO, WINDOW = 1.5, 128
STATE = RecurrentLayer(state={"ssm": (1,)})
HEADS, HEAD_DIM, GROUPS, STATE_SIZE = 48, 32, 1, 128  # Granite 4 H 350M
ROWS, CHUNK = 16, 256


def restart(ctx: Context, start: Context) -> Context:
  """As `bookkeeping.restart`; windows and states too are as they were."""
  ctx = bookkeeping.restart(ctx, start)
  pairs = zip(ctx.windows, start.windows, strict=True)
  fields = ("first_blocks", "block_tables")
  windows = [
    a.replace(
      pool=a.pool.replace(num_free=b.pool.num_free),
      **{f: getattr(b, f) for f in fields},
    )
    for a, b in pairs
  ]
  ctx = ctx.replace(windows=tuple(windows))
  now, first = ctx.state_rows, start.state_rows
  if now is None or first is None:
    return ctx
  pool = now.pool.replace(num_free=first.pool.num_free)
  fields = {"state_ids": first.state_ids, "source_ids": first.source_ids}
  return ctx.replace(state_rows=now.replace(pool=pool, clock=first.clock, **fields))


def states_step(ctx: Context, index: Array) -> Context:
  """A decode step that also reads and writes the states of all layers."""
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)
  ctx, _ = kvcache.extend(ctx, ones)
  metadata = kvcache.step_metadata(ctx, ones)
  for layer in range(ctx.config.num_recurrent_layers):
    state = kvcache.read_state(ctx, layer, metadata)
    state = jax.tree.map(lambda x: x + 1.0, state)
    ctx = kvcache.write_state(ctx, layer, state, metadata)
  return kvcache.commit(ctx, metadata.positions + index, metadata)


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  repeats = 10 if is_quick else 30
  row = functools.partial(Row, section=TITLE, repeats=repeats)
  plain = scenes.make_config(S, N, P)
  (layer,) = plain.layers
  windowed = dataclasses.replace(layer, sliding_window=WINDOW)
  states = {"num_snapshots": 2 * S, "snapshot_interval": 2}
  blocks = {"num_window_blocks": S * 2 * (WINDOW // scenes.BLOCK_SIZE + 2)}
  hybrid = dataclasses.replace(plain, layers=(layer, STATE), **states)
  groups = dataclasses.replace(plain, layers=(layer, windowed), **blocks)
  # As many layers of each kind as a model of 32 may have; what they keep is tiny.
  layers = (STATE,) * 24 + (layer, windowed) * 4
  all_three = dataclasses.replace(plain, layers=layers, **states, **blocks)
  times = {}
  for name, config in (
    ("attention alone", plain),
    ("with snapshots", hybrid),
    ("with a sliding window", groups),
    ("32 layers in three groups", all_three),
  ):
    ctx, length = scenes.decoding(config)
    times[name] = bookkeeping.round_seconds(
      bookkeeping.decode_step, ctx, repeats=repeats, length=length, restart=restart
    )
    sizes = scenes.label(config)
    yield row(
      what=f"decode step, {name}",
      sizes=sizes,
      value=seconds(times[name], "us"),
      unit="us",
    )
  ratio = times["32 layers in three groups"] / times["attention alone"]
  yield row(what="of attention alone", sizes=sizes, value=ratio, unit="x", target=RATIO)
  usual = dataclasses.replace(all_three, snapshot_interval=16)
  alone, with_all = (
    bookkeeping.serve_seconds(config, repeats=repeats) for config in (plain, usual)
  )
  what = "decode step of serve, no model"
  for name, value in (("attention alone", alone), ("three groups", with_all)):
    yield row(
      what=f"{what}, {name}", sizes=sizes, value=seconds(value, "us"), unit="us"
    )
  yield row(
    what=f"{what}: of attention alone",
    sizes=sizes,
    value=with_all / alone,
    unit="x",
    target=RATIO,
  )
  yield from _snapshots(row, repeats)
  yield from _recurrences(row, repeats)


def _snapshots(row: Callable[..., Row], repeats: int) -> Iterator[Row]:
  """A snapshot is a row that is not written again: nothing is copied."""
  size = 1 << 14
  for interval in (4, 1 << 20):
    config = dataclasses.replace(
      scenes.make_config(ROWS, 1 << 10, P),
      layers=(RecurrentLayer(state={"ssm": (size,)}),) * 4,
      num_snapshots=4 * ROWS,
      snapshot_interval=interval,
    )
    ctx, length = scenes.decoding(config)
    value = bookkeeping.round_seconds(
      states_step, ctx, repeats=repeats, length=length, restart=restart
    )
    often = f"one in {interval} blocks" if interval < 1 << 20 else "none"
    what = f"states of 4 layers, snapshots: {often}"
    yield row(what=what, sizes=f"S={ROWS}", value=seconds(value, "us"), unit="us")


def _recurrences(row: Callable[..., Row], repeats: int) -> Iterator[Row]:
  """One layer of a small Granite 4 hybrid."""
  for what, lens, num_tokens in (
    (f"ssd, {ROWS} rows decode", [1] * ROWS, ROWS),
    (f"ssd, a chunk of {CHUNK} tokens", [CHUNK] + [0] * (ROWS - 1), CHUNK),
  ):
    keys = iter(jax.random.split(jax.random.key(0), 6))
    x = jax.random.normal(next(keys), (num_tokens, HEADS, HEAD_DIM))
    dt = jax.random.uniform(next(keys), (num_tokens, HEADS))
    a = -jax.random.uniform(next(keys), (HEADS,))
    b = jax.random.normal(next(keys), (num_tokens, GROUPS, STATE_SIZE))
    c = jax.random.normal(next(keys), (num_tokens, GROUPS, STATE_SIZE))
    state = jax.random.normal(next(keys), (ROWS, HEADS, HEAD_DIM, STATE_SIZE))
    starts = jnp.cumsum(jnp.asarray([0, *lens], jnp.int32), dtype=jnp.int32)
    is_decode = num_tokens == ROWS
    chunked = functools.partial(ssm.ssd, max_query_len=1 if is_decode else None)
    runs: dict[str, Callable] = {what: chunked}
    if not is_decode:
      runs["the same, token by token"] = reference.ssd
    inputs = (x, dt, a, b, c)
    for label, op in runs.items():
      run = jax.jit(lambda state, *args, op=op: op(*args[:-1], state, args[-1]))
      num = max(3, repeats // 3)
      value = timing.call_seconds(run, state, *inputs, starts, repeats=num)
      sizes = f"H={HEADS} P={HEAD_DIM} N={STATE_SIZE}"
      yield row(what=label, sizes=sizes, value=seconds(value, "ms"), unit="ms")
