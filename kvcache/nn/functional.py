"""A module as a plain function whose arrays are arguments.

A compiled loop must not see a module: every call would walk its attributes in Python
(thousands of callbacks per step for a deep model), and arrays found by closure would
become constants of the program. `as_function` walks the module once.
"""

import functools
from typing import Any

from flax import nnx
import jax
from jax.tree_util import Partial

from kvcache.printing import count, Node


def as_function(module: nnx.Module) -> Partial:
  """Returns a callable that does what `module` does and owns its arrays as leaves.

  The result is a pytree: pass it to a jitted function, close a `while_loop` over it, or
  shard it like any tree of arrays. Its code part is the same for modules of the same
  structure, so programs compiled for one set of weights serve another one without a new
  trace. It is a picture of the module at the time of the call: later changes of the
  module are not seen.

  Args:
    module: A module whose call changes none of its variables.

  Returns:
    A `jax.tree_util.Partial` with the call signature of `module`.

  Raises:
    ValueError: It is no module.
  """
  if not isinstance(module, nnx.Module):
    raise ValueError(f"module must be an nnx.Module, got {type(module).__name__}")
  graph, state = nnx.split(module)
  arrays, structure = jax.tree.flatten(state)
  return Partial(_call_of(graph, structure), _Weights(arrays=arrays))


class _Weights(Node, kw_only=True):
  """The arrays of a module, in a line when printed."""

  arrays: list[jax.Array]

  def __repr__(self) -> str:
    num = sum(getattr(array, "size", 0) for array in self.arrays)
    return f"{count(len(self.arrays), 'array')} of {count(num, 'element')}"


class _CallModule:
  """The code part of a module's function, which can be pickled."""

  def __init__(self, graph: nnx.GraphDef[Any], structure: Any):
    self.graph, self.structure = graph, structure

  def __call__(self, weights: _Weights, *args: Any, **kwargs: Any) -> Any:
    state = jax.tree.unflatten(self.structure, weights.arrays)
    return nnx.merge(self.graph, state)(*args, **kwargs)

  def __repr__(self) -> str:
    return "call_module"

  def __reduce__(self) -> tuple[Any, ...]:
    return _call_of, (self.graph, self.structure)


@functools.lru_cache(maxsize=64)
def _call_of(graph: nnx.GraphDef[Any], structure: Any) -> _CallModule:
  """Makes one object per structure: jit compares functions by identity."""
  return _CallModule(graph, structure)
