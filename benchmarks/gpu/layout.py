"""What the layout of a pool costs: one kernel, two orders of the axes.

This project keeps the tokens of a block and head together, `[N, K, block_size, D]`.
Others keep the heads of a token together, `[N, block_size, K, D]` ("NHD"). The second
variant here is the same Triton kernel but for the line that says where a token lies.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from jax import Array, lax
import jax.numpy as jnp

from benchmarks.gpu.batch import Arrays, Batch, run_attention
from pallas_kernels.paged_attention import triton_walk
from pallas_kernels.paged_attention.triton_walk import Layer, Memory

NHD = "triton, NHD pool"


def candidates(
  batch: Batch, *, interpret: bool
) -> Iterator[tuple[str, Callable[[], tuple[Arrays, Any]]]]:
  """Names, and how to make arrays and a function of them."""
  run = run_attention(batch, "triton", interpret=interpret)

  def run_nhd(arrays: Arrays) -> Any:
    with mock.patch.object(triton_walk, "_slots", _slots):
      return run(arrays)

  def make_nhd() -> tuple[Arrays, Any]:
    return batch.arrays | {x: _as_nhd(batch.arrays[x]) for x in ("k", "v")}, run_nhd

  yield "triton", lambda: (batch.arrays, run)
  yield NHD, make_nhd


def _as_nhd(pool: Array) -> Array:
  """The pool in the other order, under the shape that the kernel expects."""
  return jnp.swapaxes(pool, 1, 2).reshape(pool.shape)


def _slots(
  memory: Memory, layer: Layer, row: Array, head: Array, place: Array
) -> Array:
  """Index of each position of a row in the flat pools, as in `triton_walk`."""
  size, num_kv_heads = layer.block_size, layer.num_kv_heads
  block = memory.block_tables[row, lax.div(place, size)]
  num_blocks = memory.k.shape[0] // (num_kv_heads * size)
  block = jnp.clip(block, 0, num_blocks - 1)
  return (block * size + lax.rem(place, size)) * num_kv_heads + head
