"""Recurrent states and layer groups: what they add to a step."""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import bookkeeping, scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import Context, RecurrentLayer
from pallas_kernels import ssm
from pallas_kernels.ssm import reference

TITLE = "Recurrent states and layer groups"
RATIO = 1.5
NEVER = 1 << 20
"""Blocks between snapshots: more than there are."""
STATE = RecurrentLayer(state={"ssm": (1,)})
HEAD_DIM, GROUPS, STATE_SIZE = 32, 1, 128  # Granite 4 H 350M


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S` of the steps without a model.
    pool: `(N, P)` of these.
    window: Tokens that a layer with a sliding window sees.
    kinds: What is also measured with layers of one other kind.
    layers: How many hold states, and how many pairs of a full layer and one with a
      window there are beside them, where all three kinds come together.
    few_rows: `S` where states are large enough to be felt.
    intervals: Blocks between snapshots there.
    state_size: Elements of the state of a row in a layer there.
    heads: Of the recurrence.
    chunk: Tokens of a prompt that it takes at once.
    repeats: Of each measurement.
  """

  rows: int
  pool: tuple[int, int]
  window: int
  kinds: tuple[str, ...]
  layers: tuple[int, int]
  few_rows: int
  intervals: tuple[int, ...]
  state_size: int
  heads: int
  chunk: int
  repeats: int


_QUICK = Sizes(
  rows=256,
  pool=(1 << 16, 64),
  window=128,
  kinds=("with snapshots", "with a sliding window"),
  layers=(24, 4),  # as a model of 32 may have
  few_rows=16,
  intervals=(4, NEVER),
  state_size=1 << 14,
  heads=48,
  chunk=256,
  repeats=10,
)
SIZES = {
  Size.FULL: dataclasses.replace(_QUICK, repeats=30),
  Size.QUICK: _QUICK,
  Size.TINY: Sizes(
    rows=2,
    pool=(32, 8),
    window=16,
    kinds=(),
    layers=(2, 1),
    few_rows=2,
    intervals=(4,),
    state_size=4,
    heads=2,
    chunk=8,
    repeats=1,
  ),
}


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


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  wanted = SIZES[size]
  repeats, S, window = wanted.repeats, wanted.rows, wanted.window
  num_states, num_pairs = wanted.layers
  row = functools.partial(Row, section=TITLE, repeats=repeats)
  plain = scenes.make_config(S, *wanted.pool)
  (layer,) = plain.layers
  windowed = dataclasses.replace(layer, sliding_window=window)
  states = {"num_snapshots": 2 * S, "snapshot_interval": 2}
  blocks = {"num_window_blocks": S * 2 * (window // scenes.BLOCK_SIZE + 2)}
  hybrid = dataclasses.replace(plain, layers=(layer, STATE), **states)
  groups = dataclasses.replace(plain, layers=(layer, windowed), **blocks)
  # What these layers keep is tiny.
  layers = (STATE,) * num_states + (layer, windowed) * num_pairs
  all_three = dataclasses.replace(plain, layers=layers, **states, **blocks)
  all_kinds = f"{len(layers)} layers in three groups"
  configs = {
    "attention alone": plain,
    "with snapshots": hybrid,
    "with a sliding window": groups,
    all_kinds: all_three,
  }
  times = {}
  for name in ("attention alone", *wanted.kinds, all_kinds):
    config = configs[name]
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
  ratio = times[all_kinds] / times["attention alone"]
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
  yield from _snapshots(row, wanted)
  yield from _recurrences(row, wanted)


def _snapshots(row: Callable[..., Row], wanted: Sizes) -> Iterator[Row]:
  """A snapshot is a row that is not written again: nothing is copied."""
  S, (_, P) = wanted.few_rows, wanted.pool
  for interval in wanted.intervals:
    config = dataclasses.replace(
      scenes.make_config(S, 64 * S, P),
      layers=(RecurrentLayer(state={"ssm": (wanted.state_size,)}),) * 4,
      num_snapshots=4 * S,
      snapshot_interval=interval,
    )
    ctx, length = scenes.decoding(config)
    value = bookkeeping.round_seconds(
      states_step, ctx, repeats=wanted.repeats, length=length, restart=restart
    )
    often = f"one in {interval} blocks" if interval < NEVER else "none"
    what = f"states of 4 layers, snapshots: {often}"
    yield row(what=what, sizes=f"S={S}", value=seconds(value, "us"), unit="us")


def _recurrences(row: Callable[..., Row], wanted: Sizes) -> Iterator[Row]:
  """One layer of a small Granite 4 hybrid."""
  S, heads, chunk = wanted.few_rows, wanted.heads, wanted.chunk
  for what, lens, num_tokens in (
    (f"ssd, {S} rows decode", [1] * S, S),
    (f"ssd, a chunk of {chunk} tokens", [chunk] + [0] * (S - 1), chunk),
  ):
    keys = iter(jax.random.split(jax.random.key(0), 6))
    x = jax.random.normal(next(keys), (num_tokens, heads, HEAD_DIM))
    dt = jax.random.uniform(next(keys), (num_tokens, heads))
    a = -jax.random.uniform(next(keys), (heads,))
    b = jax.random.normal(next(keys), (num_tokens, GROUPS, STATE_SIZE))
    c = jax.random.normal(next(keys), (num_tokens, GROUPS, STATE_SIZE))
    state = jax.random.normal(next(keys), (S, heads, HEAD_DIM, STATE_SIZE))
    starts = jnp.cumsum(jnp.asarray([0, *lens], jnp.int32), dtype=jnp.int32)
    is_decode = num_tokens == S
    chunked = functools.partial(ssm.ssd, max_query_len=1 if is_decode else None)
    runs: dict[str, Callable] = {what: chunked}
    if not is_decode:
      runs["the same, token by token"] = reference.ssd
    inputs = (x, dt, a, b, c)
    for label, op in runs.items():
      run = jax.jit(lambda state, *args, op=op: op(*args[:-1], state, args[-1]))
      num = min(wanted.repeats, max(3, wanted.repeats // 3))
      value = timing.call_seconds(run, state, *inputs, starts, repeats=num)
      sizes = f"H={heads} P={HEAD_DIM} N={STATE_SIZE}"
      yield row(what=label, sizes=sizes, value=seconds(value, "ms"), unit="ms")
