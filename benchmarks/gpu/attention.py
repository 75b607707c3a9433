"""Paged attention on a GPU: compared with XLA in float32, and timed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from benchmarks.gpu import layout, peers
from benchmarks.gpu.batch import Arrays, Batch, make_batch, run_attention
from benchmarks.gpu.loop import begin_to_compile, Chain, num_turns, Timer
from benchmarks.gpu.rows import failed, IMPLEMENTATIONS, Row, Run
from pallas_kernels.paged_attention.arg_specs import ArgSpec, named

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
_LEAST_TURNS = 8
"""Of a round: what a step computes once, for all layers, is spread over so many."""


# --- Numerics -------------------------------------------------------------------------


def check(run: Run, specs: Sequence[ArgSpec]) -> Iterator[Row]:
  """Compares every implementation with plain XLA in float32."""
  with ThreadPoolExecutor() as pool:
    ahead = None
    for spec in (*specs, None):
      # The programs of one shape are compiled while those of the next are lowered.
      begun = None if spec is None else _begin_checks(run, spec, pool)
      for rows in ahead or ():
        yield from rows
      ahead = begun


def _begin_checks(run: Run, spec: ArgSpec, pool: ThreadPoolExecutor) -> list[Any]:
  """Generators of rows, whose programs are being compiled."""
  found = []
  for is_decode in (True, False):
    what = f"{spec.name}, {'decode' if is_decode else 'mixed'}"
    rows = [(n, min(q, 1) if is_decode else q) for n, q in run.sizes.checked]
    try:
      batch = make_batch(spec, rows, is_decode=is_decode)
      ours = [(by, _attention_of(batch, by, run)) for by in run.implementations]
      if spec.name.startswith("llama-3-8b") and not run.interpret:
        ours += peers.serving(batch)
      ours = [(by, make) for by, make in ours if run.wants("check", what, by)]
      if not ours or not run.wants("check", what, "xla"):
        continue
      run.begin_to_compile("check", what, "xla")
      exact = batch.in_float32().arrays, exactly(batch)
    except Exception as problem:
      found.append([failed("check", what, "xla", problem)])
      continue
    want, runs = _begin(lambda exact=exact: exact, pool, run), []
    for by, make in ours:
      run.begin_to_compile("check", what, by)
      runs.append((by, _begin(make, pool, run)))
    found.append(_compare(what, spec, want, runs, run))
  return found


def exactly(batch: Batch) -> Any:
  """XLA's result of a batch in float32: on a GPU, products would be less by default."""
  call = run_attention(batch, "xla")

  def run(arrays: Arrays) -> Any:
    with jax.default_matmul_precision("highest"):
      return call(arrays)

  return run


def _compare(
  what: str, spec: ArgSpec, want: Any, runs: list[Any], run: Run
) -> Iterator[Row]:
  """Rows of one batch."""
  try:
    call = want()
    run.begin("check", what, "xla")
    want, want_lse = call()
  except Exception as problem:
    yield failed("check", what, "xla", problem)
    return
  for by, compiled in runs:
    is_ours = by in IMPLEMENTATIONS
    try:
      call = compiled()
      run.begin("check", what, by)
      result = call()
      out, lse = result if is_ours else (result, want_lse)
      seen = want_lse > -jnp.inf
      gap = out.astype(jnp.float32) - want
      if not is_ours:  # peers need not know rows without tokens
        gap = jnp.where(seen[..., None], gap, 0.0)
      error = jnp.max(jnp.abs(gap))
      gap = jnp.where(seen, lse, 0.0) - jnp.where(seen, want_lse, 0.0)
      error = jnp.maximum(error, jnp.max(jnp.abs(gap)))
      # NaN is never below the limit.
      limit = TOLERANCE[jnp.dtype(spec.dtype).name]
      is_bad = is_ours and not float(error) < limit
      yield Row(section="check", what=what, by=by, error=float(error), is_bad=is_bad)
    except Exception as problem:
      yield failed("check", what, by, problem, is_bad=is_ours)


def _begin(make: Any, pool: ThreadPoolExecutor, run: Run) -> Any:
  """Lowers here, begins to compile elsewhere; the result waits for what runs it."""

  def lower() -> Any:
    arrays, call = make()
    lowered = jax.jit(call).lower(arrays)
    return lambda: functools.partial(lowered.compile(), arrays)

  return begin_to_compile(lower, pool, waits=run.is_careful)


# --- Times ----------------------------------------------------------------------------


def time_decode(run: Run) -> Iterator[Row]:
  """Times decode steps, beside peers."""
  for name, lengths in run.sizes.decode:
    spec, what = named(name), decode_label(name, lengths)
    num_bytes = seen_bytes(spec, lengths)
    try:
      batch = decode_batch(spec, lengths, num_bytes, run)
    except Exception as problem:  # of memory
      yield failed("decode", what, "", problem)
      continue
    candidates = [(by, _attention_of(batch, by, run)) for by in run.implementations]
    if not run.interpret:
      candidates += peers.serving(batch)
    yield from time_candidates("decode", what, batch, candidates, num_bytes, run)


def time_layouts(run: Run) -> Iterator[Row]:
  """Times one kernel on pools of two layouts."""
  for name, lengths in run.sizes.layout:
    spec, what = named(name), decode_label(name, lengths)
    num_bytes = seen_bytes(spec, lengths)
    try:
      batch = decode_batch(spec, lengths, num_bytes, run)
    except Exception as problem:
      yield failed("layout", what, "", problem)
      continue
    candidates = list(layout.candidates(batch, interpret=run.interpret))
    yield from time_candidates("layout", what, batch, candidates, num_bytes, run)


def time_prefill(run: Run) -> Iterator[Row]:
  """Times whole prompts, causal."""
  spec = run.sizes.first[0]
  for length in run.sizes.prefill:
    what = f"{spec.name}, {length} tokens"
    try:
      batch = make_batch(spec, [(length, length)], is_decode=False)
    except Exception as problem:
      yield failed("prefill", what, "", problem)
      continue
    flops = 2 * length * length * spec.num_heads * spec.head_dim
    candidates = [(by, _attention_of(batch, by, run)) for by in run.implementations]
    estimate = flops / 400e12
    timers = begin_timers("prefill", what, batch, candidates, estimate, run, num=2)
    for by, timer in timers:
      try:
        found = timer()
        run.begin("prefill", what, by)
        seconds = found.seconds()
        rate = flops / seconds / 1e12
        yield Row(
          section="prefill",
          what=what,
          by=by,
          microseconds=seconds * 1e6,
          rate=rate,
          share=run.share_of("matmul", rate),
        )
      except Exception as problem:
        yield failed("prefill", what, by, problem)


def time_candidates(
  section: str,
  what: str,
  batch: Batch,
  candidates: Sequence[tuple[str, Any]],
  num_bytes: int,
  run: Run,
) -> Iterator[Row]:
  """Times each on a batch; peers that fail are no failure of this project."""
  num = max(batch.num_copies, 1 if run.interpret else _LEAST_TURNS)
  estimate = max(4e-6, num_bytes / 2.5e12)
  timers = begin_timers(section, what, batch, candidates, estimate, run, num=num)
  for by, timer in timers:
    try:
      found = timer()
      run.begin(section, what, by)
      seconds = found.seconds()
      rate = num_bytes / seconds / 1e9
      yield Row(
        section=section,
        what=what,
        by=by,
        microseconds=seconds * 1e6,
        rate=rate,
        share=run.share_of("copy", rate),
        num_bytes=num_bytes,
      )
    except Exception as problem:
      yield failed(section, what, by, problem, is_bad=by in IMPLEMENTATIONS)


def begin_timers(
  section: str,
  what: str,
  batch: Batch,
  candidates: Sequence[tuple[str, Any]],
  estimate: float,
  run: Run,
  *,
  num: int,
) -> list[tuple[str, Any]]:
  """Programs of all candidates, compiled side by side; one may raise when asked for."""

  def lower(by: str, make: Any) -> Any:
    arrays, call = make()
    turns = peers.turns(batch, by, num)
    turns = turns or _turns(batch, arrays["block_tables"], num)
    chain = attention_chain(arrays, call, turns, estimate)
    return Timer(chain, run.sizes.seconds).lower().compile

  begun = []
  with ThreadPoolExecutor() as pool:
    for by, make in candidates:
      if run.wants(section, what, by):
        run.begin_to_compile(section, what, by)
        one = functools.partial(lower, by, make)
        begun.append((by, begin_to_compile(one, pool, waits=run.is_careful)))
  return begun


def _turns(batch: Batch, tables: Any, num: int) -> list[Arrays]:
  """Each call of a round reads another copy of the batch."""
  shifts = [i % batch.num_copies * batch.blocks_per_copy for i in range(num)]
  return [{"block_tables": tables + shift} for shift in shifts]


def attention_chain(
  arrays: Arrays, call: Any, turns: Sequence[Arrays], estimate: float
) -> Chain:
  """Calls whose result is the query of the next one.

  `call` gives the output, or a tuple that begins with it.
  """
  replaced = {"q", *turns[0]}
  constants = {name: x for name, x in arrays.items() if name not in replaced}

  def step(q: Any, constants: Arrays, turn: Arrays) -> Any:
    out = call({**constants, **turn, "q": q})
    out = out[0] if isinstance(out, tuple) else out
    width = out.shape[-1]
    if width == q.shape[-1]:
      return out
    return lax.concatenate([out, q[..., width:]], q.ndim - 1)  # of latent layers

  return Chain(
    step=step, state=arrays["q"], constants=constants, turns=turns, estimate=estimate
  )


def decode_label(name: str, lengths: Sequence[int]) -> str:
  """Name of a shape."""
  what = f"{name}, {len(lengths)} rows, {sum(lengths)} tokens"
  return what if len(set(lengths)) == 1 else f"{what}, ragged"


def seen_bytes(spec: ArgSpec, lengths: Sequence[int]) -> int:
  """Bytes of keys and values that a decode step has to read."""
  return sum(min(n, spec.sliding_window or n) for n in lengths) * spec.bytes_per_token


def decode_batch(
  spec: ArgSpec, lengths: Sequence[int], num_bytes: int, run: Run
) -> Batch:
  """A batch of decoding rows, as often in the pool as no cache holds it."""
  copies = 1 if run.interpret else num_turns(num_bytes)
  rows = [(length, 1) for length in lengths]
  return make_batch(spec, rows, is_decode=True, num_copies=copies)


def _attention_of(batch: Batch, by: str, run: Run) -> Any:
  """How to make arrays and a function of them."""

  def make() -> tuple[Arrays, Any]:
    return batch.arrays, run_attention(batch, by, interpret=run.interpret)

  return make
