"""How weights are split over devices: by heads, features in between, and words."""

from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_BY_OUTPUT = {"qkv", "q", "gate_up", "expert_gate_up", "in_proj", "head"}
_BY_INPUT = {"out", "down", "expert_down"}
_BY_HEAD = {"k_up", "v_up"}


def weight_specs(
  module: nnx.Module, axes: Sequence[str], *, mesh: Mesh | AbstractMesh | None = None
) -> nnx.State[Any, Any]:
  """Returns a `PartitionSpec` for each array of a module made of this package's layers.

  Projections into a layer are split by their outputs and those out of it by their
  inputs, so that XLA adds up the devices' parts once behind attention and once behind
  the feed-forward layer; output matrices are split by words. What does not divide, and
  all the rest, is whole on every device.

  Args:
    module: The model.
    axes: `config.head_axes`.
    mesh: The mesh that has these axes; the one set with `jax.set_mesh` if omitted.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  devices = math.prod(mesh.shape[name] for name in axes)

  def spec(path: tuple[Any, ...], leaf: jax.Array) -> P:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    is_bias, axis = names[-1] == "bias", None
    owner = names[-2] if names[-1] in ("weight", "bias") else names[-1]
    if owner in _BY_OUTPUT:
      axis = -1 if is_bias else -2
    elif owner in _BY_INPUT and not is_bias:
      axis = -1
    elif owner in _BY_HEAD:
      axis = -3
    if axis is None or leaf.shape[axis] % devices:
      return P()
    return P(*[None] * (leaf.ndim + axis), tuple(axes))

  return jax.tree_util.tree_map_with_path(spec, nnx.state(module))


def place_weights[Module: nnx.Module](
  module: Module, axes: Sequence[str], *, mesh: Mesh | None = None
) -> Module:
  """Moves a module's arrays to the devices of a mesh, after `weight_specs`."""
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  graph, state = nnx.split(module)
  specs = weight_specs(module, axes, mesh=mesh)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  return nnx.merge(graph, jax.device_put(state, shardings))
