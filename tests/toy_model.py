"""A toy model whose next token hashes everything it reads back, and its oracle.

Layer 0 keeps each token; layer 1 keeps a fingerprint of all tokens up to it and of the
namespace it was computed in. Logits hash every fingerprint of the row, read through the
block table. So a block that is lost, stale, shared with another prefix or namespace, or
not yet computed changes the tokens that follow. With a recurrent layer the sum that
fingerprints are made of comes from its state instead of from layer 0. With a sliding
window layer 2 keeps another fingerprint, and the last few of these are hashed in as
well. `expected` computes the same in NumPy from a request alone: it knows nothing of
blocks, rows, steps or neighbours.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import (
  AttentionLayer,
  CacheConfig,
  RecurrentLayer,
  Requests,
  RequestStatus,
  sampling,
  SamplingParams,
)
from kvcache.requests import NO_TOKEN

VOCAB = 32
NEVER = 2**30  # as `max_new_tokens`: only a stop token or the end of memory ends it


def config(
  *, is_hybrid: bool = False, sliding_window: int | None = None, **sizes
) -> CacheConfig:
  """Makes a configuration for the model."""
  layer = AttentionLayer(num_kv_heads=1, head_dim=1)
  total = RecurrentLayer(state={"sum": jax.ShapeDtypeStruct((), np.uint32)})
  layers = (layer, total, layer) if is_hybrid else (layer,) * 2
  if sliding_window is not None:
    layers += (dataclasses.replace(layer, sliding_window=sliding_window),)
  return CacheConfig(layers=layers, **sizes)


def fresh(sizes: CacheConfig, **kwargs) -> kvcache.Context:
  """Makes a context where what was never written is NaN."""
  ctx = kvcache.init(sizes, **kwargs)
  junk = jax.tree.map(lambda x: x.at[:, 1:].set(0xDEADBEEF), ctx.states)
  kv = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ctx.kv)
  return ctx.replace(kv=kv, states=junk)


def make_requests(
  prompts, max_new_tokens=1, *, num: int, width: int, num_stops: int = 2, **kwargs
) -> Requests:
  """Makes requests in arrays of given sizes, so that few sizes are ever compiled.

  The requests that fill up to `num` have not arrived.
  """
  requests = kvcache.make_requests(
    prompts, max_new_tokens=max_new_tokens, capacity=width, **kwargs
  )

  def widen(x, columns, value=0):
    padding = ((0, 0), (0, columns - x.shape[1]))
    return jnp.pad(x, padding, constant_values=value)

  logprobs = requests.logprobs
  requests = requests.replace(
    tokens=widen(requests.tokens, width),
    logprobs=None if logprobs is None else widen(logprobs, width),
    stop_tokens=widen(requests.stop_tokens, num_stops, NO_TOKEN),
  )
  more = num - len(prompts)

  def lengthen(x):
    return jnp.pad(x, ((0, more), (0, 0))[: x.ndim]) if x.ndim else x

  return absent(jax.tree.map(lengthen, requests), range(len(prompts), num))


def absent(requests: Requests, ids: Sequence[int]) -> Requests:
  """Makes requests that have not arrived yet, or never will."""
  at = jnp.asarray(list(ids), jnp.int32)
  done = int(RequestStatus.FINISHED)
  return requests.replace(
    status=requests.status.at[at].set(done), seq_ids=requests.seq_ids.at[at].set(-1)
  )


def arrive(requests: Requests, ids: Sequence[int]) -> Requests:
  """Lets absent requests arrive."""
  at = jnp.asarray(list(ids), jnp.int32)
  waiting = int(RequestStatus.WAITING)
  return requests.replace(status=requests.status.at[at].set(waiting))


def outputs(requests: Requests) -> list[list[int]]:
  """The tokens that each request has generated so far."""
  host = jax.device_get((requests.tokens, requests.prompt_lens, requests.lengths))
  return [row[begin:end].tolist() for row, begin, end in zip(*host, strict=True)]


# The hashes, for NumPy and JAX alike.


def _mix(x):
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def _word(token, position):
  return _mix(token * np.uint32(0x9E3779B1) + position * np.uint32(0x85EBCA77))


def _fingerprint(total, namespace):
  return _mix(total + namespace * np.uint32(0xC2B2AE3D)) >> np.uint32(12)


def _trace(fingerprint, position):
  return _mix(fingerprint * np.uint32(0x27D4EB2F) + position * np.uint32(0x165667B1))


def _scores(total):
  vocab = np.arange(VOCAB, dtype=np.uint32).reshape((1,) * total.ndim + (VOCAB,))
  return _mix(_mix(total)[..., None] + vocab * np.uint32(0x9E3779B9)) >> np.uint32(20)


def model(tokens, metadata, ctx):
  """The model: `(tokens [T], metadata, ctx) -> (logits, ctx)`, logits where wanted."""
  sizes = ctx.config
  length = sizes.max_blocks_per_seq * sizes.block_size
  position = jnp.arange(length, dtype=jnp.uint32)[None]
  is_stored = position < metadata.seq_lens.astype(jnp.uint32)[:, None]

  def write(ctx, layer, values):
    values = values.astype(jnp.float32)[:, None, None]
    return kvcache.write_kv(ctx, layer, values, -values, metadata)

  def read(ctx, layer, tables, is_readable):
    group, place = sizes.places[layer]
    store = ctx.kv[group]
    pool = store.flat().k
    values, k = lax.optimization_barrier(
      (pool[tables + place * store.num_blocks], store.k)
    )
    values = jnp.where(is_readable, values.reshape(sizes.max_seqs, length), 0)
    stores = list(ctx.kv)
    stores[group] = store.replace(k=k)
    return values.astype(jnp.uint32), ctx.replace(kv=tuple(stores))

  def read_all(ctx, layer):
    return read(ctx, layer, metadata.block_tables, is_stored)

  if sizes.num_recurrent_layers:
    sums, ctx = _sums_by_state(tokens, metadata, ctx)
  else:
    stored, ctx = read_all(write(ctx, 0, tokens), 0)
    words = jnp.where(is_stored, _word(stored, position), np.uint32(0))
    sums = jnp.cumsum(words, axis=1)[metadata.seq_ids, metadata.positions]
  namespaces = ctx.sequences.namespaces[metadata.seq_ids].astype(jnp.uint32)
  stored, ctx = read_all(write(ctx, 1, _fingerprint(sums, namespaces)), 1)
  traces = jnp.where(is_stored, _trace(stored, position), np.uint32(0))
  last = metadata.logits_indices
  totals = jnp.cumsum(traces, axis=1)
  rows, at = metadata.seq_ids[last], metadata.positions[last]
  totals = totals[rows, at]
  for window in sizes.windows:
    first = metadata.seq_lens - metadata.query_lens - (window - 1)
    is_seen = is_stored & (position.astype(jnp.int32) >= first[:, None])
    ctx = write(ctx, 2, _fingerprint(sums + np.uint32(1), namespaces))
    stored, ctx = read(ctx, 2, metadata.windows[0].block_tables, is_seen)
    traces = jnp.where(is_seen, _trace(stored, position), np.uint32(0))
    running = jnp.pad(jnp.cumsum(traces, axis=1), ((0, 0), (1, 0)))
    begin = jnp.maximum(at + 1 - window, 0)
    totals += running[rows, at + 1] - running[rows, begin]
  scores = _scores(totals)
  return scores.astype(jnp.float32) / 512.0, ctx


def _sums_by_state(tokens, metadata, ctx):
  """The sum up to each token `[T]`, from the sum up to the step and its tokens."""
  before = kvcache.read_state(ctx, 0, metadata)["sum"]
  words = _word(tokens.astype(jnp.uint32), metadata.positions.astype(jnp.uint32))
  words = jnp.where(metadata.is_padding, np.uint32(0), words)
  running = jnp.concatenate([jnp.zeros(1, jnp.uint32), jnp.cumsum(words)])
  starts = running[metadata.cu_seqlens]  # [S + 1]
  state = before + starts[1:] - starts[:-1]
  if metadata.num_logits > 1:  # after each token
    entry = jnp.arange(1, metadata.num_logits + 1, dtype=jnp.int32)[None]
    ends = running[jnp.minimum(metadata.cu_seqlens[:-1, None] + entry, tokens.size)]
    state = (before - starts[:-1])[:, None] + ends
  sums = (before - starts[:-1])[metadata.seq_ids] + running[1:]
  return sums, kvcache.write_state(ctx, 0, {"sum": state}, metadata)


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a request must get."""

  tokens: list[int]
  logprobs: list[float]
  finish_reason: str


def next_logits(
  text: Sequence[int], *, namespace: int = 0, sliding_window: int | None = None
) -> np.ndarray:
  """Logits `[VOCAB]` after a text, from the text alone."""
  position = np.arange(len(text), dtype=np.uint32)
  sums = np.cumsum(_word(np.array(text, np.uint32), position), dtype=np.uint32)
  traces = _trace(_fingerprint(sums, np.uint32(namespace)), position)
  total = np.sum(traces, dtype=np.uint32, keepdims=True)
  if sliding_window is not None:
    prints = _fingerprint(sums + np.uint32(1), np.uint32(namespace))
    total += np.sum(_trace(prints, position)[-sliding_window:], dtype=np.uint32)
  return _scores(total)[0].astype(np.float32) / np.float32(512)


def expected(
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  *,
  max_tokens_per_seq: int,
  stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
  namespaces: Sequence[int] | None = None,
  params: Sequence[SamplingParams] | None = None,
  sliding_window: int | None = None,
) -> list[Expected]:
  """Computes what each request must get, from itself alone.

  The requests are computed side by side for speed, one NumPy row each.
  """
  num = len(prompts)
  spaces = np.array(namespaces or [0] * num, np.int64).astype(np.uint32)
  wanted = np.broadcast_to(np.asarray(max_new_tokens, np.int64), num)
  sums, totals = np.zeros(num, np.uint32), np.zeros(num, np.uint32)
  stops = _stop_table(stop_tokens, num)
  lens = np.zeros(num, np.int64)
  reasons = np.full(num, "refused", dtype=object)
  prompt_lens = np.array([len(p) for p in prompts])
  live = (prompt_lens > 0) & (prompt_lens <= max_tokens_per_seq)
  longest = prompt_lens[live].max(initial=0)
  table = np.zeros((num, longest), np.uint32)
  for i in np.flatnonzero(live):
    table[i, : prompt_lens[i]] = prompts[i]

  seen = np.zeros((num, sliding_window or 0), np.uint32)  # traces, by place modulo W

  def take(tokens, mask):
    position = lens.astype(np.uint32)
    sums[mask] += _word(tokens, position)[mask]
    totals[mask] += _trace(_fingerprint(sums, spaces), position)[mask]
    if sliding_window is not None:
      new = _trace(_fingerprint(sums + np.uint32(1), spaces), position)
      seen[mask, lens[mask] % sliding_window] = new[mask]
    lens[mask] += 1

  for column in range(longest):
    take(table[:, column], live & (column < prompt_lens))
  outputs, logprobs = [[] for _ in range(num)], [[] for _ in range(num)]
  settings = sampling.make_settings(params) if params else None
  while live.any():
    in_window = seen.sum(axis=1, dtype=np.uint32)
    logits = _scores(totals + in_window).astype(np.float32) / np.float32(512)
    chosen = np.argmax(logits, axis=1)
    if settings is not None:
      positions = jnp.asarray(lens, jnp.int32)
      chosen = np.asarray(_draw(jnp.asarray(logits), settings, positions))
    log_sum = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    logprob = logits[np.arange(num), chosen] - log_sum
    for i in np.flatnonzero(live):
      outputs[i].append(int(chosen[i]))
      logprobs[i].append(float(logprob[i]))
    num_new = lens + 1 - prompt_lens
    # The last token is sampled and never stored, so one more fits than is stored.
    is_full = live & (lens == max_tokens_per_seq)
    has_all = live & (num_new >= wanted)
    is_stop = live & (stops == chosen[:, None]).any(axis=1)
    for reason, mask in (("capacity", is_full), ("length", has_all), ("stop", is_stop)):
      reasons[mask] = reason
      live = live & ~mask
    take(chosen.astype(np.uint32), live)
  return [
    Expected(*row) for row in zip(outputs, logprobs, reasons.tolist(), strict=True)
  ]


def _stop_table(stop_tokens, num: int) -> np.ndarray:
  is_nested = len(stop_tokens) > 0 and np.ndim(stop_tokens[0]) > 0
  lists = stop_tokens if is_nested else [stop_tokens] * num
  table = np.full((num, max(1, *map(len, lists))), NO_TOKEN)
  for row, entry in zip(table, lists, strict=True):
    row[: len(entry)] = entry
  return table


_draw = jax.jit(sampling.sample)
