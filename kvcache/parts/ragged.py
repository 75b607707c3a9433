"""Flat lists of ragged rows: row `s` has `counts[s]` entries, laid end to end.

Every transition that touches a varying number of things per row works on such a list of
static length, so that its cost is the number of things and not rows times the longest
row.
"""

import jax
from jax import Array, lax
import jax.numpy as jnp

from kvcache.parts import loops
from kvcache.printing import Node

_COPY_BATCH = 4
_NEVER = 2**31 - 1


class Ragged(Node, kw_only=True):
  """The first `E` entries of the rows, in row order.

  Attributes:
    rows: `[E]` int32. Row of each entry, 0 where not valid.
    offsets: `[E]` int32. Index of the entry within its row, 0 where not valid.
    is_valid: `[E]` bool. False past the last entry.
    starts: `[S]` int32. Flat index of each row's first entry.
    total: `[]` int32. Entries of all rows, which may exceed `E`.
  """

  rows: Array
  offsets: Array
  is_valid: Array
  starts: Array
  total: Array


def expand(counts: Array, num_entries: int) -> Ragged:
  """Lists the first `num_entries` entries of rows with `counts` entries each.

  Args:
    counts: `[S]` int32, non-negative.
    num_entries: `E`, the static length of the list.
  """
  ends = jnp.cumsum(counts)
  starts = ends - counts
  entry = jnp.arange(num_entries, dtype=jnp.int32)
  is_valid = entry < ends[-1]
  rows = jnp.searchsorted(ends, entry, side="right", method="scan_unrolled")
  rows = jnp.where(is_valid, rows.astype(jnp.int32), 0)
  offsets = jnp.where(is_valid, entry - starts[rows], 0)
  # Without the barrier XLA recomputes the search inside every consumer.
  rows, offsets = lax.optimization_barrier((rows, offsets))
  return Ragged(
    rows=rows, offsets=offsets, is_valid=is_valid, starts=starts, total=ends[-1]
  )


def first_come(need: Array, available: Array, *, order: Array | None = None):
  """Serves rows in order until one does not fit; later ones then wait too.

  Args:
    need: `[S]` int32, non-negative. Or `[G, S]`, of `G` things.
    available: `[]` int32, or `[G]`.
    order: `[S]` int32 permutation: the row served first, second and so on. A row that
      it does not name gets nothing.

  Returns:
    `(starts, fits)`: int32 as `need`, what the rows before took; `[S]` bool. A row that
    needs nothing always fits.
  """
  if order is None:
    ends = jnp.cumsum(need, axis=-1)
  else:
    ends = jnp.cumsum(need[..., order], axis=-1)
    ends = jnp.full_like(need, _NEVER).at[..., order].set(ends)
  if need.ndim == 1:
    return ends - need, (need == 0) | (ends <= available)
  fits = jnp.all(need == 0, axis=0) | jnp.all(ends <= available[:, None], axis=0)
  return ends - need, fits


def ranks(mask: Array) -> Array:
  """`[E]` int32: how many entries of a `[E]` bool mask are set before each one."""
  set_before = jnp.cumsum(mask.astype(jnp.int32))
  return set_before - mask.astype(jnp.int32)


def masked(index: Array, mask: Array, size: int) -> Array:
  """Returns `index` where `mask`, else one past the end, for scatters that drop."""
  return jnp.where(mask, index, jnp.int32(size))


def hold(*arrays: Array):
  """Keeps values that were gathered apart from a later scatter that depends on them."""
  held = lax.optimization_barrier(arrays)
  return held[0] if len(arrays) == 1 else held


def read(array: Array, *index: Array) -> tuple[Array, Array]:
  """Gathers from an array that is scattered into afterwards.

  XLA updates in place only what nobody reads any more, and orders a read before a write
  only by their data. The array returned depends on the values gathered; use it from
  here on, or the scatter copies the whole array.

  Returns:
    `(array[index], array)`.
  """
  return lax.optimization_barrier((array[index], array))


@loops.compiled("num_rows")
def copy_rows[Pools](
  pools: Pools, source: Array, target: Array, *, num_rows: int
) -> Pools:
  """Copies rows of every layer of every array, in place.

  Costs what is copied: a few rows at a time, so that a list of mostly dropped entries
  moves next to nothing.

  Args:
    pools: Pytree of arrays `[L, num_rows, ...]`.
    source: `[F]` int32.
    target: `[F]` int32, distinct, and none of them a source; `num_rows` drops the
      entry.
    num_rows: Rows of each array.
  """
  size = source.shape[0]
  mask = target < num_rows
  to = masked(ranks(mask), mask, size)
  source = jnp.zeros(size, jnp.int32).at[to].set(source, mode="drop")
  target = jnp.full(size, num_rows).at[to].set(target, mode="drop")
  num = sum_int(mask)

  def copy(state: tuple[Pools, Array]) -> tuple[Pools, Array]:
    pools, start = state
    at = start + jnp.arange(min(size, _COPY_BATCH), dtype=jnp.int32)
    at = jnp.minimum(at, size - 1)  # Copying the last one twice is harmless.

    def put(pool: Array) -> Array:
      rows = hold(pool[:, source[at]])
      return pool.at[:, target[at]].set(rows, mode="drop")

    return jax.tree.map(put, pools), start + at.shape[0]

  # Ends because `start` grows to `num`.
  pools, _ = lax.while_loop(lambda state: state[1] < num, copy, (pools, jnp.int32(0)))
  return pools


def sum_int(mask: Array) -> Array:
  """`[]` int32 number of set entries."""
  return jnp.sum(mask, dtype=jnp.int32)
