"""Finding a long cached prefix, hashing included."""

from collections.abc import Iterator
import functools

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from benchmarks import scenes, timing
from benchmarks.report import Row, seconds
import kvcache
from kvcache import PrefixIndex

TITLE = "Prefix lookup"
NUM_BLOCKS = 1000
SIZES = (1 << 12, 1 << 16, 1 << 20)
LOOKUP_MS, GROWTH = 0.2, 2.0


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  repeats = 20 if is_quick else 100
  times = {}
  for N in SIZES:
    config = scenes.make_config(4, N, 1024)
    # One token more than the prefix, since the last one is always computed.
    length = NUM_BLOCKS * scenes.BLOCK_SIZE + 1
    tokens, lengths = scenes.prompts(1, length), np.array([length])
    ctx = scenes.filled(scenes.empty(config), tokens, lengths)
    ctx = jax.jit(kvcache.publish, donate_argnums=0)(ctx)
    shapes = jax.eval_shape(functools.partial(kvcache.init, config))

    @jax.jit
    def find(index: PrefixIndex, tokens: Array, lengths: Array, shapes=shapes):
      return kvcache.find(shapes.replace(prefix=index), tokens, lengths)

    arguments = (ctx.prefix, tokens, jnp.asarray(lengths, jnp.int32))
    _, num_hits = find(*arguments)
    if int(num_hits[0]) != NUM_BLOCKS:
      raise RuntimeError(f"found {int(num_hits[0])} of {NUM_BLOCKS} blocks")
    times[N] = timing.steady_seconds(find, *arguments, repeats=repeats)
    yield Row(
      section=TITLE,
      what=f"find {NUM_BLOCKS} blocks, one host call",
      sizes=f"N={scenes.short(N)}",
      value=seconds(times[N], "ms"),
      unit="ms",
      target=LOOKUP_MS,
      repeats=repeats,
    )
  yield Row(
    section=TITLE,
    what=f"find {NUM_BLOCKS} blocks: growth",
    sizes=f"N={scenes.short(SIZES[0])} to {scenes.short(SIZES[-1])}",
    value=times[SIZES[-1]] / times[SIZES[0]],
    unit="x",
    target=GROWTH,
    repeats=repeats,
  )
