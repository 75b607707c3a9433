"""Granite 4 hybrids: Mamba-2 layers with an attention layer now and then.

The dense members of the family; mixtures of experts are not supported. Blocks of the
two kinds differ, so the stack is unrolled.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.config import AttentionLayer, RecurrentLayer
from kvcache.context import Context
from kvcache.models.decoder import Decoder
from kvcache.nn.attention import PagedAttention
from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.mamba2 import Mamba2
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import Rotary
from kvcache.verbs.metadata import StepMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteHybridConfig:
  """The shape of a model; hashable.

  Attributes:
    vocab_size: Rows of the embedding.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the gated feed-forward layer.
    layer_types: `"mamba"` or `"attention"` for each layer.
    num_heads: `H` of attention.
    num_kv_heads: `K`.
    head_dim: `D`.
    mamba_heads: Heads of the recurrence.
    mamba_head_dim: `P`.
    mamba_state_size: `N`.
    mamba_groups: `G`.
    mamba_conv_width: Taps of the convolution.
    mamba_bias: Whether the recurrence's projections have biases.
    mamba_conv_bias: Whether its convolution has one.
    dt_limit: Bounds of its step sizes.
    rope_theta: Base of the rotary frequencies, or None for no position embedding.
    attention_multiplier: Factor of attention logits.
    embedding_multiplier: Factor of embeddings.
    residual_multiplier: Factor of what each layer adds to the residual stream.
    logits_divisor: What logits are divided by.
    norm_epsilon: Epsilon of every RMSNorm.
    tie_embeddings: Whether the output matrix is the embedding.
    max_position: Context length the model was trained for; not enforced here.
    dtype: Of weights and activations. States, products and logits are float32.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  layer_types: tuple[str, ...]
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mamba_heads: int
  mamba_head_dim: int
  mamba_state_size: int
  mamba_groups: int = 1
  mamba_conv_width: int = 4
  mamba_bias: bool = False
  mamba_conv_bias: bool = True
  dt_limit: tuple[float, float] = (0.0, float("inf"))
  rope_theta: float | None = None
  attention_multiplier: float = 1.0
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  logits_divisor: float = 1.0
  norm_epsilon: float = 1e-5
  tie_embeddings: bool = True
  max_position: int = 2048
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    object.__setattr__(self, "dtype", np.dtype(self.dtype))
    object.__setattr__(self, "layer_types", tuple(self.layer_types))
    strange = set(self.layer_types) - {"mamba", "attention"}
    if strange:
      raise ValueError(f"layer_types must be 'mamba' or 'attention', got {strange}")

  @property
  def num_layers(self) -> int:
    """Layers of both kinds."""
    return len(self.layer_types)

  @property
  def rotary(self) -> Rotary | None:
    """The position embedding that all attention layers share, if any."""
    if self.rope_theta is None:
      return None
    return Rotary(head_dim=self.head_dim, theta=self.rope_theta)

  def cache_layers(self) -> tuple[AttentionLayer | RecurrentLayer, ...]:
    """Returns what each layer keeps, for `CacheConfig(layers=...)`."""
    kinds = {
      "attention": AttentionLayer(
        num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
      ),
      "mamba": RecurrentLayer.mamba2(
        num_heads=self.mamba_heads,
        head_dim=self.mamba_head_dim,
        state_size=self.mamba_state_size,
        num_groups=self.mamba_groups,
        conv_width=self.mamba_conv_width,
      ),
    }
    return tuple(kinds[kind] for kind in self.layer_types)


class HybridBlock(nnx.Module):
  """One layer: a mixer of either kind, then feed-forward; both normalised before."""

  def __init__(self, config: GraniteHybridConfig, kind: str, *, rngs: nnx.Rngs):
    self.residual_multiplier = config.residual_multiplier
    self.mixer_norm = _norm(config)
    if kind == "attention":
      self.mixer = PagedAttention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        sm_scale=config.attention_multiplier,
        dtype=config.dtype,
        rngs=rngs,
      )
    else:
      self.mixer = Mamba2(
        config.hidden_size,
        num_heads=config.mamba_heads,
        head_dim=config.mamba_head_dim,
        state_size=config.mamba_state_size,
        num_groups=config.mamba_groups,
        conv_width=config.mamba_conv_width,
        use_bias=config.mamba_bias,
        use_conv_bias=config.mamba_conv_bias,
        dt_limit=config.dt_limit,
        norm_epsilon=config.norm_epsilon,
        dtype=config.dtype,
        rngs=rngs,
      )
    self.mlp_norm = _norm(config)
    self.mlp = FeedForward(
      config.hidden_size, config.intermediate_size, dtype=config.dtype, rngs=rngs
    )

  def __call__(
    self, x: jax.Array, layer: int, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    """Maps the residual stream `[T, hidden]`; `layer` counts layers of its kind."""
    mixed, ctx = self.mixer(self.mixer_norm(x), layer, metadata, ctx)
    x = x + mixed * self.residual_multiplier
    return x + self.mlp(self.mlp_norm(x)) * self.residual_multiplier, ctx


class GraniteHybrid(Decoder[GraniteHybridConfig]):
  """A decoder-only language model over a cache of K/V blocks and recurrent states.

  Attributes:
    config: Its shape.
    embedding: `[vocab_size, hidden_size]`.
    layers: A list of `HybridBlock`.
    norm: Normalisation before the output matrix.
    head: `[vocab_size, hidden_size]`, or None if the embedding serves.
  """

  def __init__(self, config: GraniteHybridConfig, *, rngs: nnx.Rngs):
    super().__init__(
      config,
      lambda: nnx.List([HybridBlock(config, x, rngs=rngs) for x in config.layer_types]),
      _norm(config),
      is_tied=config.tie_embeddings,
      rngs=rngs,
    )

  def _run_layers(
    self, x: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    x, layer_types = x * self.config.embedding_multiplier, self.config.layer_types
    counts = dict.fromkeys(layer_types, 0)
    for kind, block in zip(layer_types, self.layers, strict=True):
      x, ctx = block(x, counts[kind], metadata, ctx)
      counts[kind] += 1
    return x, ctx

  def _finish_logits(self, logits: jax.Array) -> jax.Array:
    return logits / self.config.logits_divisor


def _norm(config: GraniteHybridConfig) -> RMSNorm:
  return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, dtype=config.dtype)
