"""A Llama cut into parts, for a `jax.shard_map` around the whole loop.

Each device has its query heads, the kv heads that these read, and its share of the
features between gate and down; embedding, norms and output matrix are whole. A layer
adds up the parts twice, behind attention and behind the feed-forward layer, and nothing
else is ever sent.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
import numpy as np

from kvcache.models.llama import Llama, LlamaConfig
from kvcache.nn.functional import as_function
from kvcache.verbs import sharding


def cut_llama(
  model: Llama, axes: Sequence[str], *, mesh: Mesh | None = None
) -> tuple[Partial, Any]:
  """Cuts a model into one part per device.

  For the whole loop under `shard_map`, whose `check_vma` must be off::

      model, specs = cut_llama(model, config.head_axes)
      spread = sharding.partition_specs(config)
      specs = dict(in_specs=(specs, spread, P()), out_specs=(spread, P()))
      run = jax.shard_map(kvcache.serve, **specs, check_vma=False)

  Args:
    model: The whole model.
    axes: `config.head_axes` of the context.
    mesh: The mesh that has these axes; the one set with `jax.set_mesh` if omitted.

  Returns:
    `(function, specs)`: what `as_function` makes of a model, its arrays spread over the
    devices, and the `PartitionSpec` of each of them. The function is to be called
    within a `shard_map` over these axes, and refuses to be called elsewhere.

  Raises:
    ValueError: Heads or features do not divide.
  """
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  config, axes = model.config, tuple(axes)
  heads = sharding.Split(tuple((name, mesh.shape[name]) for name in axes))
  heads.kv_spec(config.num_kv_heads, axis=0)
  heads.query_spec(config.num_heads, axis=0)
  if config.intermediate_size % heads.num_devices:
    raise ValueError(
      f"intermediate_size={config.intermediate_size} must be a multiple of the"
      f" {heads.num_devices} devices of {axes}"
    )
  local = dataclasses.replace(
    config,
    num_heads=config.num_heads // heads.num_devices,
    num_kv_heads=heads.num_local(config.num_kv_heads),
    intermediate_size=config.intermediate_size // heads.num_devices,
  )
  graph = nnx.split(nnx.eval_shape(lambda: Llama(local, rngs=nnx.Rngs(0))))[0]
  cuts = jax.tree_util.tree_map_with_path(
    functools.partial(_cut, config, heads), nnx.state(model)
  )
  is_cut = lambda x: isinstance(x, tuple)  # noqa: E731
  arrays = jax.tree.map(
    lambda cut: jax.device_put(cut[0], NamedSharding(mesh, cut[1])),
    cuts,
    is_leaf=is_cut,
  )
  specs = [spec for _, spec in jax.tree.leaves(cuts, is_leaf=is_cut)]
  whole = as_function(nnx.merge(graph, arrays))
  function = Partial(_part_of(whole.func, axes), *whole.args)
  return function, jax.tree.unflatten(jax.tree.structure(function), specs)


@functools.lru_cache(maxsize=64)
def _part_of(call: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
  """The same call, for where a device has its part only."""

  def call_part(*args: Any, **kwargs: Any) -> Any:
    if not sharding.is_within(axes):
      raise ValueError(
        "a model made by cut_llama computes the part of one device: call it within a"
        f" jax.shard_map over {axes}; jax.jit and kvcache.generate take the whole"
        " model, spread by kvcache.nn.place_weights"
      )
    return call(*args, **kwargs)

  return call_part


def _cut(
  config: LlamaConfig, heads: sharding.Split, path: tuple[Any, ...], x: jax.Array
) -> tuple[jax.Array, P]:
  """Puts an array in the order of the devices, and says how to split it."""
  names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  owner, is_bias, devices = names[-2:][0], names[-1] == "bias", heads.num_devices
  axis = x.ndim - 1 if is_bias else x.ndim - 2  # of the outputs
  lead, features = x.shape[:axis], x.shape[axis + 1 :]
  if owner == "qkv":
    x = x.reshape(*lead, -1, config.head_dim, *features)
    x = jnp.take(x, _heads_of_devices(config, heads), axis=axis)
    x = x.reshape(*lead, -1, *features)
  elif owner == "gate_up":
    x = x.reshape(*lead, 2, devices, -1, *features).swapaxes(axis, axis + 1)
    x = x.reshape(*lead, -1, *features)
  elif owner in ("out", "down") and not is_bias:
    axis += 1  # the inputs, which are in order
  elif owner == "out":
    # Once on the first device, because the parts are added up.
    rest = jnp.zeros((*lead, (devices - 1) * x.shape[-1]), x.dtype)
    x = jnp.concatenate([x, rest], axis=-1)
  else:
    return x, P()
  return x, P(*[None] * axis, tuple(name for name, _ in heads.sizes))


def _heads_of_devices(config: LlamaConfig, heads: sharding.Split) -> np.ndarray:
  """Places, among queries, keys and values, of each device's heads, in its order."""
  num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
  per_device, local = num_heads // heads.num_devices, heads.num_local(num_kv_heads)
  found = []
  for device in range(heads.num_devices):
    query = np.arange(per_device) + device * per_device
    kv = np.arange(local) + query[0] * num_kv_heads // num_heads
    found += [query, num_heads + kv, num_heads + num_kv_heads + kv]
  return np.concatenate(found)
