"""Every invariant is broken by hand, and exactly that one is named.

Some cannot be broken alone: where another follows from them, both are named.
"""

import functools

import chex
import jax
from jax import lax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache import InvariantError
from kvcache.verbs import checks
from tests.fixtures import small
from tests.fixtures import toy_model as toy
from tests.fixtures.small import append, finish, fork, ints, mask, start

A = list(range(1, 17))  # prompts that share nothing
B = list(range(101, 117))
C = list(range(201, 217))


@functools.cache
def sound():
  """A context in which everything occurs."""
  ctx = finish(start(small.empty(), C[:8]), mask(0))
  ctx = start(ctx, A[:10], B[:6])
  ctx, _, _ = fork(ctx, ints([0, -1]))
  ctx = append(small.publish(ctx), {1: B[6:8]})
  # Rows 0 and 2 share a cached prefix; 7 is full, but not published yet.
  assert small.tables(ctx) == [[3, 4, 5], [6, 7], [3, 4, 8], []]
  assert small.cached(ctx) == [1, 2, 3, 4, 6]
  assert small.queue(ctx) == [2, 1]  # a leaf and its parent
  assert small.free(ctx) == [9, 10, 11]
  return ctx


def change(ctx, part, **fields):
  """Puts values into fields of a part: `field={place: value}` or `field=value`."""
  part, _, inner = part.partition(".")
  old, new = getattr(ctx, part), {}
  if inner:
    new_part = change(old, inner, **fields)
    return ctx.replace(**{part: new_part})
  for name, value in fields.items():
    array = getattr(old, name)
    if not isinstance(value, dict):
      value = {(): value}
    for place, entry in value.items():
      array = array.at[place].set(entry)
    new[name] = array
  return ctx.replace(**{part: old.replace(**new)})


BREAKAGES = {}


def breaks(sentence, *others):
  """Registers a mutation and all the invariants that it breaks."""

  def register(mutate):
    BREAKAGES[sentence] = (mutate, {sentence, *others})
    return mutate

  return register


# The pool.


@breaks(
  "num_free is between 0 and N - 1",
  "every usable block is free, cached and unheld, or referenced",
  "capacity is conserved",
)
def negative_height(ctx):
  return change(ctx, "pool", num_free=-1)


@breaks(
  "free ids are in range",
  "every usable block is free, cached and unheld, or referenced",
)
def free_id_out_of_range(ctx):
  return change(ctx, "pool", free_list={0: 12})


@breaks("free ids are distinct", "capacity is conserved")
def freed_twice(ctx):
  return change(ctx, "pool", free_list={3: 9}, num_free=4)


@breaks(
  "free blocks have no references",
  "every usable block is free, cached and unheld, or referenced",
  "ref_counts equal the table entries naming each block",
  "capacity is conserved",
)
def freed_while_held(ctx):
  return change(ctx, "pool", ref_counts={9: 1})


@breaks("every usable block is free, cached and unheld, or referenced")
def one_lost_and_one_both_free_and_cached(ctx):
  return change(ctx, "pool", free_list={2: 2})


@breaks(
  "capacity is conserved",
  "every usable block is free, cached and unheld, or referenced",
)
def lost(ctx):
  return change(ctx, "pool", num_free=2)


# The table.


@breaks("table entries are in range")
def minus_one(ctx):
  return change(ctx, "sequences", block_tables={(1, 3): -1})


@breaks("tables are dense")
def id_past_the_row(ctx):
  return change(ctx, "sequences", block_tables={(1, 3): 9})


@breaks("ref_counts equal the table entries naming each block")
def one_reference_too_many(ctx):
  return change(ctx, "pool", ref_counts={3: 3})


@breaks("ids in a row are distinct")
def same_block_twice(ctx):
  ctx = change(
    ctx,
    "sequences",
    block_tables={(1, 2): 7},
    num_blocks={1: 3},
    seq_lens={1: 12},
    num_frozen={1: 3},
    is_sealed={1: True},
  )
  return change(ctx, "pool", ref_counts={7: 2})


@breaks("rows have blocks for their tokens")
def tokens_without_a_block(ctx):
  return change(ctx, "sequences", seq_lens={1: 9})


@breaks(
  "blocks being written have one reference and are not cached",
  "published <= frozen <= full blocks",
)
def cached_tail(ctx):
  return change(ctx, "sequences", seq_lens={1: 3})


@breaks("inactive rows are empty")
def sealed_but_inactive(ctx):
  return change(ctx, "sequences", is_sealed={3: True})


@breaks("published <= frozen <= full blocks")
def frozen_past_the_tokens(ctx):
  return change(ctx, "sequences", num_frozen={1: 3})


@breaks("published blocks are cached")
def published_but_not_cached(ctx):
  return change(ctx, "sequences", num_published={1: 2}, num_frozen={1: 2})


@breaks("blocks that are not frozen have one reference and are not cached")
def cached_but_not_frozen(ctx):
  return change(ctx, "sequences", num_published={0: 1}, num_frozen={0: 1})


@breaks("a shared block is cached, or its rows are sealed")
def shared_before_it_is_published(ctx):
  ctx = change(
    ctx,
    "sequences",
    block_tables={(3, slice(2)): jnp.array([6, 7])},
    num_blocks={3: 2},
    seq_lens={3: 8},
    is_active={3: True},
    num_published={3: 1},
    num_frozen={3: 2, 1: 2},
  )
  return change(ctx, "pool", ref_counts={6: 2, 7: 2})


# Rows and the index.


@breaks(
  "depth of a cached block is its column",
  "roots have depth 0, children one more than their parent",
)
def held_too_deep(ctx):
  return change(ctx, "prefix", depth={4: 2})


@breaks("parent of a cached block is the block one column before")
def another_parent(ctx):
  return change(ctx, "prefix", parent={4: 6}, num_children={3: 0, 6: 1})


@breaks("namespace of a cached block is its row's")
def foreign_row(ctx):
  return change(ctx, "sequences", namespaces={0: 7})


# The index.


@breaks("parents of cached blocks are cached")
def orphan(ctx):
  return change(ctx, "prefix", parent={2: 9}, num_children={1: 0})


@breaks("roots have depth 0, children one more than their parent")
def evictable_too_deep(ctx):
  return change(ctx, "prefix", depth={2: 3})


@breaks("num_children counts the cached children")
def one_child_too_many(ctx):
  return change(ctx, "prefix", num_children={3: 2})


@breaks(
  "a parent has at least the references of a child",
  "parent of a cached block is the block one column before",
)
def parent_let_go(ctx):
  return change(ctx, "prefix", parent={4: 1}, num_children={3: 0, 1: 2})


@breaks("ways and blocks name each other")
def way_cleared(ctx):
  places = jnp.asarray(ctx.prefix.way_ids == 4)
  way_ids = jnp.where(places, 0, ctx.prefix.way_ids)
  return change(ctx, "prefix", way_ids=way_ids)


@breaks("equal full prefixes have one block")
def twins(ctx):
  index = ctx.prefix
  return change(
    ctx,
    "prefix",
    block_tokens={6: index.block_tokens[3]},
    prefix_hash={6: index.prefix_hash[3]},
  )


# The ring.


@breaks("exactly what is cached and held by nobody is in the ring")
def held_in_the_ring(ctx):
  return change(ctx, "prefix.ring", queue={1: 6}, queue_pos={1: 0, 6: 2})


@breaks("num_evictable counts it", "capacity is conserved")
def miscounted(ctx):
  return change(ctx, "prefix.ring", num_waiting=3)


@breaks("ring entries name their blocks")
def passed_by(ctx):
  return change(ctx, "prefix.ring", head=1)


@breaks("in the ring a child stands before its parent")
def parent_first(ctx):
  return change(ctx, "prefix.ring", queue={0: 1, 1: 2}, queue_pos={1: 1, 2: 2})


# The tests.


def broken_context(sentence):
  ctx = BREAKAGES[sentence][0](sound())
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (ctx, sound())]
  assert shapes[0] == shapes[1]
  return ctx


def test_a_sound_context_passes():
  checks.check_invariants(sound())


def test_every_invariant_is_broken_once():
  assert set(BREAKAGES) == set(jax.eval_shape(checks.invariants, sound()))


def said(raised):
  """The invariants that an error names."""
  _, _, broken = str(raised.value).partition("broken invariants: ")
  return set(broken.partition(". [failed at")[0].split("; "))


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_eagerly_the_error_names_exactly_what_is_broken(sentence):
  _, broken = BREAKAGES[sentence]
  with pytest.raises(InvariantError) as raised:
    kvcache.check_invariants(broken_context(sentence))
  assert str(raised.value).startswith("broken invariants: ")
  assert said(raised) == broken


# --- Inside jit -----------------------------------------------------------------------


@functools.cache
def pass_on():
  """A transition that does nothing, checked: it looks for a context in its result."""
  return kvcache.checked(lambda ctx, *, number: (number + 1, {"context": ctx}))


@functools.cache
def loop():
  """A loop that checks in each round; the context is whole before and after it."""

  def body(ctx, num_free):
    height = ctx.pool.num_free
    ctx = ctx.replace(pool=ctx.pool.replace(num_free=height + num_free))
    kvcache.check_invariants(ctx)
    return ctx.replace(pool=ctx.pool.replace(num_free=height)), height

  def run(ctx, changes):
    return lax.scan(body, ctx, changes)[0]

  return chex.chexify(jax.jit(run, donate_argnums=0), async_check=False)


def test_checked_returns_what_the_transition_returns():
  number, out = pass_on()(sound(), number=jnp.int32(4))
  assert number == 5
  chex.assert_trees_all_equal(out["context"], sound())


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_checked_names_exactly_what_is_broken(sentence):
  _, broken = BREAKAGES[sentence]
  with pytest.raises(InvariantError) as raised:
    pass_on()(broken_context(sentence), number=jnp.int32(4))
  assert str(raised.value).startswith("broken invariants: ")
  assert said(raised) == broken


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_a_loop_of_ones_own_names_exactly_what_is_broken(sentence):
  _, broken = BREAKAGES[sentence]
  ctx = jax.tree.map(jnp.copy, broken_context(sentence))
  with pytest.raises(AssertionError) as raised:
    loop()(ctx, ints([0, 0, 0]))
  assert said(raised) == broken


def test_a_loop_tells_of_the_first_round_that_went_wrong():
  ctx = jax.tree.map(jnp.copy, sound())
  after = loop()(ctx, ints([0, 0, 0]))
  assert ctx.pool.num_free.is_deleted()  # donated all the same
  chex.assert_trees_all_equal(after, sound())
  with pytest.raises(AssertionError) as raised:
    loop()(after, ints([0, -1, -9]))
  _, broken = BREAKAGES["capacity is conserved"]
  assert said(raised) == broken


def test_where_nobody_has_called_chexify_the_error_says_what_to_call():
  with pytest.raises(RuntimeError, match=r"chex.chexify\(jax.jit\(step\)"):
    jax.jit(kvcache.check_invariants)(sound())


def test_a_context_that_a_trace_closes_over_is_checked_too():
  run = chex.chexify(
    jax.jit(lambda x: (kvcache.check_invariants(lost(sound())), x)[1]),
    async_check=False,
  )
  with pytest.raises(AssertionError, match="capacity is conserved"):
    run(jnp.int32(0))


def test_other_assertions_inside_checked_stay_what_they_are():
  def transition(ctx, x):
    chex.assert_tree_all_finite(x)
    return ctx

  run = kvcache.checked(transition)
  run(sound(), jnp.float32(1))
  with pytest.raises(AssertionError, match="non-finite") as raised:
    run(sound(), jnp.float32(jnp.nan))
  assert not isinstance(raised.value, InvariantError)


def stack(contexts):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)


def test_under_vmap_each_context_is_judged_alone():
  fleet = stack([sound(), *map(broken_context, BREAKAGES)])
  held = jax.device_get(jax.jit(jax.vmap(checks.invariants))(fleet))
  want = [set(), *(broken for _, broken in BREAKAGES.values())]
  for i, broken in enumerate(want):
    assert {sentence for sentence, holds in held.items() if not holds[i]} == broken


def test_one_broken_context_of_a_fleet_is_found():
  check = chex.chexify(jax.jit(jax.vmap(kvcache.check_invariants)), async_check=False)
  check(stack([sound()] * 3))
  broken = broken_context("num_evictable counts it")
  with pytest.raises(AssertionError) as raised:
    check(stack([sound(), broken, sound()]))
  assert said(raised) == BREAKAGES["num_evictable counts it"][1]


def test_a_model_checks_inside_the_loop_of_serve():
  """It finds what a model that writes where it must not has done."""

  def model(tokens, metadata, ctx, *, leak):
    logits, ctx = toy.model(tokens, metadata, ctx)
    lost = leak * (jnp.max(metadata.seq_lens) > 6).astype(jnp.int32)
    ctx = ctx.replace(pool=ctx.pool.replace(num_free=ctx.pool.num_free - lost))
    kvcache.check_invariants(ctx)
    return logits, ctx

  @functools.partial(chex.chexify, async_check=False)
  @jax.jit
  def serve(ctx, requests, leak):
    return kvcache.serve(functools.partial(model, leak=leak), ctx, requests)

  sizes = toy.config(num_blocks=8, block_size=4, max_seqs=2, max_seq_len=12)
  requests = toy.make_requests([[1, 2, 3], [4]], max_new_tokens=6, num=2, width=12)
  ctx, done = serve(toy.fresh(sizes), requests, jnp.int32(0))
  assert done.lengths.tolist() == [9, 7]
  kvcache.check_invariants(ctx)
  with pytest.raises(AssertionError) as raised:
    serve(toy.fresh(sizes), requests, jnp.int32(1))
  assert "capacity is conserved" in said(raised)


# --- Shapes and dtypes ----------------------------------------------------------------


def misshapen():
  """What differs, and the words for it."""
  ctx = sound()
  short = ctx.pool.replace(ref_counts=ctx.pool.ref_counts[:-1])
  wide = ctx.pool.replace(ref_counts=ctx.pool.ref_counts.astype(jnp.uint32))
  half = ctx.kv[0].replace(k=ctx.kv[0].k.astype(jnp.bfloat16))
  return [
    (ctx.replace(pool=short), r"'pool/ref_counts': int32\[11\] instead of int32\[12\]"),
    (ctx.replace(pool=wide), r"'pool/ref_counts': uint32\[12\] instead of int32\[12\]"),
    (ctx.replace(kv=(half,)), r"'kv/0/k': bfloat16\[.*\] instead of float32\["),
    (ctx.replace(kv=()), "do not match"),
  ]


@pytest.mark.parametrize("place", range(4))
def test_shapes_and_dtypes_are_the_configurations_in_any_trace(place):
  ctx, words = misshapen()[place]
  with pytest.raises(InvariantError, match=words):
    kvcache.check_invariants(ctx)
  with pytest.raises(InvariantError, match=words):
    jax.eval_shape(kvcache.check_invariants, ctx)


def test_a_number_is_no_array():
  ctx = sound()
  with pytest.raises(InvariantError, match=r"int instead of int32\[\]"):
    kvcache.check_invariants(ctx.replace(pool=ctx.pool.replace(num_free=3)))


def test_a_batch_is_refused_outside_of_vmap():
  with pytest.raises(ValueError, match=r"call this in jax\.vmap"):
    kvcache.check_invariants(stack([sound()] * 2))


# --- Turned off -----------------------------------------------------------------------


@pytest.fixture
def no_asserts():
  chex.disable_asserts()
  yield
  chex.enable_asserts()


def test_disable_asserts_silences_everything(no_asserts):
  broken = lost(sound())
  for ctx in (broken, *(ctx for ctx, _ in misshapen())):
    kvcache.check_invariants(ctx)
  number, out = pass_on()(broken, number=jnp.int32(1))
  assert number == 2 and out["context"].pool.num_free == 2
  jax.jit(kvcache.check_invariants)(broken)


def test_what_is_turned_off_costs_nothing(no_asserts):
  def step(ctx):
    kvcache.check_invariants(ctx)
    return kvcache.publish(ctx)

  texts = [jax.jit(f).lower(sound()).as_text() for f in (step, kvcache.publish)]
  assert texts[0].replace("jit_step", "jit_publish") == texts[1]


def test_what_was_turned_off_is_on_again():
  with pytest.raises(InvariantError):
    pass_on()(lost(sound()), number=jnp.int32(1))
