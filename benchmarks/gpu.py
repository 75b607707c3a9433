"""Checks and times the attention kernels on the GPU that jax sees: `make gpu`.

Needs jax, flax, chex and numpy alone: `PYTHONPATH=. python -m benchmarks.gpu`. First
every named shape is compared with plain XLA in float32, then times are taken beside the
device's own copy bandwidth and matmul rate. A case that fails is a row that says why.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
from pathlib import Path
import sys
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from benchmarks import gpu_peers, report
from benchmarks.gpu_batch import Batch, make_batch, run_attention
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, ArgSpec, named

ROOT = Path(__file__).parent
IMPLEMENTATIONS = ("triton", "mosaic")
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
L2_BYTES = 256 << 20
"""Loops go round as much memory as no cache holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How large a run is.

  Attributes:
    specs: What is compared.
    checked: `(tokens stored, of these queries)` of the rows of a comparison.
    decode: `(name of a shape, lengths of the rows)` that are timed.
    prefill: Tokens of prompts that are timed.
    copy_elements: Of the array that is copied.
    matmul: Rows of the matrices that are multiplied.
    seconds: That a timed loop should take.
  """

  specs: tuple[ArgSpec, ...]
  checked: tuple[tuple[int, int], ...]
  decode: tuple[tuple[str, tuple[int, ...]], ...]
  prefill: tuple[int, ...]
  copy_elements: int
  matmul: int
  seconds: float


def _ragged(num: int, mean: int) -> tuple[int, ...]:
  """Lengths from a sixteenth of the mean to about twice as much, of the same sum."""
  low, high = mean // 16, 2 * mean - mean // 16
  return tuple(low + (high - low) * i // (num - 1) for i in range(num))


FULL = Sizes(
  specs=ARG_SPECS,
  checked=((1, 1), (17, 17), (300, 40), (1000, 5), (0, 0), (2049, 200), (4000, 1)),
  decode=(
    *(
      (name, (length,) * num)
      for name in ("llama-3-8b", "llama-3-8b block 16")
      for num, length in (
        *((1, 1024), (1, 8192), (1, 32_768), (1, 131_072)),
        *((16, 1024), (16, 8192), (16, 32_768), (64, 1024), (64, 8192), (256, 1024)),
      )
    ),
    ("llama-3-8b", _ragged(64, 4096)),
    ("llama-3-8b", (4096,) * 64),
    ("llama-3-8b fp8", (8192,) * 64),
    ("llama-3-8b int8", (8192,) * 64),
    ("llama-3-70b tp8", (8192,) * 64),
    ("gpt-oss-120b full", (8192,) * 64),
    ("gpt-oss-120b window", (8192,) * 64),
    ("gemma-3-27b", (8192,) * 64),
    ("deepseek-v3 tp8", (8192,) * 64),
  ),
  prefill=(4096, 16_384),
  copy_elements=1 << 29,
  matmul=8192,
  seconds=0.1,
)
TINY = Sizes(
  specs=(named("qwen-2.5-0.5b"),),
  checked=((1, 1), (70, 20), (0, 0), (130, 1)),
  decode=(("qwen-2.5-0.5b", (70, 5)),),
  prefill=(32,),
  copy_elements=1 << 10,
  matmul=16,
  seconds=0.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of the table; what does not apply is None.

  Attributes:
    section: `device`, `check`, `decode` or `prefill`.
    what: The shape.
    by: Which implementation.
    error: Largest difference from XLA in float32, or why there is no number.
    microseconds: Per call on the device.
    rate: GB/s, or TFLOP/s of `prefill` and the matmul.
    share: Of the measured copy bandwidth, or of the measured matmul rate.
  """

  section: str
  what: str
  by: str
  error: float | str | None = None
  microseconds: float | None = None
  rate: float | None = None
  share: float | None = None
  is_bad: bool = False

  def cells(self) -> list[str]:
    """What the table shows."""
    error = self.error
    return [
      *(self.section, self.what, self.by),
      f"{error:.1e}" if isinstance(error, float) else str(error or ""),
      "" if self.microseconds is None else f"{self.microseconds:.1f}",
      "" if self.rate is None else f"{self.rate:.0f}",
      "" if self.share is None else f"{self.share:.0%}",
    ]


def check(sizes: Sizes, *, interpret: bool) -> Iterator[Row]:
  """Compares every implementation with plain XLA in float32, on every shape."""
  for spec in sizes.specs:
    for is_decode in (True, False):
      rows = [(n, min(q, 1) if is_decode else q) for n, q in sizes.checked]
      what = f"{spec.name}, {'decode' if is_decode else 'mixed'}"
      batch = make_batch(spec, rows, is_decode=is_decode)
      exact = batch.in_float32()
      want, want_lse = jax.jit(run_attention(exact, "xla"))(exact.arrays)
      for by in _implementations(interpret=interpret):
        try:
          run = jax.jit(run_attention(batch, by, interpret=interpret))
          out, lse = run(batch.arrays)
          error = float(jnp.max(jnp.abs(out.astype(jnp.float32) - want)))
          seen = want_lse > -jnp.inf
          gap = jnp.where(seen, lse, 0.0) - jnp.where(seen, want_lse, 0.0)
          error = max(error, float(jnp.max(jnp.abs(gap))))
          limit = TOLERANCE[jnp.dtype(spec.dtype).name]
          # NaN is never below the limit.
          yield Row(
            section="check", what=what, by=by, error=error, is_bad=not error < limit
          )
        except Exception as problem:
          yield _failed("check", what, by, problem)


def loop_seconds(body: Callable[[Any, Any], Any], state: Any, seconds: float) -> float:
  """Time on the device of `state = body(i, state)`, by loops of two lengths."""
  run = jax.jit(lambda state, num: lax.fori_loop(0, num, body, state))

  def timed(num: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(state, jnp.int32(num)))
    return time.perf_counter() - start

  timed(1)
  one = min(timed(2) for _ in range(2)) / 2
  num = max(2, min(2000, int(seconds / max(one, 1e-6))))
  pairs = [(timed(num), timed(2 * num)) for _ in range(3)]
  short, long = (min(column) for column in zip(*pairs, strict=True))
  return max(long - short, 1e-9) / num


def measure_device(sizes: Sizes) -> tuple[Row, Row]:
  """Copy bandwidth in GB/s, and the rate of a bfloat16 matmul in TFLOP/s."""
  x = jnp.zeros(sizes.copy_elements, jnp.float32)
  seconds = loop_seconds(lambda _, x: x + 1.0, x, sizes.seconds)
  copy = Row(
    section="device",
    what="copy",
    by="xla",
    microseconds=seconds * 1e6,
    rate=2 * x.nbytes / seconds / 1e9,
  )
  n = sizes.matmul
  w = jnp.full((n, n), 1 / n, jnp.bfloat16)
  seconds = loop_seconds(lambda _, x: x @ w, w, sizes.seconds)
  matmul = Row(
    section="device",
    what=f"matmul {n}",
    by="xla",
    microseconds=seconds * 1e6,
    rate=2 * n**3 / seconds / 1e12,
  )
  return copy, matmul


def attention_seconds(
  batch: Batch, arrays: Any, run: Callable[[Any], Any], sizes: Sizes
) -> float:
  """Time of one call; each call of the loop reads another part of the pool."""

  def body(index: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
    arrays, total = state
    shift = lax.rem(index, batch.num_copies) * batch.blocks_per_copy
    tables = arrays["block_tables"] + shift
    out = jax.tree.leaves(run({**arrays, "block_tables": tables}))[0]
    # The result is used, so that no call is left out.
    return arrays, total + out.astype(jnp.float32).ravel()[0]

  return loop_seconds(body, (arrays, jnp.float32(0)), sizes.seconds)


def time_decode(sizes: Sizes, copy: Row, *, interpret: bool) -> Iterator[Row]:
  """Times decode steps."""
  for name, lengths in sizes.decode:
    spec = named(name)
    what = f"{name}, {len(lengths)} rows, {sum(lengths)} tokens"
    what += "" if len(set(lengths)) == 1 else ", ragged"
    rows = [(length, 1) for length in lengths]
    seen = [min(n, spec.sliding_window or n) for n in lengths]
    num_bytes = sum(seen) * spec.bytes_per_token
    copies = 1 if interpret else max(1, -(-L2_BYTES // num_bytes))
    try:
      batch = make_batch(spec, rows, is_decode=True, num_copies=copies)
    except Exception as problem:  # of memory
      yield _failed("decode", what, "", problem)
      continue
    for by, make in _candidates(batch, interpret=interpret):
      try:
        seconds = attention_seconds(batch, *make(), sizes)
        rate = num_bytes / seconds / 1e9
        yield Row(
          section="decode",
          what=what,
          by=by,
          microseconds=seconds * 1e6,
          rate=rate,
          share=rate / (copy.rate or 1.0),
        )
      except Exception as problem:
        yield _failed("decode", what, by, problem, is_bad=by in IMPLEMENTATIONS)


def time_prefill(sizes: Sizes, matmul: Row, *, interpret: bool) -> Iterator[Row]:
  """Times whole prompts, causal."""
  spec = sizes.specs[0]
  for length in sizes.prefill:
    what = f"{spec.name}, {length} tokens"
    for by in _implementations(interpret=interpret):
      try:
        batch = make_batch(spec, [(length, length)], is_decode=False)
        run = run_attention(batch, by, interpret=interpret)
        seconds = attention_seconds(batch, batch.arrays, run, sizes)
        flops = 2 * length * length * spec.num_heads * spec.head_dim
        rate = flops / seconds / 1e12
        yield Row(
          section="prefill",
          what=what,
          by=by,
          microseconds=seconds * 1e6,
          rate=rate,
          share=rate / (matmul.rate or 1.0),
        )
      except Exception as problem:
        yield _failed("prefill", what, by, problem)


def measure(sizes: Sizes, *, interpret: bool) -> Iterator[Row]:
  """All rows."""
  yield from check(sizes, interpret=interpret)
  copy, matmul = measure_device(sizes)
  yield from (copy, matmul)
  yield from time_decode(sizes, copy, interpret=interpret)
  yield from time_prefill(sizes, matmul, interpret=interpret)


def save(rows: list[Row], folder: Path, *, is_dry: bool) -> list[Path]:
  """Writes `<device>.json` and `<device>.md`."""
  folder.mkdir(parents=True, exist_ok=True)
  facts = report.environment(is_quick=is_dry)
  stem = folder / (f"dry-{facts['device']}" if is_dry else str(facts["device"]))
  names = ("section", "what", "by", "error", "us", "GB/s or TFLOP/s", "of the limit")
  lines = [
    f"# Kernels on {facts['device']}",
    "",
    f"jax {facts['jax']}, {facts['date']}",
  ]
  lines += ["", *_table([list(names), ["---"] * len(names)])]
  lines += _table([row.cells() for row in rows])
  records = [dataclasses.asdict(row) for row in rows]
  text = json.dumps({"environment": facts, "rows": records}, indent=2)
  paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
  paths[0].write_text("\n".join(lines) + "\n", "utf-8")
  paths[1].write_text(text + "\n", "utf-8")
  return paths


def main(arguments: list[str] | None = None) -> None:
  """Runs everything; ends with an error if a comparison failed."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
  parser.add_argument(
    "--dry-run", action="store_true", help="tiny shapes, interpreted, on any device"
  )
  parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR")
  options = parser.parse_args(arguments)
  if not options.dry_run and jax.default_backend() != "gpu":
    sys.exit(f"needs a GPU, and jax sees {jax.devices()}; try --dry-run")
  sizes = TINY if options.dry_run else FULL
  rows = []
  for row in measure(sizes, interpret=options.dry_run):
    rows.append(row)
    print(*_table([row.cells()]), flush=True)
  for path in save(rows, options.out, is_dry=options.dry_run):
    print(f"wrote {path}")
  if bad := [row.what for row in rows if row.is_bad]:
    sys.exit(f"{len(bad)} of {len(rows)} rows are wrong or failed: {', '.join(bad)}")


def _implementations(*, interpret: bool) -> tuple[str, ...]:
  """What is compared and timed; Mosaic has an interpreter of its own, and tests."""
  return tuple(by for by in IMPLEMENTATIONS if not (interpret and by == "mosaic"))


def _candidates(
  batch: Batch, *, interpret: bool
) -> Iterator[tuple[str, Callable[[], tuple[Any, Callable[[Any], Any]]]]]:
  """What is timed on a batch: name, and how to make arrays and a function of them."""
  for by in _implementations(interpret=interpret):
    run = run_attention(batch, by, interpret=interpret)
    yield by, functools.partial(lambda run: (batch.arrays, run), run)
  if not interpret:
    yield from gpu_peers.serving(batch)


def _failed(
  section: str, what: str, by: str, problem: Exception, *, is_bad: bool = True
) -> Row:
  """A row without a number; that something is not served is no failure."""
  text = f"{type(problem).__name__}: {problem}".replace("\n", " ").replace("|", "/")
  if isinstance(problem, NotImplementedError):
    text, is_bad = f"not served: {problem}", False
  return Row(section=section, what=what, by=by, error=text[:200], is_bad=is_bad)


def _table(rows: list[list[str]]) -> list[str]:
  return [f"| {' | '.join(cells)} |" for cells in rows]


if __name__ == "__main__":
  main()
