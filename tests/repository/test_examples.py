"""The examples that the documentation shows: they run, and mean what they say."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import model_flax, model_plain, move_flax, move_function
import kvcache as kv
from kvcache import nn
from tests.fixtures.thorough import more


@pytest.mark.parametrize("example", [model_plain, *more(model_flax)])
def test_models_generate(example):
  """Deterministic, in range, and dependent on the prompt."""
  first, second = example.main()
  assert len(first) == len(second) == 6 and first != second
  assert all(0 <= token < example.VOCAB for token in first + second)


@pytest.mark.thorough
@pytest.mark.parametrize("example", [move_flax, move_function])
def test_a_moved_model_gives_the_tokens_it_gave_before(example):
  before, after = example.main()
  assert before == after
  assert before[0] != before[1]


def by_hand(prompts, *, num_blocks=16):
  """A step of examples/model_plain.py and what it starts with: `step, ctx, texts`."""
  weights = model_plain.make_weights(jax.random.key(0))
  config = kv.CacheConfig(
    layers=(kv.AttentionLayer(num_kv_heads=2, head_dim=8),) * 2,
    num_blocks=num_blocks,
    block_size=4,
    max_seqs=2,
    max_seq_len=32,
  )
  texts = np.zeros((2, 32), np.int32)
  for row, prompt in zip(texts, prompts, strict=False):
    row[: len(prompt)] = prompt
  lengths = jnp.array([len(prompt) for prompt in prompts])
  ctx, _ = jax.jit(kv.admit)(kv.init(config), texts[: len(prompts)], lengths)
  step = functools.partial(model_plain.compiled_step, weights)
  return step, ctx, jnp.asarray(texts)


def test_the_step_by_hand_is_the_step_of_the_loop():
  step, ctx, texts = by_hand([[1, 2, 3, 4, 5]])
  row = jnp.array([1, 0], jnp.int32)
  ctx, logits = step(ctx, texts, 5 * row, num_tokens=5)
  for length in range(5, 11):
    texts = texts.at[0, length].set(jnp.argmax(logits[0]))
    ctx, logits = step(ctx, texts, row)
  assert texts[0, 5:11].tolist() == model_plain.main()[0]


def test_a_row_refused_by_hand_leaves_the_others_their_tokens():
  long, short = list(range(20, 29)), [1, 2, 3, 4, 5]
  step, ctx, texts = by_hand([long, short], num_blocks=5)  # of three and two
  ctx, _ = kv.extend(ctx, jnp.array([0, 5]), num_tokens=16)  # it has its room first
  ctx, together = step(ctx, texts, jnp.array([9, 5]), num_tokens=16)
  assert ctx.sequences.seq_lens.tolist() == [0, 5]
  step, ctx, texts = by_hand([short])
  _, alone = step(ctx, texts, jnp.array([5, 0]), num_tokens=16)
  np.testing.assert_array_equal(together[1], alone[0])


@pytest.fixture(scope="module")
def cache() -> nn.StepCache:
  """Two rows of two tokens each, in the decode shape's other layout: four packed."""
  config = kv.CacheConfig(
    layers=(kv.AttentionLayer(num_kv_heads=2, head_dim=4),),
    num_blocks=4,
    block_size=4,
    max_seqs=2,
    max_seq_len=8,
  )

  @jax.jit
  def prepare(ctx):
    tokens, lens = jnp.zeros((2, 2), jnp.int32), jnp.array([2, 2])
    ctx, _ = kv.admit(ctx, tokens, lens)
    ctx, _ = kv.extend(ctx, lens, num_tokens=4)
    return nn.StepCache(ctx=ctx, metadata=kv.step_metadata(ctx, lens, num_tokens=4))

  return prepare(kv.init(config))


def normal(*shape):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def test_leading_axes_are_the_callers(cache):
  q, k, v = normal(4, 4, 4), normal(4, 2, 4), normal(4, 2, 4)
  out, after = cache.attend(0, q, k, v)
  batched = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
  same, after_same = cache.attend(0, *batched)
  np.testing.assert_array_equal(same.reshape(4, 4, 4), out)
  jax.tree.map(np.testing.assert_array_equal, after.ctx.kv, after_same.ctx.kv)
  soft, _ = cache.attend(0, q, k, v, logits_soft_cap=0.1)
  assert not np.allclose(soft, out)
  with pytest.raises(ValueError, match="q must have 4 tokens before"):
    cache.attend(0, q[:3], k, v)


@pytest.mark.parametrize("normalize_qk", [False, True])
def test_a_flax_module_keeps_its_meaning(cache, normalize_qk):
  module = nnx.MultiHeadAttention(
    4, 6, 16, num_kv_heads=2, normalize_qk=normalize_qk, rngs=nnx.Rngs(0)
  )
  x = normal(2, 2, 6)
  out, _ = nn.attend_with(module, x, 0, cache)
  mask = nnx.make_causal_mask(jnp.ones((2, 2)))
  wanted = module(x, mask=mask, decode=False)
  np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_an_attention_function_of_its_own_is_refused(cache):
  module = nnx.MultiHeadAttention(
    2, 8, attention_fn=lambda *args, **kwargs: args[0], rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="attention_fn must be"):
    nn.attend_with(module, normal(4, 8), 0, cache)
