"""Decode attention of rows that share a prefix, which is read once or by each."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.report import Row, seconds
from benchmarks.sizes import Size
from pallas_kernels.paged_attention import cascade_attention, paged_attention

TITLE = "Attention of 64 rows that share 4096 tokens"
H, K, D, BLOCK = 8, 2, 64, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    rows: `S`.
    num_shared: Blocks at the start of every row.
    num_own: Further blocks of each row.
    repeats: Of each measurement.
  """

  rows: int
  num_shared: int
  num_own: int
  repeats: int


_QUICK = Sizes(rows=64, num_shared=256, num_own=4, repeats=4)
SIZES = {
  Size.FULL: dataclasses.replace(_QUICK, repeats=8),
  Size.QUICK: _QUICK,
  Size.TINY: Sizes(rows=2, num_shared=2, num_own=1, repeats=1),
}


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  sizes = SIZES[size]
  S, num_shared, num_own = sizes.rows, sizes.num_shared, sizes.num_own
  num_blocks = 1 + num_shared + S * num_own
  shared = jnp.broadcast_to(1 + jnp.arange(num_shared), (S, num_shared))
  own = 1 + num_shared + jnp.arange(S * num_own).reshape(S, num_own)
  keys = jax.random.split(jax.random.key(0), 3)
  pool = (num_blocks, K, BLOCK, D)
  k, v = (jax.random.normal(key, pool) for key in keys[:2])
  args = (
    *(jax.random.normal(keys[2], (S, H, D)), k, v),
    jnp.concatenate([shared, own], axis=1).astype(jnp.int32),
    jnp.full(S, (num_shared + num_own) * BLOCK, jnp.int32),
    jnp.arange(S + 1, dtype=jnp.int32),
  )
  cascade = functools.partial(cascade_attention, num_prefix_blocks=num_shared)
  row = functools.partial(
    Row, section=TITLE, sizes=f"H={H} K={K} D={D}", repeats=sizes.repeats
  )
  times = []
  for name, attend in (("plain", paged_attention), ("cascade", cascade)):
    run = jax.jit(functools.partial(attend, max_query_len=1))
    times.append(
      timing.call_seconds(
        lambda q, run=run: run(q, *args[1:]), args[0], repeats=sizes.repeats
      )
    )
    yield row(what=name, value=seconds(times[-1], "ms"), unit="ms")
  yield row(what="cascade, of plain", value=100 * times[1] / times[0], unit="%")
