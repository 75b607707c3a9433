"""The benchmark on a GPU, as far as it runs without one: tiny, interpreted."""

import json
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import attention, layout, measure, sizes, ssm, table, watch, worker
from benchmarks.gpu.batch import make_batch
from benchmarks.gpu.loop import call_seconds, Chain, num_turns
from benchmarks.gpu.rows import failed, Row, Run, Section
from benchmarks.gpu.targets import missed, ratios, verdicts
from benchmarks.gpu.watch import Begun, LostError
from benchmarks.gpu.worker import Finished, Task
from pallas_kernels.choice import NotServedError
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named

DRY = Run(sizes=sizes.TINY, interpret=True)


def row(section, by, us=None, *, what="llama, 64 rows, 9 tokens", **more):
  return Row(section=section, what=what, by=by, microseconds=us, **more)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
def test_a_dry_run_goes_through_all_sections(tmp_path, capsys):
  measure.main(["--dry-run", "--minutes", "60", "--out", str(tmp_path)])
  (data,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
  data, page = json.loads(data.read_text("utf-8")), page.read_text("utf-8")
  rows = data["rows"]
  assert not any(row["is_bad"] for row in rows)
  assert [(row["section"], row["by"]) for row in rows] == [
    *[("device", "xla")] * 2,
    *[("check", "triton")] * 2,
    ("decode", "triton"),
    ("bookkeeping", "serve, no model"),
    ("bookkeeping", "extend, metadata, commit"),
    ("prefill", "triton"),
    *[("check", by) for by in ssm.IMPLEMENTATIONS * 5],
    *[("ssd step", by) for by in ssm.IMPLEMENTATIONS],
    *[("conv1d step", by) for by in ssm.IMPLEMENTATIONS],
    *[("ssd prompt", by) for by in ssm.IMPLEMENTATIONS],
    *[("layout", by) for by in ("triton", layout.NHD)],
    ("serve", "no model"),
    *[("serve", "triton, scanned layers")] * 2,
    ("bookkeeping", "serve, no model, loops recorded"),
    ("decode", "PyTorch"),
  ]
  unmeasured = [row for row in rows if row["microseconds"] is None]
  checks = [row for row in unmeasured if row["section"] == "check"]
  assert len(checks) == 12 and all(row["error"] < 0.05 for row in checks)
  (other,) = (row for row in unmeasured if row["by"].endswith("loops recorded"))
  assert "recorded on a GPU alone" in other["error"]
  assert page.count("\n| ") == len(rows) + 2 + len(data["targets"]) + 2
  assert "wrote" in capsys.readouterr().out


def test_chains_do_all_calls_in_turn():
  chain = Chain(
    step=lambda x, factor, turn: x * factor + turn,
    state=jnp.int32(1),
    constants=jnp.int32(3),
    turns=[jnp.int32(turn) for turn in (5, 7)],
    estimate=1.0,
  )
  got = jax.jit(chain.program(2))(chain.state, chain.constants, tuple(chain.turns))
  assert got == ((((1 * 3 + 5) * 3 + 7) * 3 + 5) * 3 + 7)
  assert 0 < call_seconds(chain, 0.0) < 1
  assert not chain.state.is_deleted()


def test_rounds_go_over_more_memory_than_a_cache_holds():
  assert num_turns(4 << 20) == num_turns(1 << 10) == 64
  assert num_turns(100 << 20) == 3
  assert num_turns(1 << 30) == 1


def test_long_chains_are_not_repeated():
  chain = Chain(
    step=lambda x, _, __: x, state=jnp.ones(2), constants=(), turns=[()], estimate=1e-4
  )
  assert [chain.num_rounds(s) for s in (0.0, 0.01, 1e9)] == [2, 100, 20_000]


@pytest.mark.parametrize("name", ["qwen-2.5-0.5b", "deepseek-v3 tp8"])
def test_each_call_reads_a_copy_of_its_own_and_the_result_of_the_last(name):
  batch = make_batch(named(name), [(70, 1), (3, 1)], is_decode=True, num_copies=2)
  seen = []

  def call(arrays):
    seen.append((np.asarray(arrays["block_tables"]), np.asarray(arrays["q"])))
    return arrays["q"][..., : batch.spec.v_head_dim] + 1, None

  turns = attention._turns(batch, batch.arrays["block_tables"], 3)
  chain = attention.attention_chain(batch.arrays, call, turns, 1.0)
  state = chain.state
  for turn in chain.turns:
    state = chain.step(state, chain.constants, turn)
  shifts = [tables[0, 0] - seen[0][0][0, 0] for tables, _ in seen]
  assert shifts == [0, batch.blocks_per_copy, 0]
  width = batch.spec.v_head_dim or batch.spec.head_dim
  (_, q0), _, (_, q2) = seen
  assert np.array_equal(q2[..., :width], (q0 + 1 + 1)[..., :width])
  assert np.array_equal(q2[..., width:], q0[..., width:])


def test_both_layouts_give_the_same_result():
  batch = make_batch(named("qwen-2.5-0.5b"), [(70, 1), (5, 1)], is_decode=True)
  results = []
  for _, make in layout.candidates(batch, interpret=True):
    arrays, run = make()
    results.append(np.asarray(jax.jit(run)(arrays)[0], np.float32))
  ours, other = results
  assert np.array_equal(ours, other) and ours.any()
  assert not np.array_equal(arrays["k"], batch.arrays["k"])


def test_a_wrong_result_ends_the_run_with_an_error(tmp_path, monkeypatch):
  rows = [row("check", "triton", error=1.0), row("check", "y", what="x", is_bad=True)]
  monkeypatch.setattr(measure, "measure", lambda task: iter(rows))
  with pytest.raises(SystemExit, match="1 of 2 rows are wrong or failed: check x"):
    measure.main(["--dry-run", "--out", str(tmp_path)])


def test_numbers_that_differ_from_xla_are_bad(monkeypatch):
  monkeypatch.setitem(attention.TOLERANCE, "bfloat16", 0.0)
  rows = list(attention.check(DRY, DRY.sizes.first))
  assert [row.is_bad for row in rows] == [True, True]


@pytest.mark.parametrize(
  ("problem", "is_bad"),
  [
    (NotServedError("never"), False),
    (KeyError("x"), True),
    (NotImplementedError("a primitive that cannot be lowered"), True),
  ],
)
def test_what_is_not_served_is_a_row_and_a_failure_is_bad(monkeypatch, problem, is_bad):
  def fail(arrays):
    raise problem

  def run_attention(batch, by, interpret=False):
    return exact(batch, by) if by == "xla" else fail

  exact = attention.run_attention
  monkeypatch.setattr(attention, "run_attention", run_attention)
  rows = list(attention.check(DRY, DRY.sizes.first))
  rows += attention.time_decode(DRY)
  assert [row.is_bad for row in rows] == [is_bad] * 3
  assert all(("not served: never" in row.error) != is_bad for row in rows)
  assert all(("Traceback" in (row.details or "")) == is_bad for row in rows)


def test_what_is_compared_with_is_exact():
  batch = make_batch(named("qwen-2.5-0.5b"), [(70, 1)], is_decode=True)
  run = attention.exactly(batch)
  text = jax.jit(run).lower(batch.in_float32().arrays).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert products and all("HIGHEST, HIGHEST" in line for line in products)


def test_nothing_is_begun_when_the_time_is_up(monkeypatch):
  now = iter(range(100))
  monkeypatch.setattr(worker.time, "monotonic", lambda: next(now))

  def slow(run):
    for _ in range(9):
      yield row("slow", "x")

  def broken(run):
    raise KeyError("no such thing")
    yield

  def sections(*pairs):
    return tuple(Section(name=n, measure=m, seconds=s) for n, m, s in pairs)

  pairs = (("broken", broken, 1), ("other", slow, 1), ("slow", slow, 1))
  monkeypatch.setattr(worker, "SECTIONS", sections(*pairs, ("late", slow, 5)))
  task = Task(sections=("broken", "slow", "late"), is_dry=True, seconds=6.0)
  found = list(worker.measure(DRY, task))
  rows = [message for message in found if isinstance(message, Row)]
  assert [(r.section, r.what.split()[0], r.error or "") for r in rows] == [
    ("broken", "all", "KeyError: 'no such thing'"),
    *[("slow", "llama,", "")] * 5,
    ("slow", "what", "left out: 0 s are left"),
    ("late", "all", "left out: 0 s are left"),
  ]
  assert rows[0].is_bad and not rows[-1].is_bad
  ends = [message.section for message in found if isinstance(message, Finished)]
  assert ends == ["broken", "slow", "late"]


# --- Processes that get lost ----------------------------------------------------------


def bad_work(send, task):
  """Sections of which `a` hangs and `b` aborts by "bad", and `c` while compiling."""
  run = Run(sizes=DRY.sizes, interpret=True, rows=list(task.rows), lost=task.lost)
  send({"device": "made up"})
  for section in task.sections:
    for what in ("x", "y"):
      for by in ("good", "bad"):
        if not run.wants(section, what, by):
          continue
        if (section, what, by) == ("c", "x", "good"):  # while compiling
          if task.is_careful:
            send(Begun(name=(section, what, by)))
          os.abort()
        send(Begun(name=(section, what, by), seconds=0.3 if by == "bad" else 30.0))
        if (section, by) == ("a", "bad"):
          time.sleep(60)
        if (section, by) == ("b", "bad"):
          os.abort()
        send(row(section, by, 1.0, what=what))
    send(Finished(section=section))


@pytest.mark.thorough
def test_what_hangs_or_dies_is_named_and_the_rest_goes_on():
  task = Task(sections=("a", "b", "c", "d"), is_dry=True, seconds=60.0)
  facts, *rows = measure.measure(task, bad_work)
  assert facts == {"device": "made up"}
  found = [(*row.key, row.error) for row in rows]
  good = {(s, what, "good", None) for s in "abd" for what in "xy"}
  assert good <= set(found)
  assert {("d", "x", "bad", None), ("c", "y", "bad", None)} <= set(found)
  lost = [entry for entry in found if entry[-1]]
  assert lost == [
    ("a", "x", "bad", "hung: killed after 0 s"),
    ("b", "x", "bad", "died of SIGABRT"),
    ("c", "compiling", "", "died of SIGABRT"),
    ("c", "x", "good", "died of SIGABRT"),
  ]
  assert all(row.is_bad == bool(row.error) for row in rows)
  assert len(found) == len(set(found))


def silent(send, task):
  time.sleep(60)


def test_a_worker_that_says_nothing_is_cut_short(monkeypatch):
  monkeypatch.setattr(measure, "_GRACE", 0.0)
  task = Task(sections=("a", "b"), is_dry=True, seconds=0.3)
  rows = list(measure.measure(task, silent))
  assert [(row.section, row.error) for row in rows] == [
    ("a", "cut short"),
    ("a", "left out: 0 s are left"),
    ("b", "left out: 0 s are left"),
  ]


def test_a_worker_ends_when_the_device_is_lost(monkeypatch):
  def stop(code):
    raise SystemExit(code)

  def lost(x):
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

  watch.check_alive()
  monkeypatch.setattr(watch.os, "_exit", stop)
  monkeypatch.setattr(watch.jax, "block_until_ready", lost)
  broken = failed("decode", "x", "mosaic", RuntimeError("ILLEGAL_ADDRESS"))
  monkeypatch.setattr(worker, "measure", lambda run, task: iter([broken]))
  sent = []
  with pytest.raises(SystemExit, match="1"):
    worker.work(sent.append, Task(sections=("decode",), is_dry=True, seconds=9.0))
  assert sent[1:] == [broken, Begun(name=broken.key)]
  task = Task(sections=("decode",), is_dry=True, seconds=9.0, rows=(broken,))
  blamed, left = measure._blame(task, broken.key, LostError("died of code 1"))
  assert blamed.error == "died of code 1 after RuntimeError: ILLEGAL_ADDRESS"
  assert blamed.details == broken.details and left.lost == {("decode", "mosaic")}


def test_a_later_run_of_some_sections_keeps_the_rows_of_others(tmp_path):
  facts = {"device": "x", "jax": "1", "date": "today", "quick": False}
  old = [row("check", "triton", error=math.nan, is_bad=True), row("decode", "y", 2.0)]
  table.save(old, tmp_path, facts)
  loaded = table.load(tmp_path, facts)
  assert [r.key for r in loaded] == [r.key for r in old] and loaded[0].error == "nan"
  new = row("decode", "y", 1.0)
  assert table.merged(loaded, [new]) == [loaded[0], new]
  assert table.load(tmp_path, facts | {"jax": "2"}) == []
  assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


def test_rows_are_compared_with_peers_of_the_same_shape():
  ours = row("decode", "triton", 10.0)
  rows = [
    *(ours, row("decode", "cuDNN", 12.0), row("decode", "FlashInfer", 15.0)),
    *(row("decode", "FlashInfer, NHD pool", 9.0), row("check", "flex attention", 1.0)),
    *(row("decode", "jax paged_attention", error="no"), row("decode", "mosaic", 8.0)),
  ]
  assert ratios(ours, rows) == {"cuDNN": 1.2, "FlashInfer": 0.9}
  assert ratios(rows[1], rows) == {}
  assert missed(ours, rows) == ["decode: 1.0 of FlashInfer"]
  found = {verdict.text: verdict for verdict in verdicts(rows)}
  # The faster of ours counts.
  verdict = found["decode: 1.0 of FlashInfer"]
  assert (verdict.word, verdict.worst) == ("met", 9 / 8)
  assert found["decode: 1.3 of jax"].word == "not measured"
  cells = table.cells(ours, rows)
  assert cells[6:11] == ["", "1.20", "0.90", "", ""]


def test_targets_are_met_or_missed():
  big, small = 64 << 20, 1 << 20
  what = "llama, 64 rows, {}"
  rows = [
    row("decode", "triton", 9.0, what="a", share=0.95, num_bytes=big),
    row("decode", "triton", 9.0, what="b", share=0.5, num_bytes=big),
    row("decode", "triton", 13.0, what="c", share=0.1, num_bytes=small),
    row("decode", "triton", 9.0, what=what.format("9"), rate=10, num_bytes=big),
    row("decode", "triton", 9.0, what=what.format("8, ragged"), rate=9, num_bytes=big),
    row("decode", "triton", 9.0, what="x, 64 rows, 8, ragged", rate=1, num_bytes=big),
    row("prefill", "mosaic", 9.0, rate=600.0),
    row("ssd step", "triton", 50.0, what="a", rate=2700.0, share=0.9),
    row("ssd step", "triton", 5.0, what="b", rate=270.0, share=0.09),
    row("bookkeeping", "serve, no model", 120.0),
    row("bookkeeping", "serve, no model, loops recorded", 90.0),
    row("check", "triton", what="a", error=0.01),
    row("check", "mosaic", what="a", error=float("nan"), is_bad=True),
    row("check", "mosaic", what="b", error="not served: no"),
    row("check", "cuDNN", what="c", error="no"),
  ]
  found = {verdict.text: verdict for verdict in verdicts(rows)}
  words = [verdict.word for verdict in found.values()]
  assert words == [
    *("MISSED", "MISSED", "met", "MISSED", "not measured", "not measured"),
    *("not measured", "met", "met", "met"),
  ]
  verdict = found["decode, 64 MB and more: 90 % of copy bandwidth"]
  assert (verdict.num_met, verdict.num, verdict.where) == (1, 2, "b")
  assert found["decode, ragged: 90 % of uniform"].worst == 0.9


def test_without_a_gpu_it_says_so():
  with pytest.raises(SystemExit, match="needs a GPU"):
    measure.main([])


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_batches_have_the_shapes_of_their_spec(spec):
  batch = jax.eval_shape(
    lambda: make_batch(spec, [(100, 3), (5, 1)], is_decode=False).arrays
  )
  blocks = -(-100 // spec.block_size) - (-5 // spec.block_size) + 1
  wanted = spec.shapes(
    num_seqs=2,
    num_blocks=blocks,
    max_blocks=-(-100 // spec.block_size),
    num_tokens=4,
  )
  for name, shape in wanted.items():
    found = batch[name]
    assert (found is None) == (shape is None), name
    assert shape is None or (found.shape, found.dtype) == (shape.shape, shape.dtype)


def test_ragged_rows_hold_as_much_as_uniform_ones():
  lengths = sizes.ragged(64, 4096)
  assert abs(sum(lengths) / (64 * 4096) - 1) < 0.01
  assert max(lengths) > 20 * min(lengths)


def test_everything_is_compared_once_and_what_is_timed_exists():
  full = sizes.FULL
  assert sorted(s.name for s in full.first + full.rest) == sorted(
    s.name for s in ARG_SPECS
  )
  for name, lengths in full.decode + full.layout + full.torch:
    assert named(name) and len(lengths) in (1, 16, 64, 256)
  assert set(full.torch) <= set(full.decode)
