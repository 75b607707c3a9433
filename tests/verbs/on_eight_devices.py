"""Run by test_sharding.py in a process with eight devices.

Sums are taken in another order where products are split, so tokens are compared, and
not the bits of logits; bookkeeping is integers, and compared to the last bit.
"""

import dataclasses
import functools

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kvcache
from kvcache import models, RequestStatus, SchedulerConfig
from kvcache.models import cut_llama, DeepSeek2, Llama, LlamaConfig
from kvcache.nn import as_function, Mamba2, place_weights
from kvcache.verbs import sharding
from tests.aot import hlo
from tests.fixtures import toy_model as toy
from tests.fixtures.model_runs import run_step
from tests.fixtures.places import GOLDENS
from tests.fixtures.thorough import more

MODEL = LlamaConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_layers=3,
  num_heads=16,
  num_kv_heads=2,
  head_dim=16,
  attention_bias=True,
  attention_out_bias=True,
)
SIZES = kvcache.CacheConfig(
  layers=MODEL.cache_layers(), num_blocks=24, block_size=4, max_seqs=4, max_seq_len=48
)
SPLIT = dataclasses.replace(SIZES, head_axes=("kv", "group"))
POOL = 3 * 24 * 4 * 16  # elements of the keys of one head
rng = np.random.default_rng(0)
SHARED = rng.integers(0, 64, 9).tolist()
PROMPTS = [SHARED[: 3 * i] + rng.integers(0, 64, 5).tolist() for i in range(8)]
COLLECTIVES = {
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
}
serve = functools.partial(kvcache.serve, scheduler=SchedulerConfig(token_budget=16))


def mesh_of(**axes):
  types = (AxisType.Auto,) * len(axes)
  num = int(np.prod(list(axes.values())))
  devices = jax.devices()[:num]
  return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


@functools.cache
def model():
  """Biases are random, too."""
  made = Llama(MODEL, rngs=nnx.Rngs(0))
  noise = np.random.default_rng(1)

  def draw(path, x):
    is_bias = "bias" in jax.tree_util.keystr(path)
    return x + jnp.asarray(noise.normal(size=x.shape), x.dtype) if is_bias else x

  graph, state = nnx.split(made)
  return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def requests():
  return kvcache.make_requests(PROMPTS, max_new_tokens=20, capacity=48)


@functools.cache
def on_one_device():
  """Where rows are preempted and prefixes hit."""
  ctx, done = jax.jit(serve)(as_function(model()), kvcache.init(SIZES), requests())
  assert (done.status == RequestStatus.FINISHED).all()
  assert done.num_preemptions.sum() > 0 and ctx.counters.hit_tokens > 0
  return jax.device_get((ctx.tables, done))


def assert_same_work(ctx, done, wanted=None):
  """Requests and bookkeeping are those of one device, on every device."""
  got = jax.tree.leaves((ctx.tables, done.replace(logprobs=None)))
  wanted = jax.tree.leaves(wanted or on_one_device())
  for left, right in zip(got, wanted, strict=True):
    copies = [np.asarray(shard.data) for shard in left.addressable_shards]
    assert len(copies) == len(left.sharding.device_set)
    for copy in copies:
      assert copy.dtype == right.dtype
      assert copy.tobytes() == right.tobytes()


def collectives(program):
  module = hlo.read(program.as_text())
  return [i for i in module.walk(into_fusions=True) if i.opcode in COLLECTIVES]


def test_xla_splits_the_loop_after_its_weights():
  """16 query heads and 2 kv heads over 8 devices: one kv head on each."""
  with jax.set_mesh(mesh_of(kv=2, group=4)):
    ctx = sharding.init(SPLIT)
    shapes = {shard.data.shape for shard in ctx.kv[0].k.addressable_shards}
    assert shapes == {(3, 24, 1, 4, 16)}
    split = as_function(place_weights(model(), SPLIT.head_axes))
    program = jax.jit(serve, donate_argnums=1).lower(split, ctx, requests()).compile()
    sent = collectives(program)
    assert sent and max(i.num_elements for i in sent) < POOL // 3, list(map(str, sent))
    if jax.__version_info__ >= (0, 12):  # before, XLA:CPU copied around a shard_map
      module = hlo.read(program.as_text())
      assert not [str(i) for i in module.rewrites(POOL) if POOL in i.sizes]
    ctx, done = program(split, ctx, requests())
    specs = jax.tree.leaves(sharding.partition_specs(SPLIT))
  for x, spec in zip(jax.tree.leaves(ctx), specs, strict=True):
    assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim)
  assert_same_work(ctx, done)


@pytest.mark.thorough
def test_the_whole_loop_runs_under_shard_map():
  """Two fleets of four devices each, and every fleet has its own context."""
  mesh = mesh_of(data=2, kv=2, group=2)
  specs = sharding.partition_specs(SPLIT, mesh=mesh)
  stacked = jax.tree.map(lambda spec: P("data", *spec), specs)
  weights, weight_specs = cut_llama(model(), SPLIT.head_axes, mesh=mesh)

  def run(weights, ctx, requests):
    ctx, requests = jax.tree.map(lambda x: x[0], (ctx, requests))
    return jax.tree.map(lambda x: x[None], serve(weights, ctx, requests))

  whole = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(weight_specs, stacked, P("data")),
    out_specs=(stacked, P("data")),
    check_vma=False,
  )
  twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
  ctx = jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    twice(kvcache.init(SPLIT)),
    stacked,
  )
  # The second fleet has nothing to do but the second half of the requests.
  todo = twice(requests())
  is_mine = jnp.asarray([[True] * 8, [False] * 4 + [True] * 4])
  todo = todo.replace(
    status=jnp.where(is_mine, todo.status, RequestStatus.FINISHED).astype(jnp.int32)
  )
  program = jax.jit(whole, donate_argnums=1).lower(weights, ctx, todo).compile()
  sent = collectives(program)
  # Behind attention and feed-forward of each layer, in mixed and in decode steps.
  assert [i.opcode for i in sent] == ["all-reduce"] * 4 * MODEL.num_layers
  todo = jax.device_put(todo, NamedSharding(mesh, P("data")))
  ctx, done = program(weights, ctx, todo)

  def first(tree):
    """What the devices of the first fleet have."""
    mine = {d.id for d in mesh.devices[0].flat}
    return [
      [s.data[0] for s in x.addressable_shards if s.device.id in mine]
      for x in jax.tree.leaves(tree)
    ]

  got = first((ctx.tables, done.replace(logprobs=None)))
  for copies, right in zip(got, jax.tree.leaves(on_one_device()), strict=True):
    assert len(copies) == 4
    assert {np.asarray(copy).tobytes() for copy in copies} == {right.tobytes()}
  tokens, lengths = np.asarray(done.tokens)[1], np.asarray(done.lengths)[1]
  wanted = on_one_device()[1]
  for i in range(4, 8):
    assert tokens[i, : lengths[i]].tolist() == wanted.tokens[i, : lengths[i]].tolist()


# --- Drafts ---------------------------------------------------------------------------


def serve_with(model, ctx, requests, drafter):
  return serve(model, ctx, requests, drafter=drafter)[:2]


def draft_model(function, config):
  """The model drafts for itself, so a draft is wrong only where its part is."""
  return kvcache.DraftModel(model=function, config=config, num_drafts=3, chunk_size=16)


LOOKUP = kvcache.PromptLookup(num_drafts=3, ngram=1)


@functools.cache
def with_drafts(kind):
  """On one device: the tokens are those without drafts."""
  drafter = LOOKUP if kind == "lookup" else draft_model(as_function(model()), SIZES)
  ctx, done = jax.jit(serve_with)(
    as_function(model()), kvcache.init(SIZES), requests(), drafter
  )
  for got, want in zip(done.tokens, on_one_device()[1].tokens, strict=True):
    np.testing.assert_array_equal(got, want)
  assert done.num_accepted > 40
  assert kind == "lookup" or done.num_accepted == done.num_drafts
  return jax.device_get((ctx.tables, done))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_xla_splits_drafts_too(kind):
  with jax.set_mesh(mesh_of(kv=2, group=4)):
    split = as_function(place_weights(model(), SPLIT.head_axes))
    drafter = LOOKUP if kind == "lookup" else draft_model(split, SPLIT)
    program = jax.jit(serve_with, donate_argnums=1)
    program = program.lower(split, sharding.init(SPLIT), requests(), drafter).compile()
    sent = collectives(program)
    assert sent and max(i.num_elements for i in sent) < POOL // 3, list(map(str, sent))
    ctx, done = program(split, sharding.init(SPLIT), requests(), drafter)
  assert_same_work(ctx, done, with_drafts(kind))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_drafts_under_shard_map(kind):
  mesh = mesh_of(kv=2, group=4)
  spread = sharding.partition_specs(SPLIT, mesh=mesh)
  weights, specs = cut_llama(model(), SPLIT.head_axes, mesh=mesh)
  drafter, drafter_specs = LOOKUP, P()
  if kind == "model":
    drafter, drafter_specs = draft_model(weights, SPLIT), draft_model(specs, SPLIT)
  whole = jax.shard_map(
    serve_with,
    mesh=mesh,
    in_specs=(specs, spread, P(), drafter_specs),
    out_specs=(spread, P()),
    check_vma=False,
  )
  arguments = weights, sharding.init(SPLIT, mesh=mesh), requests(), drafter
  program = jax.jit(whole, donate_argnums=1).lower(*arguments).compile()
  # Two a layer, in mixed and in drafted steps, and twice as many with a model.
  sent = [i.opcode for i in collectives(program)]
  per_layer = 4 if kind == "lookup" else 8
  assert sent == ["all-reduce"] * per_layer * MODEL.num_layers
  todo = jax.device_put(requests(), NamedSharding(mesh, P()))
  ctx, done = program(weights, sharding.init(SPLIT, mesh=mesh), todo, drafter)
  assert_same_work(ctx, done, with_drafts(kind))


@pytest.mark.thorough
def test_generate_splits_what_xla_splits_and_refuses_the_rest():
  """In slices, between which the draft context stays where it is."""
  generate = functools.partial(
    kvcache.generate,
    max_new_tokens=20,
    scheduler=SchedulerConfig(token_budget=16),
    slice_steps=10,
  )
  mesh = mesh_of(kv=2, group=4)
  cut, _ = cut_llama(model(), SPLIT.head_axes, mesh=mesh)
  with jax.set_mesh(mesh):
    split = as_function(place_weights(model(), SPLIT.head_axes))
    drafter, ctx = draft_model(split, SPLIT), sharding.init(SPLIT)
    shapes = {s.data.shape for s in drafter.init().kv[0].k.addressable_shards}
    assert shapes == {(3, 24, 1, 4, 16)}
    before = kvcache.serving.generation._serve_slice._cache_size()
    _, out = generate(split, ctx, PROMPTS, drafter=drafter)
    assert kvcache.serving.generation._serve_slice._cache_size() == before + 1
    with pytest.raises(
      ValueError, match=r"within a jax.shard_map over \('kv', 'group'\)"
    ):
      generate(cut, sharding.init(SPLIT), PROMPTS)
    with pytest.raises(ValueError, match=r"call kvcache\.serve"):
      jax.jit(lambda ctx: generate(split, ctx, PROMPTS)[0])(sharding.init(SPLIT))
  wanted = on_one_device()[1]
  for completion, tokens, length in zip(
    out, wanted.tokens, wanted.lengths, strict=True
  ):
    everything = [*completion.prompt_tokens, *completion.tokens]
    assert everything == tokens[:length].tolist()


# --- Sequences move between contexts of a fleet ---------------------------------------

TOY = toy.config(num_blocks=24, block_size=4, max_seqs=2, max_seq_len=48)


@pytest.mark.thorough
def test_a_sequence_moves_from_one_context_of_a_fleet_to_another():
  mesh = mesh_of(data=2)
  over = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  text = np.random.default_rng(3).integers(0, toy.VOCAB, 12)

  def feed(ctx, tokens, query_lens):
    ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=16)
    metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=16)
    logits, ctx = toy.model(tokens, metadata, ctx)
    return kvcache.commit(ctx, tokens, metadata), logits

  @over
  def start(ctx, tokens, lengths):
    """The first context gets the prompt; the second one another."""
    ctx = jax.tree.map(lambda x: x[0], ctx)
    ctx, admission = kvcache.admit(ctx, tokens, lengths)
    query_lens = jnp.zeros(2, jnp.int32).at[admission.seq_ids[0]].set(lengths[0])
    ctx, _ = feed(ctx, jnp.pad(tokens[0], (0, 4)), query_lens)
    return jax.tree.map(lambda x: x[None], ctx)

  @over
  def move(ctx):
    ctx = jax.tree.map(lambda x: x[0], ctx)
    state = kvcache.export_sequences(ctx, jnp.zeros(1, jnp.int32), max_len=16)
    # Who is sent nothing gets zeros, which hold no sequence.
    state = lax.ppermute(state, "data", [(0, 1)])
    ctx, rows, status = kvcache.import_sequences(ctx, state)
    return jax.tree.map(lambda x: x[None], (ctx, rows, status))

  @over
  def go_on(ctx, token, rows):
    ctx = jax.tree.map(lambda x: x[0], ctx)
    query_lens = jnp.zeros(2, jnp.int32).at[rows[0, 0]].set(1)
    ctx, logits = feed(ctx, jnp.full(16, token[0]), query_lens)
    return jax.tree.map(lambda x: x[None], (ctx, logits[rows[0, 0]]))

  ctx = jax.tree.map(lambda x: jnp.stack([x, x]), toy.fresh(TOY))
  other = np.concatenate([text[:5], text[:7]])
  tokens = jnp.asarray(np.stack([text, other]), jnp.int32)
  ctx = jax.jit(start)(ctx, tokens, jnp.asarray([12, 9], jnp.int32))
  program = jax.jit(move).lower(ctx).compile()
  assert max(i.num_elements for i in collectives(program)) <= 2 * 16 * 4
  ctx, rows, status = program(ctx)
  assert status.tolist() == [[kvcache.Status.INVALID], [kvcache.Status.OK]]
  assert rows.tolist() == [[-1], [1]]
  for i in range(2):
    kvcache.check_invariants(jax.tree.map(lambda x, i=i: x[i], ctx))
  assert ctx.sequences.seq_lens.tolist() == [[12, 0], [9, 12]]
  _, logits = jax.jit(go_on)(ctx, jnp.asarray([7, 7], jnp.int32), rows.at[0].set(0))
  np.testing.assert_array_equal(logits[0], logits[1])


# --- Other layers, other verbs --------------------------------------------------------


class Hybrid(nnx.Module):
  """One recurrent layer between an embedding and the words."""

  def __init__(self, num_groups: int):
    rngs = nnx.Rngs(0)
    self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (64, 16)))
    self.mixer = Mamba2(
      16, num_heads=8, head_dim=4, state_size=8, num_groups=num_groups, rngs=rngs
    )

  def __call__(self, tokens, metadata, ctx):
    x, ctx = self.mixer(self.embedding[...][tokens], 0, metadata, ctx)
    return (x @ self.embedding[...].T)[metadata.logits_indices], ctx


def latent_model():
  config = models.load(GOLDENS / "tiny_deepseek2").model.config
  config = dataclasses.replace(config, num_heads=8)
  return DeepSeek2(config, rngs=nnx.Rngs(0)), config.cache_layers()


def hybrid_model(num_groups):
  made = Hybrid(num_groups)
  return made, (made.mixer.cache_layer(),)


@pytest.mark.parametrize(
  ("make", "local_shapes"),
  [
    *more(
      (latent_model, None),
      (functools.partial(hybrid_model, 4), {"conv": (12, 3), "ssm": (1, 4, 8)}),
      (functools.partial(hybrid_model, 1), {"conv": (6, 3), "ssm": (1, 4, 8)}),
    ),
  ],
  ids=["latent", "four groups", "one group"],
)
def test_other_layers_are_split_too(make, local_shapes):
  made, layers = make()
  sizes = kvcache.CacheConfig(
    layers=layers, num_blocks=12, block_size=4, max_seqs=3, max_seq_len=32
  )
  tokens = jnp.asarray(rng.integers(0, 40, 16), jnp.int32)
  admit = jax.jit(kvcache.admit)

  def run(function, ctx):
    ctx, _ = admit(ctx, tokens.reshape(2, 8), jnp.asarray([8, 7], jnp.int32))
    lens = jnp.asarray([8, 7, 0], jnp.int32)
    first, ctx, _ = run_step(function, ctx, tokens, lens, num_tokens=16)
    ones = jnp.asarray([1, 1, 0], jnp.int32)
    second, ctx, _ = run_step(function, ctx, tokens[:3], ones, num_tokens=None)
    return np.asarray(first)[:2], np.asarray(second)[:2], ctx

  wanted = run(as_function(made), kvcache.init(sizes))
  with jax.set_mesh(mesh_of(tensor=8)):
    split = dataclasses.replace(sizes, head_axes="tensor")
    function = as_function(place_weights(made, split.head_axes))
    got = run(function, sharding.init(split))
  for left, right in zip(got[:2], wanted[:2], strict=True):
    np.testing.assert_allclose(left, right, atol=2e-5, rtol=2e-5)
  if local_shapes is not None:
    shapes = {
      name: x.addressable_shards[0].data.shape[2:]
      for name, x in got[2].states.arrays.items()
    }
    assert shapes == local_shapes
  for left, right in zip(
    jax.tree.leaves(got[2].tables), jax.tree.leaves(wanted[2].tables), strict=True
  ):
    np.testing.assert_array_equal(left, right)


def test_no_verb_gathers_the_pool():
  state = functools.partial(kvcache.export_sequences, max_len=16)
  ids = jnp.zeros(2, jnp.int32)
  with jax.set_mesh(mesh_of(kv=2, group=4)):
    ctx = sharding.init(SPLIT)
    exported = jax.jit(state)(ctx, ids)
    for verb, arguments in {
      kvcache.fork: (ids,),
      kvcache.rewind: (jnp.zeros(4, jnp.int32),),
      state: (ids,),
      kvcache.import_sequences: (exported,),
    }.items():
      program = jax.jit(verb, donate_argnums=0).lower(ctx, *arguments).compile()
      assert not [str(i) for i in collectives(program)]
  assert exported.kv[0].k.sharding.spec[2] == "kv"


HYBRID = dataclasses.replace(
  SPLIT,
  layers=(
    *SPLIT.layers,
    kvcache.RecurrentLayer.mamba2(num_heads=8, head_dim=2, state_size=3),
  ),
)


def lose(ctx, num):
  pool = ctx.pool.replace(num_free=ctx.pool.num_free - num)
  return ctx.replace(pool=pool)


def test_invariants_are_checked_where_xla_splits():
  run = kvcache.checked(lose)
  with jax.set_mesh(mesh_of(kv=2, group=4)):
    ctx = run(sharding.init(HYBRID), jnp.int32(0))
    kvcache.check_invariants(ctx)
    with pytest.raises(kvcache.InvariantError, match="capacity is conserved"):
      run(ctx, jnp.int32(1))


def test_invariants_are_checked_within_shard_map():
  """The arrays are those of one device there, and so is what is asserted of them."""
  mesh = mesh_of(kv=2, group=4)
  specs = sharding.partition_specs(HYBRID, mesh=mesh)

  def over_heads(step):
    return jax.shard_map(step, mesh=mesh, in_specs=(specs, P()), out_specs=P())

  def step(ctx, num):
    kvcache.check_invariants(lose(ctx, num))
    return num

  def mistake_it_for_a_whole_one(ctx, num):
    return step(ctx.replace(config=dataclasses.replace(HYBRID, head_axes=())), num)

  run = kvcache.checked(over_heads(step))
  # Not under jax.set_mesh, where checkify fails: jax-ml/jax#40907.
  ctx = sharding.init(HYBRID, mesh=mesh)
  assert run(ctx, jnp.int32(0)) == 0
  with pytest.raises(kvcache.InvariantError, match="capacity is conserved") as raised:
    run(ctx, jnp.int32(1))
  assert "mapped index" not in str(raised.value)
  with pytest.raises(kvcache.InvariantError, match="instead of"):
    jax.eval_shape(over_heads(mistake_it_for_a_whole_one), ctx, jnp.int32(0))
