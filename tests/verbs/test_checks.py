"""Every invariant is broken by hand, and exactly that one is named.

Some cannot be broken alone: where another follows from them, both are named.
"""

import functools

import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import InvariantError
from kvcache.verbs import checks
from tests.fixtures import small
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


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_eagerly_the_error_names_exactly_what_is_broken(sentence):
  _, broken = BREAKAGES[sentence]
  with pytest.raises(InvariantError) as raised:
    kvcache.check_invariants(broken_context(sentence))
  message = str(raised.value)
  assert message.startswith("broken invariants: ")
  assert set(message.removeprefix("broken invariants: ").split("; ")) == broken


@functools.cache
def pass_on():
  """A transition that does nothing, checked: it looks for a context in its result."""
  return kvcache.checked(lambda ctx, *, number: (number + 1, {"context": ctx}))


def test_checked_returns_what_the_transition_returns():
  number, out = pass_on()(sound(), number=jnp.int32(4))
  assert number == 5
  jax.tree.map(np.testing.assert_array_equal, out["context"], sound())


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_inside_jit_the_error_names_what_is_broken(sentence):
  _, broken = BREAKAGES[sentence]
  with pytest.raises(InvariantError) as raised:
    pass_on()(broken_context(sentence), number=jnp.int32(4))
  assert any(f"broken invariant: {other}" in str(raised.value) for other in broken)


def test_under_vmap_each_context_is_judged_alone():
  everyone = [sound(), *map(broken_context, BREAKAGES)]
  fleet = jax.tree.map(lambda *leaves: jnp.stack(leaves), *everyone)
  held = jax.device_get(jax.jit(jax.vmap(checks.invariants))(fleet))
  want = [set(), *(broken for _, broken in BREAKAGES.values())]
  for i, broken in enumerate(want):
    assert {sentence for sentence, holds in held.items() if not holds[i]} == broken


def test_one_broken_context_of_a_fleet_is_found():
  check = jax.jit(checkify.checkify(jax.vmap(kvcache.check_invariants)))
  fleet = [sound(), sound(), sound()]
  for broken in (None, 1):
    if broken is not None:
      fleet[broken] = broken_context("num_evictable counts it")
    error, _ = check(jax.tree.map(lambda *leaves: jnp.stack(leaves), *fleet))
    message = error.get()
    assert (message is None) == (broken is None)
  assert "num_evictable counts it" in message
