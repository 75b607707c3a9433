"""From the tensors of a checkpoint to a model.

Loaders name tensors their own way; here they have one name each: a role, and a place,
the layer and the expert if there are any. Matrices are `[out, in]` on both sides, so
nothing is transposed. What a model needs is read off its variables: one that a model
does not have is not wanted from a checkpoint either.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from kvcache.models.deepseek2 import DeepSeek2, DeepSeek2Config
from kvcache.models.errors import LoadError
from kvcache.models.gemma2 import Gemma2, Gemma2Config
from kvcache.models.granite_hybrid import GraniteHybrid, GraniteHybridConfig
from kvcache.models.llama import Llama, LlamaConfig

Model = Llama | Gemma2 | GraniteHybrid | DeepSeek2
ModelConfig = LlamaConfig | Gemma2Config | GraniteHybridConfig | DeepSeek2Config
Place = Mapping[str, int]
"""`{}` outside the blocks, else `{"layer": 3}` or `{"layer": 3, "expert": 5}`."""
ReadTensor = Callable[[str, Place], np.ndarray]
"""`read(role, place)` returns one tensor."""

_MODELS: dict[type, type] = {
  LlamaConfig: Llama,
  Gemma2Config: Gemma2,
  GraniteHybridConfig: GraniteHybrid,
  DeepSeek2Config: DeepSeek2,
}

_MODEL_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
  ("embedding",): ("embedding",),
  ("norm", "scale"): ("norm",),
  ("head",): ("head",),
}
_BLOCK_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
  ("attention_norm", "scale"): ("attention_norm",),
  ("attention", "qkv", "weight"): ("q", "k", "v"),
  ("attention", "qkv", "bias"): ("q_bias", "k_bias", "v_bias"),
  ("attention", "out", "weight"): ("out",),
  ("attention", "out", "bias"): ("out_bias",),
  ("attention", "q_norm", "scale"): ("q_norm",),
  ("attention", "k_norm", "scale"): ("k_norm",),
  ("attention_out_norm", "scale"): ("attention_out_norm",),
  ("mlp_norm", "scale"): ("mlp_norm",),
  ("mlp_out_norm", "scale"): ("mlp_out_norm",),
  ("mlp", "gate_up", "weight"): ("gate", "up"),
  ("mlp", "down", "weight"): ("down",),
}
_LATENT_PARTS: dict[tuple[str, ...], tuple[str, ...]] = _BLOCK_PARTS | {
  ("attention", "q_down", "weight"): ("q_down",),
  ("attention", "q", "weight"): ("q",),
  ("attention", "kv_down", "weight"): ("kv_down",),
  ("attention", "kv_norm", "scale"): ("kv_norm",),
  ("attention", "k_up"): ("k_up",),
  ("attention", "v_up"): ("v_up",),
  ("mlp", "router"): ("router",),
  ("mlp", "expert_gate_up", "weight"): ("expert_gate", "expert_up"),
  ("mlp", "expert_down", "weight"): ("expert_down",),
  ("mlp", "shared", "gate_up", "weight"): ("shared_gate", "shared_up"),
  ("mlp", "shared", "down", "weight"): ("shared_down",),
}
_HYBRID_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
  ("mixer_norm", "scale"): ("mixer_norm",),
  ("mixer", "qkv", "weight"): ("q", "k", "v"),
  ("mixer", "in_proj", "weight"): ("in_proj",),
  ("mixer", "in_proj", "bias"): ("in_proj_bias",),
  (
    "mixer",
    "conv_weight",
  ): ("conv",),
  ("mixer", "conv_bias"): ("conv_bias",),
  ("mixer", "dt_bias"): ("dt_bias",),
  ("mixer", "a_log"): ("a_log",),
  ("mixer", "d"): ("d",),
  ("mixer", "norm_scale"): ("mamba_norm",),
  ("mlp_norm", "scale"): ("mlp_norm",),
  ("mlp", "gate_up", "weight"): ("gate_up",),
  ("mlp", "down", "weight"): ("down",),
}
"""Variable of a block -> roles of the tensors that fill it, joined along axis 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Slot:
  """One variable of a model, and the tensors that fill it.

  Attributes:
    label: The variable's name.
    roles: Of the tensors.
    layers: Where they are; more than one: stacked. None outside the blocks.
    num_experts: Of how many experts there is one of each role, or None.
    axis: Along which the tensors of a layer are joined, first by role, then by expert.
  """

  label: str
  roles: tuple[str, ...]
  layers: tuple[int | None, ...] = (None,)
  num_experts: int | None = None
  axis: int = 0

  def parts(self, layer: int | None) -> list[tuple[str, Place]]:
    """Role and place of each tensor of a layer, in order."""
    place = {} if layer is None else {"layer": layer}
    if self.num_experts is None:
      return [(role, place) for role in self.roles]
    experts = range(self.num_experts)
    return [(role, place | {"expert": i}) for role in self.roles for i in experts]


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
  make = functools.partial(_MODELS[type(config)], config)
  return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def weight_shapes(config: ModelConfig) -> list[jax.ShapeDtypeStruct]:
  """Returns shape and dtype of every array that a loaded model has; makes none."""
  return jax.tree.leaves(_abstract(config)[1])


def _slot(config: ModelConfig, path: tuple[Any, ...]) -> _Slot:
  names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
  names = tuple(name for name in names if name not in (None, "value"))
  label = ".".join(map(str, names))
  if names[0] != "layers":
    return _Slot(label=label, roles=_MODEL_PARTS[names])
  if isinstance(config, LlamaConfig) and config.scan_layers:
    layers = tuple(range(config.num_layers))
    return _Slot(label=label, roles=_BLOCK_PARTS[names[1:]], layers=layers)
  layer, name = names[1], names[2:]
  if isinstance(config, GraniteHybridConfig):
    roles = _HYBRID_PARTS.get(name)
    if roles is None:  # the one that both kinds of mixers have
      is_attention = config.layer_types[layer] == "attention"
      roles = ("out",) if is_attention else ("out_proj",)
    return _Slot(label=label, roles=roles, layers=(layer,))
  if isinstance(config, DeepSeek2Config):
    roles = _LATENT_PARTS[name]
    is_of_experts = roles[0].startswith("expert_")
    return _Slot(
      label=label,
      roles=roles,
      layers=(layer,),
      num_experts=config.num_experts if is_of_experts else None,
      axis=1 if roles == ("expert_down",) else 0,
    )
  return _Slot(label=label, roles=_BLOCK_PARTS[name], layers=(layer,))


def _slots(config: ModelConfig) -> Iterator[_Slot]:
  for path, _ in jax.tree_util.tree_leaves_with_path(_abstract(config)[1]):
    yield _slot(config, path)


def check_names(
  config: ModelConfig,
  names: Mapping[str, str],
  present: set[str],
  *,
  source: str,
  ignored: Callable[[str], bool] = lambda name: False,
) -> None:
  """Checks that a checkpoint holds what the model needs, and nothing it would not use.

  Args:
    config: The model's shape.
    names: Role -> name in the checkpoint, with `{layer}` and `{expert}` for its place.
    present: The names the checkpoint has.
    source: For messages.
    ignored: Names that may be there without being used.

  Raises:
    LoadError: Tensors are missing, or present but without a place in the model.
  """
  wanted = {
    names[role].format(**place)
    for slot in _slots(config)
    for layer in slot.layers
    for role, place in slot.parts(layer)
  }
  for what, found in (
    ("misses tensors", wanted - present),
    ("holds tensors this model has no place for", present - wanted),
  ):
    found = sorted(name for name in found if not ignored(name))
    if found:
      shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
      raise LoadError(f"{source} {what} ({len(found)}): {shown}")


def build_model(config: ModelConfig, read: ReadTensor, *, source: str) -> Model:
  """Makes a model and fills it, without ever initialising it at random.

  Args:
    config: The model's shape.
    read: Returns one tensor of the checkpoint.
    source: For messages.

  Raises:
    LoadError: A tensor has another shape than the configuration says.
  """
  graph, state = _abstract(config)

  def fill(path: tuple[Any, ...], variable: jax.ShapeDtypeStruct) -> jax.Array:
    slot = _slot(config, path)
    arrays = [
      _join([read(*part) for part in slot.parts(layer)], axis=slot.axis)
      for layer in slot.layers
    ]
    is_stacked = isinstance(config, LlamaConfig) and config.scan_layers
    is_stacked &= slot.layers != (None,)
    array = np.stack(arrays) if is_stacked else arrays[0]
    if array.shape != variable.shape:
      raise LoadError(
        f"{source}: {slot.label} has shape {array.shape}, not {variable.shape}"
      )
    return jnp.asarray(array, variable.dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def _join(parts: list[np.ndarray], *, axis: int) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
