"""A mixture of experts, computed densely."""

import functools

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.linear import Linear, multiply


class MixtureOfExperts(nnx.Module):
  """Many small gated feed-forward layers, of which each token uses a few.

  A reference: every expert computes every token, and what the router did not choose
  counts 0. The experts side by side are one wide feed-forward layer, so this is two
  products of fixed shape, without sorting or capacity: no token is ever dropped, and a
  token's result depends on nothing but the token. The cost is that of all experts.

  Reference: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient
  Mixture-of-Experts Language Model", 2024.

  Attributes:
    router: `[E, features]` float32; its softmax are the scores of the experts.
    expert_gate_up: Joint projection to the gates of all experts, then to their ups.
    expert_down: Projection of all experts back to the features; it sums over them.
    shared: A feed-forward layer that every token uses, or None.
  """

  def __init__(
    self,
    features: int,
    hidden_features: int,
    *,
    num_experts: int,
    experts_per_token: int,
    rngs: nnx.Rngs,
    shared_features: int = 0,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalise_scores: bool = False,
    score_scale: float = 1.0,
    dtype: DTypeLike = jnp.float32,
  ):
    """Makes the layer with random weights.

    Args:
      features: Width of the residual stream.
      hidden_features: Width of one expert.
      num_experts: `E`, a multiple of `num_groups`.
      experts_per_token: How many experts of the highest scores a token uses.
      rngs: Source of the initial weights.
      shared_features: Width of the shared layer; 0 for none.
      num_groups: Groups of neighbouring experts, such as those of one device.
      groups_per_token: A token's experts are chosen from so many groups, those with the
        highest scores.
      normalise_scores: Whether the scores of a token's experts are made to sum to 1.
      score_scale: Factor of the scores, after that.
      dtype: Of the weights, but for the router.
    """
    if num_experts % num_groups:
      raise ValueError(
        f"num_experts must be a multiple of num_groups, got {num_experts} and"
        f" {num_groups}"
      )
    for name, number, limit in (
      ("experts_per_token", experts_per_token, num_experts),
      ("groups_per_token", groups_per_token, num_groups),
    ):
      if not 1 <= number <= limit:
        raise ValueError(f"{name} must be from 1 to {limit}, got {number}")
    self.experts_per_token = experts_per_token
    self.num_groups, self.groups_per_token = num_groups, groups_per_token
    self.normalise_scores, self.score_scale = normalise_scores, score_scale
    init = nnx.initializers.normal(features**-0.5)
    self.router = nnx.Param(init(rngs.params(), (num_experts, features), jnp.float32))
    linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
    self.expert_gate_up = linear(features, 2 * num_experts * hidden_features)
    self.expert_down = linear(num_experts * hidden_features, features)
    self.shared = (
      FeedForward(features, shared_features, dtype=dtype, rngs=rngs)
      if shared_features
      else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[T, features]` to `[T, features]`."""
    weights = self.weights(x).astype(x.dtype)
    gate, up = jnp.split(self.expert_gate_up(x), 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).reshape(*weights.shape, -1)  # [T, E, hidden]
    out = self.expert_down((hidden * weights[..., None]).reshape(x.shape[0], -1))
    return out if self.shared is None else out + self.shared(x)

  def weights(self, x: jax.Array) -> jax.Array:
    """What each expert counts for each token, `[T, E]` float32; 0 if not chosen."""
    scores = multiply(x.astype(jnp.float32), self.router[...])
    scores = jax.nn.softmax(scores, axis=-1)
    if self.groups_per_token < self.num_groups:
      groups = scores.reshape(x.shape[0], self.num_groups, -1)
      is_open = _is_top(jnp.max(groups, axis=-1), self.groups_per_token)
      scores = jnp.where(is_open[..., None], groups, 0.0).reshape(scores.shape)
    scores = jnp.where(_is_top(scores, self.experts_per_token), scores, 0.0)
    if self.normalise_scores:
      scores = scores / jnp.sum(scores, axis=-1, keepdims=True)
    return scores * self.score_scale


def _is_top(scores: jax.Array, count: int) -> jax.Array:
  """Where the `count` highest of each row stand; of equal ones the first."""
  _, places = lax.top_k(scores, count)
  return jnp.any(jax.nn.one_hot(places, scores.shape[-1], dtype=bool), axis=-2)
