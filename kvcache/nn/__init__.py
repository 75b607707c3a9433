"""Flax NNX layers that take a cache and return it.

A layer owns weights and nothing else; keys and values live in the `Context` that goes
in and comes out. `as_function` turns a finished module into the plain callable that
`kvcache.serve` and `kvcache.generate` want. `StepCache` and `attend_with` are for
models that have attention of their own.
"""

from kvcache.nn.attention import PagedAttention
from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.functional import as_function
from kvcache.nn.latent_attention import LatentAttention
from kvcache.nn.linear import Linear
from kvcache.nn.mamba2 import Mamba2
from kvcache.nn.mixture import MixtureOfExperts
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import (
  apply_rotary,
  llama3_factors,
  Rotary,
  yarn_factors,
  yarn_scale,
)
from kvcache.nn.step_cache import attend_with, StepCache
from kvcache.nn.weight_specs import place_weights, weight_specs

__all__ = [
  "FeedForward",
  "LatentAttention",
  "Linear",
  "Mamba2",
  "MixtureOfExperts",
  "PagedAttention",
  "RMSNorm",
  "Rotary",
  "StepCache",
  "apply_rotary",
  "as_function",
  "attend_with",
  "llama3_factors",
  "place_weights",
  "weight_specs",
  "yarn_factors",
  "yarn_scale",
]
