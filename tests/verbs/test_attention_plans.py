"""Queues of work are made once per step: with its metadata, before any layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig
from kvcache.verbs import attention_plans
from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import triton, work_queue
from pallas_kernels.paged_attention.call import Call
from tests.aot import deviceless
from tests.verbs.test_attention import Batch, CHUNKS

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
FULL = AttentionLayer(num_kv_heads=2, head_dim=64)
LATENT = AttentionLayer(num_kv_heads=1, head_dim=96, v_head_dim=64, is_latent=True)
WINDOW = dataclasses.replace(FULL, sliding_window=20)
INT8 = dataclasses.replace(FULL, dtype="int8")
S = 4


def config(*layers):
  return CacheConfig(
    layers=layers, num_blocks=20, block_size=8, max_seqs=S, max_seq_len=64
  )


def query_lens(ctx):
  return jnp.ones(ctx.config.max_seqs, jnp.int32)


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def queue_work(jaxpr):
  """Equations that make queues."""
  return [
    equation
    for equation in equations(jaxpr)
    if "paged_attention_queue" in str(equation.source_info.name_stack)
  ]


def trace(layer, *, group, num_tokens):
  """A step whose layers are scanned, as traced for a GPU, and the loop's body."""
  ctx = jax.eval_shape(functools.partial(kvcache.init, config(layer, layer)))

  def step(ctx):
    metadata = kvcache.step_metadata(ctx, query_lens(ctx), num_tokens=num_tokens)
    shape = (num_tokens or S, group * layer.num_kv_heads, layer.head_dim)

    def body(total, index):
      q = jnp.full(shape, total)
      return jnp.sum(kvcache.attend(ctx, index, q, metadata)), None

    indices = jnp.arange(2, dtype=jnp.int32)
    return jax.lax.scan(body, jnp.float32(0), indices)[0]

  with deviceless.gpu():
    jaxpr = jax.make_jaxpr(step)(ctx).jaxpr
  (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["jaxpr"])
  return jaxpr, scan.params["jaxpr"].jaxpr


@pytest.mark.parametrize(
  ("layer", "group"), [(FULL, 1), (FULL, 16), (WINDOW, 4), (LATENT, 32), (INT8, 2)]
)
def test_a_decode_step_makes_its_queue_before_the_layers(layer, group):
  program, body = trace(layer, group=group, num_tokens=None)
  assert queue_work(program) and not queue_work(body)


def test_a_mixed_step_leaves_the_layers_what_depends_on_their_query_heads(monkeypatch):
  _, planned = trace(FULL, group=4, num_tokens=16)
  monkeypatch.setattr(attention_plans, "make", lambda *_: ())
  program, alone = trace(FULL, group=4, num_tokens=16)
  assert 0 < 2 * len(queue_work(planned)) < len(queue_work(alone))
  assert len(queue_work(alone)) == len(queue_work(program))


def test_with_the_query_heads_a_plan_is_for_all_of_a_mixed_step():
  q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32, 8, 64), (20, 2, 8, 64)))
  lens, starts = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (S, S + 1))
  tables = jax.ShapeDtypeStruct((S, 8), jnp.int32)
  make = functools.partial(paged_attention.plan, num_tokens=32, max_blocks=8)
  with deviceless.gpu():
    plan = jax.eval_shape(lambda *ids: make(k, k, *ids, q=q), lens, starts)
    run = functools.partial(paged_attention.paged_attention, plan=plan)
    traced = jax.make_jaxpr(lambda *args, plan: run(*args, plan=plan))
    jaxpr = traced(q, k, k, tables, lens, starts, plan=plan)
  assert not queue_work(jaxpr.jaxpr)


def test_every_group_has_a_plan_of_its_own():
  wide = dataclasses.replace(FULL, dtype="bfloat16")
  with deviceless.gpu():
    ctx = jax.eval_shape(functools.partial(kvcache.init, config(FULL, WINDOW, wide)))
    made = jax.eval_shape(lambda c: kvcache.step_metadata(c, query_lens(c)), ctx).plans
  assert [plan.cuts[0].sliding_window for plan in made] == [None, 20, None]
  assert all(plan.cuts[0].num_tokens == S for plan in made)


def test_there_is_no_plan_where_there_is_no_gpu():
  ctx = kvcache.init(config(FULL, WINDOW))
  for num_tokens in (None, 16):
    metadata = kvcache.step_metadata(ctx, query_lens(ctx), num_tokens=num_tokens)
    assert metadata.plans == (None, None)
  with deviceless.gpu():
    shape = jax.ShapeDtypeStruct((20, 2, 8, 64), jnp.float32)
    ids = jnp.zeros(S, jnp.int32), jnp.zeros(S + 1, jnp.int32)
    make = functools.partial(paged_attention.plan, num_tokens=S, max_blocks=8)
    assert make(shape, shape, *ids, implementation="xla") is None


@jax.jit
def attention(*args, plan):
  return triton.paged_attention(Call(*args, sm_scale=0.1), plan=plan, interpret=True)


def test_a_plan_changes_nothing_and_one_of_other_shapes_is_no_use():
  batch = Batch(2, chunks=CHUNKS, head_dim=32)
  *_, lens, starts = batch.arguments
  outline = Call(*batch.arguments, sm_scale=0.1).outline

  def cuts(**changes):
    return triton.cuts(dataclasses.replace(outline, **changes))

  fitting = cuts()
  assert len(fitting) == 2
  nothing = jnp.zeros_like(lens)
  want = attention(*batch.arguments, plan=None)
  for seq_lens, made_with, is_same in [
    (lens, fitting, True),
    (nothing, fitting, False),  # it is used
    (nothing, cuts(max_len=outline.max_len + 8), True),
    (nothing, cuts(sliding_window=8), True),
  ]:
    if made_with is not fitting:
      made_with = made_with[:1]
    plan = work_queue.plan_rows(seq_lens, starts, made_with)
    out, lse = attention(*batch.arguments, plan=plan)
    same = np.array_equal(out, want[0]) and np.array_equal(lse, want[1])
    assert same == is_same
