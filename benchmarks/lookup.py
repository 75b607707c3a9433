"""Finding a long cached prefix, hashing included."""

from collections.abc import Iterator
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
import kvcache

TITLE = "Prefix lookup"
LOOKUP_MS, GROWTH = 0.2, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`.
    width: `P`.
    num_blocks: Of the prefix that is found.
    pools: `N`, one after another, from the smallest to the largest.
    repeats: Of each measurement.
  """

  rows: int
  width: int
  num_blocks: int
  pools: tuple[int, ...]
  repeats: int


_QUICK = Sizes(
  rows=4,
  width=1024,
  num_blocks=1000,
  pools=(1 << 12, 1 << 16, 1 << 20),
  repeats=20,
)
SIZES = {
  Size.FULL: dataclasses.replace(_QUICK, repeats=100),
  Size.QUICK: _QUICK,
  Size.TINY: Sizes(rows=2, width=8, num_blocks=3, pools=(32,), repeats=1),
}


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes = SIZES[size]
  num_blocks, repeats = sizes.num_blocks, sizes.repeats
  find = jax.jit(kvcache.find)
  times = []
  for N in sizes.pools:
    config = scenes.make_config(sizes.rows, N, sizes.width)
    # One token more than the prefix, since the last one is always computed.
    length = num_blocks * scenes.BLOCK_SIZE + 1
    tokens, lengths = scenes.prompts(1, length), np.array([length])
    ctx = scenes.filled(scenes.empty(config), tokens, lengths)
    ctx = jax.jit(kvcache.publish, donate_argnums=0)(ctx)
    arguments = (ctx, tokens, jnp.asarray(lengths, jnp.int32))
    _, num_hits = find(*arguments)
    if int(num_hits[0]) != num_blocks:
      raise RuntimeError(f"found {int(num_hits[0])} of {num_blocks} blocks")
    times.append(timing.steady_seconds(find, *arguments, repeats=repeats))
    yield Row(
      section=TITLE,
      what=f"find {num_blocks} blocks, one host call",
      sizes=f"N={scenes.short(N)}",
      value=seconds(times[-1], "ms"),
      unit="ms",
      target=LOOKUP_MS,
      repeats=repeats,
    )
  yield Row(
    section=TITLE,
    what=f"find {num_blocks} blocks: growth",
    sizes=f"N={scenes.short(sizes.pools[0])} to {scenes.short(sizes.pools[-1])}",
    value=times[-1] / times[0],
    unit="x",
    target=GROWTH,
    repeats=repeats,
  )
