"""Multi-head latent attention: all heads share one small latent per token."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.config import AttentionLayer
from kvcache.context import Context
from kvcache.nn.linear import Linear
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import apply_rotary, Rotary
from kvcache.verbs.attention import attend
from kvcache.verbs.metadata import StepMetadata
from kvcache.verbs.stepping import write_kv


class LatentAttention(nnx.Module):
  """Causal self-attention over latents of the sequences of a `Context`.

  A token's keys and values are linear maps of one latent of `kv_lora_rank` elements.
  Only the latent is stored, once, and beside it a small rotated key that all heads
  share; for the cache that is a single kv head. Keys and values are never computed:
  each head's query is mapped into the space of the latents, and what it attended to is
  mapped out of it, which is the same product in another order ("absorbed"). There is
  one path for prompts and decode steps, like in `PagedAttention`.

  Reference: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient
  Mixture-of-Experts Language Model", 2024.

  Each head of the queries has a part without position, of `nope_head_dim` elements,
  and behind it a part that is rotated, of `rotary.head_dim` elements.

  Attributes:
    q_down, q_norm: Projection to the latent of the queries and its normalisation, or
      None if queries are projected from the features.
    q: Projection to the queries of all heads.
    kv_down: Joint projection to the latent and the rotated key, in this order.
    kv_norm: Normalisation of the latent.
    k_up: `[H, nope_head_dim, kv_lora_rank]`, from latents to keys of each head.
    v_up: `[H, v_head_dim, kv_lora_rank]`, from latents to values of each head.
    out: Projection back to the features.
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int,
    kv_lora_rank: int,
    nope_head_dim: int,
    v_head_dim: int,
    rotary: Rotary,
    rngs: nnx.Rngs,
    q_lora_rank: int | None = None,
    sm_scale: float | None = None,
    norm_epsilon: float = 1e-6,
    dtype: DTypeLike = jnp.float32,
  ):
    """Makes the layer with random weights.

    Args:
      features: Width of the residual stream.
      num_heads: `H`.
      kv_lora_rank: Elements of the latent of keys and values.
      nope_head_dim: Elements of a head's query and key without position.
      v_head_dim: Elements of a head's value.
      rotary: Position embedding of the rotated part.
      rngs: Source of the initial weights.
      q_lora_rank: Elements of the latent of the queries, or None for none.
      sm_scale: Factor of the logits; if omitted the inverse root of the elements of a
        head's query, `nope_head_dim + rotary.head_dim`.
      norm_epsilon: Epsilon of the latents' norms.
      dtype: Of the weights.
    """
    self.num_heads = num_heads
    self.kv_lora_rank = kv_lora_rank
    self.nope_head_dim = nope_head_dim
    self.v_head_dim = v_head_dim
    self.rotary = rotary
    head_dim = nope_head_dim + rotary.head_dim
    self.sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, epsilon=norm_epsilon, dtype=dtype)
    self.q_down = None if q_lora_rank is None else linear(features, q_lora_rank)
    self.q_norm = None if q_lora_rank is None else norm(q_lora_rank)
    self.q = linear(q_lora_rank or features, num_heads * head_dim)
    self.kv_down = linear(features, kv_lora_rank + rotary.head_dim)
    self.kv_norm = norm(kv_lora_rank)
    init = nnx.initializers.normal(kv_lora_rank**-0.5)
    shape = (num_heads, nope_head_dim, kv_lora_rank)
    self.k_up = nnx.Param(init(rngs.params(), shape, dtype))
    shape = (num_heads, v_head_dim, kv_lora_rank)
    self.v_up = nnx.Param(init(rngs.params(), shape, dtype))
    self.out = linear(num_heads * v_head_dim, features)

  def cache_layer(self) -> AttentionLayer:
    """What the layer keeps per token, for `CacheConfig(layers=...)`."""
    return AttentionLayer(
      num_kv_heads=1,
      head_dim=self.kv_lora_rank + self.rotary.head_dim,
      v_head_dim=self.kv_lora_rank,
      is_latent=True,
    )

  def __call__(
    self,
    x: jax.Array,
    layer: jax.Array | int,
    metadata: StepMetadata,
    ctx: Context,
    *,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    group: int | None = None,
  ) -> tuple[jax.Array, Context]:
    """Attends, and stores the latents and rotated keys of the step.

    Args:
      x: `[T, features]`, one row per token of the step.
      layer: Which of the context's layers this is; may be traced.
      metadata: What the step computes, from `step_metadata`.
      ctx: The cache, made for layers like `cache_layer()`.
      rotation: As in `PagedAttention`.
      group: As in `PagedAttention`.

    Returns:
      `[T, features]` and the cache with this layer's latents written.
    """
    if rotation is None:
      rotation = self.rotary(metadata.positions)
    latent, k_rope = jnp.split(self.kv_down(x), (self.kv_lora_rank,), axis=-1)
    latent, k_rope = self.kv_norm(latent)[:, None], k_rope[:, None]  # one kv head
    k = jnp.concatenate([latent, apply_rotary(k_rope, rotation)], axis=-1)
    ctx = write_kv(ctx, layer, k, None, metadata, group=group)

    q = self._queries(x)
    q_nope, q_rope = jnp.split(q, (self.nope_head_dim,), axis=-1)
    q_latent = _per_head("thn,hnr->thr", q_nope, self.k_up[...])
    q = jnp.concatenate([q_latent, apply_rotary(q_rope, rotation)], axis=-1)
    attended = attend(ctx, layer, q, metadata, sm_scale=self.sm_scale, group=group)
    heads = _per_head("thr,hvr->thv", attended.astype(x.dtype), self.v_up[...])
    return self.out(heads.reshape(x.shape[0], -1)), ctx

  def _queries(self, x: jax.Array) -> jax.Array:
    """`[T, H, nope_head_dim + rotary.head_dim]`, not yet rotated."""
    if self.q_down is not None and self.q_norm is not None:
      x = self.q_norm(self.q_down(x))
    return self.q(x).reshape(x.shape[0], self.num_heads, -1)


def _per_head(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """A product per head, accumulated in float32."""
  out = jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)
  return out.astype(x.dtype)
