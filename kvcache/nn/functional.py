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
  """
  graph, state = nnx.split(module)
  arrays, structure = jax.tree.flatten(state)
  return Partial(_call_of(graph, structure), arrays)


class _CallModule:
  """The code part of a module's function, which can be pickled."""

  def __init__(self, graph: nnx.GraphDef[Any], structure: Any):
    self.graph, self.structure = graph, structure

  def __call__(self, arrays: list[jax.Array], *args: Any, **kwargs: Any) -> Any:
    module = nnx.merge(self.graph, jax.tree.unflatten(self.structure, arrays))
    return module(*args, **kwargs)

  def __reduce__(self) -> tuple[Any, ...]:
    return _call_of, (self.graph, self.structure)


@functools.lru_cache(maxsize=64)
def _call_of(graph: nnx.GraphDef[Any], structure: Any) -> _CallModule:
  """Makes one object per structure: jit compares functions by identity."""
  return _CallModule(graph, structure)
