"""A model with `nnx.MultiHeadAttention`, before and after it moves to a paged cache.

`python -m examples.move_flax` shows that both give the same tokens. Before, the prompt
goes in one token at a time, and all sequences stand at the same position.
"""

from flax import nnx
import jax
import jax.numpy as jnp

import kvcache as kv
from kvcache import nn

HEADS, HEAD_DIM, VOCAB, NUM_LAYERS, MAX_LEN = 4, 8, 64, 2, 32
WIDTH = HEADS * HEAD_DIM


class Weights(nnx.Module):
  """What both models have: the move changes no weight."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
    self.positions = nnx.Embed(MAX_LEN, WIDTH, rngs=rngs)
    self.attention = nnx.List(
      nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs)
      for _ in range(NUM_LAYERS)
    )
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)


# [before]
class Before(Weights):
  """One token per sequence, `[batch, 1]`, into the modules' own caches."""

  def __call__(self, tokens, positions):
    """Returns logits `[batch, 1, VOCAB]`."""
    x = self.embedding(tokens) + self.positions(positions)
    for attention in self.attention:
      x = x + attention(self.norm(x))
    return self.embedding.attend(x)


# [after]
class After(Weights):
  """Any tokens of any sequences, `[T]`, into the context."""

  def __call__(self, tokens, metadata, ctx):
    """Returns logits `[S, VOCAB]` and the context."""
    cache = nn.StepCache(ctx=ctx, metadata=metadata)
    x = self.embedding(tokens) + self.positions(metadata.positions)
    for layer, attention in enumerate(self.attention):
      attended, cache = nn.attend_with(attention, self.norm(x), layer, cache)
      x = x + attended
    return self.embedding.attend(x[metadata.logits_indices]), cache.ctx


# [end]


def generate_before(prompt: list[int], num_tokens: int) -> list[int]:
  """The loop that the model had."""
  model = Before(rngs=nnx.Rngs(0))
  for attention in model.attention:
    attention.init_cache((1, MAX_LEN, WIDTH))
  tokens = list(prompt)
  step = nnx.jit(lambda model, tokens, positions: model(tokens, positions))
  for position in range(len(prompt) + num_tokens - 1):
    token = jnp.array([[tokens[position]]])
    logits = step(model, token, jnp.array([[position]]))
    if position + 1 == len(tokens):
      tokens.append(int(jnp.argmax(logits[0, 0])))
  return tokens[len(prompt) :]


def generate_after(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
  """The loop of the library: many sequences, each at its own position."""
  config = kv.CacheConfig(
    layers=(kv.AttentionLayer(num_kv_heads=HEADS, head_dim=HEAD_DIM),) * NUM_LAYERS,
    num_blocks=16,
    block_size=4,
    max_seqs=2,
    max_seq_len=MAX_LEN,
  )
  model = nn.as_function(After(rngs=nnx.Rngs(0)))
  scheduler = kv.SchedulerConfig(token_budget=8)
  _, completions = kv.generate(
    model, kv.init(config), prompts, max_new_tokens=num_tokens, scheduler=scheduler
  )
  return [completion.tokens for completion in completions]


def main() -> tuple[list[list[int]], list[list[int]]]:
  """Generates from two prompts, before and after."""
  prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
  before = [generate_before(prompt, 8) for prompt in prompts]
  return before, generate_after(prompts, 8)


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")
  before, after = main()
  print(before, "the same" if before == after else after)
