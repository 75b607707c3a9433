"""Steps that look for a prefix which rows share read it once, and get the same."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, SchedulerConfig
from kvcache.models import Llama, LlamaConfig
from kvcache.nn import as_function
from kvcache.verbs import metadata
from tests.fixtures.small import ints
from tests.fixtures.thorough import more

BLOCK = 4
UNUSED = ("seq_ids", "positions", "slot_mapping", "cu_seqlens", "logits_indices")


def found(tables, before, query_lens):
  view = kvcache.StepMetadata(
    **dict.fromkeys(UNUSED),
    query_lens=ints(query_lens),
    seq_lens=jnp.where(ints(query_lens) > 0, ints(before) + ints(query_lens), 0),
    block_tables=ints(tables),
  )
  shared = jax.jit(metadata.find_shared_prefix, static_argnames="block_size")(
    view, block_size=BLOCK
  )
  return int(shared.num_blocks), shared.shares.tolist()


@pytest.mark.parametrize(
  ("tables", "before", "query_lens", "num_blocks", "shares"),
  [
    # All begin with blocks 1 and 2.
    ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [9, 8, 11], [1, 1, 1], 2, [1, 1, 1]),
    # The third has one in common only: two rows save more with two blocks.
    ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 7, 8]], [13] * 3, [1] * 3, 3, [1, 1, 0]),
    # The second is not in the step, the third has a query inside the second block.
    ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [9, 8, 6], [1, 0, 3], 1, [1, 0, 1]),
    # Nothing in common, or a row alone.
    ([[1, 2], [3, 4]], [5, 6], [1, 1], 0, [0, 0]),
    ([[1, 2], [1, 4]], [5, 6], [0, 1], 0, [0, 0]),
    ([[1, 2], [1, 4]], [5, 6], [0, 0], 0, [0, 0]),
  ],
)
def test_the_prefix_that_saves_most_is_found(
  tables, before, query_lens, num_blocks, shares
):
  assert found(tables, before, query_lens) == (num_blocks, [bool(s) for s in shares])


LAYERS = {
  "plain": [AttentionLayer(num_kv_heads=2, head_dim=8)],
  "int8": [AttentionLayer(num_kv_heads=2, head_dim=8, dtype="int8")],
  "window": [AttentionLayer(num_kv_heads=2, head_dim=8, sliding_window=9)],
}


@functools.partial(jax.jit, static_argnames=("num_tokens", "cascade"))
def attended(ctx, query_lens, k, q, *, num_tokens, cascade):
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  view = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens, cascade=cascade)
  ctx = kvcache.write_kv(ctx, 0, k, 2.0 * k, view)
  out = kvcache.attend(ctx, 0, q, view)
  ctx = kvcache.commit(ctx, jnp.arange(k.shape[0], dtype=jnp.int32), view)
  return ctx, out, status, view.shared_prefix


@pytest.mark.parametrize("name", ["plain", *more(*sorted(LAYERS.keys() - {"plain"}))])
@pytest.mark.parametrize("num_tokens", [None, *more(8)])
def test_forks_attend_alike(name, num_tokens):
  config = CacheConfig(
    layers=LAYERS[name], num_blocks=40, block_size=BLOCK, max_seqs=4, max_seq_len=64
  )
  keys = iter(jax.random.split(jax.random.key(0), 4))

  def step(ctx, lens, cascade, *, num_tokens, key):
    k, q = jax.random.normal(key, (2, num_tokens or 4, 2, 8))
    q = jnp.concatenate([q, -q], axis=1)
    return attended(ctx, ints(lens), k, q, num_tokens=num_tokens, cascade=cascade)

  ctx = kvcache.init(config)
  ctx, _ = kvcache.admit(ctx, jnp.zeros((1, 30), int), jnp.array([30]))
  ctx, *_ = step(ctx, [30, 0, 0, 0], False, num_tokens=32, key=next(keys))
  ctx, _, _ = kvcache.fork(ctx, jnp.array([0, 0]))
  lens = [1, 1, 1, 0] if num_tokens is None else [3, 1, 2, 0]
  key = next(keys)
  _, plain, _, nothing = step(ctx, lens, False, num_tokens=num_tokens, key=key)
  _, out, status, shared = step(ctx, lens, True, num_tokens=num_tokens, key=key)
  assert not status.any() and nothing is None
  assert int(shared.num_blocks) == 7 and shared.shares.tolist() == [True] * 3 + [False]
  np.testing.assert_allclose(out, plain, rtol=2e-5, atol=2e-6)
  assert name == "window" or np.any(out != plain)  # it did take another way


@pytest.mark.thorough
def test_the_loop_serves_the_same_tokens():
  model = Llama(
    LlamaConfig(
      vocab_size=64,
      hidden_size=32,
      intermediate_size=48,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
    ),
    rngs=nnx.Rngs(0),
  )
  config = CacheConfig(
    layers=model.config.cache_layers(),
    num_blocks=40,
    block_size=BLOCK,
    max_seqs=3,
    max_seq_len=48,
  )
  text = np.random.default_rng(0).integers(0, 64, 21).tolist()
  requests = kvcache.make_requests([[*text, i] for i in range(5)], max_new_tokens=6)

  @functools.partial(jax.jit, static_argnames="cascade")
  def serve(ctx, requests, *, cascade):
    scheduler = SchedulerConfig(token_budget=16, cascade=cascade)
    return kvcache.serve(as_function(model), ctx, requests, scheduler=scheduler)

  results = [
    serve(kvcache.init(config), requests, cascade=cascade)[1].tokens.tolist()
    for cascade in (False, True)
  ]
  assert results[0] == results[1]
