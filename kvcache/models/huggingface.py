"""Models from Hugging Face folders: config.json, safetensors, tokenizer.json.

The Llama family, Gemma 2, the dense hybrids of Granite 4, and DeepSeek-V2.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.models.deepseek2 import DeepSeek2Config
from kvcache.models.deepseek2_folder import arrange, deepseek2_config, deepseek2_names
from kvcache.models.errors import LoadError, require
from kvcache.models.gemma2 import Gemma2Config
from kvcache.models.granite_hybrid import GraniteHybridConfig
from kvcache.models.llama import LlamaConfig
from kvcache.models.loaded import Loaded
from kvcache.models.tokenizer import Tokenizer
from kvcache.models.weights import build_model, check_names, ModelConfig, Place
from kvcache.nn.rotary import llama3_factors

_LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_GEMMA_TYPE = "gemma2"
_HYBRID_TYPE = "granitemoehybrid"
_LATENT_TYPE = "deepseek_v2"
_MODEL_TYPES = (*_LLAMA_TYPES, _GEMMA_TYPE, _HYBRID_TYPE, _LATENT_TYPE)
_BLOCK = "model.layers.{layer}."
_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
  "attention_norm": _BLOCK + "input_layernorm.weight",
  "q": _BLOCK + "self_attn.q_proj.weight",
  "k": _BLOCK + "self_attn.k_proj.weight",
  "v": _BLOCK + "self_attn.v_proj.weight",
  "q_bias": _BLOCK + "self_attn.q_proj.bias",
  "k_bias": _BLOCK + "self_attn.k_proj.bias",
  "v_bias": _BLOCK + "self_attn.v_proj.bias",
  "out": _BLOCK + "self_attn.o_proj.weight",
  "out_bias": _BLOCK + "self_attn.o_proj.bias",
  "q_norm": _BLOCK + "self_attn.q_norm.weight",
  "k_norm": _BLOCK + "self_attn.k_norm.weight",
  "mlp_norm": _BLOCK + "post_attention_layernorm.weight",
  "gate": _BLOCK + "mlp.gate_proj.weight",
  "up": _BLOCK + "mlp.up_proj.weight",
  "down": _BLOCK + "mlp.down_proj.weight",
}
_GEMMA_NAMES = _NAMES | {
  "attention_out_norm": _BLOCK + "post_attention_layernorm.weight",
  "mlp_norm": _BLOCK + "pre_feedforward_layernorm.weight",
  "mlp_out_norm": _BLOCK + "post_feedforward_layernorm.weight",
}
_HYBRID_NAMES = {
  "embedding": _NAMES["embedding"],
  "norm": _NAMES["norm"],
  "head": _NAMES["head"],
  "mixer_norm": _NAMES["attention_norm"],
  "q": _NAMES["q"],
  "k": _NAMES["k"],
  "v": _NAMES["v"],
  "out": _NAMES["out"],
  "in_proj": _BLOCK + "mamba.in_proj.weight",
  "in_proj_bias": _BLOCK + "mamba.in_proj.bias",
  "conv": _BLOCK + "mamba.conv1d.weight",
  "conv_bias": _BLOCK + "mamba.conv1d.bias",
  "dt_bias": _BLOCK + "mamba.dt_bias",
  "a_log": _BLOCK + "mamba.A_log",
  "d": _BLOCK + "mamba.D",
  "mamba_norm": _BLOCK + "mamba.norm.weight",
  "out_proj": _BLOCK + "mamba.out_proj.weight",
  "mlp_norm": _NAMES["mlp_norm"],
  "gate_up": _BLOCK + "shared_mlp.input_linear.weight",
  "down": _BLOCK + "shared_mlp.output_linear.weight",
}


def load_huggingface(
  folder: str | pathlib.Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
) -> Loaded:
  """Loads a model and its tokenizer from a folder.

  Args:
    folder: Holds `config.json`, and `model.safetensors` or shards with their index. A
      folder without `tokenizer.json` gives a model without a tokenizer.
    dtype: Of weights and activations.
    scan_layers: As in `LlamaConfig`; other families are always unrolled.

  Raises:
    LoadError: See `kvcache.models.load`.
  """
  folder = pathlib.Path(folder)
  settings = _read_json(folder / "config.json")
  with contextlib.ExitStack() as stack:
    files = _open_tensors(folder, stack)
    config = config_from_huggingface(settings, set(files), source=str(folder))
    config = dataclasses.replace(config, dtype=dtype)
    if isinstance(config, LlamaConfig):
      config = dataclasses.replace(config, scan_layers=scan_layers)
    names = _names(config)
    check_names(
      config,
      names,
      set(files),
      source=str(folder),
      # Old checkpoints store the frequencies; tied ones may store the embedding twice.
      ignored=lambda name: (
        name.endswith("rotary_emb.inv_freq")
        or (name == _NAMES["head"] and _is_tied(config))
      ),
    )

    def read(role: str, place: Place) -> np.ndarray:
      name = names[role].format(**place)
      tensor = files[name].get_tensor(name)
      if isinstance(config, DeepSeek2Config):
        return arrange(config, role, tensor)
      return tensor[:, 0] if role == "conv" else tensor  # it is depthwise

    model = build_model(config, read, source=str(folder))
  has_tokenizer = (folder / "tokenizer.json").is_file()
  return Loaded(
    model=model,
    config=config,
    tokenizer=Tokenizer.from_folder(folder) if has_tokenizer else None,
    stop_tokens=_stop_tokens(folder, settings),
    source=str(folder),
  )


def read_config(
  folder: str | pathlib.Path, *, source: str | None = None
) -> ModelConfig:
  """Returns the shape of the model in a folder, of which `config.json` is enough.

  Whether there are biases, norms of heads and an output matrix is read off the names of
  the tensors where these are known, else told from what the family does.

  Args:
    folder: The folder.
    source: For messages, if not the folder.

  Raises:
    LoadError: As in `config_from_huggingface`.
  """
  folder = pathlib.Path(folder)
  source = source or str(folder)
  settings = _read_json(folder / "config.json")
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    names = set(_read_json(index).get("weight_map", {}))
  elif (folder / "model.safetensors").is_file():
    with contextlib.ExitStack() as stack:
      names = set(_open_tensors(folder, stack))
  else:
    names = _usual_names(settings)
  return config_from_huggingface(settings, names, source=source)


def _usual_names(settings: dict[str, Any]) -> set[str]:
  """Names of the tensors that decide about a model's shape, by family and settings."""
  family, roles = settings.get("model_type"), set()
  if not settings.get("tie_word_embeddings", False):
    roles.add("head")
  has_bias = settings.get("attention_bias", False)
  if has_bias or family == "qwen2":
    roles |= {"q_bias", "k_bias", "v_bias"}
  if has_bias:
    roles.add("out_bias")
  if family == "qwen3":
    roles |= {"q_norm", "k_norm"}
  return {_NAMES[role].format(layer=0) for role in roles}


def config_from_huggingface(
  settings: dict[str, Any], names: set[str], *, source: str
) -> ModelConfig:
  """Returns the shape of the model that a `config.json` describes.

  Args:
    settings: The file's content.
    names: Names of the checkpoint's tensors: they decide about biases and norms.
    source: For messages.

  Raises:
    LoadError: The architecture, or something it uses, is not supported.
  """
  model_type = settings.get("model_type")
  if model_type not in _MODEL_TYPES:
    raise LoadError(
      f"{source}: model_type {model_type!r} is not supported;"
      f" supported are {', '.join(_MODEL_TYPES)}"
    )
  activation = settings.get("hidden_act", "silu")
  if model_type == _GEMMA_TYPE:
    activation = settings.get("hidden_activation") or "gelu_pytorch_tanh"
  if activation != ("gelu_pytorch_tanh" if model_type == _GEMMA_TYPE else "silu"):
    raise LoadError(f"{source}: activation {activation!r} is not supported")
  try:
    if model_type == _GEMMA_TYPE:
      return _gemma_config(settings)
    if model_type == _HYBRID_TYPE:
      return _hybrid_config(settings, names, source=source)
    if model_type == _LATENT_TYPE:
      return deepseek2_config(settings, names, source=source)
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or hidden // heads
    length = settings.get("max_position_embeddings", 2048)
    window = settings.get("sliding_window") or length
    if model_type != "mistral" and settings.get("use_sliding_window"):
      raise LoadError(f"{source}: windows in some of the layers are not supported")
    has_window = model_type == "mistral" and window < length
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
    return LlamaConfig(
      vocab_size=settings["vocab_size"],
      hidden_size=hidden,
      intermediate_size=settings["intermediate_size"],
      num_layers=settings["num_hidden_layers"],
      num_heads=heads,
      num_kv_heads=settings.get("num_key_value_heads") or heads,
      head_dim=head_dim,
      rope_theta=theta,
      rope_factors=_rope_factors(rope, head_dim, theta, source=source),
      norm_epsilon=settings["rms_norm_eps"],
      tie_embeddings=settings.get("tie_word_embeddings", False)
      or _NAMES["head"] not in names,
      attention_bias=_NAMES["q_bias"].format(layer=0) in names,
      attention_out_bias=_NAMES["out_bias"].format(layer=0) in names,
      qk_norm=_NAMES["q_norm"].format(layer=0) in names,
      sliding_window=window if has_window else None,
      max_position=length,
    )
  except KeyError as error:
    raise LoadError(f"{source}: config.json has no {error}") from error
  except LoadError:
    raise
  except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
    raise LoadError(f"{source}: config.json makes no sense: {error}") from error


def _names(config: ModelConfig) -> dict[str, str]:
  """What the tensor of each role is called."""
  match config:
    case DeepSeek2Config():
      return deepseek2_names(config)
    case GraniteHybridConfig():
      return _HYBRID_NAMES
    case Gemma2Config():
      return _GEMMA_NAMES
    case _:
      return _NAMES


def _is_tied(config: ModelConfig) -> bool:
  return isinstance(config, Gemma2Config) or config.tie_embeddings


def _gemma_config(settings: dict[str, Any]) -> Gemma2Config:
  num_layers = settings["num_hidden_layers"]
  kinds = settings.get("layer_types") or [
    "full_attention" if layer % 2 else "sliding_attention"
    for layer in range(num_layers)
  ]
  window = settings["sliding_window"]
  rope = dict(settings.get("rope_parameters") or {})
  return Gemma2Config(
    vocab_size=settings["vocab_size"],
    hidden_size=settings["hidden_size"],
    intermediate_size=settings["intermediate_size"],
    windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    num_heads=settings["num_attention_heads"],
    num_kv_heads=settings["num_key_value_heads"],
    head_dim=settings["head_dim"],
    query_scalar=settings["query_pre_attn_scalar"],
    attention_soft_cap=settings.get("attn_logit_softcapping"),
    logits_soft_cap=settings.get("final_logit_softcapping"),
    rope_theta=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
    norm_epsilon=settings["rms_norm_eps"],
    max_position=settings.get("max_position_embeddings", 8192),
  )


def _hybrid_config(
  settings: dict[str, Any], names: set[str], *, source: str
) -> GraniteHybridConfig:
  if settings.get("num_local_experts"):
    raise LoadError(f"{source}: mixtures of experts are not supported")
  if settings.get("attention_bias"):
    raise LoadError(f"{source}: biases of a hybrid's attention are not supported")
  hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
  rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
  theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
  uses_rope = settings.get("position_embedding_type") == "rope"
  if uses_rope and rope.get("rope_type", "default") != "default":
    raise LoadError(f"{source}: rope scaling of hybrids is not supported")
  kinds = settings.get("layer_types") or settings["layers_block_type"]
  known = {"linear_attention": "mamba", "full_attention": "attention"}
  num_mamba_heads, head_dim = settings["mamba_n_heads"], settings["mamba_d_head"]
  if head_dim == "auto":
    head_dim = settings["mamba_expand"] * hidden // num_mamba_heads
  return GraniteHybridConfig(
    vocab_size=settings["vocab_size"],
    hidden_size=hidden,
    intermediate_size=settings["shared_intermediate_size"],
    layer_types=tuple(known.get(str(kind), str(kind)) for kind in kinds),
    num_heads=heads,
    num_kv_heads=settings.get("num_key_value_heads") or heads,
    head_dim=settings.get("head_dim") or hidden // heads,
    mamba_heads=num_mamba_heads,
    mamba_head_dim=head_dim,
    mamba_state_size=settings["mamba_d_state"],
    mamba_groups=settings["mamba_n_groups"],
    mamba_conv_width=settings["mamba_d_conv"],
    mamba_bias=settings.get("mamba_proj_bias", False),
    mamba_conv_bias=settings.get("mamba_conv_bias", True),
    dt_limit=_dt_limit(settings),
    rope_theta=theta if uses_rope else None,
    attention_multiplier=settings.get("attention_multiplier", 1.0),
    embedding_multiplier=settings.get("embedding_multiplier", 1.0),
    residual_multiplier=settings.get("residual_multiplier", 1.0),
    logits_divisor=settings.get("logits_scaling", 1.0),
    norm_epsilon=settings["rms_norm_eps"],
    tie_embeddings=settings.get("tie_word_embeddings", False)
    or _NAMES["head"] not in names,
    max_position=settings.get("max_position_embeddings", 2048),
  )


def _dt_limit(settings: dict[str, Any]) -> tuple[float, float]:
  """Bounds of the step sizes; JSON has no infinity, so it may be spelt or missing."""
  bounds = settings.get("time_step_limit") or (0.0, "inf")
  low, high = (x["__float__"] if isinstance(x, dict) else x for x in bounds)
  return float(low), float(high)


def _rope_factors(
  rope: dict[str, Any], head_dim: int, theta: float, *, source: str
) -> tuple[float, ...] | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind == "linear":
    return (float(rope["factor"]),) * (head_dim // 2)
  if kind == "llama3":
    return llama3_factors(
      head_dim=head_dim,
      theta=theta,
      factor=rope["factor"],
      low_freq_factor=rope["low_freq_factor"],
      high_freq_factor=rope["high_freq_factor"],
      original_max_position=rope["original_max_position_embeddings"],
    )
  raise LoadError(f"{source}: rope scaling {kind!r} is not supported")


def _open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Returns the open file of each tensor, from one file or from shards."""
  safetensors = require("safetensors")
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
  else:
    shards = ["model.safetensors"]
  files = {}
  for shard in shards:
    path = folder / shard
    if not path.is_file():
      raise LoadError(f"{folder} has no {shard}")
    try:
      file = stack.enter_context(safetensors.safe_open(str(path), framework="numpy"))
    except safetensors.SafetensorError as error:
      raise LoadError(f"{path} is damaged or truncated: {error}") from error
    files.update(dict.fromkeys(file.keys(), file))
  return files


def _stop_tokens(folder: pathlib.Path, settings: dict[str, Any]) -> tuple[int, ...]:
  path = folder / "generation_config.json"
  generation = _read_json(path) if path.is_file() else {}
  ids = generation.get("eos_token_id", settings.get("eos_token_id"))
  if ids is None:
    return ()
  return tuple(ids) if isinstance(ids, list) else (int(ids),)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise LoadError(f"{path.parent} has no {path.name}")
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise LoadError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(content, dict):
    raise LoadError(f"{path} must hold a JSON object")
  return content
