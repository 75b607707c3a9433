"""Search over continuations of one prompt: beams, and the best of many samples.

Both are one program: the prompt is computed once, branches share its blocks by `fork`,
and branches that are given up go by `finish`, all inside `jax.jit`.
"""

from collections.abc import Callable
import functools
from typing import ClassVar, NamedTuple

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvcache import context
from kvcache.context import Context
from kvcache.errors import Status
from kvcache.parts import arguments, ragged
from kvcache.printing import Node
from kvcache.serving import sampling, scheduler
from kvcache.serving.requests import NO_TOKEN
from kvcache.serving.sampling import Sampler, SamplingSettings
from kvcache.verbs import lifecycle, stepping
from kvcache.verbs.stepping import Model

_NEVER = -jnp.inf


class SearchResult(Node, kw_only=True):
  """`B` continuations of a prompt, the best one first.

  Attributes:
    tokens: `[B, max_new_tokens]` int32, padded with `NO_TOKEN`.
    lengths: `[B]` int32. Tokens of each, a stop token included.
    scores: `[B]` float32. Sum of the tokens' log-probabilities.
    ranks: `[B]` float32. What they are ordered by; `-inf` for branches that were lost
      for want of memory.
    status: `[]` int32 `Status` of the prompt's admission, or what the first branch that
      was lost on the way lacked: `NO_BLOCKS`, `NO_WINDOW_BLOCKS` or `NO_ROW`.
    num_cached: `[]` int32. Tokens of the prompt that were cached.
  """

  codes: ClassVar = {"status": Status}
  tokens: Array
  lengths: Array
  scores: Array
  ranks: Array
  status: Array
  num_cached: Array


class _Branches(NamedTuple):
  """The state of the search; every array `[B, ...]`."""

  rows: Array  # row in the context, S for those without one
  tokens: Array
  lengths: Array
  scores: Array
  is_live: Array  # computed on; the others ended, or were never begun
  shortage: Array  # [] int32 `Status`: what the first branch that was lost lacked


_Choice = tuple[Array, Array, Array]  # parents, tokens, scores
_Choose = Callable[[Array, _Branches, Array], _Choice]


def beam_search(
  model: Model,
  ctx: Context,
  prompt: ArrayLike,
  length: ArrayLike,
  *,
  num_beams: int,
  max_new_tokens: int,
  stop_token: ArrayLike = NO_TOKEN,
  length_penalty: ArrayLike = 1.0,
  chunk_size: int = 64,
) -> tuple[Context, SearchResult]:
  """Keeps the `num_beams` likeliest continuations, token by token.

  A beam that comes to the stop token keeps its place and its score.

  Args:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`.
    ctx: The context, with `num_beams` inactive rows.
    prompt: `[max_len]` int32, padded with anything.
    length: `[]` int32.
    num_beams: `B`, static.
    max_new_tokens: Longest continuation, static.
    stop_token: Ends a continuation; no token does if omitted.
    length_penalty: Beams are ordered by `score / length ** length_penalty`.
    chunk_size: Tokens of the prompt computed per step, static.

  Returns:
    The context, in which the search has left no row but whatever it cached, and the
    beams.

  Raises:
    ValueError: There are fewer rows than beams, or an argument is out of range.
  """

  def choose(logprobs: Array, branches: _Branches, step: Array) -> _Choice:
    num_tokens = logprobs.shape[1]
    extended = branches.scores[:, None] + logprobs
    # An ended beam has one continuation: itself.
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    stays = jnp.where(token == 0, branches.scores[:, None], _NEVER)
    extended = jnp.where(branches.is_live[:, None], extended, stays)
    is_first = (step == 0) & (jnp.arange(num_beams, dtype=jnp.int32) > 0)
    extended = jnp.where(is_first[:, None], _NEVER, extended)
    scores, at = lax.top_k(extended.reshape(-1), num_beams)
    parents, tokens = at // num_tokens, at % num_tokens
    return parents.astype(jnp.int32), tokens.astype(jnp.int32), scores

  ctx, branches, status, num_cached = _search(
    model,
    ctx,
    prompt,
    length,
    choose,
    num_branches=num_beams,
    max_new_tokens=max_new_tokens,
    stop_token=stop_token,
    chunk_size=chunk_size,
  )
  lengths = jnp.maximum(branches.lengths, 1).astype(jnp.float32)
  ranks = branches.scores / lengths**length_penalty
  return ctx, _result(branches, ranks, status, num_cached)


def best_of(
  model: Model,
  ctx: Context,
  prompt: ArrayLike,
  length: ArrayLike,
  settings: SamplingSettings,
  *,
  max_new_tokens: int,
  stop_token: ArrayLike = NO_TOKEN,
  sampler: Sampler = sampling.sample,
  chunk_size: int = 64,
) -> tuple[Context, SearchResult]:
  """Samples `B` continuations, and orders them by mean log-probability.

  Args:
    model: `model(tokens [T], metadata, ctx) -> (logits [S, vocab], ctx)`.
    ctx: The context, with `B` inactive rows.
    prompt: `[max_len]` int32, padded with anything.
    length: `[]` int32.
    settings: `[B]` sampling settings (`kvcache.sampling.make_settings`); give each a
      seed of its own.
    max_new_tokens: Longest continuation, static.
    stop_token: Ends a continuation; no token does if omitted.
    sampler: How tokens are chosen.
    chunk_size: Tokens of the prompt computed per step, static.

  Returns:
    The context and the continuations, as `beam_search` returns them.

  Raises:
    ValueError: There are fewer rows than samples, or an argument is out of range.
  """
  if not isinstance(settings, SamplingSettings):
    raise ValueError(
      "settings must be SamplingSettings, as sampling.make_settings makes them of"
      f" SamplingParams, got {type(settings).__name__}"
    )
  num_branches = settings.seed.shape[0]
  start = arguments.as_int32("length", length, shape=())

  def choose(logprobs: Array, branches: _Branches, step: Array) -> _Choice:
    branch = jnp.arange(num_branches, dtype=jnp.int32)
    positions = start + branches.lengths
    tokens = sampling.draw(sampler, logprobs, settings, positions)
    gained = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    is_begun = branches.is_live | (step == 0)
    scores = branches.scores + jnp.where(is_begun, gained, 0.0)
    return jnp.where(step == 0, 0, branch), tokens, scores

  ctx, branches, status, num_cached = _search(
    model,
    ctx,
    prompt,
    length,
    choose,
    num_branches=num_branches,
    max_new_tokens=max_new_tokens,
    stop_token=stop_token,
    chunk_size=chunk_size,
  )
  ranks = branches.scores / jnp.maximum(branches.lengths, 1).astype(jnp.float32)
  return ctx, _result(branches, ranks, status, num_cached)


def _search(
  model: Model,
  ctx: Context,
  prompt: ArrayLike,
  length: ArrayLike,
  choose: _Choose,
  *,
  num_branches: int,
  max_new_tokens: int,
  stop_token: ArrayLike,
  chunk_size: int,
) -> tuple[Context, _Branches, Array, Array]:
  prompt = arguments.as_int32("prompt", prompt, ndim=1)
  length = arguments.as_int32("length", length, shape=())
  stop_token = arguments.as_int32("stop_token", stop_token, shape=())
  sizes = {"num_beams": num_branches, "max_new_tokens": max_new_tokens}
  for name, value in (sizes | {"chunk_size": chunk_size}).items():
    if value < 1:
      raise ValueError(f"{name} must be at least 1, got {value}")
  if num_branches > ctx.config.max_seqs:
    raise ValueError(f"{num_branches} branches need more than the context's rows")
  ctx, admission = lifecycle.admit(ctx, prompt[None], length[None])
  status, row = admission.status[0], admission.seq_ids[0]
  ctx, logprobs, status = _prefill(
    model, ctx, prompt, length, row, status, chunk_size=chunk_size
  )
  none = jnp.full(num_branches, ctx.config.max_seqs, jnp.int32)
  ok = status == Status.OK
  branches = _Branches(
    rows=none.at[0].set(jnp.where(ok, row, ctx.config.max_seqs)),
    tokens=jnp.full((num_branches, max_new_tokens), NO_TOKEN, jnp.int32),
    lengths=jnp.zeros_like(none),
    scores=jnp.zeros(num_branches, jnp.float32),
    is_live=(jnp.arange(num_branches, dtype=jnp.int32) == 0) & ok,
    shortage=jnp.int32(Status.OK),
  )

  def expand(
    ctx: Context, branches: _Branches, logprobs: Array, step: Array
  ) -> tuple[Context, _Branches]:
    chosen = choose(logprobs, branches, step)
    return _reorganise(ctx, branches, chosen, step, stop_token=stop_token)

  def go(
    state: tuple[Context, _Branches, Array],
  ) -> tuple[Context, _Branches, Array]:
    ctx, branches, step = state
    ctx, branches, logprobs = _decode(model, ctx, branches, step)
    ctx, branches = expand(ctx, branches, logprobs, step)
    return ctx, branches, step + 1

  everywhere = jnp.broadcast_to(logprobs[None], (num_branches, logprobs.shape[0]))
  ctx, branches = expand(ctx, branches, everywhere, jnp.int32(0))
  branches = branches._replace(is_live=branches.is_live & ok)
  # Ends because `step` grows to `max_new_tokens`.
  ctx, branches, _ = lax.while_loop(
    lambda state: jnp.any(state[1].is_live) & (state[2] < max_new_tokens),
    go,
    (ctx, branches, jnp.int32(1)),
  )
  ctx = lifecycle.finish(ctx, _mask(ctx, branches.rows))
  status = jnp.where(ok, branches.shortage, status).astype(jnp.int32)
  return ctx, branches, status, jnp.where(ok, admission.num_cached[0], 0)


def _prefill(
  model: Model,
  ctx: Context,
  prompt: Array,
  length: Array,
  row: Array,
  status: Array,
  *,
  chunk_size: int,
) -> tuple[Context, Array, Array]:
  """Computes a prompt in chunks: `(ctx, logprobs [V], status [])`."""
  rows = jnp.arange(ctx.config.max_seqs, dtype=jnp.int32)

  def go(state: tuple[Context, Array, Array]) -> tuple[Context, Array, Array]:
    ctx, _, _ = state
    seq_lens = ctx.sequences.seq_lens
    left = jnp.minimum(length - seq_lens, chunk_size)
    left = jnp.minimum(left, stepping.tokens_to_snapshot(ctx))
    query_lens = jnp.where(rows == row, left, 0)
    if ctx.windows:  # which move on when published
      ctx = context.publish(ctx)
    ctx = context.make_room(ctx, chunk_size // ctx.config.block_size + 1)
    ctx, granted = stepping.extend(ctx, query_lens, num_tokens=chunk_size)
    query_lens = jnp.where(granted == Status.OK, query_lens, 0)
    metadata = stepping.step_metadata(ctx, query_lens, num_tokens=chunk_size)
    tokens = prompt.at[metadata.positions].get(mode="clip")
    logits, ctx = stepping.call_model(model, tokens, metadata, ctx)
    ctx = stepping.commit(ctx, tokens, metadata)
    return ctx, _logprobs(logits.at[row].get(mode="clip")), granted.at[row].get()

  tokens = jnp.zeros(chunk_size, jnp.int32)
  empty = stepping.step_metadata(ctx, jnp.zeros_like(rows), num_tokens=chunk_size)
  compute = functools.partial(stepping.call_model, model)
  logits, _ = jax.eval_shape(compute, tokens, empty, ctx)
  nothing = jnp.zeros(logits.shape[1], jnp.float32)
  # Ends because every round computes a token or is refused.
  ctx, logprobs, status = lax.while_loop(
    lambda state: (
      (state[2] == Status.OK)
      & (state[0].sequences.seq_lens.at[row].get(mode="clip") < length)
    ),
    go,
    (ctx, nothing, status),
  )
  begun = (status != Status.OK) & (rows == row)
  return lifecycle.finish(ctx, begun), logprobs, status


def _decode(
  model: Model, ctx: Context, branches: _Branches, step: Array
) -> tuple[Context, _Branches, Array]:
  """Computes the last token of every live branch: log-probabilities `[B, V]`."""
  ctx, branches = _give_up(ctx, branches)
  ctx = context.make_room(ctx, branches.rows.shape[0])
  wants = _mask(ctx, branches.rows)
  ctx, status = stepping.extend(ctx, wants.astype(jnp.int32))
  wants &= status == Status.OK
  metadata = stepping.step_metadata(ctx, wants.astype(jnp.int32))
  last = branches.tokens[:, step - 1]
  tokens = jnp.zeros(ctx.config.max_seqs, jnp.int32)
  tokens = tokens.at[branches.rows].set(last, mode="drop")
  logits, ctx = stepping.call_model(model, tokens, metadata, ctx)
  ctx = stepping.commit(ctx, tokens, metadata)
  is_computed = branches.is_live & wants.at[branches.rows].get(mode="clip")
  status = status.at[branches.rows].get(mode="clip")
  branches = _lose(branches, branches.is_live & ~is_computed, status)
  return ctx, branches, _logprobs(logits.at[branches.rows].get(mode="clip"))


def _give_up(ctx: Context, branches: _Branches) -> tuple[Context, _Branches]:
  """Ends the worst branches until the others can take a token each."""

  def lacks(ctx: Context, branches: _Branches) -> Array:
    """`[1 + W]` bool: in which pools."""
    needs = scheduler.needs_block(ctx, _mask(ctx, branches.rows))
    return ragged.sum_int(needs) > scheduler.num_available(ctx)

  def is_short(state: tuple[Context, _Branches]) -> Array:
    return jnp.any(lacks(*state)) & (ragged.sum_int(state[1].is_live) > 1)

  def end_worst(state: tuple[Context, _Branches]) -> tuple[Context, _Branches]:
    ctx, branches = state
    status = context.shortage(ctx, ~lacks(ctx, branches)[0])
    worst = jnp.argmin(jnp.where(branches.is_live, branches.scores, jnp.inf))
    is_worst = jnp.arange(branches.rows.shape[0]) == worst
    none = ctx.config.max_seqs
    gone = _mask(ctx, jnp.where(is_worst, branches.rows, none))
    rows = jnp.where(is_worst, none, branches.rows)
    ctx = lifecycle.finish(ctx, gone, keep_prefix=False)
    return ctx, _lose(branches, is_worst, status)._replace(rows=rows)

  # Ends because every round ends a branch.
  return lax.while_loop(is_short, end_worst, (ctx, branches))


def _lose(branches: _Branches, mask: Array, status: ArrayLike) -> _Branches:
  """Marks branches for which there was no memory; `status []` or `[B]` says which."""
  status = jnp.broadcast_to(jnp.asarray(status, jnp.int32), mask.shape)
  first = jnp.where(jnp.any(mask), status[jnp.argmax(mask)], Status.OK)
  is_first = branches.shortage == Status.OK
  return branches._replace(
    is_live=branches.is_live & ~mask,
    scores=jnp.where(mask, _NEVER, branches.scores),
    shortage=jnp.where(is_first, first, branches.shortage).astype(jnp.int32),
  )


def _reorganise(
  ctx: Context,
  branches: _Branches,
  chosen: _Choice,
  step: Array,
  *,
  stop_token: ArrayLike,
) -> tuple[Context, _Branches]:
  """Lets branches follow their parents: forks some rows, gives up others."""
  parents, tokens, scores = chosen
  num_branches = parents.shape[0]
  branch = jnp.arange(num_branches, dtype=jnp.int32)
  grows = branches.is_live[parents] & (scores > _NEVER)
  goes_on = grows & (tokens != stop_token)
  rows = branches.rows[parents]
  # The first child that goes on keeps its parent's row; the others fork it.
  is_earlier = (branch[None] < branch[:, None]) & goes_on[None]
  has_brother = jnp.any(is_earlier & (parents[None] == parents[:, None]), axis=1)
  keeps, forks = goes_on & ~has_brother, goes_on & has_brother
  kept = _mask(ctx, jnp.where(keeps, rows, ctx.config.max_seqs))
  ctx = lifecycle.finish(ctx, _mask(ctx, branches.rows) & ~kept, keep_prefix=False)
  ctx = context.make_room(ctx, 2 * num_branches)
  ctx, new_rows, status = lifecycle.fork(ctx, jnp.where(forks, rows, -1))
  lost = forks & (status != Status.OK)
  rows = jnp.where(forks, new_rows, rows)
  rows = jnp.where(goes_on & ~lost, rows, ctx.config.max_seqs)
  texts = branches.tokens[parents]
  texts = texts.at[:, step].set(jnp.where(grows, tokens, texts[:, step]))
  branches = _Branches(
    rows=rows,
    tokens=texts,
    lengths=branches.lengths[parents] + grows.astype(jnp.int32),
    scores=scores,
    is_live=goes_on,
    shortage=branches.shortage,
  )
  return ctx, _lose(branches, lost, status)


def _mask(ctx: Context, rows: Array) -> Array:
  """`[S]` bool: which rows are listed; `S` is none."""
  return jnp.zeros(ctx.config.max_seqs, bool).at[rows].set(True, mode="drop")


def _logprobs(logits: Array) -> Array:
  return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _result(
  branches: _Branches, ranks: Array, status: Array, num_cached: Array
) -> SearchResult:
  ranks = jnp.where(branches.lengths > 0, ranks, _NEVER)
  order = jnp.argsort(-ranks).astype(jnp.int32)
  return SearchResult(
    tokens=branches.tokens[order],
    lengths=branches.lengths[order],
    scores=branches.scores[order],
    ranks=ranks[order],
    status=status,
    num_cached=num_cached,
  )
