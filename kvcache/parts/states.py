"""StateStore: the recurrent states of all sequences; read, write, copy.

A state is any set of named arrays of fixed size per sequence. One buffer holds an
array of all layers, so that a layer is an offset, as in `KVStore`. Who owns which row
is told by `kvcache.parts.state_rows`.
"""

from collections.abc import Mapping

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvcache.config import RecurrentLayer
from kvcache.parts import ragged
from kvcache.printing import Node


class StateStore(Node, kw_only=True):
  """States of all rows of all recurrent layers.

  Attributes:
    arrays: Name -> `[R, M, ...]`. Row `NULL_STATE` is zero and never written.
  """

  arrays: dict[str, Array]

  @property
  def num_layers(self) -> int:
    """`R`."""
    return next(iter(self.arrays.values())).shape[0]

  @property
  def num_states(self) -> int:
    """`M`, the null state included."""
    return next(iter(self.arrays.values())).shape[1]


def init(layer: RecurrentLayer, *, num_layers: int, num_states: int) -> StateStore:
  """Makes a store of zeros."""
  lead = (num_layers, num_states)
  return StateStore(
    arrays={
      name: jnp.zeros((*lead, *array.shape), array.dtype)
      for name, array in layer.arrays.items()
    }
  )


def read(store: StateStore, layer: ArrayLike, state_ids: Array) -> dict[str, Array]:
  """Reads the states of one layer: `state_ids [S]` -> name -> `[S, ...]`."""
  rows = jnp.asarray(layer, jnp.int32) * store.num_states + state_ids
  return {name: ragged.hold(_flat(pool)[rows]) for name, pool in store.arrays.items()}


def write(
  store: StateStore, layer: ArrayLike, state: Mapping[str, Array], state_ids: Array
) -> StateStore:
  """Writes the states of one layer; entries at or past `M` are dropped.

  Args:
    store: The store.
    layer: `[]` int32.
    state: Name -> `[S, ...]` or `[S, W, ...]`.
    state_ids: `[S]` or `[S, W]` int32, distinct or dropped.
  """
  first = jnp.asarray(layer, jnp.int32) * store.num_states
  end = store.num_layers * store.num_states
  rows = ragged.masked(first + state_ids, state_ids < store.num_states, end)

  def put(pool: Array, value: Array) -> Array:
    flat = _flat(pool).at[rows].set(value.astype(pool.dtype), mode="drop")
    return flat.reshape(pool.shape)

  return StateStore(arrays=jax.tree.map(put, store.arrays, dict(state)))


def copy(store: StateStore, source: Array, target: Array) -> StateStore:
  """Copies states in all layers, `source [F]` to `target [F]`; `M` drops the entry."""
  return ragged.copy_rows(store, source, target, num_rows=store.num_states)


def clear(store: StateStore, state_ids: Array) -> StateStore:
  """Zeroes states in all layers: `state_ids [E]` int32; `M` drops the entry."""
  return jax.tree.map(lambda pool: pool.at[:, state_ids].set(0, mode="drop"), store)


def put(store: StateStore, state: Mapping[str, Array], state_ids: Array) -> StateStore:
  """Writes the states of all layers, name -> `[R, F, ...]`; `M` drops the entry."""
  arrays = {
    name: pool.at[:, state_ids].set(state[name], mode="drop")
    for name, pool in store.arrays.items()
  }
  return StateStore(arrays=arrays)


def _flat(pool: Array) -> Array:
  return pool.reshape(-1, *pool.shape[2:])
