"""What a Hugging Face folder of DeepSeek-V2 says, and what its tensors are called."""

from typing import Any

import numpy as np

from kvcache.models.deepseek2 import DeepSeek2Config
from kvcache.models.errors import LoadError
from kvcache.nn.rotary import yarn_factors, yarn_scale

_BLOCK = "model.layers.{layer}."
_ATTENTION = _BLOCK + "self_attn."
_MLP = _BLOCK + "mlp."
_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
  "attention_norm": _BLOCK + "input_layernorm.weight",
  "q_down": _ATTENTION + "q_a_proj.weight",
  "q_norm": _ATTENTION + "q_a_layernorm.weight",
  "q": _ATTENTION + "q_proj.weight",
  "kv_down": _ATTENTION + "kv_a_proj_with_mqa.weight",
  "kv_norm": _ATTENTION + "kv_a_layernorm.weight",
  "k_up": _ATTENTION + "kv_b_proj.weight",
  "v_up": _ATTENTION + "kv_b_proj.weight",
  "out": _ATTENTION + "o_proj.weight",
  "mlp_norm": _BLOCK + "post_attention_layernorm.weight",
  "gate": _MLP + "gate_proj.weight",
  "up": _MLP + "up_proj.weight",
  "down": _MLP + "down_proj.weight",
  "router": _MLP + "gate.weight",
  "expert_gate": _MLP + "experts.{expert}.gate_proj.weight",
  "expert_up": _MLP + "experts.{expert}.up_proj.weight",
  "expert_down": _MLP + "experts.{expert}.down_proj.weight",
  "shared_gate": _MLP + "shared_experts.gate_proj.weight",
  "shared_up": _MLP + "shared_experts.up_proj.weight",
  "shared_down": _MLP + "shared_experts.down_proj.weight",
}
_REQUIRED: dict[str, tuple[Any, ...]] = {
  "attention_bias": (None, False),
  "mlp_bias": (None, False),
  "scoring_func": (None, "softmax"),
  "moe_layer_freq": (None, 1),
  "topk_method": (None, "greedy", "group_limited_greedy"),
}
"""Settings that are supported with these values only."""


def deepseek2_names(config: DeepSeek2Config) -> dict[str, str]:
  """Returns what the tensor of each role is called."""
  if config.q_lora_rank is None:
    return _NAMES
  return _NAMES | {"q": _ATTENTION + "q_b_proj.weight"}


def deepseek2_config(
  settings: dict[str, Any], names: set[str], *, source: str
) -> DeepSeek2Config:
  """Returns the shape of a model; see `config_from_huggingface`.

  Raises:
    LoadError: The model uses something that is not supported.
    KeyError: A setting is missing.
  """
  for key, values in _REQUIRED.items():
    if settings.get(key) not in values:
      raise LoadError(f"{source}: {key} {settings[key]!r} is not supported")
  num_layers = settings["num_hidden_layers"]
  head_dim = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
  multiplier, rotary = _rotary(settings, source=source)
  is_grouped = settings.get("topk_method") == "group_limited_greedy"
  return DeepSeek2Config(
    vocab_size=settings["vocab_size"],
    hidden_size=settings["hidden_size"],
    intermediate_size=settings["intermediate_size"],
    num_layers=num_layers,
    num_dense_layers=min(settings.get("first_k_dense_replace", 0), num_layers),
    num_heads=settings["num_attention_heads"],
    kv_lora_rank=settings["kv_lora_rank"],
    q_lora_rank=settings.get("q_lora_rank"),
    nope_head_dim=settings["qk_nope_head_dim"],
    rope_head_dim=settings["qk_rope_head_dim"],
    v_head_dim=settings["v_head_dim"],
    num_experts=settings["n_routed_experts"],
    experts_per_token=settings["num_experts_per_tok"],
    expert_size=settings["moe_intermediate_size"],
    num_shared_experts=settings.get("n_shared_experts") or 0,
    num_groups=settings["n_group"] if is_grouped else 1,
    groups_per_token=settings["topk_group"] if is_grouped else 1,
    normalise_scores=bool(settings.get("norm_topk_prob", False)),
    score_scale=settings.get("routed_scaling_factor", 1.0),
    attention_multiplier=multiplier * head_dim**-0.5,
    norm_epsilon=settings.get("rms_norm_eps", 1e-6),
    tie_embeddings=settings.get("tie_word_embeddings", False)
    or _NAMES["head"] not in names,
    max_position=settings.get("max_position_embeddings", 2048),
    **rotary,
  )


def arrange(config: DeepSeek2Config, role: str, tensor: np.ndarray) -> np.ndarray:
  """Returns a tensor of a folder as the model wants it.

  DeepSeek's planes are neighbouring elements, and `Rotary` takes the two halves of a
  head: the rows that make them are reordered. Queries and keys alike, so that no
  product changes. The keys' and values' projections are stored as one.
  """
  rope = config.rope_head_dim
  if role == "kv_down":
    return _halves(tensor, rope)
  if role == "q":
    heads = tensor.reshape(config.num_heads, -1, tensor.shape[-1])
    return _halves(heads, rope).reshape(tensor.shape)
  if role in ("k_up", "v_up"):
    heads = tensor.reshape(config.num_heads, -1, tensor.shape[-1])
    cut = config.nope_head_dim
    return heads[:, :cut] if role == "k_up" else heads[:, cut:]
  return tensor


def _halves(rows: np.ndarray, size: int) -> np.ndarray:
  """Puts the even ones of the last `size` rows of `[..., rows, in]` before the odd."""
  rest, turned = rows[..., :-size, :], rows[..., -size:, :]
  parts = (rest, turned[..., ::2, :], turned[..., 1::2, :])
  return np.concatenate(parts, axis=-2)


def _rotary(settings: dict[str, Any], *, source: str) -> tuple[float, dict[str, Any]]:
  """The factor of attention logits, and fields that say how heads are rotated."""
  rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
  theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return 1.0, {"rope_theta": theta}
  if kind != "yarn":
    raise LoadError(f"{source}: rope scaling {kind!r} is not supported")
  factor, all_dims = rope["factor"], rope.get("mscale_all_dim")
  scale = rope.get("attention_factor")
  if scale is None:
    scale = yarn_scale(factor)
    if rope.get("mscale") and all_dims:
      scale = yarn_scale(factor, rope["mscale"]) / yarn_scale(factor, all_dims)
  factors = yarn_factors(
    head_dim=settings["qk_rope_head_dim"],
    theta=theta,
    factor=factor,
    original_max_position=rope["original_max_position_embeddings"],
    beta_fast=rope.get("beta_fast") or 32.0,
    beta_slow=rope.get("beta_slow") or 1.0,
    truncate=rope.get("truncate", True),
  )
  multiplier = yarn_scale(factor, all_dims) ** 2 if all_dims else 1.0
  fields = {"rope_theta": theta, "rope_factors": factors, "rope_scale": scale}
  return multiplier, fields
