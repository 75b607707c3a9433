"""The loop: continuous batching inside one `jax.jit`.

`step` is one mixed step. `serve` runs steps until every request has ended, as one `while_loop`
without any host transfer: its body schedules, computes prompt chunks and decoding rows together
if there are prompt chunks, and then runs decode steps for as long as nothing else is to be done.
`generate` is the host's convenience: it runs `serve` in slices.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from kvcache import context, observe, ragged, requests as rq, sampling, scheduler as sch
from kvcache.context import Context
from kvcache.errors import Status
from kvcache.metadata import StepMetadata
from kvcache.requests import Batch, FinishReason, Requests, RequestStatus
from kvcache.sampling import Sampler, SamplingParams
from kvcache.scheduler import Plan, SchedulerConfig

Model = Callable[[Array, StepMetadata, Context], tuple[Array, Context]]


def next_tokens(
  requests: Requests, batch: Batch, metadata: StepMetadata
) -> Array:
  """`[T]` int32: the tokens that a step computes, read from the requests.

  Always read at the position, never taken from the last sample: a row can come to its last
  known token by a prompt chunk, a prefix hit or a preemption as well.
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
) -> tuple[Context, Requests, Batch]:
  """One step: make room, compute, store, sample."""
  ctx, status = context.extend(ctx, query_lens, num_tokens=num_tokens, order=order)
  query_lens = jnp.where(status == Status.OK, query_lens, 0)
  metadata = context.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  tokens = next_tokens(requests, batch, metadata)
  logits, ctx = model(tokens, metadata, ctx)
  ctx = context.commit(ctx, tokens, metadata)
  requests, batch = take_samples(ctx, requests, batch, metadata, logits, sampler)
  return ctx, requests.replace(num_steps=requests.num_steps + 1), batch


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
  tokens = sampler(logits, batch.settings, batch.lengths)
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
    requests: The requests.
    scheduler: Static settings.
    sampler: How tokens are chosen.
  """
  ctx, requests, plan = sch.schedule(ctx, requests, scheduler)
  batch = sch.running(ctx, requests)
  ctx, requests, batch = _mixed_step(
    model, ctx, requests, batch, plan, scheduler, sampler
  )
  return ctx, rq.store_batch(requests, batch)


def serve(
  model: Model,
  ctx: Context,
  requests: Requests,
  *,
  scheduler: SchedulerConfig = SchedulerConfig(),
  sampler: Sampler = sampling.sample,
  max_steps: int | Array | None = None,
) -> tuple[Context, Requests]:
  """Serves requests until all have ended, without leaving the device.

  Jit it with the context and the requests donated. Rows of finished requests are released
  before it returns, so their blocks are free or cached.

  Args:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`.
    ctx: The context. Its rows belong to these requests.
    requests: The requests, new or half served.
    scheduler: Static settings.
    sampler: How tokens are chosen.
    max_steps: `[]` int32. Stop after this many model steps; call again to go on.

  Returns:
    The context and the requests after.
  """
  sch.check_budget(ctx, scheduler)
  limit = jnp.int32(2**31 - 1) if max_steps is None else jnp.asarray(max_steps, jnp.int32)
  limit = requests.num_steps + jnp.minimum(limit, 2**31 - 1 - requests.num_steps)

  def decode(state: tuple[Context, Requests, Batch, Array]):
    ctx, requests, batch, num_run = state
    query_lens = _live(ctx, batch).astype(jnp.int32)
    ctx, requests, batch = _run_model(
      model, ctx, requests, batch, query_lens, sampler, num_tokens=None
    )
    return ctx, requests, batch, num_run + 1

  def body(state: tuple[Context, Requests]) -> tuple[Context, Requests]:
    ctx, requests, plan = sch.schedule(*state, scheduler)
    batch = sch.running(ctx, requests)
    num_waiting = ragged.sum_int(requests.status == RequestStatus.WAITING)

    def mixed(state: tuple[Context, Requests, Batch, Array]):
      ctx, requests, batch, num_run = state
      ctx, requests, batch = _mixed_step(
        model, ctx, requests, batch, plan, scheduler, sampler
      )
      return ctx, requests, batch, num_run + 1

    def may_decode(state: tuple[Context, Requests, Batch, Array]) -> Array:
      ctx, requests, batch, num_run = state
      live = _live(ctx, batch)
      in_step = jnp.all(~live | (batch.lengths - ctx.sequences.seq_lens == 1))
      lacking = ragged.sum_int(sch.needs_block(ctx, live))
      # Something can be admitted: a row or its blocks came free, or the last admission ended
      # only because it looked at a bounded number of requests.
      done = jnp.any(ctx.sequences.is_active & batch.is_finished)
      has_row = jnp.any(~ctx.sequences.is_active)
      can_admit = (num_waiting > 0) & (done | (has_row & ~plan.is_stalled))
      first = (num_run == 0) & ~plan.has_prefill
      return (
        jnp.any(live)
        & in_step
        & (first | ((lacking <= ctx.pool.num_free) & ~can_admit))
        & (requests.num_steps < limit)
      )

    # Zero or one iteration, as a `while` because a `cond` would copy all keys and values.
    state = lax.while_loop(
      lambda state: plan.has_prefill & (state[3] == 0),
      mixed,
      (ctx, requests, batch, jnp.int32(0)),
    )
    # Ends because every live row gets a token per step and ends at its limit, or lacks a block.
    ctx, requests, batch, _ = lax.while_loop(may_decode, decode, state)
    return ctx, rq.store_batch(requests, batch)

  # Ends because every round computes a token, or admits or refuses a request, or preempts one so
  # that an earlier one computes.
  ctx, requests = lax.while_loop(
    lambda state: (
      jnp.any(state[1].status != RequestStatus.FINISHED)
      & (state[1].num_steps < limit)
    ),
    body,
    (ctx, requests),
  )
  return ctx, requests


def _live(ctx: Context, batch: Batch) -> Array:
  return ctx.sequences.is_active & ~batch.is_finished


# --- On the host ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What became of one request.

  Attributes:
    request_id: Its index among the prompts.
    prompt_tokens: Its prompt.
    tokens: The tokens it generated, a stop token included.
    finish_reason: `"stop"`, `"length"`, `"capacity"` or `"refused"`.
    status: Why it was refused; `Status.OK` otherwise.
    num_cached: Prompt tokens found in the cache.
    num_preemptions: How often it was sent back to wait.
    logprobs: Log-probabilities of `tokens`, if recorded.
  """

  request_id: int
  prompt_tokens: list[int]
  tokens: list[int]
  finish_reason: str
  status: Status
  num_cached: int
  num_preemptions: int
  logprobs: list[float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """How far `generate` is after one slice of work.

  Attributes:
    num_steps: Model steps so far.
    num_requests: All requests.
    num_finished: Requests ended so far.
    num_tokens: Output tokens so far, of all requests.
    seconds: Time since the start.
    stats: `observe.Stats` of the context, on the host.
    finished: Requests that ended in this slice.
    running: Output tokens so far of each request that is running, by request id.
  """

  num_steps: int
  num_requests: int
  num_finished: int
  num_tokens: int
  seconds: float
  stats: observe.Stats
  finished: list[Completion]
  running: dict[int, list[int]]


def generate(
  model: Model,
  ctx: Context,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int | Sequence[int] = 128,
  sampling_params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
  stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
  priority: Sequence[int] | None = None,
  namespace: Sequence[int] | None = None,
  logprobs: bool = False,
  scheduler: SchedulerConfig = SchedulerConfig(),
  slice_steps: int = 16,
  on_slice: Callable[[Slice], None] | None = None,
) -> tuple[Context, list[Completion]]:
  """Generates from prompts: `serve` in slices, with a look at the progress after each.

  Args:
    model: The model. If it owns arrays make it a `jax.tree_util.Partial`, so that they are
      arguments of the compiled loop and not constants in it.
    ctx: The context. It is donated: use the one returned.
    prompts: Lists of token ids.
    max_new_tokens: As in `make_requests`, like the following ones.
    sampling_params: How tokens are chosen.
    stop_tokens: Ids that end a request.
    priority: Higher goes first.
    namespace: Prefixes are shared within one.
    logprobs: Whether to record log-probabilities.
    scheduler: Static settings of the loop.
    slice_steps: Model steps per slice; nothing reaches the host in between.
    on_slice: Called after each slice; raise in it to stop.

  Returns:
    The context after, and one completion per prompt, in order.

  Raises:
    ValueError: An argument has the wrong length or range.
  """
  if slice_steps < 1:
    raise ValueError(f"slice_steps must be at least 1, got {slice_steps}")
  requests = rq.make_requests(
    prompts,
    max_new_tokens=max_new_tokens,
    sampling_params=sampling_params,
    stop_tokens=stop_tokens,
    priority=priority,
    namespace=namespace,
    logprobs=logprobs,
    capacity=ctx.config.max_tokens_per_seq + 1,
  )
  params = (
    [sampling_params]
    if isinstance(sampling_params, SamplingParams)
    else list(sampling_params)
  )
  sampler = sampling.choose_sampler(params)
  if not isinstance(model, jax.tree_util.Partial):
    model = jax.tree_util.Partial(model)
  prompts = [list(prompt) for prompt in prompts]
  reported: dict[int, Completion] = {}
  start = time.perf_counter()
  while len(reported) < len(prompts):
    ctx, requests = _serve_slice(
      model, ctx, requests, jnp.int32(slice_steps), scheduler=scheduler, sampler=sampler
    )
    host = jax.device_get(requests.replace(settings=None))
    finished = [
      _completion(host, prompts, i)
      for i in np.flatnonzero(host.status == RequestStatus.FINISHED)
      if int(i) not in reported
    ]
    reported |= {completion.request_id: completion for completion in finished}
    if on_slice is not None:
      on_slice(
        Slice(
          num_steps=int(host.num_steps),
          num_requests=len(prompts),
          num_finished=len(reported),
          num_tokens=int(np.sum(host.lengths - host.prompt_lens)),
          seconds=time.perf_counter() - start,
          stats=jax.device_get(_stats(ctx)),
          finished=finished,
          running={
            int(i): _output(host, int(i))
            for i in np.flatnonzero(host.status == RequestStatus.RUNNING)
          },
        )
      )
  return ctx, [reported[i] for i in range(len(prompts))]


_stats = jax.jit(observe.stats)


@functools.partial(
  jax.jit, donate_argnums=(1, 2), static_argnames=("scheduler", "sampler")
)
def _serve_slice(
  model: Model,
  ctx: Context,
  requests: Requests,
  max_steps: Array,
  *,
  scheduler: SchedulerConfig,
  sampler: Sampler,
) -> tuple[Context, Requests]:
  return serve(
    model, ctx, requests, scheduler=scheduler, sampler=sampler, max_steps=max_steps
  )


def _output(host: Any, index: int) -> list[int]:
  return host.tokens[index, host.prompt_lens[index] : host.lengths[index]].tolist()


def _completion(host: Any, prompts: list[list[int]], index: int) -> Completion:
  logprobs = host.logprobs
  if logprobs is not None:
    span = slice(host.prompt_lens[index], host.lengths[index])
    logprobs = logprobs[index, span].tolist()
  return Completion(
    request_id=int(index),
    prompt_tokens=prompts[index],
    tokens=_output(host, index),
    finish_reason=FinishReason(host.finish_reason[index]).name.lower(),
    status=Status(host.refusals[index]),
    num_cached=int(host.num_cached[index]),
    num_preemptions=int(host.num_preemptions[index]),
    logprobs=logprobs,
  )
