"""A language model of plain functions and a dictionary of arrays: no Flax.

`python -m examples.model_plain` generates a few tokens with random weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import kvcache as kv

HEADS, KV_HEADS, HEAD_DIM, VOCAB, NUM_LAYERS = 4, 2, 8, 64, 2
WIDTH = HEADS * HEAD_DIM


def make_weights(key: jax.Array) -> dict[str, Any]:
  """Random weights; each layer has arrays of its own."""
  layer = {
    "q": (WIDTH, HEADS, HEAD_DIM),
    "k": (WIDTH, KV_HEADS, HEAD_DIM),
    "v": (WIDTH, KV_HEADS, HEAD_DIM),
    "out": (HEADS, HEAD_DIM, WIDTH),
  }
  shapes = {
    "embedding": (VOCAB, WIDTH),
    "positions": (128, WIDTH),
    "layers": [layer] * NUM_LAYERS,
  }
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(key, len(leaves))
  made = [
    jax.random.normal(key, shape) * WIDTH**-0.5
    for key, shape in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


def model(weights, tokens, metadata, ctx):
  """Computes the step's tokens `[T]`: logits `[S, VOCAB]`, and the cache."""
  x = weights["embedding"].at[tokens].get(mode="clip")
  x = x + weights["positions"][metadata.positions]
  for layer, w in enumerate(weights["layers"]):
    q = jnp.einsum("tw,whd->thd", x, w["q"])
    k = jnp.einsum("tw,whd->thd", x, w["k"])
    v = jnp.einsum("tw,whd->thd", x, w["v"])
    ctx = kv.write_kv(ctx, layer, k, v, metadata)
    attended = kv.attend(ctx, layer, q, metadata)
    x = x + jnp.einsum("thd,hdw->tw", attended, w["out"])
  return x[metadata.logits_indices] @ weights["embedding"].T, ctx


def main() -> list[list[int]]:
  """Generates from two prompts."""
  config = kv.CacheConfig(
    layers=(kv.AttentionLayer(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM),) * NUM_LAYERS,
    num_blocks=16,
    block_size=4,
    max_seqs=2,
    max_seq_len=32,
  )
  weights = make_weights(jax.random.key(0))
  _, completions = kv.generate(
    jax.tree_util.Partial(model, weights),  # the weights are arguments, not constants
    kv.init(config),
    [[1, 2, 3, 4, 5], [9, 8, 7]],
    max_new_tokens=6,
    scheduler=kv.SchedulerConfig(token_budget=8),
  )
  return [completion.tokens for completion in completions]


def step(weights, ctx, texts, query_lens, *, num_tokens=None):
  """One step by hand, for those who write the loop themselves.

  `texts [S, C]` are the tokens known of each row. A row that finds no room waits.
  """
  ctx, status = kv.extend(ctx, query_lens, num_tokens=num_tokens)
  query_lens = jnp.where(status == kv.Status.OK, query_lens, 0)
  metadata = kv.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  tokens = texts[metadata.seq_ids, metadata.positions]
  logits, ctx = model(weights, tokens, metadata, ctx)
  return kv.commit(ctx, tokens, metadata), logits


compiled_step = functools.partial(
  jax.jit, donate_argnums=1, static_argnames="num_tokens"
)(step)


if __name__ == "__main__":
  print(main())
