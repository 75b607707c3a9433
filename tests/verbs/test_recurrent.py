"""Recurrences over a context: in one verb, and between reading and writing states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, RecurrentLayer
from kvcache.verbs import recurrent
from tests.aot.test_memory import compile_program

C, W, H, P, G, N = 16, 4, 2, 4, 1, 4
CONFIG = CacheConfig(
  layers=(
    AttentionLayer(num_kv_heads=1, head_dim=2),
    *(
      RecurrentLayer.mamba2(
        num_heads=H, head_dim=P, state_size=N, num_groups=G, conv_width=W
      ),
    )
    * 2,
  ),
  num_blocks=16,
  block_size=4,
  max_seqs=4,
  max_seq_len=32,
  num_snapshots=2,
  max_drafts=2,
)
FORMS = {  # tokens of each row, of the step, and logits of each row
  "decode": ((1, 0, 1, 1), None, 1),
  "packed": ((1, 7, 0, 3), 16, 1),
  "draft": ((3, 0, 1, 2), 12, 3),
}


@pytest.fixture(scope="module")
def ctx():
  """Row 0 begins, row 1 reads a state it writes in draft steps, row 2 a snapshot.

  Row 3 is free; every state that is not null is random.
  """
  ctx = kvcache.init(CONFIG)
  rng = np.random.default_rng(0)
  arrays = {
    name: jnp.asarray(rng.normal(size=pool.shape), jnp.float32).at[:, 0].set(0.0)
    for name, pool in ctx.states.arrays.items()
  }
  rows = ctx.state_rows.replace(
    state_ids=jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]], jnp.int32),
    source_ids=jnp.asarray([0, 5, 14, 0], jnp.int32),
  )
  table = ctx.sequences.replace(
    seq_lens=jnp.asarray([0, 5, 6, 0], jnp.int32),
    num_blocks=jnp.asarray([3, 3, 3, 0], jnp.int32),
  )
  states = ctx.states.replace(arrays=arrays)
  return ctx.replace(states=states, state_rows=rows, sequences=table)


def begin(ctx, form):
  query_lens, num_tokens, num_logits = FORMS[form]
  query_lens = jnp.asarray(query_lens, jnp.int32)
  return kvcache.step_metadata(
    ctx, query_lens, num_tokens=num_tokens, num_logits=num_logits
  )


def inputs(num_tokens):
  rng = np.random.default_rng(1)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  conv = (normal(num_tokens, C), normal(C, W))
  dt, a = abs(normal(num_tokens, H)), -abs(normal(H))
  x, b, c = normal(num_tokens, H, P), *(normal(num_tokens, G, N) for _ in "bc")
  return conv, normal(C), (x, dt, a, b, c), normal(H)


@functools.partial(jax.jit, static_argnames="form")
def in_one_verb(ctx, layer, *, form):
  metadata = begin(ctx, form)
  conv, bias, ssd, d = inputs(metadata.num_tokens)
  ctx, u = recurrent.step_conv1d(ctx, layer, *conv, metadata, bias=bias)
  ctx, y = recurrent.step_ssd(ctx, layer, *ssd, metadata, d=d)
  return ctx, u, y


@functools.partial(jax.jit, static_argnames="form")
def in_three(ctx, layer, *, form):
  metadata = begin(ctx, form)
  conv, bias, ssd, d = inputs(metadata.num_tokens)
  state = kvcache.read_state(ctx, layer, metadata)
  u, conv = recurrent.causal_conv1d(*conv, state["conv"], metadata, bias=bias)
  y, ssm = recurrent.ssd(*ssd, state["ssm"], metadata, d=d)
  ctx = kvcache.write_state(ctx, layer, {"conv": conv, "ssm": ssm}, metadata)
  return ctx, u, y


@pytest.mark.parametrize("form", FORMS)
def test_one_verb_is_to_read_to_compute_and_to_write(ctx, form):
  """To the bit, on a CPU."""
  one = in_one_verb(ctx, jnp.int32(1), form=form)
  three = in_three(ctx, jnp.int32(1), form=form)
  jax.tree.map(np.testing.assert_array_equal, one, three)
  before, after = (x.states.arrays["ssm"] for x in (ctx, one[0]))
  np.testing.assert_array_equal(after[0], before[0])
  query_lens, _, num_logits = FORMS[form]
  changed = {
    int(ctx.state_rows.state_ids[s, i])
    for s, n in enumerate(query_lens)
    for i in range(min(n, num_logits))
    if s < 3  # the others have no room
  }
  found = np.flatnonzero((after[1] != before[1]).any((1, 2, 3)))
  assert set(found.tolist()) == changed


def test_misuse_is_refused(ctx):
  metadata = begin(ctx, "decode")
  conv, _, ssd, _ = inputs(4)
  with pytest.raises(ValueError, match=r"name must be one of \['conv', 'ssm'\]"):
    recurrent.step_conv1d(ctx, 0, *conv, metadata, name="state")
  with pytest.raises(ValueError, match="pool must be floating and have 5 axes"):
    recurrent.step_ssd(ctx, 0, *ssd, metadata, name="conv")
  more, _, _, _ = inputs(5)
  with pytest.raises(ValueError, match="x must have 4 tokens"):
    recurrent.step_conv1d(ctx, 0, *more, metadata)
  with pytest.raises(NotImplementedError, match="it needs a GPU"):
    recurrent.step_ssd(ctx, 0, *ssd, metadata, implementation="triton")
  plain = kvcache.init(CacheConfig(layers=CONFIG.layers[:1], num_blocks=4, max_seqs=4))
  with pytest.raises(ValueError, match="the context has no recurrent layer"):
    recurrent.step_conv1d(plain, 0, *conv, metadata)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_copies_no_pool_of_states(form):
  """Nor the states of one layer."""
  config = dataclasses.replace(CONFIG, num_snapshots=1 << 14)
  ctx = jax.eval_shape(functools.partial(kvcache.init, config))
  run = functools.partial(in_one_verb.__wrapped__, form=form)
  program = compile_program(run, ctx, jax.ShapeDtypeStruct((), jnp.int32))
  leaves = range(len(jax.tree.leaves(ctx)))
  assert [program.module.aliases.get(leaf) for leaf in leaves] == list(leaves)
  elements = config.num_states * H * P * N
  assert not [str(i) for i in program.module.rewrites(elements)]
