"""Gemma 2: every other layer sees a window only, and logits are softly capped.

Blocks are alike; which layers have a window is told by the cache, where these keep no
more than it. The stack is unrolled, so that the layers' groups are known.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.config import AttentionLayer
from kvcache.context import Context
from kvcache.models.decoder import Decoder
from kvcache.nn.attention import PagedAttention
from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import Rotary
from kvcache.verbs.metadata import StepMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config:
  """The shape of a model; hashable.

  Attributes:
    vocab_size: Rows of the embedding.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the gated feed-forward layer.
    windows: Tokens that each layer's queries see, themselves included; None for all.
    num_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    query_scalar: Attention logits are divided by its square root.
    attention_soft_cap: Soft bound of attention logits, or None.
    logits_soft_cap: Soft bound of the output's logits, or None.
    rope_theta: Base of the rotary frequencies.
    norm_epsilon: Epsilon of every RMSNorm.
    max_position: Context length the model was trained for; not enforced here.
    dtype: Of weights and activations. Products and logits are float32.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  windows: tuple[int | None, ...]
  num_heads: int
  num_kv_heads: int
  head_dim: int
  query_scalar: float
  attention_soft_cap: float | None = 50.0
  logits_soft_cap: float | None = 30.0
  rope_theta: float = 10000.0
  norm_epsilon: float = 1e-6
  max_position: int = 8192
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    object.__setattr__(self, "dtype", np.dtype(self.dtype))
    object.__setattr__(self, "windows", tuple(self.windows))

  @property
  def num_layers(self) -> int:
    """`L`."""
    return len(self.windows)

  @property
  def rotary(self) -> Rotary:
    """The position embedding that all layers share."""
    return Rotary(head_dim=self.head_dim, theta=self.rope_theta)

  def cache_layers(self) -> tuple[AttentionLayer, ...]:
    """Returns what each layer keeps per token, for `CacheConfig(layers=...)`."""
    layer = AttentionLayer(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
    return tuple(
      dataclasses.replace(layer, sliding_window=window) for window in self.windows
    )


class Gemma2Block(nnx.Module):
  """One layer: attention and feed-forward, each normalised before and after."""

  def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config)
    self.attention = PagedAttention(
      config.hidden_size,
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      rotary=config.rotary,
      sm_scale=config.query_scalar**-0.5,
      logits_soft_cap=config.attention_soft_cap,
      dtype=config.dtype,
      rngs=rngs,
    )
    self.attention_out_norm = _norm(config)
    self.mlp_norm = _norm(config)
    self.mlp = FeedForward(
      config.hidden_size,
      config.intermediate_size,
      activation="gelu_tanh",
      dtype=config.dtype,
      rngs=rngs,
    )
    self.mlp_out_norm = _norm(config)

  def __call__(
    self,
    x: jax.Array,
    layer: int,
    metadata: StepMetadata,
    ctx: Context,
    *,
    rotation: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, Context]:
    """Maps the residual stream `[T, hidden]`; arguments as in `PagedAttention`."""
    attended, ctx = self.attention(
      self.attention_norm(x), layer, metadata, ctx, rotation=rotation
    )
    x = x + self.attention_out_norm(attended)
    return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), ctx


class Gemma2(Decoder[Gemma2Config]):
  """A decoder-only language model over a paged cache.

  Attributes:
    config: Its shape.
    embedding: `[vocab_size, hidden_size]`, also the output matrix.
    layers: A list of `Gemma2Block`.
    norm: Normalisation before the output matrix.
  """

  def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
    super().__init__(
      config,
      lambda: nnx.List([Gemma2Block(config, rngs=rngs) for _ in config.windows]),
      _norm(config),
      is_tied=True,
      rngs=rngs,
    )

  def _run_layers(
    self, x: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    x = x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)
    rotation = self.config.rotary(metadata.positions)
    for layer, block in enumerate(self.layers):
      x, ctx = block(x, layer, metadata, ctx, rotation=rotation)
    return x, ctx

  def _finish_logits(self, logits: jax.Array) -> jax.Array:
    cap = self.config.logits_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _norm(config: Gemma2Config) -> RMSNorm:
  """Its weights are stored as their difference from 1."""
  return RMSNorm(
    config.hidden_size, epsilon=config.norm_epsilon, offset=1.0, dtype=config.dtype
  )
