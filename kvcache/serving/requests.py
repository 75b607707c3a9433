"""Requests: prompts, outputs, settings and status of many requests in one pytree.

There is no prefill mode and no decode mode. A request knows how many tokens it has,
prompt and output together (`lengths`); its row in the context knows how many of them
are computed (`seq_lens`). A step computes some of the difference, and a row whose every
token is computed samples the next one.
"""

from collections.abc import Collection, Sequence
import enum
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from kvcache import printing
from kvcache.errors import Status
from kvcache.parts import arguments, ragged
from kvcache.printing import count, Node
from kvcache.serving import sampling
from kvcache.serving.sampling import SamplingParams, SamplingSettings

NO_TOKEN = -1
"""Pads lists of stop tokens; no vocabulary has it."""


class RequestStatus(enum.IntEnum):
  """Where a request is in its life. A preempted request waits again."""

  WAITING = 0
  RUNNING = 1
  FINISHED = 2


class FinishReason(enum.IntEnum):
  """Why a request ended."""

  NONE = 0
  """It has not."""
  STOP = 1
  """It sampled one of its stop tokens."""
  LENGTH = 2
  """It has the `max_new_tokens` it asked for."""
  CAPACITY = 3
  """It is as long as a sequence of this context can be."""
  REFUSED = 4
  """It can never be served; `refusals` says why."""


class WaitReason(enum.IntEnum):
  """Why a request gets nothing computed in a step."""

  NONE = 0
  """It does, or it has ended."""
  NO_ROW = 1
  """Every row is taken."""
  NO_BLOCKS = 2
  """There are too few blocks for it, or for one before it."""
  NO_WINDOW_BLOCKS = 3
  """The pool of a sliding window has too few blocks for it, or for one before it."""
  SHARED = 4
  """It waits for another one to compute a prefix that it will adopt."""
  QUEUED = 5
  """Only `max_admissions` requests before it were looked at."""
  BUDGET = 6
  """It has a row, but others had the step's whole token budget."""


class Requests(Node, kw_only=True):
  """`Q` requests; `C` is the longest that any of them can get.

  Attributes:
    tokens: `[Q, C]` int32. Prompt, then output.
    prompt_lens: `[Q]` int32.
    lengths: `[Q]` int32. Tokens known so far, prompt and output.
    max_lens: `[Q]` int32. `lengths` at which the request has all it asked for.
    status: `[Q]` int32 `RequestStatus`.
    finish_reason: `[Q]` int32 `FinishReason`.
    refusals: `[Q]` int32 `Status`. Why it was refused.
    seq_ids: `[Q]` int32. Its row in the context, -1 while it has none.
    priority: `[Q]` int32. Higher goes first; equal ones go in order of their index.
    namespaces: `[Q]` int32.
    settings: `[Q]` sampling settings.
    stop_tokens: `[Q, E]` int32, padded with `NO_TOKEN`.
    num_cached: `[Q]` int32. Prompt tokens found in the cache when first admitted.
    num_preemptions: `[Q]` int32.
    wait_reason: `[Q]` int32 `WaitReason`, as the scheduler left it.
    num_waited: `[Q, len(WaitReason)]` int32. Steps until `num_scheduled` in which it
      got nothing computed, by reason.
    logprobs: `[Q, C]` float32, log-probabilities of the output tokens, or None if not
      wanted.
    num_steps: `[]` int32. Model steps in which something of them was computed.
    num_scheduled: `[]` int32. `num_steps` when the scheduler last looked at them.
    num_drafts: `[]` int32. Tokens guessed by a drafter.
    num_accepted: `[]` int32. Those of them that were right.
  """

  tokens: Array
  prompt_lens: Array
  lengths: Array
  max_lens: Array
  status: Array
  finish_reason: Array
  refusals: Array
  seq_ids: Array
  priority: Array
  namespaces: Array
  settings: SamplingSettings
  stop_tokens: Array
  num_cached: Array
  num_preemptions: Array
  wait_reason: Array
  num_waited: Array
  logprobs: Array | None
  num_steps: Array
  num_scheduled: Array
  num_drafts: Array
  num_accepted: Array

  def __repr__(self) -> str:
    arrays = jax.tree.leaves(self)
    if not all(isinstance(x, Array | np.ndarray) for x in arrays):
      return super().__repr__()
    size = f"{count(self.num_requests, 'request')} of up to"
    size = f"{size} {count(self.capacity, 'token')}"
    if (reason := printing.obstacle(arrays)) is not None:
      return f"Requests({size}; {reason})"
    if self.tokens.ndim != 2:
      return f"Requests({size}; a batch of {self.tokens.shape[:-2]})"
    num_prompt = int(np.sum(self.prompt_lens))
    parts = [
      size,
      _counts(RequestStatus, self.status),
      f"{count(num_prompt, 'prompt token')},"
      f" {int(np.sum(self.lengths)) - num_prompt:,} new",
      count(int(self.num_steps), "step"),
    ]
    if reasons := _counts(FinishReason, self.finish_reason):
      parts[1] += f" ({reasons})"
    return f"Requests({'; '.join(parts)})"

  @property
  def num_requests(self) -> int:
    """`Q`."""
    return self.tokens.shape[-2]

  @property
  def capacity(self) -> int:
    """`C`."""
    return self.tokens.shape[-1]

  def counts(self) -> dict[str, Array]:
    """Returns what a `History` keeps of them: `[]` int32 each, by name."""
    status = self.status
    return {
      "step": self.num_steps,
      "running": ragged.sum_int(status == RequestStatus.RUNNING),
      "waiting": ragged.sum_int(status == RequestStatus.WAITING),
      "finished": ragged.sum_int(status == RequestStatus.FINISHED),
      "tokens": jnp.sum(self.lengths - self.prompt_lens, dtype=jnp.int32),
      "preemptions": jnp.sum(self.num_preemptions, dtype=jnp.int32),
    }

  def sizes(self) -> dict[str, Any]:
    """Returns what must be equal for arrays of a checkpoint to fit, by name."""
    return {
      "prompts": self.num_requests,
      "tokens of the longest": self.capacity,
      "stop tokens": self.stop_tokens.shape[1],
      "logprobs": self.logprobs is not None,
    }

  def asked(self) -> dict[str, Any]:
    """Returns what was asked for, by the names of `make_requests`' arguments.

    It is the same before, during and after the work. Call it outside `jax.jit`.
    """
    position = np.arange(self.capacity)
    is_prompt = position < np.asarray(self.prompt_lens)[:, None]
    return {
      "prompts": (self.prompt_lens, np.where(is_prompt, self.tokens, 0)),
      "max_new_tokens": self.max_lens,
      "sampling_params": self.settings,
      "stop_tokens": self.stop_tokens,
      "priority": self.priority,
      "namespace": self.namespaces,
    }

  def _index(self, index: int) -> int:
    if self.tokens.ndim != 2:
      raise ValueError(f"requests are a batch of {self.tokens.shape[:-2]}: pick one")
    return range(self.num_requests)[index]

  def waited(self, index: int) -> dict[WaitReason, int]:
    """Steps that a request waited so far, by reason; call it outside `jax.jit`."""
    index = self._index(index)
    since = int(self.num_steps) - int(self.num_scheduled)
    steps = np.asarray(self.num_waited[index]).copy()
    steps[int(self.wait_reason[index])] += since
    return {why: int(steps[why]) for why in WaitReason if why and steps[why]}

  def explain(self, index: int) -> str:
    """Tells in words what became of a request and why it waited."""
    index = self._index(index)
    status = RequestStatus(int(self.status[index]))
    text = f"request {index}: {status.name.lower()}"
    reason = FinishReason(int(self.finish_reason[index]))
    if reason is FinishReason.REFUSED:
      text += f", refused ({Status(int(self.refusals[index])).name})"
    elif reason is not FinishReason.NONE:
      text += f" ({reason.name.lower()})"
    prompt, length = int(self.prompt_lens[index]), int(self.lengths[index])
    text += (
      f"; {count(prompt, 'prompt token')}, {int(self.num_cached[index])} of them cached"
    )
    text += f"; {count(length - prompt, 'new token')}"
    if waited := self.waited(index):
      told = (f"{num} {_WAITS[why]}" for why, num in waited.items())
      text += f"; waited {count(sum(waited.values()), 'step')}: {', '.join(told)}"
    if times := int(self.num_preemptions[index]):
      text += f"; preempted {count(times, 'time')}"
    return text


def _counts(kind: type[enum.IntEnum], values: Array) -> str:
  """How many there are of each, `"3 waiting, 1 running"`; `NONE` is left out."""
  nums = ((x, int(np.sum(np.asarray(values) == x))) for x in kind if x.name != "NONE")
  return ", ".join(f"{num:,} {x.name.lower()}" for x, num in nums if num)


_WAITS = {
  WaitReason.NO_ROW: "for a row",
  WaitReason.NO_BLOCKS: "for blocks",
  WaitReason.NO_WINDOW_BLOCKS: "for blocks of a window",
  WaitReason.SHARED: "for a prefix that another computed",
  WaitReason.QUEUED: "behind others in the queue",
  WaitReason.BUDGET: "for the token budget",
}


class Batch(Node, kw_only=True):
  """The running requests by row: what a decode step uses instead of `[Q]` arrays.

  Attributes:
    request_ids: `[S]` int32. Request of each row, `Q` for rows without one.
    lengths: `[S]` int32. 0 for rows without a request.
    limits: `[S]` int32. `lengths` at which the row ends, by its wish or the context's
      capacity.
    max_lens: `[S]` int32. `lengths` at which the request has all it asked for.
    finish_reason: `[S]` int32.
    settings: `[S]` sampling settings.
    stop_tokens: `[S, E]` int32.
  """

  request_ids: Array
  lengths: Array
  limits: Array
  max_lens: Array
  finish_reason: Array
  settings: SamplingSettings
  stop_tokens: Array

  @property
  def is_finished(self) -> Array:
    """`[S]` bool: rows whose request ended and that wait to be released."""
    return self.finish_reason != FinishReason.NONE

  @property
  def is_live(self) -> Array:
    """`[S]` bool: rows whose request goes on; a context may have rows of nobody."""
    return (self.lengths > 0) & ~self.is_finished


def make_requests(
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int | Sequence[int],
  sampling_params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
  stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
  priority: Sequence[int] | None = None,
  namespace: Sequence[int] | None = None,
  logprobs: bool = False,
  capacity: int | None = None,
) -> Requests:
  """Builds requests on the host.

  Args:
    prompts: `Q` lists of token ids. An empty one, or one that no context can hold, is
      refused by the scheduler and disturbs nobody.
    max_new_tokens: Output tokens wanted, for all or for each; at least 1.
    sampling_params: For all or for each.
    stop_tokens: Ids that end a request when sampled, for all or a list for each.
    priority: For each; all 0 if omitted. Between -1000 and 1000.
    namespace: For each; all 0 if omitted.
    logprobs: Whether to record the log-probabilities of output tokens.
    capacity: Upper bound for `C`, commonly `config.max_tokens_per_seq + 1`. What does
      not fit is not stored; the request ends with `FinishReason.CAPACITY` or is
      refused.

  Raises:
    ValueError: An argument has the wrong length or range.

  Example:
    >>> requests = kv.make_requests([[1, 2, 3], [4]], max_new_tokens=[2, 5])
    >>> requests.tokens.shape, requests.max_lens.tolist()
    ((2, 6), [5, 6])
  """
  num = len(prompts)
  if not num:
    raise ValueError("prompts must not be empty")
  wanted = _each("max_new_tokens", max_new_tokens, num)
  if min(wanted) < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {min(wanted)}")
  is_for_all = not isinstance(sampling_params, Sequence)
  params = [sampling_params] * num if is_for_all else list(sampling_params)
  if len(params) != num:
    raise ValueError(f"sampling_params has {len(params)} entries for {num} prompts")
  for entry in params:
    if not isinstance(entry, SamplingParams):
      raise ValueError(f"sampling_params must be SamplingParams, got {entry!r}")
  priorities = _each("priority", 0 if priority is None else priority, num)
  if max(map(abs, priorities)) > MAX_PRIORITY:
    raise ValueError(f"priority must be within +-{MAX_PRIORITY}")
  namespaces = _each("namespace", 0 if namespace is None else namespace, num)
  arguments.check_int32("namespace", namespaces)
  stops = _stop_lists(stop_tokens, num)

  texts = [_token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
  prompt_lens = np.array([text.size for text in texts], np.int32)
  most = np.array([min(number, 2**31 - 1) for number in wanted], np.int64)
  max_lens = np.minimum(prompt_lens + most, 2**31 - 1)
  longest = int(max_lens.max())
  width = max(1, longest if capacity is None else min(longest, capacity))
  tokens = np.zeros((num, width), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: text.size] = text[:width]
  stop_width = max(1, max(len(stop) for stop in stops))
  stop_array = np.full((num, stop_width), NO_TOKEN, np.int32)
  for row, stop in zip(stop_array, stops, strict=True):
    row[: len(stop)] = _token_ids("stop_tokens", stop)

  def full(value: int) -> Array:
    # Of enums `jnp.full` would make a weak type, and a loop one that is not.
    return jnp.asarray(np.full(num, value, np.int32))

  return Requests(
    tokens=jnp.asarray(tokens),
    prompt_lens=jnp.asarray(prompt_lens),
    lengths=jnp.asarray(prompt_lens),
    max_lens=jnp.asarray(max_lens.astype(np.int32)),
    status=full(RequestStatus.WAITING),
    finish_reason=full(FinishReason.NONE),
    refusals=full(Status.OK),
    seq_ids=full(-1),
    priority=jnp.asarray(np.array(priorities, np.int32)),
    namespaces=jnp.asarray(np.array(namespaces, np.int32)),
    settings=sampling.make_settings(params),
    stop_tokens=jnp.asarray(stop_array),
    num_cached=full(0),
    num_preemptions=full(0),
    wait_reason=full(WaitReason.NONE),
    num_waited=jnp.zeros((num, len(WaitReason)), jnp.int32),
    logprobs=jnp.zeros((num, width), jnp.float32) if logprobs else None,
    num_steps=jnp.int32(0),
    num_scheduled=jnp.int32(0),
    num_drafts=jnp.int32(0),
    num_accepted=jnp.int32(0),
  )


MAX_PRIORITY = 1000


def request_of_row(requests: Requests, max_seqs: int) -> Array:
  """`[S]` int32: the request in each row, `Q` where there is none."""
  num = requests.num_requests
  rows = jnp.where(requests.seq_ids >= 0, requests.seq_ids, max_seqs)
  ids = jnp.arange(num, dtype=jnp.int32)
  return jnp.full(max_seqs, num, jnp.int32).at[rows].set(ids, mode="drop")


def load_batch(requests: Requests, *, max_seqs: int, max_tokens_per_seq: int) -> Batch:
  """Gathers the running requests by row. `max_tokens_per_seq` is the context's."""
  ids = request_of_row(requests, max_seqs)
  at = jnp.minimum(ids, requests.num_requests - 1)
  max_lens = requests.max_lens[at]
  # The last token is sampled but never computed, hence one more than a sequence can
  # store.
  limits = jnp.minimum(max_lens, min(requests.capacity, max_tokens_per_seq + 1))
  is_running = ids < requests.num_requests
  return Batch(
    request_ids=ids,
    lengths=jnp.where(is_running, requests.lengths[at], 0),
    limits=limits,
    max_lens=max_lens,
    finish_reason=jnp.where(is_running, requests.finish_reason[at], 0),
    settings=jax.tree.map(lambda field: field[at], requests.settings),
    stop_tokens=requests.stop_tokens[at],
  )


def store_batch(requests: Requests, batch: Batch) -> Requests:
  """Writes back what the steps changed: lengths and finish reasons."""
  ids = batch.request_ids
  return requests.replace(
    lengths=requests.lengths.at[ids].set(batch.lengths, mode="drop"),
    finish_reason=requests.finish_reason.at[ids].set(batch.finish_reason, mode="drop"),
  )


def append(
  requests: Requests,
  batch: Batch,
  tokens: Array,
  mask: Array,
  *,
  logprobs: Array | None = None,
) -> tuple[Requests, Batch]:
  """Appends a sampled token to each row in `mask`, and ends rows that are complete.

  Args:
    requests: The requests; only `tokens` and `logprobs` change.
    batch: The running rows.
    tokens: `[S]` int32.
    mask: `[S]` bool.
    logprobs: `[S]` float32, if recorded.
  """
  ids = jnp.where(mask, batch.request_ids, requests.num_requests)
  at = batch.lengths
  requests = requests.replace(
    tokens=requests.tokens.at[ids, at].set(tokens, mode="drop")
  )
  if logprobs is not None and requests.logprobs is not None:
    table = requests.logprobs.at[ids, at].set(logprobs, mode="drop")
    requests = requests.replace(logprobs=table)
  lengths = batch.lengths + mask.astype(jnp.int32)
  stops = jnp.any(batch.stop_tokens == tokens[:, None], axis=1)
  reason = jnp.where(lengths >= batch.limits, FinishReason.CAPACITY, FinishReason.NONE)
  reason = jnp.where(lengths >= batch.max_lens, FinishReason.LENGTH, reason)
  reason = jnp.where(stops, FinishReason.STOP, reason).astype(jnp.int32)
  batch = batch.replace(
    lengths=lengths, finish_reason=jnp.where(mask, reason, batch.finish_reason)
  )
  return requests, batch


def _each(name: str, value: int | Sequence[int], num: int) -> list[int]:
  values: list[Any] = [value] * num if np.ndim(value) == 0 else list(np.asarray(value))
  if len(values) != num:
    raise ValueError(f"{name} has {len(values)} entries for {num} prompts")
  for entry in values:
    if isinstance(entry, bool) or not isinstance(entry, int | np.integer):
      raise ValueError(f"{name} must be integers, got {entry!r}")
  return [int(v) for v in values]


def _token_ids(name: str, tokens: Sequence[int]) -> np.ndarray:
  """The ids as int32; `ValueError` for texts, fractions, nested lists, and the like."""
  ids = np.asarray(tokens)
  if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    raise ValueError(f"{name} must be a list of token ids, got {str(tokens)[:40]!r}")
  arguments.check_int32(name, ids)
  return ids.astype(np.int32)


def _stop_lists(
  stop_tokens: Sequence[int] | Sequence[Sequence[int]], num: int
) -> list[list[int]]:
  """One list of stop tokens for each request, from one for all or one for each."""
  is_list = isinstance(stop_tokens, Collection) and not isinstance(stop_tokens, str)
  if not (is_list or (isinstance(stop_tokens, Array) and stop_tokens.ndim)):
    raise ValueError(f"stop_tokens must be a list of token ids, got {stop_tokens!r}")
  lists = [np.asarray(stop).tolist() for stop in stop_tokens]
  for_each = [stop for stop in lists if isinstance(stop, list)]
  if not for_each:
    return [lists] * num
  if len(for_each) != num:
    raise ValueError(f"stop_tokens has {len(for_each)} lists for {num} prompts")
  return for_each
