"""The benchmark of the kernels, as far as it runs without a GPU: tiny, interpreted."""

import json

import jax
import pytest

from benchmarks import gpu, gpu_peers
from benchmarks.gpu_batch import make_batch
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from tests import deviceless


def test_a_dry_run_checks_times_and_writes_a_table(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(gpu, "loop_seconds", lambda body, state, seconds: 1e-3)
  gpu.main(["--dry-run", "--out", str(tmp_path)])
  (data,), (table,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
  rows = json.loads(data.read_text("utf-8"))["rows"]
  assert [row["section"] for row in rows] == [
    *("check", "check", "device", "device", "decode", "prefill")
  ]
  assert not any(row["is_bad"] for row in rows)
  assert all(row["error"] < 0.04 for row in rows[:2])
  assert table.read_text("utf-8").count("\n| ") == len(rows) + 2
  assert "wrote" in capsys.readouterr().out


def test_loops_are_timed():
  seconds = gpu.loop_seconds(lambda _, x: x * 2, jax.numpy.ones(8), 0.0)
  assert 0 < seconds < 1


def test_a_wrong_result_ends_the_run_with_an_error(tmp_path, monkeypatch):
  bad = gpu.Row(section="check", what="llama", by="triton", error=float("nan"))
  rows = [bad, gpu.Row(section="check", what="x", by="y", error=1.0, is_bad=True)]
  monkeypatch.setattr(gpu, "measure", lambda sizes, interpret: iter(rows))
  with pytest.raises(SystemExit, match="1 of 2 rows are wrong or failed: x"):
    gpu.main(["--dry-run", "--out", str(tmp_path)])


@pytest.mark.parametrize(
  ("problem", "is_bad"), [(NotImplementedError("never"), False), (KeyError("x"), True)]
)
def test_what_is_not_served_is_a_row_and_a_failure_is_bad(monkeypatch, problem, is_bad):
  def fail(arrays):
    raise problem

  def run_attention(batch, by, interpret=False):
    return exact(batch, by) if by == "xla" else fail

  exact = gpu.run_attention
  monkeypatch.setattr(gpu, "run_attention", run_attention)
  rows = list(gpu.check(gpu.TINY, interpret=True))
  assert [row.is_bad for row in rows] == [is_bad] * 2
  assert all(("not served: never" in row.error) != is_bad for row in rows)


def test_peers_serve_plain_decode_steps_alone():
  def names(name, **settings):
    batch = make_batch(named(name), [(5, 1)], **settings)
    return [peer for peer, _ in gpu_peers.serving(batch)]

  assert names("llama-3-8b", is_decode=True) == ["jax paged_attention", "cuDNN"]
  assert names("llama-3-8b", is_decode=False) == []
  for name in ("llama-3-8b fp8", "gpt-oss-120b full", "deepseek-v3 tp8"):
    assert names(name, is_decode=True) == []


@pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
def test_peers_are_lowered_or_say_why_not():
  batch = make_batch(named("llama-3-8b"), [(200, 1), (64, 1)], is_decode=True)
  make = dict(gpu_peers.serving(batch))["jax paged_attention"]
  arrays, run = make()
  assert "triton" in deviceless.lower(run, arrays).as_text()


def test_without_a_gpu_it_says_so():
  with pytest.raises(SystemExit, match="needs a GPU"):
    gpu.main([])


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
  lengths = gpu._ragged(64, 4096)
  assert abs(sum(lengths) / (64 * 4096) - 1) < 0.01
  assert max(lengths) > 20 * min(lengths)
