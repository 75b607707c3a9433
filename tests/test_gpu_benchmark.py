"""The benchmark of the kernels, as far as it runs without a GPU: tiny, interpreted."""

import json

import jax
import pytest

from benchmarks import gpu
from benchmarks.gpu_batch import make_batch
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS


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


def test_a_failure_is_a_row(monkeypatch):
  monkeypatch.setattr(gpu, "IMPLEMENTATIONS", ("nonsense",))
  rows = list(gpu.check(gpu.TINY, interpret=False))
  assert all(row.is_bad and "NotImplementedError" in row.error for row in rows)


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
