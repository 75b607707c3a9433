"""generate: the host's convenience, `serve` in slices.

Nothing reaches the host within a slice; after each one finished requests are collected
and a callback can move a progress bar or stream texts.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
from jax import Array
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from kvcache import observe
from kvcache.context import as_context, Context
from kvcache.errors import Status
from kvcache.observe import History
from kvcache.observe.terminal import PoolSample, ProgressLine, RunProgress
from kvcache.serving import requests as rq
from kvcache.serving import rows_of_others, sampling
from kvcache.serving.requests import FinishReason, Requests, RequestStatus, WaitReason
from kvcache.serving.sampling import Sampler, SamplingParams
from kvcache.serving.scheduler import SchedulerConfig
from kvcache.serving.serve import serve
from kvcache.serving.speculation import Drafter
from kvcache.verbs import checkpoint, sharding
from kvcache.verbs.stepping import Model


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
    waited: Steps in which nothing of it was computed, by `WaitReason`.
  """

  request_id: int
  prompt_tokens: list[int]
  tokens: list[int]
  finish_reason: str
  status: Status
  num_cached: int
  num_preemptions: int
  logprobs: list[float] | None
  waited: dict[WaitReason, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """How far `generate` is after one slice of work.

  Attributes:
    num_steps: Model steps so far.
    num_requests: All requests.
    num_finished: Requests ended so far.
    num_tokens: Output tokens so far, of all requests.
    num_drafts: Tokens that a drafter has guessed so far.
    num_accepted: Those of them that were right.
    seconds: Time since the start.
    stats: `observe.Stats` of the context, on the host.
    finished: Requests that ended in this slice.
    running: Output tokens so far of each request that is running, by request id.
    ctx: The context, until the callback returns: the next slice takes it over. Keep
      `kvcache.map_blocks` of it.
    history: On the host, if it was asked for: the newest samples, also of slices
      before.
    waits: Why each request that gets nothing computed waits, by request id.
  """

  num_steps: int
  num_requests: int
  num_finished: int
  num_tokens: int
  num_drafts: int
  num_accepted: int
  seconds: float
  stats: observe.Stats
  finished: list[Completion]
  running: dict[int, list[int]]
  ctx: Context | None = None
  history: History | None = None
  waits: dict[int, WaitReason] = dataclasses.field(default_factory=dict)

  @property
  def sample(self) -> PoolSample:
    """How the pool was used, for charts over the steps."""
    used, cached = int(self.stats.num_in_use), int(self.stats.num_evictable)
    return PoolSample(step=self.num_steps, used=used, cached=cached)


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
  drafter: Drafter | None = None,
  checkpoints: str | pathlib.Path | None = None,
  history: int | None = None,
  progress: bool = False,
) -> tuple[Context, list[Completion]]:
  """Generates from prompts: `serve` in slices, with a look at the progress after each.

  It runs on the host and compiles the slices itself. On several devices call it under
  `jax.set_mesh`, with a model whose weights are spread (`nn.place_weights`): XLA splits
  the rest. Within `jax.jit` or `jax.shard_map` call `serve`.

  Args:
    model: The model. If it owns arrays make it a `jax.tree_util.Partial`, so that they
      are arguments of the compiled loop and not constants in it.
    ctx: The context. It is donated: use the one returned. Rows that belong to none of
      these requests stay as they are; a request that cannot go on because of what they
      hold ends as `"refused"`, for want of a row or of blocks.
    prompts: Lists of token ids.
    max_new_tokens: As in `make_requests`, like the following ones.
    sampling_params: How tokens are chosen.
    stop_tokens: Ids that end a request.
    priority: Higher goes first.
    namespace: Prefixes are shared within one.
    logprobs: Whether to record log-probabilities.
    scheduler: Static settings of the loop.
    slice_steps: Model steps per slice; nothing reaches the host in between.
    on_slice: Called after each slice; raise in it to stop. As `ctx` was donated,
      `Slice.ctx` is then what is left of it, with rows of requests that were running:
      `kvcache.reset(ctx, keep_prefix=True)` ends them.
    drafter: As in `serve`. Its state goes from slice to slice, and is not saved.
    checkpoints: Folder to which context and requests are saved after each slice. If it
      holds a checkpoint of the same prompts, the work goes on from there, with the
      same bits, and with the saved context instead of `ctx`: a process that dies loses
      one slice of work at most.
    history: Samples to keep of how memory and requests were doing; `Slice.history` has
      them. It begins anew when work goes on from a checkpoint.
    progress: Whether to show a line of progress on stderr, if that is a terminal or a
      notebook's.

  Returns:
    The context after, and one completion per prompt, in order.

  Raises:
    ValueError: An argument has the wrong length or range, or this is called within
      `jax.jit` or `jax.shard_map`.
    CheckpointError: `checkpoints` holds what belongs to other prompts, settings or
      another configuration, or cannot be read.
  """
  ctx = as_context(ctx)
  if any(isinstance(x, Tracer) for x in jax.tree.leaves(ctx)):
    raise ValueError(
      "generate runs on the host, but ctx is being traced: within jax.jit or"
      " jax.shard_map call kvcache.serve"
    )
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
  is_for_all = isinstance(sampling_params, SamplingParams)
  params = [sampling_params] if is_for_all else list(sampling_params)
  sampler = sampling.choose_sampler(params)
  if not isinstance(model, jax.tree_util.Partial):
    model = jax.tree_util.Partial(model)
  prompts = [np.asarray(prompt).tolist() for prompt in prompts]
  requests = sharding.place(ctx.config.head_axes, requests)
  if checkpoints is not None and checkpoint.has_checkpoint(checkpoints):
    ctx, requests = checkpoint.restore_checkpoint(checkpoints, ctx, requests)
  draft_state = None if drafter is None else _init_drafter(drafter)
  samples = None if history is None else observe.make_history(history)
  line = ProgressLine(sys.stderr, enabled=progress)
  run = RunProgress(line, num_blocks=ctx.config.num_blocks - 1)
  reported: dict[int, Completion] = {}
  num_steps = int(requests.num_steps)
  start = time.perf_counter()
  while len(reported) < len(prompts):
    with _annotate("serve"):
      ctx, requests, draft_state, samples = _serve_slice(
        model,
        ctx,
        requests,
        drafter,
        draft_state,
        samples,
        jnp.int32(slice_steps),
        scheduler=scheduler,
        sampler=sampler,
      )
    with _annotate("collect"):
      host = jax.device_get(requests.replace(settings=None))
      ends_early = host.num_steps < num_steps + slice_steps
      if ends_early and not np.all(host.status == RequestStatus.FINISHED):
        # Rows of others are in the way of the first, and it in that of the others.
        ctx, requests = _refuse_first(ctx, requests, scheduler)
        host = jax.device_get(requests.replace(settings=None))
      num_steps = int(host.num_steps)
      finished = [
        _completion(host, prompts, i)
        for i in map(int, np.flatnonzero(host.status == RequestStatus.FINISHED))
        if i not in reported
      ]
      reported |= {completion.request_id: completion for completion in finished}
    if checkpoints is not None:
      with _annotate("checkpoint"):
        checkpoint.save_checkpoint(checkpoints, ctx, requests)
    if on_slice is None and not line.enabled:
      continue
    with _annotate("report"):
      part = Slice(
        num_steps=int(host.num_steps),
        num_requests=len(prompts),
        num_finished=len(reported),
        num_tokens=int(np.sum(host.lengths - host.prompt_lens)),
        num_drafts=int(host.num_drafts),
        num_accepted=int(host.num_accepted),
        seconds=time.perf_counter() - start,
        stats=jax.device_get(_stats(ctx)),
        finished=finished,
        running={
          int(i): _output(host, int(i))
          for i in np.flatnonzero(host.status == RequestStatus.RUNNING)
        },
        ctx=ctx,
        history=jax.device_get(samples),
        waits={
          int(i): WaitReason(host.wait_reason[i])
          for i in np.flatnonzero(host.wait_reason != WaitReason.NONE)
        },
      )
      if on_slice is not None:
        line.clear()
        on_slice(part)
      run.add(part.sample, num_tokens=part.num_tokens, seconds=part.seconds)
      run.show(num_finished=part.num_finished, num_requests=part.num_requests)
  line.clear()
  return ctx, [reported[i] for i in range(len(prompts))]


def _annotate(name: str) -> jax.profiler.TraceAnnotation:
  """A span on the host's line of a profile, which Perfetto shows."""
  return jax.profiler.TraceAnnotation(f"kvcache.{name}")


_stats = jax.jit(observe.stats)
_refuse_first = jax.jit(rows_of_others.refuse_first, donate_argnums=(0, 1))
_init_drafter = jax.jit(lambda drafter: drafter.init())


@functools.partial(
  jax.jit, donate_argnums=(1, 2, 4, 5), static_argnames=("scheduler", "sampler")
)
def _serve_slice(
  model: Model,
  ctx: Context,
  requests: Requests,
  drafter: Drafter | None,
  draft_state: Any,
  history: History | None,
  max_steps: Array,
  *,
  scheduler: SchedulerConfig,
  sampler: Sampler,
) -> tuple[Context, Requests, Any, History | None]:
  ctx, requests, *rest = serve(
    model,
    ctx,
    requests,
    scheduler=scheduler,
    sampler=sampler,
    max_steps=max_steps,
    drafter=drafter,
    draft_state=draft_state,
    history=history,
  )
  draft_state = None if drafter is None else rest.pop(0)
  return ctx, requests, draft_state, rest.pop(0) if rest else None


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
    waited=host.waited(index),
  )
