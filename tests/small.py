"""A cache small enough to check by eye, and its verbs, compiled once for all tests.

Four rows of up to four blocks of four tokens, eleven usable blocks, two layers. The
chunks are so small that every bulk loop runs more than once.
"""

from collections.abc import Mapping, Sequence
import functools

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import Admission, AttentionLayer, CacheConfig, Context, StepMetadata

LAYERS = (AttentionLayer(num_kv_heads=1, head_dim=2),) * 2
CONFIG = CacheConfig(
  layers=LAYERS,
  num_blocks=12,
  block_size=4,
  max_seqs=4,
  max_seq_len=16,
  chunk_size=3,
  index_ways=4,
)
NUM_TOKENS = 16
"""T of packed steps."""
WIDTH = 15
"""Columns of the prompts that are admitted: one less than a row can hold."""
NO_LIMIT = 2**31 - 1

check = kvcache.check_invariants
evict = jax.jit(kvcache.evict)
extend = jax.jit(kvcache.extend, static_argnames="num_tokens")
finish = jax.jit(kvcache.finish, static_argnames="keep_prefix")
fork = jax.jit(kvcache.fork)
publish = jax.jit(kvcache.publish)
reset = jax.jit(kvcache.reset, static_argnames="keep_prefix")
rewind = jax.jit(kvcache.rewind)
_admit = jax.jit(kvcache.admit)
_find = jax.jit(kvcache.find)


def ints(values: Sequence[int]) -> Array:
  return jnp.array(values, jnp.int32)


def rows(values: Mapping[int, int]) -> Array:
  """`[S]` int32: `values[s]` where given, else 0."""
  return ints([values.get(s, 0) for s in range(CONFIG.max_seqs)])


def mask(*which: int) -> Array:
  """`[S]` bool: which rows."""
  return jnp.array([s in which for s in range(CONFIG.max_seqs)])


@functools.cache
def empty() -> Context:
  return jax.jit(kvcache.init, static_argnums=0)(CONFIG)


def prompts(*texts: Sequence[int]) -> tuple[Array, Array]:
  """`tokens [2, WIDTH]` and `lengths [2]`; a missing prompt is an empty one."""
  tokens = np.full((2, WIDTH), -1, np.int32)
  for row, text in zip(tokens, texts, strict=False):
    row[: len(text)] = text[:WIDTH]
  lengths = [len(text) for text in texts] + [0] * (2 - len(texts))
  return jnp.asarray(tokens), ints(lengths)


def admit(
  ctx: Context,
  tokens: Array,
  lengths: Array,
  *,
  namespace: Sequence[int] = (0, 0),
  block_budget: int = NO_LIMIT,
) -> tuple[Context, Admission]:
  budget = jnp.int32(block_budget)
  return _admit(ctx, tokens, lengths, namespace=ints(namespace), block_budget=budget)


def find(
  ctx: Context, tokens: Array, lengths: Array, *, namespace: Sequence[int] = (0, 0)
) -> tuple[Array, Array]:
  return _find(ctx, tokens, lengths, namespace=ints(namespace))


def contents(tokens: Array) -> tuple[Array, Array]:
  """K and V `[T, 1, 2]` that the toy model computes: the token, and minus the token."""
  k = jnp.broadcast_to(tokens[:, None, None], (tokens.size, 1, 2)).astype(jnp.float32)
  return k, -k


@functools.partial(jax.jit, static_argnames="num_tokens")
def step(
  ctx: Context, tokens: Array, query_lens: Array, *, num_tokens: int | None
) -> tuple[Context, Array, StepMetadata]:
  """Extends, writes K/V of both layers (the second one's are tenfold), commits."""
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  k, v = contents(tokens)
  ctx = kvcache.write_kv(ctx, 0, k, v, metadata)
  ctx = kvcache.write_kv(ctx, 1, 10 * k, 10 * v, metadata)
  return kvcache.commit(ctx, tokens, metadata), status, metadata


def append(ctx: Context, texts: Mapping[int, Sequence[int]]) -> Context:
  """Appends tokens to rows, in one packed step in which all of them must fit."""
  flat = [token for s in sorted(texts) for token in texts[s]]
  tokens = ints(flat + [-1] * (NUM_TOKENS - len(flat)))
  query_lens = rows({s: len(text) for s, text in texts.items()})
  ctx, status, _ = step(ctx, tokens, query_lens, num_tokens=NUM_TOKENS)
  kvcache.raise_for_status(status)
  return ctx


def start(ctx: Context, *texts: Sequence[int]) -> Context:
  """Admits one or two prompts and computes what is not cached of them."""
  ctx, admission = admit(ctx, *prompts(*[text[:WIDTH] for text in texts]))
  given = zip(admission.seq_ids.tolist(), admission.num_cached.tolist(), strict=True)
  todo = {
    s: text[num_cached:] for (s, num_cached), text in zip(given, texts, strict=False)
  }
  kvcache.raise_for_status(admission.status[: len(texts)])
  return append(ctx, todo)


def tables(ctx: Context) -> list[list[int]]:
  """Ids of each row's blocks."""
  table = ctx.sequences
  ids, lens = table.block_tables.tolist(), table.num_blocks.tolist()
  return [row[:num] for row, num in zip(ids, lens, strict=True)]


def text(ctx: Context, row: int) -> list[int]:
  """The tokens of a row, read from its blocks; K and V must agree with them."""
  ids, length = tables(ctx)[row], ctx.sequences.seq_lens[row].item()
  stored = np.asarray(ctx.prefix.block_tokens)[ids].reshape(-1)[:length]
  for layer, factor in ((0, 1), (1, 10)):
    for pool, sign in ((ctx.kv[0].k, 1), (ctx.kv[0].v, -1)):
      held = np.asarray(pool)[layer, ids, 0].reshape(-1, 2)[:length]
      np.testing.assert_array_equal(held, np.stack([stored] * 2, 1) * factor * sign)
  return stored.tolist()


def free(ctx: Context) -> list[int]:
  """Free blocks, the next to be handed out first."""
  return ctx.pool.free_list[: ctx.pool.num_free.item()].tolist()[::-1]


def queue(ctx: Context) -> list[int]:
  """Evictable blocks, the next victim first."""
  places = {
    b: place for b, place in enumerate(ctx.prefix.ring.queue_pos.tolist()) if place
  }
  return sorted(places, key=places.__getitem__)


def cached(ctx: Context) -> list[int]:
  """Blocks in the prefix index, in order of their ids."""
  return np.flatnonzero(ctx.prefix.way_of).tolist()
