"""`scrub=True`: whatever is handed out is zero, read from the raw pools.

Every pool begins full of what others left behind. What a sequence then owns may hold
what was written for it, and zeros: nothing else, not past its length, not in scales,
not in sliding windows, not in states that it is yet to write.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, Context, RecurrentLayer
from tests.aot import hlo, programs
from tests.walks import walk as walks
from tests.walks.moves import CONFIGS, script

SECRET = 77
FULL = AttentionLayer(num_kv_heads=1, head_dim=2)
LAYERS = (
  FULL,
  dataclasses.replace(FULL, dtype="int8"),
  dataclasses.replace(FULL, dtype="float8_e4m3fn", is_latent=True, v_head_dim=1),
  dataclasses.replace(FULL, sliding_window=6),
  RecurrentLayer(state={"sum": (3,)}),
)
CONFIG = CacheConfig(
  layers=LAYERS,
  num_blocks=24,
  block_size=4,
  max_seqs=4,
  max_seq_len=16,
  chunk_size=4,
  num_snapshots=4,
  snapshot_interval=1,
  max_drafts=1,
)


def full_of_secrets(ctx: Context) -> Context:
  """Every array that holds what users wrote, in every block and state but the null."""

  def spoil(pool):
    return pool.at[:, 1:].set(SECRET)

  index = ctx.prefix
  index = index.replace(block_tokens=index.block_tokens.at[1:].set(SECRET))
  kv, states = jax.tree.map(spoil, (ctx.kv, ctx.states))
  return ctx.replace(kv=kv, states=states, prefix=index)


def step(ctx, query_lens, num_tokens, num_logits=1):
  query_lens = jnp.asarray(query_lens, jnp.int32)
  ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(
    ctx, query_lens, num_tokens=num_tokens, num_logits=num_logits
  )
  ones = jnp.ones((metadata.num_tokens, 1, 2))
  for layer, spec in enumerate(ctx.config.attention_layers):
    v = None if spec.is_latent else ones
    ctx = kvcache.write_kv(ctx, layer, ones, v, metadata)
  each = (num_logits,) if num_logits > 1 else ()
  state = {"sum": jnp.ones((ctx.config.max_seqs, *each, 3))}
  ctx = kvcache.write_state(ctx, 0, state, metadata)
  tokens = jnp.ones(metadata.num_tokens, jnp.int32)
  accepted = query_lens if num_logits > 1 else None
  return kvcache.commit(ctx, tokens, metadata, accepted=accepted)


@functools.partial(jax.jit, static_argnames="scrub")
def story(scrub: bool) -> dict[str, Context]:
  """Every way of being given blocks and states, and the context after each."""
  ctx = full_of_secrets(kvcache.init(dataclasses.replace(CONFIG, scrub=scrub)))
  chapters = {}
  prompts, lengths = jnp.ones((2, 8), jnp.int32), jnp.array([6, 3], jnp.int32)
  # Tenants of different namespaces, so that both write blocks of their own.
  namespaces = jnp.array([1, 2], jnp.int32)
  ctx, _ = kvcache.admit(ctx, prompts, lengths, namespace=namespaces)
  chapters["admit"] = ctx
  ctx = chapters["packed"] = step(ctx, [6, 3, 0, 0], 12)
  ctx = chapters["decode"] = step(step(ctx, [1, 1, 0, 0], None), [0, 1, 0, 0], None)
  ctx = chapters["draft"] = step(ctx, [2, 2, 0, 0], 8, num_logits=2)
  ctx, _, _ = kvcache.fork(ctx, [1])
  chapters["fork"] = ctx
  ctx, _ = kvcache.rewind(ctx, [0, 3, 0, 0])
  chapters["rewind"] = ctx
  state = kvcache.export_sequences(ctx, [0], max_len=12)
  elsewhere = full_of_secrets(kvcache.init(ctx.config))
  chapters["import"] = kvcache.import_sequences(elsewhere, state)[0]
  return chapters


def leftovers(ctx: Context) -> set[str]:
  """Pools in which something that is owned holds what others left there."""
  ctx = jax.device_get(ctx)
  in_use = {None: (ctx.pool.ref_counts > 0) | (ctx.prefix.way_of > 0)}
  for width, window in zip(ctx.config.windows, ctx.windows, strict=True):
    in_use[width] = (window.pool.ref_counts > 0) | (window.owner_ids > 0)
  owned = [("tokens", ctx.prefix.block_tokens[None], in_use[None])]
  for group, store in zip(ctx.config.groups, ctx.kv, strict=True):
    kind, where = group.layer.kv_dtype, in_use[group.layer.sliding_window]
    for name, pool in vars(store).items():
      if pool is not None:
        owned.append((f"{name} {kind} {group.layer.sliding_window}", pool, where))
  taken = ctx.state_rows.pool.ref_counts > 0
  owned += [("states", pool, taken) for pool in ctx.states.arrays.values()]
  assert all(where.any() for *_, where in owned)
  return {name for name, pool, where in owned if (pool[:, where] == SECRET).any()}


POOLS = {
  "tokens",
  "states",
  "k float32 None",
  "v float32 None",
  "k float32 6",
  "v float32 6",
  "k int8 None",
  "v int8 None",
  "k_scale int8 None",
  "v_scale int8 None",
  "k float8_e4m3fn None",
  "k_scale float8_e4m3fn None",
}


def test_nobody_is_given_what_another_left():
  for chapter, ctx in story(True).items():
    if chapter != "admit":  # nothing is owned yet but states
      kvcache.check_invariants(ctx)
      assert not leftovers(ctx), chapter
  admitted = jax.device_get(story(True)["admit"])
  taken = admitted.state_rows.pool.ref_counts > 0
  assert taken.sum() == 4
  assert not (admitted.states.arrays["sum"][:, taken] == SECRET).any()


@pytest.mark.thorough
def test_without_it_everything_is_left_in_place():
  """So the test above looks where it should."""
  chapters = story(False)
  assert leftovers(chapters["packed"]) == leftovers(chapters["decode"]) == POOLS
  assert leftovers(chapters["import"]) == POOLS


def test_no_pool_is_copied_or_walked():
  """Zeroing costs what is handed out: no instruction makes another pool."""
  sizes = {"num_blocks": 4096, "block_size": 4, "max_seqs": 4, "max_seq_len": 64}
  config = CacheConfig(layers=(FULL, FULL), scrub=True, **sizes)
  ctx = jax.eval_shape(lambda: kvcache.init(config))
  ints = jax.ShapeDtypeStruct((4,), jnp.int32)
  for num_tokens in (None, 16):
    extend = functools.partial(kvcache.extend, num_tokens=num_tokens)
    lowered = jax.jit(extend, donate_argnums=0).lower(ctx, ints)
    module = hlo.read(lowered.compile().as_text())
    assert not [str(i) for i in module.rewrites(4096 * 8)]
    assert not module.whiles()


@pytest.mark.parametrize("name", ["decode_step", "mixed_step", "admit", "fork"])
def test_nothing_is_compiled_if_it_is_off(name):
  config = dataclasses.replace(CONFIG, layers=(FULL, LAYERS[-1]), max_seq_len=64)
  counts = []
  for scrub in (False, True):
    sizes = dataclasses.replace(config, scrub=scrub)
    program = programs.verbs(sizes)[name]
    ctx = jax.eval_shape(lambda sizes=sizes: kvcache.init(sizes))
    counts.append(str(jax.make_jaxpr(program.run)(ctx, *program.arguments)))
  off, on = (text.count("scatter") for text in counts)
  assert off < on


class Walk(walks.Walk):
  """Looks for NaN, which the walk leaves in all that nobody owns, after every verb."""

  def apply(self, name, arrays, after, poisoned, result):
    # States that are owned and yet to be written are poisoned too: nobody reads them.
    super().apply(name, arrays, after, poisoned, result)
    ctx = jax.device_get(after)
    in_use = {None: (ctx.pool.ref_counts > 0) | (ctx.prefix.way_of > 0)}
    for width, window in zip(ctx.config.windows, ctx.windows, strict=True):
      in_use[width] = (window.pool.ref_counts > 0) | (window.owner_ids > 0)
    for group, store in zip(ctx.config.groups, ctx.kv, strict=True):
      where = in_use[group.layer.sliding_window]
      assert not np.isnan(store.k[:, where]).any(), name
      assert not np.isnan(store.v[:, where]).any(), name


def walk(scrub, num_steps):
  config = CONFIGS["three_groups"]
  cache = dataclasses.replace(config.cache, scrub=scrub)
  config = dataclasses.replace(config, cache=cache)
  one = Walk(config, seed=0)
  for name in itertools.islice(script(config, np.random.default_rng(0)), num_steps):
    one.advance(name)


@pytest.mark.slow
def test_walks_find_nothing_that_another_left():
  walk(True, 1000)
  with pytest.raises(AssertionError):
    walk(False, 1000)
