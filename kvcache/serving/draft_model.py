"""DraftModel: a small model that drafts what a large one checks.

It has a context of its own, which the loop carries beside the large model's. Row `s`
of it follows row `s` of the other, by comparing tokens: whatever the target's row came
to by admission, a prefix hit, preemption or rejected drafts, the draft's row goes back
to what both have in common and catches up from there.

Nothing is published in it, so every block has one holder, and a row goes back by
getting shorter: its blocks stay its own. Going back costs one pass over the rows'
tokens.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jax import Array, lax
import jax.numpy as jnp

from kvcache.config import CacheConfig, settle_ints
from kvcache.context import Context
from kvcache.errors import Status
from kvcache.parts import ragged
from kvcache.printing import Node
from kvcache.serving import sampling
from kvcache.serving.requests import Batch, Requests
from kvcache.serving.sampling import Sampler
from kvcache.verbs import sharding, stepping

_NUM_BEHIND = 2
"""Most tokens that a row lacks after a step: the last draft if all were right, and the
token sampled behind it."""


class DraftModel(Node, kw_only=True):
  """A drafter that is a model.

  It samples as the loop does, with the request's settings and the noise of the
  position, so that drafts are right as often as may be.

  Each step computes up to `chunk_size` tokens that rows lack, and then `num_drafts - 1`
  decode steps of the rows that lack none; rows that still do have no drafts.

  Attributes:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`, with the
      vocabulary of the model it drafts for. A `jax.tree_util.Partial` if it owns
      arrays.
    config: Of the draft context: as many rows as the one it drafts for, and layers that
      keep every token: none is recurrent or has a sliding window.
      `max_seqs * max_blocks_per_seq` blocks and the null block are enough for all; rows
      that find none, or grow too long, have no drafts. With `head_axes` its heads are
      split like those of the model it drafts for; without, each device has all of it.
    num_drafts: `J`, drafts per row.
    chunk_size: Tokens that rows catch up with in one step, all together: at least two
      per row.
  """

  model: Callable[..., Any]
  config: CacheConfig = flax.struct.field(pytree_node=False)
  num_drafts: int = flax.struct.field(pytree_node=False, default=4)
  chunk_size: int = flax.struct.field(pytree_node=False, default=64)

  def __post_init__(self):
    if callable(self.model) and not isinstance(self.model, jax.tree_util.Partial):
      object.__setattr__(self, "model", jax.tree_util.Partial(self.model))
    settle_ints(self, "num_drafts", "chunk_size")
    least = _NUM_BEHIND * self.config.max_seqs
    if self.chunk_size < least:
      raise ValueError(
        f"chunk_size must be at least {_NUM_BEHIND} * max_seqs = {least}, got"
        f" {self.chunk_size}"
      )
    if self.config.num_recurrent_layers:
      raise ValueError(
        "config has recurrent layers: their states cannot go back to where drafts were"
        " rejected"
      )
    if self.config.windows:
      raise ValueError(
        f"config has sliding windows {self.config.windows}: what is behind them is gone"
        " when drafts are rejected"
      )

  def init(self) -> Context:
    """Makes the draft context; its rows are active for good."""
    ctx = sharding.init_part(self.config)
    is_active = jnp.ones(self.config.max_seqs, bool)
    return ctx.replace(sequences=ctx.sequences.replace(is_active=is_active))

  def propose(
    self, state: Context, requests: Requests, batch: Batch, sampler: Sampler
  ) -> tuple[Context, Array, Array]:
    """See `kvcache.Drafter`."""
    ctx, (S,) = state, batch.lengths.shape
    if self.config.max_seqs != S:
      raise ValueError(
        f"the draft context must have the {S} rows of the context it drafts for, got"
        f" {self.config.max_seqs}"
      )
    ids = jnp.minimum(batch.request_ids, requests.num_requests - 1)
    tokens, lengths = requests.tokens[ids], batch.lengths
    is_live = (batch.request_ids < requests.num_requests) & ~batch.is_finished
    ctx = _go_back(ctx, tokens, lengths, requests.namespaces[ids], is_live)
    lacks = jnp.where(is_live, lengths - ctx.sequences.seq_lens, 0)
    query_lens = _share(lacks, self.chunk_size)
    ctx, status = stepping.extend(ctx, query_lens, num_tokens=self.chunk_size)
    query_lens = jnp.where(status == Status.OK, query_lens, 0)
    metadata = stepping.step_metadata(ctx, query_lens, num_tokens=self.chunk_size)
    at = jnp.minimum(metadata.positions, requests.capacity - 1)
    packed = tokens[metadata.seq_ids, at]
    logits, ctx = stepping.call_model(self.model, packed, metadata, ctx)
    ctx = stepping.commit(ctx, packed, metadata)
    drafting = (query_lens > 0) & (ctx.sequences.seq_lens == lengths)
    first = sampling.draw(sampler, logits, batch.settings, lengths)
    drafts = jnp.zeros((S, self.num_drafts), jnp.int32).at[:, 0].set(first)

    def draft(
      i: Array, carry: tuple[Context, Array, Array, Array]
    ) -> tuple[Context, Array, Array, Array]:
      ctx, drafts, drafting, num = carry
      last: Array = lax.dynamic_index_in_dim(drafts, i - 1, axis=1, keepdims=False)
      ctx, status = stepping.extend(ctx, drafting.astype(jnp.int32))
      drafting &= status == Status.OK
      metadata = stepping.step_metadata(ctx, drafting.astype(jnp.int32))
      logits, ctx = stepping.call_model(self.model, last, metadata, ctx)
      ctx = stepping.commit(ctx, last, metadata)
      after = sampling.draw(sampler, logits, batch.settings, lengths + i)
      drafts = lax.dynamic_update_index_in_dim(drafts, after, i, axis=1)
      return ctx, drafts, drafting, num + drafting.astype(jnp.int32)

    carry = ctx, drafts, drafting, drafting.astype(jnp.int32)
    ctx, drafts, _, num = lax.fori_loop(jnp.int32(1), self.num_drafts, draft, carry)
    return ctx, drafts, num


def _go_back(
  ctx: Context, tokens: Array, lengths: Array, namespaces: Array, mask: Array
) -> Context:
  """Shortens rows to what they have in common with `tokens [S, C]`.

  To less than all of it, so that there is a token to compute.
  """
  table = ctx.sequences
  stored, block_tokens = ragged.read(ctx.prefix.block_tokens, table.block_tables)
  stored = stored.reshape(table.max_seqs, -1)
  width = min(stored.shape[1], tokens.shape[1])
  position = jnp.arange(width, dtype=jnp.int32)[None]
  differs = stored[:, :width] != tokens[:, :width]
  common = jnp.min(jnp.where(differs, position, width), axis=1)
  common = jnp.minimum(jnp.minimum(common, lengths - 1), table.seq_lens)
  common = jnp.where(table.namespaces == namespaces, common, 0)
  table = table.replace(
    seq_lens=jnp.where(mask, common, table.seq_lens),
    namespaces=jnp.where(mask, namespaces, table.namespaces),
  )
  index = ctx.prefix.replace(block_tokens=block_tokens)
  return ctx.replace(sequences=table, prefix=index)


def _share(lacks: Array, num_tokens: int) -> Array:
  """`[S]` int32 tokens to compute: a few for every row, then rows in order."""
  few = jnp.minimum(lacks, _NUM_BEHIND)
  more = lacks - few
  before = jnp.cumsum(more) - more
  return few + jnp.clip(num_tokens - jnp.sum(few, dtype=jnp.int32) - before, 0, more)
