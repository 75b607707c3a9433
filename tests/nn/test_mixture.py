"""Mixtures of experts against one expert and one token at a time."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.nn import MixtureOfExperts

FEATURES, HIDDEN, E, T = 8, 5, 6, 20


def make(**kwargs) -> MixtureOfExperts:
  fields = {"num_experts": E, "experts_per_token": 2, "rngs": nnx.Rngs(3)} | kwargs
  return MixtureOfExperts(FEATURES, HIDDEN, **fields)


def by_hand(layer: MixtureOfExperts, token: np.ndarray) -> np.ndarray:
  """`[features]` of one token, choosing with sorted lists."""
  wide = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731
  scores = np.exp(wide(layer.router) @ token)
  scores /= scores.sum()
  group = E // layer.num_groups
  best = sorted(range(E), key=lambda e: -scores[e])
  best_groups = list(dict.fromkeys(e // group for e in best))
  is_open = best_groups[: layer.groups_per_token]
  chosen = [e for e in best if e // group in is_open][: layer.experts_per_token]
  total = sum(scores[e] for e in chosen) if layer.normalise_scores else 1.0
  gate, up = wide(layer.expert_gate_up.weight).reshape(2, E, HIDDEN, FEATURES)
  down = wide(layer.expert_down.weight).reshape(FEATURES, E, HIDDEN)
  out = np.zeros(FEATURES)
  for e in chosen:
    hidden = gate[e] @ token
    hidden = hidden / (1 + np.exp(-hidden)) * (up[e] @ token)
    out += layer.score_scale * scores[e] / total * (down[:, e] @ hidden)
  if layer.shared is not None:
    out += np.asarray(layer.shared(jnp.asarray(token, jnp.float32)[None])[0])
  return out


@pytest.mark.parametrize(
  "kwargs",
  [
    {},
    {"shared_features": 7, "score_scale": 3.0},
    {"experts_per_token": 3, "normalise_scores": True, "score_scale": 0.5},
    {"num_groups": 3, "groups_per_token": 1},
    {"num_groups": 2, "groups_per_token": 1, "normalise_scores": True},
    {"experts_per_token": E},
  ],
)
def test_a_token_is_the_weighted_sum_of_its_experts(kwargs):
  layer = make(**kwargs)
  x = np.random.default_rng(0).standard_normal((T, FEATURES)).astype(np.float32)
  out = jax.jit(lambda x: layer(x))(x)
  np.testing.assert_allclose(out, [by_hand(layer, row) for row in x], atol=1e-5)
  weights = np.asarray(layer.weights(jnp.asarray(x)))
  assert ((weights > 0).sum(axis=1) == layer.experts_per_token).all()


def test_the_experts_of_equal_scores_are_the_first():
  layer = make()
  layer.router[...] = jnp.zeros((E, FEATURES))
  weights = layer.weights(jnp.ones((1, FEATURES)))
  np.testing.assert_allclose(weights, [[1 / 6, 1 / 6, 0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"num_groups": 4}, "num_experts must be a multiple of num_groups, got 6 and 4"),
    ({"experts_per_token": 7}, "experts_per_token must be from 1 to 6, got 7"),
    ({"groups_per_token": 2}, "groups_per_token must be from 1 to 1, got 2"),
  ],
)
def test_sizes_that_do_not_fit_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)
