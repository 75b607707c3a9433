"""From the tensors of a checkpoint to a model.

Loaders name tensors their own way; here they have one name each: a role, and for
tensors of a block its layer. Matrices are `[out, in]` on both sides, so nothing is
transposed. What a model needs is read off its variables: one that a model does not have
is not wanted from a checkpoint either.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from kvcache.models.errors import LoadError
from kvcache.models.gemma2 import Gemma2, Gemma2Config
from kvcache.models.granite_hybrid import GraniteHybrid, GraniteHybridConfig
from kvcache.models.llama import Llama, LlamaConfig

Model = Llama | Gemma2 | GraniteHybrid
ModelConfig = LlamaConfig | Gemma2Config | GraniteHybridConfig
ReadTensor = Callable[[str, int | None], np.ndarray]
"""`read(role, layer)` returns one tensor; `layer` is None outside the blocks."""

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


@dataclasses.dataclass(frozen=True)
class _Slot:
  """One variable of a model, and the tensors that fill it."""

  label: str
  roles: tuple[str, ...]
  layers: tuple[int | None, ...]  # more than one: stacked


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  def make() -> Model:
    if isinstance(config, LlamaConfig):
      return Llama(config, rngs=nnx.Rngs(0))
    if isinstance(config, Gemma2Config):
      return Gemma2(config, rngs=nnx.Rngs(0))
    return GraniteHybrid(config, rngs=nnx.Rngs(0))

  return nnx.split(nnx.eval_shape(make))


def _slot(config: ModelConfig, path: tuple) -> _Slot:
  names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
  names = tuple(name for name in names if name not in (None, "value"))
  label = ".".join(map(str, names))
  if names[0] != "layers":
    return _Slot(label, _MODEL_PARTS[names], (None,))
  if isinstance(config, LlamaConfig) and config.scan_layers:
    return _Slot(label, _BLOCK_PARTS[names[1:]], tuple(range(config.num_layers)))
  if not isinstance(config, GraniteHybridConfig):
    return _Slot(label, _BLOCK_PARTS[names[2:]], (names[1],))
  if names[2:] == ("mixer", "out", "weight"):
    is_attention = config.layer_types[names[1]] == "attention"
    return _Slot(label, ("out" if is_attention else "out_proj",), (names[1],))
  return _Slot(label, _HYBRID_PARTS[names[2:]], (names[1],))


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
    names: Role -> name in the checkpoint, with `{layer}` for the layer.
    present: The names the checkpoint has.
    source: For messages.
    ignored: Names that may be there without being used.

  Raises:
    LoadError: Tensors are missing, or present but without a place in the model.
  """
  wanted = {
    names[role].format(layer=layer)
    for slot in _slots(config)
    for role in slot.roles
    for layer in slot.layers
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

  def fill(path: tuple, variable: jax.ShapeDtypeStruct) -> jax.Array:
    slot = _slot(config, path)
    arrays = [_join([read(role, i) for role in slot.roles]) for i in slot.layers]
    is_stacked = isinstance(config, LlamaConfig) and config.scan_layers
    is_stacked &= slot.layers != (None,)
    array = np.stack(arrays) if is_stacked else arrays[0]
    if array.shape != variable.shape:
      raise LoadError(
        f"{source}: {slot.label} has shape {array.shape}, not {variable.shape}"
      )
    return jnp.asarray(array, variable.dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def _join(parts: list[np.ndarray]) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
