"""Rows of a context and requests that do not belong together.

A context may hold rows of no request: somebody keeps a prefix, or another loop runs on
it. And requests may come with a context that lacks their rows, as after `reset`.
"""

from jax import Array, lax
import jax.numpy as jnp

from kvcache.context import Context
from kvcache.errors import Status
from kvcache.parts import ragged
from kvcache.serving import scheduler as sch
from kvcache.serving.requests import (
  FinishReason,
  request_of_row,
  Requests,
  RequestStatus,
  WaitReason,
)
from kvcache.serving.scheduler import SchedulerConfig
from kvcache.verbs import lifecycle

_NUM_COLUMNS = 16  # of the block tables, compared at a time
_LAST = 2**31 - 1


def send_back_rowless(ctx: Context, requests: Requests) -> Requests:
  """Lets running requests wait whose rows hold something else, or nothing.

  Costs a pass over the tokens of the running rows.
  """
  ids = request_of_row(requests, ctx.config.max_seqs)
  is_own = (ids < requests.num_requests) & _are_same(ctx, requests, ids)
  to = ragged.masked(ids, is_own, requests.num_requests)
  has_row = jnp.zeros(requests.num_requests, bool).at[to].set(True, mode="drop")
  is_lost = (requests.status == RequestStatus.RUNNING) & ~has_row
  waiting = jnp.int32(RequestStatus.WAITING)
  return requests.replace(
    status=jnp.where(is_lost, waiting, requests.status),
    seq_ids=jnp.where(is_lost, -1, requests.seq_ids),
  )


def _are_same(ctx: Context, requests: Requests, ids: Array) -> Array:
  """`[S]` bool: rows that hold the first tokens of the requests `ids [S]`."""
  table, block_tokens = ctx.sequences, ctx.prefix.block_tokens
  ids = jnp.minimum(ids, requests.num_requests - 1)
  seq_lens = table.seq_lens
  same = table.is_active & (seq_lens <= requests.lengths[ids])
  same &= table.namespaces == requests.namespaces[ids]
  width = min(_NUM_COLUMNS, table.max_blocks_per_seq)
  size = block_tokens.shape[1]

  def compare(state: tuple[Array, Array]) -> tuple[Array, Array]:
    first, same = state
    # The last round may look at columns again.
    at = jnp.minimum(first, table.max_blocks_per_seq - width)
    block_ids = lax.dynamic_slice_in_dim(table.block_tables, at, width, axis=1)
    stored = block_tokens[block_ids].reshape(same.shape[0], -1)
    position = at * size + jnp.arange(stored.shape[1], dtype=jnp.int32)[None]
    place = jnp.minimum(position, requests.capacity - 1)
    differs = (stored != requests.tokens[ids[:, None], place]) & (
      position < seq_lens[:, None]
    )
    return first + width, same & ~jnp.any(differs, axis=1)

  # Ends because `first` grows past the longest row.
  _, same = lax.while_loop(
    lambda state: jnp.any(state[1] & (state[0] * size < seq_lens)),
    compare,
    (jnp.int32(0), same),
  )
  return same


def refuse_first(
  ctx: Context, requests: Requests, scheduler: SchedulerConfig
) -> tuple[Context, Requests]:
  """Ends the request that all others wait for, where nothing can go on.

  It is the first of the running ones, or of the waiting ones if none runs, in the order
  of admission. Its status is what it lacks: a row, or blocks.
  """
  order = sch.order_by(scheduler.admission, ctx, requests)
  running = requests.status == RequestStatus.RUNNING
  waiting = requests.status == RequestStatus.WAITING
  may_be = jnp.where(jnp.any(running), running, waiting)
  victim = jnp.argmin(jnp.where(may_be, order, _LAST))
  reason = requests.wait_reason[victim]
  lacks = jnp.where(reason == WaitReason.NO_ROW, Status.NO_ROW, Status.NO_BLOCKS)
  is_window = reason == WaitReason.NO_WINDOW_BLOCKS
  lacks = jnp.where(is_window, Status.NO_WINDOW_BLOCKS, lacks).astype(jnp.int32)
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)
  ctx = lifecycle.finish(ctx, rows == requests.seq_ids[victim])
  ended, refused = int(RequestStatus.FINISHED), int(FinishReason.REFUSED)
  return ctx, requests.replace(
    status=requests.status.at[victim].set(ended),
    finish_reason=requests.finish_reason.at[victim].set(refused),
    refusals=requests.refusals.at[victim].set(lacks),
    seq_ids=requests.seq_ids.at[victim].set(-1),
    wait_reason=requests.wait_reason.at[victim].set(int(WaitReason.NONE)),
  )
