"""Compiled for an H100 without one: how often the samplers go over the logits.

`make aot` runs this in an environment with the CUDA compiler's wheels.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from kvcache.serving import sampling
from tests.aot import hlo

pytestmark = pytest.mark.aot
S, V = 64, 128_256


def logprobs(logits, settings, positions):
  return sampling.token_logprobs(logits, positions)


@pytest.mark.parametrize(
  ("sampler", "num_reads", "num_writes"),
  [
    (sampling.greedy, 1, 0),
    # The largest logit and the greedy token, then the noise and the token drawn.
    (functools.partial(sampling.sample, use_top_k=False, use_top_p=False), 2, 0),
    # The third is a gather of the tokens.
    (logprobs, 3, 0),
    # 16 passes of bisection over keys, and 16 over keys and masses.
    (sampling.sample, 55, 3),
  ],
  ids=["greedy", "noise", "logprobs", "filters"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samplers_go_over_the_logits_few_times(
  compiler, dtype, sampler, num_reads, num_writes
):
  rows = functools.partial(jax.ShapeDtypeStruct, (S,))
  settings = sampling.SamplingSettings(
    temperature=rows(jnp.float32),
    top_k=rows(jnp.int32),
    top_p=rows(jnp.float32),
    min_p=rows(jnp.float32),
    seed=rows(jnp.uint32),
  )
  logits = jax.ShapeDtypeStruct((S, V), dtype)
  program = compiler(sampler, logits, settings, rows(jnp.int32))
  module = hlo.read(program.text)
  assert len(module.reads(S * V)) <= num_reads, [str(i) for i in module.reads(S * V)]
  written = [n for i in module.rewrites(S * V) for n in i.sizes if n >= S * V]
  assert len(written) <= num_writes
  # Nor does anything in a kernel go over the logits several times.
  everything = module.walk(into_fusions=True)
  assert not [str(i) for i in everything if i.num_elements > S * V]
  assert not module.count("sort") and not module.count("conditional")
