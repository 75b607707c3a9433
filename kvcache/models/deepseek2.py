"""DeepSeek-V2: latent attention, and mixtures of experts behind a few dense layers.

Blocks of the two kinds differ, so the stack is unrolled.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.config import AttentionLayer
from kvcache.context import Context
from kvcache.models.decoder import Decoder
from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.latent_attention import LatentAttention
from kvcache.nn.mixture import MixtureOfExperts
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import Rotary
from kvcache.verbs.metadata import StepMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeek2Config:
  """The shape of a model; hashable.

  Attributes:
    vocab_size: Rows of the embedding.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the gated feed-forward layer of dense layers.
    num_layers: `L`.
    num_dense_layers: How many layers, the first ones, have no experts.
    num_heads: `H`.
    kv_lora_rank: Elements of the latent that keys and values are made from.
    q_lora_rank: Elements of the latent that queries are made from; None for queries
      made from the features, as in V2-Lite.
    nope_head_dim: Elements of a head's query and key without position.
    rope_head_dim: Elements of the rotated part.
    v_head_dim: Elements of a head's value.
    num_experts: Experts of a layer.
    experts_per_token: How many of them a token uses.
    expert_size: Width of one expert.
    num_shared_experts: Experts that every token uses besides.
    num_groups: Groups of experts.
    groups_per_token: From how many of the groups a token's experts are chosen.
    normalise_scores: Whether the scores of a token's experts sum to 1.
    score_scale: Factor of the scores of experts.
    attention_multiplier: Factor of attention logits, or None for the inverse root of
      the elements of a head's query.
    rope_theta: Base of the rotary frequencies.
    rope_factors: Divisors of the frequencies, or None.
    rope_scale: Factor of the rotated parts.
    norm_epsilon: Epsilon of every RMSNorm but those of latents, which have 1e-6.
    tie_embeddings: Whether the output matrix is the embedding.
    max_position: Context length the model was trained for; not enforced here.
    dtype: Of weights and activations. Routers, products and logits are float32.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_dense_layers: int
  num_heads: int
  kv_lora_rank: int
  q_lora_rank: int | None = None
  nope_head_dim: int
  rope_head_dim: int
  v_head_dim: int
  num_experts: int
  experts_per_token: int
  expert_size: int
  num_shared_experts: int = 0
  num_groups: int = 1
  groups_per_token: int = 1
  normalise_scores: bool = False
  score_scale: float = 1.0
  attention_multiplier: float | None = None
  rope_theta: float = 10000.0
  rope_factors: tuple[float, ...] | None = None
  rope_scale: float = 1.0
  norm_epsilon: float = 1e-6
  tie_embeddings: bool = False
  max_position: int = 2048
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    object.__setattr__(self, "dtype", np.dtype(self.dtype))

  @property
  def rotary(self) -> Rotary:
    """The position embedding that all layers share."""
    return Rotary(
      head_dim=self.rope_head_dim,
      theta=self.rope_theta,
      factors=self.rope_factors,
      scale=self.rope_scale,
    )

  def cache_layers(self) -> tuple[AttentionLayer, ...]:
    """Returns what each layer keeps per token, for `CacheConfig(layers=...)`."""
    layer = AttentionLayer(
      num_kv_heads=1,
      head_dim=self.kv_lora_rank + self.rope_head_dim,
      v_head_dim=self.kv_lora_rank,
      is_latent=True,
    )
    return (layer,) * self.num_layers


class DeepSeek2Block(nnx.Module):
  """One layer: attention, then a dense or a mixed layer; both normalised before."""

  def __init__(self, config: DeepSeek2Config, *, is_dense: bool, rngs: nnx.Rngs):
    self.attention_norm = _norm(config)
    self.attention = LatentAttention(
      config.hidden_size,
      num_heads=config.num_heads,
      kv_lora_rank=config.kv_lora_rank,
      q_lora_rank=config.q_lora_rank,
      nope_head_dim=config.nope_head_dim,
      v_head_dim=config.v_head_dim,
      rotary=config.rotary,
      sm_scale=config.attention_multiplier,
      dtype=config.dtype,
      rngs=rngs,
    )
    self.mlp_norm = _norm(config)
    if is_dense:
      self.mlp = FeedForward(
        config.hidden_size, config.intermediate_size, dtype=config.dtype, rngs=rngs
      )
    else:
      self.mlp = MixtureOfExperts(
        config.hidden_size,
        config.expert_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        shared_features=config.num_shared_experts * config.expert_size,
        num_groups=config.num_groups,
        groups_per_token=config.groups_per_token,
        normalise_scores=config.normalise_scores,
        score_scale=config.score_scale,
        dtype=config.dtype,
        rngs=rngs,
      )

  def __call__(
    self,
    x: jax.Array,
    layer: int,
    metadata: StepMetadata,
    ctx: Context,
    *,
    rotation: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, Context]:
    """Maps the residual stream `[T, hidden]`; arguments as in `LatentAttention`."""
    attended, ctx = self.attention(
      self.attention_norm(x), layer, metadata, ctx, rotation=rotation
    )
    x = x + attended
    return x + self.mlp(self.mlp_norm(x)), ctx


class DeepSeek2(Decoder[DeepSeek2Config]):
  """A decoder-only language model over a paged cache of latents.

  Attributes:
    config: Its shape.
    embedding: `[vocab_size, hidden_size]`.
    layers: A list of `DeepSeek2Block`.
    norm: Normalisation before the output matrix.
    head: `[vocab_size, hidden_size]`, or None if the embedding serves.
  """

  def __init__(self, config: DeepSeek2Config, *, rngs: nnx.Rngs):
    def make_layers() -> nnx.List[DeepSeek2Block]:
      are_dense = (i < config.num_dense_layers for i in range(config.num_layers))
      return nnx.List(
        [DeepSeek2Block(config, is_dense=dense, rngs=rngs) for dense in are_dense]
      )

    super().__init__(
      config, make_layers, _norm(config), is_tied=config.tie_embeddings, rngs=rngs
    )

  def _run_layers(
    self, x: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    rotation = self.config.rotary(metadata.positions)
    for layer, block in enumerate(self.layers):
      x, ctx = block(x, layer, metadata, ctx, rotation=rotation)
    return x, ctx


def _norm(config: DeepSeek2Config) -> RMSNorm:
  return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, dtype=config.dtype)
