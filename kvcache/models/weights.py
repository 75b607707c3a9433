"""From the tensors of a checkpoint to a model.

Loaders name tensors their own way; here they have one name each: a role, and for
tensors of a block its layer. Matrices are `[out, in]` on both sides, so nothing is
transposed.
"""

from collections.abc import Callable, Mapping

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from kvcache.models.errors import LoadError
from kvcache.models.llama import Llama, LlamaConfig

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
  ("mlp_norm", "scale"): ("mlp_norm",),
  ("mlp", "gate_up", "weight"): ("gate", "up"),
  ("mlp", "down", "weight"): ("down",),
}
"""Variable of a block -> roles of the tensors that fill it, joined along axis 0."""


def required_roles(config: LlamaConfig) -> tuple[list[str], list[str]]:
  """Returns the roles a checkpoint must have: of the model, and of every block."""
  absent = set()
  if config.tie_embeddings:
    absent |= {"head"}
  if not config.attention_bias:
    absent |= {"q_bias", "k_bias", "v_bias"}
  if not config.attention_out_bias:
    absent |= {"out_bias"}
  if not config.qk_norm:
    absent |= {"q_norm", "k_norm"}
  model = [role for roles in _MODEL_PARTS.values() for role in roles]
  block = [role for roles in _BLOCK_PARTS.values() for role in roles]
  return [r for r in model if r not in absent], [r for r in block if r not in absent]


def check_names(
  config: LlamaConfig,
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
  model, block = required_roles(config)
  wanted = {names[role] for role in model}
  for layer in range(config.num_layers):
    wanted |= {names[role].format(layer=layer) for role in block}
  for what, found in (
    ("misses tensors", wanted - present),
    ("holds tensors this model has no place for", present - wanted),
  ):
    found = sorted(name for name in found if not ignored(name))
    if found:
      shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
      raise LoadError(f"{source} {what} ({len(found)}): {shown}")


def build_model(config: LlamaConfig, read: ReadTensor, *, source: str) -> Llama:
  """Makes a model and fills it, without ever initialising it at random.

  Args:
    config: The model's shape.
    read: Returns one tensor of the checkpoint.
    source: For messages.

  Raises:
    LoadError: A tensor has another shape than the configuration says.
  """
  abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(abstract)

  def fill(path: tuple, variable: jax.ShapeDtypeStruct) -> jax.Array:
    names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
    names = tuple(name for name in names if name not in (None, "value"))
    if names[0] != "layers":
      array = _join([read(role, None) for role in _MODEL_PARTS[names]])
    elif config.scan_layers:
      roles = _BLOCK_PARTS[names[1:]]
      layers = range(config.num_layers)
      array = np.stack([_join([read(r, layer) for r in roles]) for layer in layers])
    else:
      array = _join([read(role, names[1]) for role in _BLOCK_PARTS[names[2:]]])
    if array.shape != variable.shape:
      label = ".".join(map(str, names))
      raise LoadError(
        f"{source}: {label} has shape {array.shape}, not {variable.shape}"
      )
    return jnp.asarray(array, variable.dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def _join(parts: list[np.ndarray]) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
