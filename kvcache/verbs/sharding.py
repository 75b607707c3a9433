"""Tensor parallelism: heads spread over devices, and everything else on each of them.

`config.head_axes` names the axes of a mesh. Keys, values and recurrent states are split
over them by heads; tables, lists, hashes and requests are whole on every device, where
the same integer work makes the same bits. Both ways of JAX to run on several devices
work with such a context:

*   `jax.jit` under `jax.set_mesh(mesh)`, the axes of the type `Auto`: XLA splits the
    model after its weights (`kvcache.nn.partition_specs`), and what touches keys,
    values and states (`write_kv`, `attend`, `kvcache.recurrent`) runs in a `shard_map`
    of its own, so that kernels see local arrays and no pool is ever gathered.
*   `jax.shard_map` around the whole loop, with `partition_specs(config)` for the
    context and a model that knows its part (`kvcache.models.tensor_parallel`): nothing
    is left for XLA to decide.

Heads are split over the longest leading part of the axes whose devices divide them, and
repeated over the rest. So 16 query heads and 2 kv heads go on 8 devices with two axes
of 2 and 4: each device has two query heads and the one kv head that they read, which is
half of what one device alone would hold.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from kvcache import context
from kvcache.config import AttentionLayer, CacheConfig, Layer, RecurrentLayer
from kvcache.context import Context


@dataclasses.dataclass(frozen=True)
class Split:
  """Mesh axes over which heads are split, and their sizes; none on one device.

  Attributes:
    sizes: Devices along each axis, by its name, in order.
  """

  sizes: tuple[tuple[str, int], ...]

  def __bool__(self) -> bool:
    """Whether there is anything to split."""
    return bool(self.sizes)

  @property
  def num_devices(self) -> int:
    """Devices that share the heads."""
    return math.prod(size for _, size in self.sizes)

  def axes(self, num_heads: int) -> tuple[str, ...]:
    """The longest leading part of the axes whose devices divide the heads."""
    found, devices = (), 1
    for name, size in self.sizes:
      devices *= size
      if num_heads % devices:
        break
      found = (*found, name)
    return found

  def num_local(self, num_heads: int) -> int:
    """Heads on one device."""
    sizes = dict(self.sizes)
    return num_heads // math.prod(sizes[name] for name in self.axes(num_heads))

  def spec(self, num_heads: int, *, axis: int) -> P:
    """The spec of an array that has the heads on one of its axes."""
    axes = self.axes(num_heads)
    return P(*[None] * axis, axes) if axes else P()

  def query_spec(self, num_heads: int, *, axis: int) -> P:
    """The same for query heads, each of which is on one device only."""
    if num_heads % self.num_devices:
      raise ValueError(
        f"{num_heads} query heads must be a multiple of the {self.num_devices} devices"
        f" of head_axes {dict(self.sizes)}"
      )
    return self.spec(num_heads, axis=axis)

  def kv_spec(self, num_heads: int, *, axis: int) -> P:
    """The same for kv heads, which must be on the devices of their query heads."""
    if self.axes(num_heads) != self.axes(0) and self.num_local(num_heads) > 1:
      devices = self.num_devices
      hint = ""
      if devices % num_heads == 0:
        hint = f"; two axes, of {num_heads} and {devices // num_heads}, would do"
      raise ValueError(
        f"{num_heads} kv heads cannot be split over head_axes {dict(self.sizes)}: each"
        f" device needs equally many, or there is one head on each{hint}"
      )
    return self.spec(num_heads, axis=axis)

  def over(
    self, function: Callable[..., Any], *, in_specs: tuple[Any, ...], out_specs: Any
  ) -> Callable[..., Any]:
    """The function on local arrays; the function itself on one device."""
    if not self:
      return function
    mesh = jax.sharding.get_abstract_mesh()
    # Manual over all that is not yet: kernels cannot be split by XLA along any axis.
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, kind in types if kind != AxisType.Manual}
    return jax.shard_map(
      function,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=names,
      check_vma=False,
    )


def split(axes: Sequence[str]) -> Split:
  """How XLA is to split heads where this is called; not at all within `shard_map`.

  Args:
    axes: `config.head_axes`.

  Raises:
    ValueError: The mesh set with `jax.set_mesh` has no such axes, or they are typed.
  """
  if not axes:
    return Split(())
  mesh = jax.sharding.get_abstract_mesh()
  sizes = _sizes(axes, mesh)
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  kinds = {types[name] for name in axes}
  if kinds == {AxisType.Manual}:
    return Split(())
  if kinds != {AxisType.Auto}:
    raise ValueError(
      f"head_axes={tuple(axes)} must all be Auto or all be Manual, got {mesh}: make the"
      " mesh with axis_types=(jax.sharding.AxisType.Auto,) * num_axes"
    )
  return Split(sizes)


def is_within(axes: Sequence[str]) -> bool:
  """Whether this is called within a `shard_map` over all of the axes, at least one."""
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return bool(axes) and all(types.get(name) == AxisType.Manual for name in axes)


def partition_specs(
  config: CacheConfig, *, mesh: Mesh | AbstractMesh | None = None
) -> Context:
  """Returns a `Context` in which every array is a `PartitionSpec`.

  Keys, values and scales are split by kv heads; recurrent states by the first axis of
  each array (heads, or channels of a convolution); the rest is whole on every device.
  Latent layers have one head, so they are whole, too.

  Args:
    config: Its `head_axes` say over what.
    mesh: The mesh that has these axes; the one set with `jax.set_mesh` if omitted.

  Raises:
    ValueError: The mesh lacks an axis, or the kv heads of a layer do not fit it.
  """
  heads = Split(_sizes(config.head_axes, mesh))
  ctx = jax.eval_shape(functools.partial(context.init, config))
  specs = jax.tree.map(lambda _: P(), ctx)
  kv = []
  for store in ctx.kv:
    spec = heads.kv_spec(store.num_heads, axis=2)
    kv.append(jax.tree.map(lambda _, spec=spec: spec, store))
  specs = specs.replace(kv=tuple(kv))
  if ctx.states is None:
    return specs
  states = jax.tree.map(
    lambda x: heads.spec(x.shape[2], axis=2) if x.ndim > 2 else P(), ctx.states
  )
  return specs.replace(states=states)


def init(
  config: CacheConfig, *, mesh: Mesh | None = None, salt: ArrayLike = 0
) -> Context:
  """Makes an empty context where each device only ever holds its own part.

  Args:
    config: Static sizes.
    mesh: The mesh that has `config.head_axes`; the one set with `jax.set_mesh` if
      omitted.
    salt: As in `kvcache.init`.
  """
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  specs = partition_specs(config, mesh=mesh)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  make = functools.partial(context.init, config)
  return jax.jit(make, out_shardings=shardings)(salt=salt)


def init_part(config: CacheConfig) -> Context:
  """Makes an empty context where it is called, split like one that came from outside.

  Within `shard_map` it is the part of one device; where XLA splits, each device makes
  its own.
  """
  if is_within(config.head_axes):
    return context.init(local_config(config)).replace(config=config)
  return constrain(context.init(config))


def local_config(
  config: CacheConfig, *, mesh: Mesh | AbstractMesh | None = None
) -> CacheConfig:
  """What one device holds of a context, as a configuration of its own.

  Its `num_bytes` are those of one device. To fill devices of a given memory, size it
  with `CacheConfig.from_memory` from the layers found here, and use its `num_blocks`.

  Args:
    config: Static sizes.
    mesh: As in `partition_specs`.
  """
  heads = Split(_sizes(config.head_axes, mesh))

  def local(layer: Layer) -> Layer:
    if isinstance(layer, AttentionLayer):
      heads.kv_spec(layer.num_kv_heads, axis=2)  # refuses what does not fit
      num = heads.num_local(layer.num_kv_heads)
      return dataclasses.replace(layer, num_kv_heads=num)
    return RecurrentLayer(
      state={
        name: jax.ShapeDtypeStruct(
          (heads.num_local(x.shape[0]), *x.shape[1:]) if x.shape else (), x.dtype
        )
        for name, x in layer.arrays.items()
      }
    )

  layers = tuple(local(layer) for layer in config.layers)
  return dataclasses.replace(config, layers=layers, head_axes=())


def constrain(ctx: Context) -> Context:
  """Holds a context to `partition_specs` where XLA splits, and is nothing elsewhere."""
  if not split(ctx.config.head_axes):
    return ctx
  return lax.with_sharding_constraint(ctx, partition_specs(ctx.config))


def replicate[Tree](axes: Sequence[str], tree: Tree) -> Tree:
  """Makes arrays whole on every device where XLA splits; nothing elsewhere."""
  return lax.with_sharding_constraint(tree, P()) if split(axes) else tree


def gather_logits(axes: Sequence[str], logits: Array) -> Array:
  """Makes logits `[S, V]` whole on every device where XLA splits."""
  heads = split(axes)
  if heads:
    # First by words: asked for whole logits alone, XLA gathers the output matrix.
    words = heads.spec(logits.shape[-1], axis=logits.ndim - 1)
    logits = lax.with_sharding_constraint(logits, words)
  return replicate(axes, logits)


def place[Tree](axes: Sequence[str], tree: Tree) -> Tree:
  """Moves arrays, whole, to every device of the mesh; nothing on one device."""
  if not axes:
    return tree
  return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def sum_parts(axes: Sequence[str], x: Array) -> Array:
  """Adds up what devices have computed from their own heads, within `shard_map`.

  Where XLA splits, it does so by itself, and this is nothing.
  """
  if not axes or split(axes):
    return x
  return lax.psum(x, tuple(axes))


def _sizes(
  axes: Sequence[str], mesh: Mesh | AbstractMesh | None
) -> tuple[tuple[str, int], ...]:
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  sizes: Mapping[str, int] = dict(mesh.shape)
  if missing := [name for name in axes if name not in sizes]:
    raise ValueError(
      f"head_axes={tuple(axes)}: the mesh has no axis {missing[0]!r}, only"
      f" {tuple(sizes)}; call under jax.set_mesh(mesh)"
    )
  return tuple((name, sizes[name]) for name in axes)
