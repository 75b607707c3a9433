"""Every section of the benchmarks runs, however little it measures here."""

import json
import math

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks.generation import NoModelError
from benchmarks.report import Row, Section
from benchmarks.sizes import Size


@pytest.mark.parametrize("section", command.SECTIONS, ids=lambda section: section.name)
def test_each_section_runs(section):
  rows = list(section.measure(Size.TINY))
  assert rows
  assert {row.section for row in rows} == {section.title}
  assert all(math.isfinite(row.value) for row in rows)
  places = [(row.what, row.sizes) for row in rows]
  assert len(places) == len(set(places))


def sections(**measures):
  return tuple(
    Section(name=name, title=name, measure=measure)
    for name, measure in measures.items()
  )


def good(size):
  assert size is Size.QUICK
  yield Row(section="good", what="x", sizes="", value=1.0, unit="ms")


def broken(size):
  yield Row(section="broken", what="y", sizes="", value=2.0, unit="ms")
  raise KeyError("no such thing")


def missing(size):
  raise NoModelError("it is not installed")
  yield


@pytest.fixture
def run(monkeypatch, tmp_path):
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)

  def run(**measures):
    monkeypatch.setattr(command, "SECTIONS", sections(**measures))
    command.main(["--quick", "--out", str(tmp_path)])

  return run


def saved(folder):
  (path,) = folder.glob("*.json")
  return [row["what"] for row in json.loads(path.read_text("utf-8"))["rows"]]


def test_a_section_that_fails_takes_no_rows_along(run, tmp_path, capsys):
  with pytest.raises(SystemExit, match="failed: broken"):
    run(broken=broken, good=good)
  assert saved(tmp_path) == ["y", "x"]
  assert "KeyError: 'no such thing'" in capsys.readouterr().err


def test_a_section_without_its_model_is_skipped(run, tmp_path, capsys):
  run(missing=missing, good=good)
  assert saved(tmp_path) == ["x"]
  assert "skipped: it is not installed" in capsys.readouterr().out


def test_no_rows_are_no_success(run, tmp_path):
  with pytest.raises(SystemExit, match="nothing was measured"):
    run(missing=missing)
  assert not list(tmp_path.iterdir())
