"""Recurrent states on a GPU: comparisons with XLA, and steps and prompts to be timed.

A step over a pool is bound by reading and writing its states once each.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.loop import call_seconds, Chain, num_turns
from benchmarks.gpu.rows import failed, Row, Run
from pallas_kernels import ssm
from pallas_kernels.ssm.arg_specs import ARG_SPECS, ArgSpec, named
from pallas_kernels.ssm.rows import Rows

IMPLEMENTATIONS = ("xla", "triton")
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Of the largest difference, against the root mean square of what is expected."""
OPERATIONS = ("ssd", "conv1d")
TINY = ArgSpec(name="tiny", num_heads=2, head_dim=16, state_size=16)
CHECKED = (1, 200, 0, 64, 1, 65, 2, 3)
DRAFTS = (4, 1, 0, 2, 4, 3, 1, 4)
FIRST = ("mamba2-2.7b", "granite-4-h-small")
"""Compared before anything is timed; the others come last, and may be cut off."""
STEPS = tuple(
  (name, rows)
  for name in ("mamba2-2.7b", "granite-4-h-small")
  for rows in (1, 16, 64, 256)
)
PROMPTS = (
  ("mamba2-2.7b", (4096,)),
  ("granite-4-h-small", (4096,)),
  ("granite-4-h-small", (512,) * 8),
  ("nemotron-h-8b", (4096,)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Arguments of one operation for a step.

  Attributes:
    spec: Whose they are.
    operation: `"ssd"` or `"conv1d"`.
    arrays: By argument.
    max_query_len: 1 for a decode step, else None.
  """

  spec: ArgSpec
  operation: str
  arrays: dict[str, Any]
  max_query_len: int | None

  def run(self, by: str, *, interpret: bool) -> Callable[..., Any]:
    """The operation of these arguments by keyword: `(y, pool)`."""
    name = f"step_{self.operation}"
    if interpret and by == "triton":
      from pallas_kernels.ssm import triton

      kernel = functools.partial(
        getattr(triton, name), interpret=True, max_query_len=self.max_query_len
      )

      def run(**arrays: Any) -> Any:
        rows = Rows(**{x: arrays.pop(x) for x in Rows._fields})
        return kernel(**arrays, rows=rows)

      return run
    kernel = functools.partial(getattr(ssm, name), implementation=by)
    return functools.partial(kernel, max_query_len=self.max_query_len)

  def in_float32(self) -> dict[str, Any]:
    """The same numbers in float32."""
    return {
      name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
      for name, x in self.arrays.items()
    }


def make_batch(
  spec: ArgSpec,
  lens: Sequence[int],
  *,
  operation: str,
  is_decode: bool = False,
  num_entries: int | None = None,
  num_layers: int = 1,
) -> Batch:
  """A step of rows with so many tokens, whose states stand anywhere in the pool."""
  lens, num_seqs = np.array(lens, np.int32), len(lens)
  num_states = 1 + num_seqs * (num_entries or 1)
  make = spec.ssd_shapes if operation == "ssd" else spec.conv_shapes
  shapes = make(
    num_seqs=num_seqs,
    num_tokens=num_seqs if is_decode else max(int(lens.sum()), 1),
    num_states=num_states,
    num_layers=num_layers,
    num_entries=num_entries,
  )
  rng = np.random.default_rng(0)
  write = 1 + rng.permutation(num_states - 1).reshape(num_seqs, -1)
  entry = np.arange(write.shape[1])[None]
  target = np.where(entry < lens[:, None], write, num_states)
  starts = np.arange(num_seqs + 1) if is_decode else np.append(0, lens.cumsum())
  ids = {
    "layer": np.int32(num_layers - 1),
    "read_ids": np.where(lens > 0, write[:, 0], 0),
    "write_ids": target if num_entries else target[:, 0],
    "cu_seqlens": starts,
  }
  arrays = {name: jnp.asarray(x, jnp.int32) for name, x in ids.items()}
  drawn = tuple((n, x.shape, x.dtype) for n, x in shapes.items() if n not in ids)
  arrays |= _random(drawn)
  most = 1 if is_decode else None
  return Batch(spec=spec, operation=operation, arrays=arrays, max_query_len=most)


@functools.partial(jax.jit, static_argnums=0)
def _random(shapes: tuple[tuple[str, tuple[int, ...], Any], ...]) -> dict[str, Any]:
  """So that what a call yields may be the `x` of the next one, for any time."""
  arrays = {}
  for seed, (name, shape, dtype) in enumerate(shapes):
    values = jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.float32)
    if name == "dt":
      values = 0.1 * jax.nn.softplus(values)
    elif name == "a":
      values = -jnp.exp(values)
    elif name in ("c", "d", "weight"):
      values = 0.1 * values
    arrays[name] = values.astype(dtype)
  return arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A chain of calls, each of which is handed the pool and the `x` of the one before.

  Attributes:
    section: Of the table.
    what: The shape.
    chain: The calls; in turn they update the states of one layer after another.
    work: Of one call, in gigabytes or teraflops.
    num_bytes: Of the states that a call reads and writes.
  """

  section: str
  what: str
  chain: Chain
  work: float
  num_bytes: int


def cases(*, interpret: bool = False) -> Iterator[Callable[[str], Case]]:
  """What is to be timed, each for an implementation by name; arrays are made then."""
  steps = (("tiny", 2),) if interpret else STEPS
  for operation in OPERATIONS:
    for name, num_rows in steps:
      yield functools.partial(_step_case, name, num_rows, operation, interpret)
  for name, lens in (("tiny", (40,)),) if interpret else PROMPTS:
    yield functools.partial(_prompt_case, name, lens, interpret)


def _step_case(name: str, rows: int, operation: str, interpret: bool, by: str) -> Case:
  spec = TINY if interpret else named(name)
  per_state = spec.ssd_bytes if operation == "ssd" else spec.conv_bytes
  num_bytes = 2 * rows * per_state
  # What is written is what was read.
  num_layers = 1 if interpret else num_turns(num_bytes // 2)
  batch = make_batch(
    spec, (1,) * rows, operation=operation, is_decode=True, num_layers=num_layers
  )
  return _case(
    batch,
    by,
    interpret,
    section=f"{operation} step",
    what=f"{name}, {rows} rows",
    work=num_bytes / 1e9,
    num_bytes=num_bytes,
    estimate=max(num_bytes / 3e12, 3e-6),
  )


def _prompt_case(name: str, lens: tuple[int, ...], interpret: bool, by: str) -> Case:
  spec = TINY if interpret else named(name)
  batch = make_batch(spec, lens, operation="ssd")
  # Of the recurrence itself; chunks do some more, to do it in products.
  flops = 4 * sum(lens) * spec.num_heads * spec.head_dim * spec.state_size
  return _case(
    batch,
    by,
    interpret,
    section="ssd prompt",
    what=f"{name}, {len(lens)} x {lens[0]} tokens",
    work=flops / 1e12,
    num_bytes=2 * len(lens) * spec.ssd_bytes,
    estimate=flops / 50e12,
  )


def _case(
  batch: Batch, by: str, interpret: bool, *, estimate: float, **facts: Any
) -> Case:
  run, constants = batch.run(by, interpret=interpret), dict(batch.arrays)
  state = (constants.pop("pool"), constants.pop("x"))
  last = int(constants.pop("layer"))

  def step(state: Any, constants: Any, turn: Any) -> Any:
    pool, x = state
    y, pool = run(x=x, pool=pool, layer=turn, **_options(batch), **constants)
    return pool, y

  turns = tuple(jnp.int32(layer) for layer in range(last + 1))
  chain = Chain(
    step=step, state=state, constants=constants, turns=turns, estimate=estimate
  )
  return Case(chain=chain, **facts)


def _options(batch: Batch) -> dict[str, Any]:
  """What kernels want that have no defaults."""
  return {"chunk_size": 64} if batch.operation == "ssd" else {}


def check(specs: Sequence[ArgSpec], run: Run) -> Iterator[Row]:
  """Compares every implementation with XLA in float32."""
  forms = {
    "decode": ([min(n, 1) for n in CHECKED], {"is_decode": True}),
    "draft": (DRAFTS, {"num_entries": 4}),
    "mixed": (CHECKED, {}),
  }
  for spec in specs:
    for operation in OPERATIONS:
      for form, (lens, options) in forms.items():
        if (operation, form) == ("conv1d", "mixed"):  # XLA's alone
          continue
        what = f"{spec.name}, {operation} {form}"
        wanted = [by for by in IMPLEMENTATIONS if run.wants("check", what, by)]
        if not wanted:
          continue
        try:
          run.begin("check", what, "exact", seconds=60.0)
          batch = make_batch(spec, lens, operation=operation, **options)
          more = _options(batch)
          exact = jax.jit(functools.partial(batch.run("xla", interpret=False), **more))
          with jax.default_matmul_precision("highest"):  # not in tensor-core halves
            want = exact(**batch.in_float32())
        except Exception as problem:
          yield failed("check", what, "exact", problem)
          continue
        live = _live(lens, **options)
        limit = TOLERANCE[jnp.dtype(spec.dtype).name]
        for by in wanted:
          try:
            run.begin("check", what, by, seconds=60.0)
            call = batch.run(by, interpret=run.interpret)
            got = jax.jit(functools.partial(call, **more))(**batch.arrays)
            error = max(_error(got[0][live], want[0][live]), _error(got[1], want[1]))
            # NaN is never below the limit.
            is_bad = not error < limit
            yield Row(section="check", what=what, by=by, error=error, is_bad=is_bad)
          except Exception as problem:
            yield failed("check", what, by, problem)


def _live(lens: Sequence[int], *, is_decode: bool = False, **_: Any) -> np.ndarray:
  """The tokens of rows."""
  return np.flatnonzero(lens) if is_decode else np.arange(sum(lens))


def _error(got: Any, want: Any) -> float:
  gap = jnp.max(jnp.abs(got.astype(jnp.float32) - want))
  return float(gap / jnp.sqrt(jnp.mean(jnp.square(want))))


def measure(run: Run) -> Iterator[Row]:
  """All rows: two shapes are compared, then times taken, then the others compared."""
  yield from check([TINY] if run.interpret else [named(n) for n in FIRST], run)
  for make in cases(interpret=run.interpret):
    section = what = ""
    for by in IMPLEMENTATIONS:
      try:
        case = make(by)
        section, what = case.section, case.what
        if not run.wants(section, what, by):
          continue
        run.begin(section, what, by, seconds=60.0)
        seconds = call_seconds(case.chain, run.sizes.seconds)
        rate = case.work / seconds
        yield Row(
          section=section,
          what=what,
          by=by,
          microseconds=seconds * 1e6,
          rate=rate,
          share=run.share_of("copy", rate) if section.endswith("step") else None,
          num_bytes=case.num_bytes,
        )
      except Exception as problem:
        yield failed(section or "ssm", what, by, problem)
  if not run.interpret:
    yield from check([spec for spec in ARG_SPECS if spec.name not in FIRST], run)
