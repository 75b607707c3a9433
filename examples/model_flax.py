"""A language model of `kvcache.nn` layers: the Flax NNX way.

`python -m examples.model_flax` generates a few tokens with random weights.
"""

from flax import nnx
import jax

import kvcache as kv
from kvcache import nn

WIDTH, VOCAB, NUM_LAYERS = 32, 64, 2


class Block(nnx.Module):
  """Attention and a feed-forward layer, each normalised before and added after."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.attention_norm = nn.RMSNorm(WIDTH)
    self.attention = nn.PagedAttention(
      WIDTH,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      rotary=nn.Rotary(head_dim=8),
      rngs=rngs,
    )
    self.mlp_norm = nn.RMSNorm(WIDTH)
    self.mlp = nn.FeedForward(WIDTH, 2 * WIDTH, rngs=rngs)

  def __call__(self, x, layer, metadata, ctx):
    """Maps `[T, WIDTH]`, and writes the layer's keys and values."""
    attended, ctx = self.attention(self.attention_norm(x), layer, metadata, ctx)
    x = x + attended
    return x + self.mlp(self.mlp_norm(x)), ctx


class Model(nnx.Module):
  """Embedding, blocks, and the embedding again."""

  def __init__(self, *, rngs: nnx.Rngs):
    init = nnx.initializers.normal(1.0)
    self.embedding = nnx.Param(init(rngs.params(), (VOCAB, WIDTH)))
    self.blocks = nnx.List([Block(rngs=rngs) for _ in range(NUM_LAYERS)])
    self.norm = nn.RMSNorm(WIDTH)

  def __call__(self, tokens, metadata, ctx):
    """Computes the step's tokens `[T]`: logits `[S, VOCAB]`, and the cache."""
    x = self.embedding[...].at[tokens].get(mode="clip")  # padding may be anything
    for layer, block in enumerate(self.blocks):
      x, ctx = block(x, layer, metadata, ctx)
    last = self.norm(x[metadata.logits_indices])  # each row's last token
    return last @ self.embedding[...].T, ctx


def main() -> list[list[int]]:
  """Generates from two prompts."""
  config = kv.CacheConfig(
    layers=(kv.AttentionLayer(num_kv_heads=2, head_dim=8),) * NUM_LAYERS,
    num_blocks=16,
    block_size=4,
    max_seqs=2,
    max_seq_len=32,
  )
  model = nn.as_function(Model(rngs=nnx.Rngs(0)))  # its arrays are leaves
  requests = kv.make_requests([[1, 2, 3, 4, 5], [9, 8, 7]], max_new_tokens=6)
  scheduler = kv.SchedulerConfig(token_budget=8)
  serve = jax.jit(kv.serve, donate_argnums=(1, 2))
  _, requests = serve(model, kv.init(config), requests, scheduler=scheduler)
  return [
    tokens[start:end].tolist()
    for tokens, start, end in zip(
      requests.tokens, requests.prompt_lens, requests.lengths, strict=True
    )
  ]


if __name__ == "__main__":
  print(main())
