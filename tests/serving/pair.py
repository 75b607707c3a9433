"""One of two processes that serve a model together, each with half of its heads.

    python -m tests.serving.pair PORT PROCESS FOLDER LAST_SLICE

It saves to FOLDER, and process 1 kills itself after so many slices. It prints the
tokens in the end.
"""

import dataclasses
import functools
import json
import os
import signal
import sys

from flax import nnx
import jax
from jax.sharding import AxisType
import numpy as np

import kvcache
from kvcache.models import Llama, LlamaConfig
from kvcache.nn import as_function, place_weights
from kvcache.verbs import sharding

MODEL = LlamaConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)
SIZES = kvcache.CacheConfig(
  layers=MODEL.cache_layers(), num_blocks=24, block_size=4, max_seqs=3, max_seq_len=48
)
rng = np.random.default_rng(0)
SHARED = rng.integers(0, 64, 9).tolist()
PROMPTS = [SHARED[: 3 * i] + rng.integers(0, 64, 5).tolist() for i in range(6)]
generate = functools.partial(
  kvcache.generate,
  prompts=PROMPTS,
  max_new_tokens=20,
  scheduler=kvcache.SchedulerConfig(token_budget=16),
  slice_steps=5,
)
HEARTBEAT = 15
"""Seconds after which a process that is not heard of counts as dead."""


def alone() -> list[list[int]]:
  """The tokens, by one process."""
  model = as_function(Llama(MODEL, rngs=nnx.Rngs(0)))
  return [one.tokens for one in generate(model, kvcache.init(SIZES))[1]]


def together(folder: str, last_slice: int) -> list[list[int]]:
  """The tokens, by all processes."""
  sizes = dataclasses.replace(SIZES, head_axes="tensor")
  seen = []

  def on_slice(one: kvcache.Slice):
    seen.append(one.num_steps)
    print("steps", one.num_steps, flush=True)
    if jax.process_index() == 1 and len(seen) == last_slice:
      os.kill(os.getpid(), signal.SIGKILL)

  mesh = jax.make_mesh((jax.device_count(),), ("tensor",), (AxisType.Auto,))
  with jax.set_mesh(mesh):
    model = place_weights(Llama(MODEL, rngs=nnx.Rngs(0)), sizes.head_axes)
    ctx = sharding.init(sizes)
    done = generate(as_function(model), ctx, checkpoints=folder, on_slice=on_slice)[1]
  return [one.tokens for one in done]


if __name__ == "__main__":
  port, process, folder, last_slice = sys.argv[1:]
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.distributed.initialize(
    f"127.0.0.1:{port}",
    num_processes=2,
    process_id=int(process),
    initialization_timeout=120,
    heartbeat_timeout_seconds=HEARTBEAT,
    shutdown_timeout_seconds=HEARTBEAT,
  )
  print(json.dumps(together(folder, int(last_slice))), flush=True)
