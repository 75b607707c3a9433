"""Who computes how many tokens in the next step: admission, chunking and preemption.

Pure functions. A policy is `policy(ctx, requests) -> order`: `[Q]` int32, smaller is
served first. Waiting requests are admitted in that order, prompts share the token
budget in that order, and when memory runs short the running request that comes last in
it is preempted.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import Array, lax
import jax.numpy as jnp

from kvcache import context
from kvcache.config import settle_ints
from kvcache.context import Context
from kvcache.errors import Status
from kvcache.parts import arguments, ragged, windows
from kvcache.printing import Node
from kvcache.serving.requests import (
  Batch,
  FinishReason,
  load_batch,
  MAX_PRIORITY,
  Requests,
  RequestStatus,
  WaitReason,
)
from kvcache.verbs import lifecycle, stepping

Policy = Callable[[Context, Requests], Array]

_FIRST, _LAST = -(2**31), 2**31 - 1


def first_come_first_served(ctx: Context, requests: Requests) -> Array:
  """Higher priority first, then in order of index. Needs fewer than 2^20 requests."""
  del ctx
  index = jnp.arange(requests.num_requests, dtype=jnp.int32)
  return (MAX_PRIORITY - requests.priority) * (1 << 20) + index


def shortest_first(ctx: Context, requests: Requests) -> Array:
  """Fewest tokens still to be sampled first; equal ones in order of index."""
  del ctx
  index = jnp.arange(requests.num_requests, dtype=jnp.int32)
  left = jnp.clip(requests.max_lens - requests.lengths, 0, (1 << 11) - 2)
  return left * (1 << 20) + index


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
  """Static settings of the loop; hashable, and static as an argument of `jax.jit` too.

  Attributes:
    token_budget: `T` of a mixed step: tokens computed in it, decoding rows and prompt
      chunks together. At least `max_seqs`, so that decoding rows never miss a step.
    max_admissions: `A`, prompts looked at in one step.
    watermark: Blocks that each mixed step leaves free, by eviction, so that the decode
      steps that follow find some. `max_seqs` if None.
    defer_shared: Whether a prompt waits while another one computes blocks that it could
      adopt.
    cascade: Whether steps look for a prefix that rows share and read it once; see
      `step_metadata`.
    admission: Order in which requests are served.
    preemption: Order whose last running request is preempted. `admission` if None.
  """

  token_budget: int = 256
  max_admissions: int = 8
  watermark: int | None = None
  defer_shared: bool = True
  cascade: bool = False
  admission: Policy = first_come_first_served
  preemption: Policy | None = None

  def __post_init__(self):
    settle_ints(self, "token_budget", "max_admissions")
    if self.watermark is not None:
      settle_ints(self, "watermark", least=0)
    if not callable(self.admission):
      raise ValueError(f"admission must be a policy, got {self.admission!r}")
    if not callable(self.preemption or self.admission):
      raise ValueError(f"preemption must be a policy or None, got {self.preemption!r}")


class Plan(Node, kw_only=True):
  """What the next step does.

  Attributes:
    query_lens: `[S]` int32. Tokens each row computes.
    order: `[S]` int32. Rows in the order in which they are served.
    has_prefill: `[]` bool. Whether some row computes, or waits to compute, more than
      one token.
    is_stalled: `[]` bool. Whether a waiting request was turned away for want of blocks;
      asking again makes sense after another one has finished.
  """

  query_lens: Array
  order: Array
  has_prefill: Array
  is_stalled: Array


def schedule(
  ctx: Context, requests: Requests, scheduler: SchedulerConfig
) -> tuple[Context, Requests, Plan]:
  """Releases finished rows, admits, preempts and shares out the token budget.

  Blocks for the plan's `query_lens`, and states for its snapshots, are free afterwards
  if any can be; `extend` with the plan's order takes the blocks.

  Args:
    ctx: The context.
    requests: The requests.
    scheduler: Static settings.
  """
  check_budget(ctx, scheduler)
  policy = scheduler.admission
  requests = _count_waits(requests)
  ctx, requests = _release_finished(context.publish(ctx), requests)
  ctx, requests, shortage = _preempt(ctx, requests, scheduler)
  order = order_by(policy, ctx, requests)
  ctx, requests, is_stalled = _admit(ctx, requests, scheduler, order, shortage)
  order = order_by(policy, ctx, requests)
  ctx, requests, plan = _share_budget(ctx, requests, scheduler, order)
  return ctx, requests, plan.replace(is_stalled=is_stalled)


def check_budget(ctx: Context, scheduler: SchedulerConfig) -> None:
  """Raises `ValueError` if decoding rows could miss a step."""
  if scheduler.token_budget < ctx.config.max_seqs:
    raise ValueError(
      f"token_budget={scheduler.token_budget} must be at least"
      f" max_seqs={ctx.config.max_seqs}"
    )


def running(ctx: Context, requests: Requests) -> Batch:
  """The running requests by row."""
  return load_batch(
    requests,
    max_seqs=ctx.config.max_seqs,
    max_tokens_per_seq=ctx.config.max_tokens_per_seq,
  )


def num_available(ctx: Context) -> Array:
  """`[1 + W]` int32: free and evictable blocks of the context and of each window."""
  main = ctx.pool.num_free + ctx.prefix.num_evictable
  return jnp.stack([main, *(w.pool.num_free + w.ring.num_waiting for w in ctx.windows)])


def _shortage(num_blocks: Array) -> Array:
  """`[]` int32 `WaitReason` of those for whom blocks are too few.

  Args:
    num_blocks: `[1 + W]` int32, in the context's pool and in each window's. The
      scarcest is the one that is named; of equal ones the context's.
  """
  is_window = jnp.argmin(num_blocks) > 0
  reason = jnp.where(is_window, WaitReason.NO_WINDOW_BLOCKS, WaitReason.NO_BLOCKS)
  return reason.astype(jnp.int32)


def needs_block(ctx: Context, mask: Array) -> Array:
  """`[S]` bool: rows in `mask` that cannot store one more token in their blocks."""
  table = ctx.sequences
  return mask & (table.seq_lens == table.num_blocks * ctx.config.block_size)


def all_can_decode(ctx: Context, mask: Array, *, recycles: bool = True) -> Array:
  """`[]` bool: whether every row in `mask` can store one more token as things are.

  Args:
    ctx: The context.
    mask: `[S]` bool.
    recycles: Whether rows may write over what is behind their windows, as they do in
      the decode shape.
  """
  needs = needs_block(ctx, mask)
  result = ragged.sum_int(needs) <= ctx.pool.num_free
  for window in ctx.windows:
    takes = needs
    if recycles:
      takes &= ~windows.can_recycle(window, ctx.sequences.seq_lens)
    result &= ragged.sum_int(takes) <= window.pool.num_free
  return result


def num_snapshots_lacking(ctx: Context, query_lens: Array) -> Array:
  """`[]` int32: free states that a step lacks to take the snapshots it comes to."""
  rows = ctx.state_rows
  if rows is None:
    return jnp.int32(0)
  wants = (query_lens > 0) & (query_lens >= stepping.tokens_to_snapshot(ctx))
  return jnp.maximum(ragged.sum_int(wants) - rows.num_spare, 0)


def _count_waits(requests: Requests) -> Requests:
  """Counts the steps since the last call to what each request waited for in them."""
  reasons = jnp.arange(len(WaitReason), dtype=jnp.int32)[None]
  steps = requests.num_steps - requests.num_scheduled
  waits = (requests.wait_reason[:, None] == reasons) & (reasons > 0)
  return requests.replace(
    num_waited=requests.num_waited + jnp.where(waits, steps, 0),
    num_scheduled=requests.num_steps,
  )


def _release_finished(ctx: Context, requests: Requests) -> tuple[Context, Requests]:
  batch = running(ctx, requests)
  done = batch.is_finished
  ctx = lifecycle.finish_published(ctx, done)
  ids = jnp.where(done, batch.request_ids, requests.num_requests)
  requests = requests.replace(
    status=requests.status.at[ids].set(int(RequestStatus.FINISHED), mode="drop"),
    seq_ids=requests.seq_ids.at[ids].set(-1, mode="drop"),
  )
  return ctx, requests


def order_by(policy: Policy, ctx: Context, requests: Requests) -> Array:
  """Calls a policy, and refuses what is no order `[Q]`; `ValueError`."""
  order = policy(ctx, requests)
  return arguments.as_int32("the policy's order", order, shape=(requests.num_requests,))


def _preempt(
  ctx: Context, requests: Requests, scheduler: SchedulerConfig
) -> tuple[Context, Requests, Array]:
  """Sends the last running requests back until the others can take a token each.

  Returns:
    The context and the requests after, and `[]` int32 `WaitReason`: what was short when
    the last one was sent back, `NONE` if nobody was.
  """
  policy = scheduler.preemption or scheduler.admission

  def must_serve(ctx: Context, requests: Requests) -> tuple[Array, Array]:
    batch = running(ctx, requests)
    live = batch.is_live
    decodes = live & (batch.lengths - ctx.sequences.seq_lens == 1)
    # Without a decoding row the first of the prompts must be able to go on.
    first = _row_order(order_by(policy, ctx, requests), batch, live)[0]
    row = jnp.arange(live.shape[0], dtype=jnp.int32)
    must = jnp.where(jnp.any(decodes), decodes, live & (row == first))
    return ragged.sum_int(needs_block(ctx, must)), live

  def is_short(state: tuple[Context, Requests, Array]) -> Array:
    needed, live = must_serve(state[0], state[1])
    is_short = jnp.any(needed > num_available(state[0]))
    return is_short & (ragged.sum_int(live) > 1)

  def preempt_last(state: tuple[Context, Requests, Array]):
    ctx, requests, _ = state
    shortage = _shortage(num_available(ctx))
    batch = running(ctx, requests)
    live = batch.is_live
    at = jnp.minimum(batch.request_ids, requests.num_requests - 1)
    rank = jnp.where(live, order_by(policy, ctx, requests)[at], _FIRST)
    victim = jnp.argmax(rank).astype(jnp.int32)
    row = jnp.arange(live.shape[0], dtype=jnp.int32)
    ctx = lifecycle.finish_published(ctx, live & (row == victim))
    request = batch.request_ids[victim]
    requests = requests.replace(
      status=requests.status.at[request].set(int(RequestStatus.WAITING)),
      seq_ids=requests.seq_ids.at[request].set(-1),
      num_preemptions=requests.num_preemptions.at[request].add(1),
    )
    return ctx, requests, shortage

  # Ends because every round ends one live row.
  nothing = jnp.int32(WaitReason.NONE)
  return lax.while_loop(is_short, preempt_last, (ctx, requests, nothing))


def _admit(
  ctx: Context,
  requests: Requests,
  scheduler: SchedulerConfig,
  order: Array,
  shortage: Array,
) -> tuple[Context, Requests, Array]:
  """Admits waiting requests in order, as far as rows and blocks reach.

  Nobody if others were just sent back for a `shortage`, `[]` int32 `WaitReason`.
  """
  config = ctx.config
  is_short = shortage != WaitReason.NONE
  num_candidates = min(scheduler.max_admissions, requests.num_requests, config.max_seqs)
  waiting = requests.status == RequestStatus.WAITING
  keys, candidates = _smallest(jnp.where(waiting, order, _LAST), num_candidates)
  is_candidate = (keys < _LAST) & ~is_short
  lengths = jnp.where(is_candidate, requests.lengths[candidates], 0)
  prompts = requests.tokens[candidates, : config.max_tokens_per_seq]
  waits = jnp.zeros_like(is_candidate)
  if scheduler.defer_shared:
    waits = is_candidate & _shares_pending(ctx, requests, candidates, lengths, prompts)
  # Every running row may need one block more soon; a lone request may take the whole
  # pool.
  num_live = ragged.sum_int(requests.status == RequestStatus.RUNNING)
  budgets = num_available(ctx) - num_live
  is_crowded = is_candidate & ~waits & ~_windows_fit(ctx, lengths, ~waits, budgets[1:])
  reason = jnp.where(waits, WaitReason.SHARED, WaitReason.NO_ROW)
  reason = jnp.where(is_crowded, WaitReason.NO_WINDOW_BLOCKS, reason)
  waits |= is_crowded
  ctx, admission = lifecycle.admit_published(
    ctx,
    prompts,
    jnp.where(waits, 0, lengths),
    namespace=requests.namespaces[candidates],
    block_budget=budgets[0],
  )
  asked = is_candidate & ~waits
  admitted = asked & (admission.status == Status.OK)
  refused = asked & is_permanent(admission.status)
  num = requests.num_requests
  to = jnp.where(admitted, candidates, num)
  first_time = admitted & (requests.num_preemptions[candidates] == 0)
  to_first = jnp.where(first_time, candidates, num)
  out = jnp.where(refused, candidates, num)
  status = requests.status.at[to].set(int(RequestStatus.RUNNING), mode="drop")
  requests = requests.replace(
    status=status.at[out].set(int(RequestStatus.FINISHED), mode="drop"),
    seq_ids=requests.seq_ids.at[to].set(admission.seq_ids, mode="drop"),
    num_cached=requests.num_cached.at[to_first].set(admission.num_cached, mode="drop"),
    refusals=requests.refusals.at[out].set(admission.status, mode="drop"),
    finish_reason=requests.finish_reason.at[out].set(
      int(FinishReason.REFUSED), mode="drop"
    ),
  )
  no_blocks = asked & (admission.status == Status.NO_BLOCKS)
  lacks_blocks = is_crowded | no_blocks
  # Those not looked at wait for what would let anybody in.
  reason = jnp.where(no_blocks, WaitReason.NO_BLOCKS, reason)
  others = jnp.where(
    jnp.all(ctx.sequences.is_active), WaitReason.NO_ROW, WaitReason.QUEUED
  )
  others = jnp.where(is_short, shortage, others)
  waiting = requests.status == RequestStatus.WAITING
  reasons = jnp.where(waiting, others, WaitReason.NONE).astype(jnp.int32)
  to = jnp.where(is_candidate & ~admitted & ~refused, candidates, num)
  requests = requests.replace(
    wait_reason=reasons.at[to].set(reason.astype(jnp.int32), mode="drop")
  )
  return ctx, requests, jnp.any(lacks_blocks) | is_short


def _windows_fit(ctx: Context, lengths: Array, mask: Array, budgets: Array) -> Array:
  """`[A]` bool: prompts in `mask` whose windows fit into `budgets [W]`, in order."""
  fits = jnp.ones_like(mask)
  for i, window in enumerate(ctx.windows):
    num_blocks = (lengths + (ctx.config.block_size - 1)) // ctx.config.block_size
    need = jnp.where(mask, jnp.minimum(num_blocks, window.num_columns), 0)
    fits &= ragged.first_come(need, budgets[i])[1]
  return fits


def _smallest(keys: Array, num: int) -> tuple[Array, Array]:
  """The `num` smallest of `[Q]` keys in ascending order, and their indices.

  Each is one pass over the keys; `lax.top_k` sorts them all on CPU (measured: 0.5 ms
  and more for 10,000).
  """

  def pick(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    left, found, at = state
    smallest = jnp.argmin(left).astype(jnp.int32)
    found, at = found.at[i].set(left[smallest]), at.at[i].set(smallest)
    return left.at[smallest].set(_LAST), found, at

  nothing = jnp.full(num, _LAST, jnp.int32), jnp.zeros(num, jnp.int32)
  _, found, at = lax.fori_loop(0, num, pick, (keys, *nothing))
  return found, at


def is_permanent(status: Array) -> Array:
  """Whether each `Status` value is one that never changes."""
  table = [code.is_permanent for code in Status]
  return jnp.array(table)[status]


def _shares_pending(
  ctx: Context, requests: Requests, candidates: Array, lengths: Array, prompts: Array
) -> Array:
  """`[A]` bool: candidates that could adopt blocks that others are about to compute.

  The others are the candidates before it and the running rows with most prompt tokens
  left.
  """
  config = ctx.config
  batch = running(ctx, requests)
  left = batch.lengths - ctx.sequences.seq_lens
  left = jnp.where(batch.is_live, left, 0)
  num_others = min(candidates.shape[0], config.max_seqs)
  left, rows = lax.top_k(left, num_others)
  others = jnp.minimum(batch.request_ids[rows], requests.num_requests - 1)
  num_columns = prompts.shape[1] // config.block_size
  if not num_columns:
    return jnp.zeros_like(lengths, bool)
  width = num_columns * config.block_size

  ids = jnp.concatenate([candidates, others])
  their_tokens = requests.tokens[ids, :width]
  their_lens = jnp.concatenate(
    [lengths, jnp.where(left > 1, requests.lengths[others], 0)]
  )
  computed = jnp.concatenate([jnp.zeros_like(lengths), ctx.sequences.seq_lens[rows]])
  same = jnp.all(
    (prompts[:, None, :width] == their_tokens[None]).reshape(
      candidates.shape[0], ids.shape[0], num_columns, config.block_size
    ),
    axis=-1,
  )
  num_same = jnp.sum(lax.cumprod(same.astype(jnp.int32), axis=2), axis=2)
  may_adopt = jnp.maximum(lengths - 1, 0) // config.block_size
  shared = jnp.minimum(
    num_same, jnp.minimum(may_adopt[:, None], (their_lens // config.block_size)[None])
  )
  mine = jnp.arange(candidates.shape[0], dtype=jnp.int32)[:, None]
  theirs = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
  is_other = (theirs < mine) | (theirs >= candidates.shape[0])
  namespaces = requests.namespaces[candidates]
  is_kin = namespaces[:, None] == requests.namespaces[ids][None]
  # A candidate before it may be a hit itself: then there is nothing to wait for.
  _, cached = lifecycle.find(ctx, prompts, lengths, namespace=namespaces)
  ready = jnp.maximum(cached[:, None], (computed // config.block_size)[None])
  return jnp.any(is_other & is_kin & (shared > ready), axis=1)


def _row_order(order: Array, batch: Batch, mask: Array) -> Array:
  """`[S]` int32 rows in their requests' order; those not in `mask` last."""
  at = jnp.minimum(batch.request_ids, order.shape[0] - 1)
  return jnp.argsort(jnp.where(mask, order[at], _LAST)).astype(jnp.int32)


def _share_budget(
  ctx: Context, requests: Requests, scheduler: SchedulerConfig, order: Array
) -> tuple[Context, Requests, Plan]:
  """Decoding rows take one token each, prompts in order what is left of the budget."""
  config, table = ctx.config, ctx.sequences
  batch = running(ctx, requests)
  live = batch.is_live
  left = jnp.where(live, batch.lengths - table.seq_lens, 0)
  by_order = _row_order(order, batch, live)
  is_prefill = (left > 1)[by_order]
  # A stable partition: rows that decode, in order, then prompts, in order.
  place = jnp.where(
    is_prefill,
    ragged.sum_int(~is_prefill) + ragged.ranks(is_prefill),
    ragged.ranks(~is_prefill),
  )
  rows = jnp.zeros_like(by_order).at[place].set(by_order)

  # A chunk ends where a snapshot is wanted: states are kept between steps only.
  wanted = jnp.minimum(left, stepping.tokens_to_snapshot(ctx))[rows]
  before = jnp.cumsum(wanted) - wanted
  query_lens = jnp.clip(scheduler.token_budget - before, 0, wanted)
  size = config.block_size
  seq_lens, num_blocks = table.seq_lens[rows], table.num_blocks[rows]
  need = jnp.maximum((seq_lens + query_lens + (size - 1)) // size - num_blocks, 0)
  watermark = config.max_seqs if scheduler.watermark is None else scheduler.watermark
  watermark = min(watermark, config.num_blocks - 1)
  num_needed = jnp.sum(need, dtype=jnp.int32)
  target = jnp.maximum(num_needed, watermark)
  ctx = context.make_room(ctx, target)
  # A chunk shrinks to the blocks that are left; later ones wait.
  num_free = context.num_free(ctx)
  free_here = jnp.maximum(jnp.min(num_free) - (jnp.cumsum(need) - need), 0)
  room = (num_blocks + free_here) * size - seq_lens
  over_budget = (wanted > 0) & (query_lens == 0)
  query_lens = jnp.clip(query_lens, 0, room)
  reason = jnp.where(over_budget, WaitReason.BUDGET, _shortage(num_free))
  waits = (wanted > 0) & (query_lens == 0)
  to = jnp.where(waits, batch.request_ids[rows], requests.num_requests)
  requests = requests.replace(
    wait_reason=requests.wait_reason.at[to].set(reason.astype(jnp.int32), mode="drop")
  )
  query_lens = jnp.zeros_like(query_lens).at[rows].set(query_lens)
  if ctx.state_rows is not None:
    ctx, _ = context.evict_snapshots(ctx, num_snapshots_lacking(ctx, query_lens))
  plan = Plan(
    query_lens=query_lens,
    order=rows,
    has_prefill=jnp.any(left > 1),
    is_stalled=jnp.zeros((), bool),
  )
  return ctx, requests, plan
