"""Numbers of a context's use, and what entered and left its index between two of them.

Pure reads. `stats` and `events` may be jitted; they look at every block, so call them
once per slice of work and not in every step.
"""

from jax import Array
import jax.numpy as jnp

from kvcache.context import as_context, check_context, Context, Counters
from kvcache.parts import ragged
from kvcache.parts.prefix import PrefixIndex
from kvcache.printing import Node


class Stats(Node, kw_only=True):
  """How the memory is used. All `[]` int32 unless said otherwise.

  Attributes:
    num_sequences: Live rows.
    num_tokens: Tokens stored by live rows, shared ones counted for each row.
    num_free: Free blocks.
    num_evictable: Cached blocks that nobody holds.
    num_in_use: Blocks that some row holds.
    num_shared: Blocks that more than one row holds.
    num_references: Table entries that name a block: what there would be without
      sharing.
    num_cached: Blocks in the prefix index, held or not.
    num_reserved: Token positions in blocks in use that hold no token yet.
    num_snapshots: Recurrent states kept beside blocks.
    num_free_states: Rows of the state pool that are neither live nor snapshots.
    num_window_free: `[W]` int32. Free blocks of each of `config.windows`.
    num_window_evictable: `[W]` int32. Cached blocks of each that no row holds.
    hit_rate: `[]` float32. Share of all admitted prompt tokens that were cached.
    counters: Running totals, among them why hits ended.
  """

  num_sequences: Array
  num_tokens: Array
  num_free: Array
  num_evictable: Array
  num_in_use: Array
  num_shared: Array
  num_references: Array
  num_cached: Array
  num_reserved: Array
  num_snapshots: Array
  num_free_states: Array
  num_window_free: Array
  num_window_evictable: Array
  hit_rate: Array
  counters: Counters


class Events(Node, kw_only=True):
  """What entered and left the prefix index between two contexts.

  Attributes:
    stored: `[N]` bool. Blocks whose present content was not cached in them before.
    removed: `[N]` bool. Blocks whose former content is no longer cached in them.
  """

  stored: Array
  removed: Array


def stats(ctx: Context) -> Stats:
  """Measures a context.

  Example:
    >>> numbers = kv.stats(started)
    >>> int(numbers.num_tokens), int(numbers.num_in_use), int(numbers.num_reserved)
    (10, 3, 2)
  """
  ctx = as_context(ctx)
  refs, table, counters = ctx.pool.ref_counts, ctx.sequences, ctx.counters
  room = table.num_blocks * ctx.config.block_size
  prompt_tokens = counters.prompt_tokens.astype(jnp.float32)
  rows, num_snapshots, num_free_states = ctx.state_rows, jnp.int32(0), jnp.int32(0)
  if rows is not None:
    num_snapshots, num_free_states = (
      ragged.sum_int(rows.block_ids > 0),
      rows.pool.num_free,
    )
  return Stats(
    num_sequences=ragged.sum_int(table.is_active),
    num_tokens=jnp.sum(table.seq_lens, dtype=jnp.int32),
    num_free=ctx.pool.num_free,
    num_evictable=ctx.prefix.num_evictable,
    num_in_use=ragged.sum_int(refs > 0),
    num_shared=ragged.sum_int(refs > 1),
    num_references=jnp.sum(refs, dtype=jnp.int32),
    num_cached=ragged.sum_int(ctx.prefix.way_of > 0),
    num_reserved=jnp.sum(room - table.seq_lens, dtype=jnp.int32),
    num_snapshots=num_snapshots,
    num_free_states=num_free_states,
    num_window_free=jnp.array([w.pool.num_free for w in ctx.windows], jnp.int32),
    num_window_evictable=jnp.array(
      [w.ring.num_waiting for w in ctx.windows], jnp.int32
    ),
    hit_rate=counters.hit_tokens.astype(jnp.float32) / jnp.maximum(prompt_tokens, 1.0),
    counters=counters,
  )


def events(before: Context, after: Context) -> Events:
  """Computes what was stored in and removed from the prefix index.

  A block that was evicted and holds another cached prefix now is in both masks.

  Args:
    before: An earlier context (not donated since).
    after: A later one of the same configuration.

  Example:
    >>> after = jax.jit(kv.publish)(started)
    >>> int(kv.events(started, after).stored.sum())
    2
  """
  check_context(before)
  check_context(after)
  if before.config != after.config:
    raise ValueError("before and after have different configurations")
  before, after = as_context(before), as_context(after)
  return index_events(before.prefix, after.prefix)


def index_events(old: PrefixIndex, new: PrefixIndex) -> Events:
  """`events` of two indices of one size."""
  was_cached, is_cached = old.way_of > 0, new.way_of > 0
  same = (
    jnp.all(old.block_tokens == new.block_tokens, axis=-1)
    & jnp.all(old.prefix_hash == new.prefix_hash, axis=-1)
    & (old.namespace == new.namespace)
  )
  kept = was_cached & is_cached & same
  return Events(stored=is_cached & ~kept, removed=was_cached & ~kept)
