"""Self-attention whose keys and values live in a paged cache."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.context import Context
from kvcache.nn.linear import Linear
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import apply_rotary, Rotary
from kvcache.verbs import sharding
from kvcache.verbs.attention import attend
from kvcache.verbs.metadata import StepMetadata
from kvcache.verbs.stepping import write_kv


class PagedAttention(nnx.Module):
  """Grouped-query causal self-attention over the sequences of a `Context`.

  There is no prefill and no decode mode: the metadata says which row of the context
  each token of the step belongs to, and a token attends to everything its row has
  stored and to the row's earlier tokens of the step. The layer writes the step's keys
  and values into the cache and returns the cache.

  Attributes:
    qkv: Joint projection to queries, keys and values, in this order.
    out: Projection back to the features.
    q_norm, k_norm: Normalisation of each head before the rotation (Qwen3), or None.
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rngs: nnx.Rngs,
    rotary: Rotary | None = None,
    use_bias: bool = False,
    use_out_bias: bool = False,
    qk_norm: bool = False,
    norm_epsilon: float = 1e-5,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    dtype: DTypeLike = jnp.float32,
  ):
    """Makes the layer with random weights.

    Args:
      features: Width of the residual stream.
      num_heads: `H`, a multiple of `num_kv_heads`.
      num_kv_heads: `K`.
      head_dim: `D`.
      rngs: Source of the initial weights.
      rotary: Position embedding of queries and keys; None for no position embedding.
      use_bias: Whether the projection to queries, keys and values has a bias (Qwen2).
      use_out_bias: Whether the output projection has one.
      qk_norm: Whether queries and keys are normalised per head (Qwen3).
      norm_epsilon: Epsilon of these norms.
      sm_scale: Factor of the logits, `head_dim ** -0.5` if omitted.
      sliding_window: Tokens that a query sees, itself included; all if omitted.
      logits_soft_cap: Soft bound of the logits, or None.
      dtype: Of the weights.
    """
    if num_heads % num_kv_heads:
      raise ValueError(
        f"num_heads must be a multiple of num_kv_heads, got {num_heads} and"
        f" {num_kv_heads}"
      )
    self.num_heads = num_heads
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    self.rotary = rotary
    self.sm_scale = sm_scale
    self.sliding_window = sliding_window
    self.logits_soft_cap = logits_soft_cap
    linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    self.qkv = linear(features, width, use_bias=use_bias)
    self.out = linear(num_heads * head_dim, features, use_bias=use_out_bias)
    norm = functools.partial(RMSNorm, epsilon=norm_epsilon, dtype=dtype)
    self.q_norm = norm(head_dim) if qk_norm else None
    self.k_norm = norm(head_dim) if qk_norm else None

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
    """Attends, and stores the keys and values of the step.

    Args:
      x: `[T, features]`, one row per token of the step.
      layer: Which of the context's layers this is; may be traced, for a scan over
        layers.
      metadata: What the step computes, from `step_metadata`.
      ctx: The cache.
      rotation: Cosines and sines of the step's positions, if the caller computed them
        once for all layers; default `rotary(metadata.positions)`.
      group: Index in `ctx.config.groups`, only for a traced layer where there are
        several.

    Returns:
      `[T, features]` and the cache with this layer's keys and values written.
    """
    num_tokens = x.shape[0]
    heads = self.qkv(x).reshape(num_tokens, -1, self.head_dim)
    cuts = (self.num_heads, self.num_heads + self.num_kv_heads)
    q, k, v = jnp.split(heads, cuts, axis=1)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if self.rotary is not None:
      if rotation is None:
        rotation = self.rotary(metadata.positions)
      q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
    ctx = write_kv(ctx, layer, k, v, metadata, group=group)
    attended = attend(
      ctx,
      layer,
      q,
      metadata,
      sm_scale=self.sm_scale,
      sliding_window=self.sliding_window,
      logits_soft_cap=self.logits_soft_cap,
      group=group,
    )
    out = self.out(attended.astype(x.dtype).reshape(num_tokens, -1))
    return sharding.sum_parts(metadata.head_axes, out), ctx
