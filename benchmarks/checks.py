"""What it costs to check the invariants, and that it is nothing where nobody asks."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools

import chex
import jax
from jax import Array, lax
import jax.numpy as jnp

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache
from kvcache import Context

TITLE = "Checks of the invariants"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`.
    width: `P`.
    pools: `N`, one after another.
    iterations: Of a loop that checks nothing; one that does has a part of them.
    repeats: Of each measurement.
  """

  rows: int
  width: int
  pools: tuple[int, ...]
  iterations: int
  repeats: int


_FULL = Sizes(
  rows=256, width=64, pools=(1 << 12, 1 << 16, 1 << 20), iterations=512, repeats=10
)
SIZES = {
  Size.FULL: _FULL,
  Size.QUICK: dataclasses.replace(_FULL, pools=(1 << 12, 1 << 16), repeats=5),
  Size.TINY: Sizes(rows=2, width=8, pools=(32,), iterations=32, repeats=1),
}


def step(ctx: Context) -> Context:
  """Drops a token of each row and computes one again: as sound as before.

  It publishes, too, though there is nothing to publish: XLA would look but once at an
  index that no step can change.
  """
  ones = jnp.ones(ctx.config.max_seqs, jnp.int32)
  ctx, _ = kvcache.rewind(ctx, ones)
  ctx, _ = kvcache.extend(ctx, ones)
  return kvcache.publish(kvcache.commit(ctx, ones, kvcache.step_metadata(ctx, ones)))


def checked_step(ctx: Context) -> Context:
  """The same, and looks at what it made."""
  ctx = step(ctx)
  kvcache.check_invariants(ctx)
  return ctx


def in_loop(step: Callable[[Context], Context]) -> Callable[..., Context]:
  """`run(ctx, num)`, jitted."""

  def run(ctx: Context, num: Array) -> Context:
    return lax.fori_loop(0, num, lambda _, ctx: step(ctx), ctx)

  return jax.jit(run, donate_argnums=0)


@contextlib.contextmanager
def no_asserts() -> Iterator[None]:
  """Nothing is asserted of what is traced within."""
  chex.disable_asserts()
  try:
    yield
  finally:
    chex.enable_asserts()


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  wanted = SIZES[size]
  repeats = wanted.repeats
  chexify = functools.partial(chex.chexify, async_check=False)
  for N in wanted.pools:
    config = scenes.make_config(wanted.rows, N, wanted.width)
    base = functools.partial(
      Row, section=TITLE, sizes=scenes.label(config), unit="us", repeats=repeats
    )

    def called(what: str, run, ctx: Context, base=base) -> Row:
      value = timing.call_seconds(run, ctx, repeats=repeats)
      return base(what=f"{what}, one host call", value=seconds(value, "us"))

    def looped(what: str, run, ctx: Context, *, num: int, base=base) -> Row:
      value = timing.step_seconds(run, ctx, repeats=repeats, num=num)
      return base(what=f"{what}, in a loop", value=seconds(value, "us"))

    ctx = jax.jit(kvcache.publish)(scenes.decoding(config)[0])
    few, many = wanted.iterations // 32, wanted.iterations
    yield called("check_invariants", kvcache.check_invariants, ctx)
    plain = jax.jit(step, donate_argnums=0)
    yield called("step", plain, ctx)
    yield called("step, chexified, unchecked", chexify(plain), ctx)
    yield looped("step", in_loop(step), ctx, num=many)
    with no_asserts():
      silent = in_loop(checked_step)
      yield looped("step, checks turned off", silent, ctx, num=many)
    verified = chexify(in_loop(checked_step))
    yield looped("step, chexified, checked", verified, ctx, num=few)
