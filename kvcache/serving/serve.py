"""The loop: continuous batching inside one `jax.jit`.

`step` is one mixed step. `serve` runs steps until every request has ended, as one
`while_loop` without any host transfer: its body schedules, computes prompt chunks and
decoding rows together if there are prompt chunks, and then runs decode steps for as
long as nothing else is to be done. `kvcache.serving.generation` has the host's
convenience, which runs `serve` in slices.
"""

from typing import Any, overload, TypedDict, Unpack

import jax
from jax import Array, lax
import jax.numpy as jnp

from kvcache import context
from kvcache.context import Context
from kvcache.errors import Status
from kvcache.observe.history import History, record
from kvcache.parts import ragged
from kvcache.serving import requests as rq
from kvcache.serving import rows_of_others, sampling
from kvcache.serving import scheduler as sch
from kvcache.serving.requests import Batch, Requests, RequestStatus
from kvcache.serving.sampling import Sampler
from kvcache.serving.scheduler import Plan, SchedulerConfig
from kvcache.serving.speculation import Drafter
from kvcache.verbs import sharding, stepping
from kvcache.verbs.metadata import StepMetadata
from kvcache.verbs.stepping import Model


def next_tokens(requests: Requests, batch: Batch, metadata: StepMetadata) -> Array:
  """`[T]` int32: the tokens that a step computes, read from the requests.

  Always read at the position, never taken from the last sample: a row can come to its
  last known token by a prompt chunk, a prefix hit or a preemption as well.
  """
  ids = batch.request_ids[metadata.seq_ids]
  at = jnp.minimum(metadata.positions, requests.capacity - 1)
  return requests.tokens[jnp.minimum(ids, requests.num_requests - 1), at]


def _run_model(
  model: Model,
  ctx: Context,
  requests: Requests,
  batch: Batch,
  query_lens: Array,
  sampler: Sampler,
  *,
  num_tokens: int | None,
  order: Array | None = None,
  cascade: bool = False,
) -> tuple[Context, Requests, Batch]:
  """One step: make room, compute, store, sample."""
  with jax.named_scope("extend"):
    ctx, status = stepping.extend(ctx, query_lens, num_tokens=num_tokens, order=order)
    query_lens = jnp.where(status == Status.OK, query_lens, 0)
    metadata = stepping.step_metadata(
      ctx, query_lens, num_tokens=num_tokens, cascade=cascade
    )
    tokens = next_tokens(requests, batch, metadata)
  with jax.named_scope("model"):
    logits, ctx = stepping.call_model(model, tokens, metadata, ctx)
  with jax.named_scope("commit"):
    ctx = stepping.commit(ctx, tokens, metadata)
  with jax.named_scope("sample"):
    requests, batch = take_samples(ctx, requests, batch, metadata, logits, sampler)
  return ctx, _count_step(requests, metadata), batch


def _run_drafts(
  model: Model,
  ctx: Context,
  requests: Requests,
  batch: Batch,
  sampler: Sampler,
  drafter: Drafter,
  draft_state: Any,
) -> tuple[Context, Requests, Batch, Any]:
  """A decode step that also computes guessed tokens, and keeps those that were right.

  Every live row knows one token that is not computed.
  """
  S, num_each = ctx.config.max_seqs, 1 + drafter.num_drafts
  live = batch.is_live
  with jax.named_scope("draft"):
    draft_state, drafts, num_drafts = drafter.propose(
      draft_state, requests, batch, sampler
    )
  # Not beyond what the request may have; none if there are no blocks for all.
  room = jnp.maximum(batch.limits - 1 - batch.lengths, 0)
  most = jnp.minimum(room, drafter.num_drafts)
  num_drafts = jnp.where(live, jnp.clip(num_drafts, 0, most), 0)
  seq_lens, size = ctx.sequences.seq_lens, ctx.config.block_size
  need = (seq_lens + 1 + num_drafts + (size - 1)) // size - ctx.sequences.num_blocks
  needed = jnp.sum(jnp.where(live, jnp.maximum(need, 0), 0), dtype=jnp.int32)
  num_drafts = jnp.where(needed <= jnp.min(context.num_free(ctx)), num_drafts, 0)

  query_lens = jnp.where(live, 1 + num_drafts, 0)
  ctx, status = stepping.extend(ctx, query_lens, num_tokens=S * num_each)
  query_lens = jnp.where(status == Status.OK, query_lens, 0)
  metadata = stepping.step_metadata(
    ctx, query_lens, num_tokens=S * num_each, num_logits=num_each
  )
  rows = metadata.seq_ids
  guess = jnp.clip(metadata.positions - batch.lengths[rows], 0, drafter.num_drafts - 1)
  is_known = metadata.positions < batch.lengths[rows]
  known = next_tokens(requests, batch, metadata)
  tokens = jnp.where(is_known, known, drafts[rows, guess])
  with jax.named_scope("model"):
    logits, ctx = stepping.call_model(model, tokens, metadata, ctx)

  settings = jax.tree.map(lambda x: jnp.repeat(x, num_each, axis=0), batch.settings)
  place = jnp.arange(num_each, dtype=jnp.int32)[None]
  positions = batch.lengths[:, None] + place
  with jax.named_scope("sample"):
    flat = sampling.draw(sampler, logits, settings, positions.reshape(-1))
  logprobs = None
  if requests.logprobs is not None:
    logprobs = sampling.token_logprobs(logits, flat).reshape(S, num_each)
  sampled = flat.reshape(S, num_each)
  is_right = (drafts == sampled[:, :-1]) & (place[:, :-1] < num_drafts[:, None])
  num_right = jnp.sum(jnp.cumprod(is_right.astype(jnp.int32), axis=1), axis=1)
  before = batch.lengths
  for i in range(num_each):
    mask = (query_lens > 0) & (i <= num_right) & ~batch.is_finished
    one = None if logprobs is None else logprobs[:, i]
    requests, batch = rq.append(requests, batch, sampled[:, i], mask, logprobs=one)
  num_new = batch.lengths - before
  with jax.named_scope("commit"):
    ctx = stepping.commit(ctx, tokens, metadata, accepted=num_new)
  num_accepted = jnp.sum(jnp.maximum(num_new - 1, 0), dtype=jnp.int32)
  return (
    ctx,
    _count_step(requests, metadata).replace(
      num_drafts=requests.num_drafts + jnp.sum(num_drafts, dtype=jnp.int32),
      num_accepted=requests.num_accepted + num_accepted,
    ),
    batch,
    draft_state,
  )


def _count_step(requests: Requests, metadata: StepMetadata) -> Requests:
  """Counts a step in which something was computed: whoever lacks room cannot go on."""
  num = requests.num_steps + jnp.any(metadata.query_lens > 0).astype(jnp.int32)
  return requests.replace(num_steps=num)


def take_samples(
  ctx: Context,
  requests: Requests,
  batch: Batch,
  metadata: StepMetadata,
  logits: Array,
  sampler: Sampler,
) -> tuple[Requests, Batch]:
  """Samples a token for each row whose every token is computed.

  Args:
    ctx: The context after `commit`.
    requests: The requests.
    batch: The running rows.
    metadata: Of the step.
    logits: `[S, V]`, of each row's last token.
    sampler: As in `kvcache.sampling`.
  """
  mask = (metadata.query_lens > 0) & (ctx.sequences.seq_lens == batch.lengths)
  tokens = sampling.draw(sampler, logits, batch.settings, batch.lengths)
  logprobs = None
  if requests.logprobs is not None:
    logprobs = sampling.token_logprobs(logits, tokens)
  return rq.append(requests, batch, tokens, mask, logprobs=logprobs)


def _mixed_step(
  model: Model,
  ctx: Context,
  requests: Requests,
  batch: Batch,
  plan: Plan,
  scheduler: SchedulerConfig,
  sampler: Sampler,
) -> tuple[Context, Requests, Batch]:
  return _run_model(
    model,
    ctx,
    requests,
    batch,
    plan.query_lens,
    sampler,
    num_tokens=scheduler.token_budget,
    order=plan.order,
    cascade=scheduler.cascade,
  )


def step(
  model: Model,
  ctx: Context,
  requests: Requests,
  scheduler: SchedulerConfig = SchedulerConfig(),
  *,
  sampler: Sampler = sampling.sample,
) -> tuple[Context, Requests]:
  """Runs one mixed step: schedule, compute, sample.

  Args:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`.
    ctx: The context.
    requests: The requests, new or of the step before.
    scheduler: Static settings.
    sampler: How tokens are chosen.
  """
  with jax.named_scope("schedule"):
    ctx, requests, plan = sch.schedule(ctx, requests, scheduler)
    batch = sch.running(ctx, requests)
  ctx, requests, batch = _mixed_step(
    model, ctx, requests, batch, plan, scheduler, sampler
  )
  return ctx, rq.store_batch(requests, batch)


class _Settings(TypedDict, total=False):
  """Arguments of `serve` that its results do not depend on in kind."""

  scheduler: SchedulerConfig
  sampler: Sampler
  max_steps: int | Array | None


@overload
def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  drafter: None = None,
  draft_state: None = None,
  history: None = None,
  **settings: Unpack[_Settings],
) -> tuple[Context, Requests]: ...


@overload
def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  drafter: Drafter,
  draft_state: Any = None,
  history: None = None,
  **settings: Unpack[_Settings],
) -> tuple[Context, Requests, Any]: ...


@overload
def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  drafter: None = None,
  draft_state: None = None,
  history: History,
  **settings: Unpack[_Settings],
) -> tuple[Context, Requests, History]: ...


@overload
def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  drafter: Drafter,
  draft_state: Any = None,
  history: History,
  **settings: Unpack[_Settings],
) -> tuple[Context, Requests, Any, History]: ...


@overload
def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  drafter: Drafter | None,
  draft_state: Any,
  history: History | None,
  **settings: Unpack[_Settings],
) -> tuple[Any, ...]: ...


def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  scheduler: SchedulerConfig = SchedulerConfig(),
  sampler: Sampler = sampling.sample,
  max_steps: int | Array | None = None,
  drafter: Drafter | None = None,
  draft_state: Any = None,
  history: History | None = None,
) -> tuple[Any, ...]:
  """Serves requests until all have ended, without leaving the device.

  Jit it with the context and the requests donated. Rows of finished requests are
  released before it returns, so their blocks are free or cached.

  Args:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`.
    ctx: The context. Rows that belong to none of these requests stay as they are. If
      the first request cannot go on because of what they hold, nor can those behind it:
      `serve` ends with requests that wait.
    requests: The requests, new or half served. Those whose rows `ctx` does not hold any
      more, token for token, are computed again.
    scheduler: Static settings.
    sampler: How tokens are chosen.
    max_steps: `[]` int32. Stop after this many model steps; call again to go on. It
      ends after fewer if all have ended, or nothing can go on.
    drafter: Guesses tokens, so that a decode step can yield several. The tokens are
      those of a loop without it. The model must give logits for all of
      `metadata.logits_indices`.
    draft_state: What the drafter remembers: from the call before, to be donated like
      the context; `drafter.init()` if omitted.
    history: Where to append a sample in each round of the outer loop; see
      `kvcache.make_history`. Nothing is recorded, and nothing computed, without it.

  Returns:
    The context and the requests after, with a drafter its state, and with a history
    the history.

  Raises:
    ValueError: The token budget is less than the rows, or the drafter guesses more than
      the `max_drafts` that recurrent layers keep states for.

  Example:
    >>> def count(tokens, metadata, ctx):  # says the position
    ...   x = jnp.zeros((tokens.size, 1, 4))
    ...   for layer in range(2):
    ...     ctx = kv.write_kv(ctx, layer, x, x, metadata)
    ...   return jax.nn.one_hot(metadata.positions[metadata.logits_indices], 16), ctx
    >>> requests = kv.make_requests([[7, 7, 7]], max_new_tokens=3)
    >>> run = jax.jit(kv.serve, static_argnums=0, donate_argnums=(1, 2))
    >>> ctx, requests = run(count, ctx, requests)
    >>> requests.tokens[0].tolist()
    [7, 7, 7, 2, 3, 4]
  """
  ctx = context.as_context(ctx)
  if not isinstance(requests, Requests):
    raise ValueError(
      f"requests must be Requests, from make_requests, got {type(requests).__name__}"
    )
  if not isinstance(history, History | None):
    raise ValueError(
      f"history must be a History, from make_history, got {type(history).__name__}"
    )
  sch.check_budget(ctx, scheduler)
  requests = rows_of_others.send_back_rowless(ctx, requests)
  reach = 1 if drafter is None else 1 + drafter.num_drafts  # tokens of a decode step
  if ctx.state_rows is not None and reach > 1 + ctx.config.max_drafts:
    raise ValueError(
      f"drafter guesses {reach - 1} tokens, but recurrent layers keep states for"
      f" max_drafts={ctx.config.max_drafts}"
    )
  if drafter is not None and draft_state is None:
    draft_state = drafter.init()
  limit = (
    jnp.int32(2**31 - 1) if max_steps is None else jnp.asarray(max_steps, jnp.int32)
  )
  limit = requests.num_steps + jnp.minimum(limit, 2**31 - 1 - requests.num_steps)

  def decode(state: tuple[Context, Requests, Batch, Any, Array]):
    ctx, requests, batch, drafting, num_run = state
    if drafter is not None:
      after = _run_drafts(model, ctx, requests, batch, sampler, drafter, drafting)
      return *after, num_run + 1
    query_lens = batch.is_live.astype(jnp.int32)
    ctx, requests, batch = _run_model(
      model,
      ctx,
      requests,
      batch,
      query_lens,
      sampler,
      num_tokens=None,
      cascade=scheduler.cascade,
    )
    return ctx, requests, batch, drafting, num_run + 1

  def body(state: tuple[Context, Requests, Any, History | None, Array]):
    with jax.named_scope("schedule"):
      ctx, requests, plan = sch.schedule(*state[:2], scheduler)
      batch = sch.running(ctx, requests)
      if drafter is not None and ctx.state_rows is not None:
        lacking = sch.num_snapshots_lacking(ctx, jnp.where(batch.is_live, reach, 0))
        ctx, _ = context.evict_snapshots(ctx, lacking)
    num_waiting = ragged.sum_int(requests.status == RequestStatus.WAITING)

    def mixed(state: tuple[Context, Requests, Batch, Array]):
      ctx, requests, batch, num_run = state
      ctx, requests, batch = _mixed_step(
        model, ctx, requests, batch, plan, scheduler, sampler
      )
      return ctx, requests, batch, num_run + 1

    def may_decode(state: tuple[Context, Requests, Batch, Any, Array]) -> Array:
      ctx, requests, batch, _, num_run = state
      live = batch.is_live
      in_step = jnp.all(~live | (batch.lengths - ctx.sequences.seq_lens == 1))
      has_room = sch.all_can_decode(ctx, live, recycles=drafter is None)
      in_want = sch.num_snapshots_lacking(ctx, jnp.where(live, reach, 0)) > 0
      # Something can be admitted: a row or its blocks came free, or the last admission
      # ended only because it looked at a bounded number of requests.
      done = jnp.any(batch.is_finished)
      has_row = jnp.any(~ctx.sequences.is_active)
      can_admit = (num_waiting > 0) & (done | (has_row & ~plan.is_stalled))
      first = (num_run == 0) & ~plan.has_prefill
      return (
        jnp.any(live)
        & in_step
        & (first | (has_room & ~can_admit & ~in_want))
        & (requests.num_steps < limit)
      )

    # Zero or one iteration: a `cond` would copy all keys and values.
    ctx, requests, batch, num_run = lax.while_loop(
      lambda state: plan.has_prefill & (state[3] == 0),
      mixed,
      (ctx, requests, batch, jnp.int32(0)),
    )
    # Ends because every live row gets a token per step until its limit.
    ctx, requests, batch, drafting, _ = lax.while_loop(
      may_decode, decode, (ctx, requests, batch, state[2], num_run)
    )
    is_stuck = (
      jnp.all(plan.query_lens == 0)
      & (requests.num_steps == state[1].num_steps)
      & (_num_open(requests) == _num_open(state[1]))
    )
    requests, log = rq.store_batch(requests, batch), state[3]
    if log is not None:
      with jax.named_scope("history"):
        log = record(log, ctx, requests)
    return ctx, requests, drafting, log, is_stuck

  # Ends because every round computes a token, or ends a request, or is stuck: then the
  # next round would be the same.
  ctx, requests, draft_state, history, _ = lax.while_loop(
    lambda state: (_num_open(state[1]) > 0) & (state[1].num_steps < limit) & ~state[4],
    body,
    (ctx, requests, draft_state, history, jnp.zeros((), bool)),
  )
  ctx = sharding.constrain(ctx)
  requests = sharding.replicate(ctx.config.head_axes, requests)
  extras = () if drafter is None else (draft_state,)
  return ctx, requests, *extras, *(() if history is None else (history,))


def _num_open(requests: Requests) -> Array:
  return ragged.sum_int(requests.status != RequestStatus.FINISHED)
