"""Decode attention of rows that share a prefix, which is read once or by each."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.report import Row, seconds
from pallas_kernels.paged_attention import cascade_attention, paged_attention

TITLE = "Attention of 64 rows that share 4096 tokens"
S, H, K, D, BLOCK = 64, 8, 2, 64, 16
NUM_SHARED, NUM_OWN = 256, 4  # blocks of each row


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  num_blocks = 1 + NUM_SHARED + S * NUM_OWN
  shared = jnp.broadcast_to(1 + jnp.arange(NUM_SHARED), (S, NUM_SHARED))
  own = 1 + NUM_SHARED + jnp.arange(S * NUM_OWN).reshape(S, NUM_OWN)
  keys = jax.random.split(jax.random.key(0), 3)
  pool = (num_blocks, K, BLOCK, D)
  k, v = (jax.random.normal(key, pool) for key in keys[:2])
  args = (
    *(jax.random.normal(keys[2], (S, H, D)), k, v),
    jnp.concatenate([shared, own], axis=1).astype(jnp.int32),
    jnp.full(S, (NUM_SHARED + NUM_OWN) * BLOCK, jnp.int32),
    jnp.arange(S + 1, dtype=jnp.int32),
  )
  cascade = functools.partial(cascade_attention, num_prefix_blocks=NUM_SHARED)
  row = functools.partial(
    Row, section=TITLE, sizes=f"H={H} K={K} D={D}", repeats=4 if is_quick else 8
  )
  times = []
  for name, attend in (("plain", paged_attention), ("cascade", cascade)):
    run = jax.jit(functools.partial(attend, max_query_len=1))
    times.append(
      timing.call_seconds(
        lambda q, run=run: run(q, *args[1:]), args[0], repeats=row.keywords["repeats"]
      )
    )
    yield row(what=name, value=seconds(times[-1], "ms"), unit="ms")
  yield row(what="cascade, of plain", value=100 * times[1] / times[0], unit="%")
