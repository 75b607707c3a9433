"""Batches of attention arguments on the device, with random contents."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.arg_specs import ArgSpec
from pallas_kernels.paged_attention.call import Call

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Arguments of one call.

  Attributes:
    spec: Whose they are.
    arrays: The arrays, by argument.
    max_query_len: 1 for a decode step, else None.
    num_copies: How often the pool holds the batch; `block_tables + i * blocks_per_copy`
      names copy `i`.
    blocks_per_copy: Blocks of one copy.
  """

  spec: ArgSpec
  arrays: Arrays
  max_query_len: int | None
  num_copies: int
  blocks_per_copy: int

  def in_float32(self) -> "Batch":
    """The same numbers in float32; quantised pools stay as they are."""

    def cast(x: Any) -> Any:
      is_float = x is not None and jnp.issubdtype(x.dtype, jnp.floating)
      return x.astype(jnp.float32) if is_float else x

    arrays = {name: cast(x) for name, x in self.arrays.items()}
    return dataclasses.replace(self, arrays=arrays)


def make_batch(
  spec: ArgSpec,
  rows: Sequence[tuple[int, int]],
  *,
  is_decode: bool,
  num_copies: int = 1,
  seed: int = 0,
) -> Batch:
  """A batch whose blocks stand anywhere in the pool.

  Args:
    spec: Shapes, dtypes and options.
    rows: Tokens stored, and how many of these are queries, of each row.
    is_decode: Whether token `s` is the query of row `s`.
    num_copies: How often the pool holds the batch.
    seed: Of the contents.
  """
  lens, query_lens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
  counts = -(-lens // spec.block_size)
  num_blocks = int(counts.sum()) + 1
  num_tokens = len(rows) if is_decode else max(int(query_lens.sum()), 1)
  shapes = spec.shapes(
    num_seqs=len(rows),
    num_blocks=num_copies * num_blocks,
    max_blocks=max(int(counts.max()), 1),
    num_tokens=num_tokens,
  )
  rng = np.random.default_rng(seed)
  ids = 1 + rng.permutation(num_blocks - 1)
  tables = np.zeros(shapes["block_tables"].shape, np.int32)
  for row, count in enumerate(counts):
    tables[row, :count], ids = ids[:count], ids[count:]
  starts = np.arange(len(rows) + 1) if is_decode else np.append(0, query_lens.cumsum())
  known = {
    "block_tables": jnp.asarray(tables),
    "seq_lens": jnp.asarray(np.where(query_lens > 0, lens, 0)),
    "cu_seqlens": jnp.asarray(starts, jnp.int32),
  }
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  arrays: Arrays = dict(known)
  for key, (name, shape) in zip(keys, shapes.items(), strict=True):
    if name not in known:
      random = functools.partial(_random, key)
      arrays[name] = None if shape is None else random(shape.shape, shape.dtype)
  return Batch(
    spec=spec,
    arrays=arrays,
    max_query_len=1 if is_decode else None,
    num_copies=num_copies,
    blocks_per_copy=num_blocks,
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """About unit variance once scaled: bits of float8, integers, scales, or floats."""
  if dtype == jnp.uint8:
    values = jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(values, jnp.uint8)
  if dtype == jnp.int8:
    return jax.random.randint(key, shape, -2, 3, jnp.int8)
  if dtype == jnp.float32 and len(shape) == 3:  # scales are
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5)
  return jax.random.normal(key, shape, dtype)


def run_attention(
  batch: Batch, implementation: str, *, interpret: bool = False
) -> Callable[[Arrays], tuple[Any, Any]]:
  """A function of a batch's arrays that returns `(out, lse)`."""
  spec, most = batch.spec, batch.max_query_len
  if interpret:
    from pallas_kernels.paged_attention import triton

    options = spec.options | {"sm_scale": spec.sm_scale or spec.head_dim**-0.5}
    return lambda arrays: triton.paged_attention(
      Call(**arrays, max_query_len=most, **options), interpret=True
    )
  kernel = functools.partial(
    paged_attention, implementation=implementation, return_lse=True, **spec.options
  )
  return lambda arrays: kernel(**arrays, max_query_len=most)
