"""An attention function with a dense cache, before and after it moves to a paged one.

The shapes are those of Hugging Face's JAX models: `[batch, length, heads, head_dim]`,
with a cache that is handed from layer to layer. `python -m examples.move_function`
shows that both give the same tokens.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

import kvcache as kv
from kvcache import nn

HEADS, KV_HEADS, HEAD_DIM, VOCAB, NUM_LAYERS, MAX_LEN = 4, 2, 8, 64, 2, 32
WIDTH = HEADS * HEAD_DIM


def make_weights(key: jax.Array) -> dict[str, jax.Array]:
  """Random weights; those of the layers are stacked."""
  shapes = {
    "embedding": (VOCAB, WIDTH),
    "positions": (MAX_LEN, WIDTH),
    "qkv": (NUM_LAYERS, WIDTH, HEADS + 2 * KV_HEADS, HEAD_DIM),
    "out": (NUM_LAYERS, WIDTH, WIDTH),
  }
  keys = jax.random.split(key, len(shapes))
  return {
    name: jax.random.normal(key, shape) * WIDTH**-0.5
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def project(weights, layer, x):
  """Queries, keys and values `[batch, length, heads, head_dim]`."""
  heads = jnp.einsum("blw,whd->blhd", x, weights["qkv"][layer])
  return jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=2)


def append_and_attend(cache, layer, q, k, v):
  """The old cache: `k, v [layers, batch, MAX_LEN, ...]` and one length for all."""
  start, length = cache["length"], q.shape[1]
  at = (layer, 0, start, 0, 0)
  cache = cache | {
    "k": lax.dynamic_update_slice(cache["k"], k[None], at),
    "v": lax.dynamic_update_slice(cache["v"], v[None], at),
  }
  mask = jnp.arange(MAX_LEN)[None] <= start + jnp.arange(length)[:, None]
  k, v = cache["k"][layer], cache["v"][layer]
  return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None]), cache


# [before]
def attention_before(weights, layer, x, cache):
  """Attends, and returns the cache with the new keys and values."""
  q, k, v = project(weights, layer, x)
  out, cache = append_and_attend(cache, layer, q, k, v)
  return out.reshape(x.shape) @ weights["out"][layer], cache


# [after]
def attention_after(weights, layer, x, cache):
  """Attends, and returns the cache with the new keys and values."""
  q, k, v = project(weights, layer, x)
  out, cache = cache.attend(layer, q, k, v)
  return out.reshape(x.shape) @ weights["out"][layer], cache


# [end]


def model(attention, weights, tokens, positions, cache):
  """The model around them, which does not change: `x [batch, length, WIDTH]`."""
  x = weights["embedding"].at[tokens].get(mode="clip")
  x = x + weights["positions"][positions]
  for layer in range(NUM_LAYERS):
    attended, cache = attention(weights, layer, x, cache)
    x = x + attended
  return x, cache


# [adapter]
def paged_model(weights, tokens, metadata, ctx):
  """The contract of the library: one batch of `T` packed tokens."""
  cache = nn.StepCache(ctx=ctx, metadata=metadata)
  x, cache = model(
    attention_after, weights, tokens[None], metadata.positions[None], cache
  )
  return x[0, metadata.logits_indices] @ weights["embedding"].T, cache.ctx


# [end adapter]


def generate_before(weights, prompt: list[int], num_tokens: int) -> list[int]:
  """The loop that the model had: one sequence, or several of one length."""
  shape = (NUM_LAYERS, 1, MAX_LEN, KV_HEADS, HEAD_DIM)
  cache = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "length": jnp.int32(0)}
  run = jax.jit(functools.partial(model, attention_before))
  tokens, out = jnp.array([prompt]), []
  while len(out) < num_tokens:
    positions = cache["length"] + jnp.arange(tokens.shape[1])[None]
    x, cache = run(weights, tokens, positions, cache)
    cache = cache | {"length": cache["length"] + tokens.shape[1]}
    out.append(int(jnp.argmax(x[0, -1] @ weights["embedding"].T)))
    tokens = jnp.array([out[-1:]])
  return out


def generate_after(weights, prompts: list[list[int]], num_tokens: int):
  """The loop of the library."""
  layer = kv.AttentionLayer(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
  config = kv.CacheConfig(
    layers=(layer,) * NUM_LAYERS,
    num_blocks=16,
    block_size=4,
    max_seqs=2,
    max_seq_len=MAX_LEN,
  )
  _, completions = kv.generate(
    jax.tree_util.Partial(paged_model, weights),
    kv.init(config),
    prompts,
    max_new_tokens=num_tokens,
    scheduler=kv.SchedulerConfig(token_budget=8),
  )
  return [completion.tokens for completion in completions]


def main() -> tuple[list[list[int]], list[list[int]]]:
  """Generates from two prompts, before and after."""
  weights = make_weights(jax.random.key(0))
  prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
  before = [generate_before(weights, prompt, 8) for prompt in prompts]
  return before, generate_after(weights, prompts, 8)


if __name__ == "__main__":
  before, after = main()
  print(before, "the same" if before == after else after)
