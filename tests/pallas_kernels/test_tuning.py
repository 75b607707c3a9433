"""Settings are those of the device's table, and the search for them finds the best."""

import dataclasses
import json
import math
import time
import types

import jax.numpy as jnp
import pytest

from benchmarks.gpu import tune
from benchmarks.gpu.watch import Begun
from pallas_kernels.paged_attention import mosaic_sm90, triton, tuning
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from pallas_kernels.paged_attention.call import Outline
from tests.aot import deviceless

FIELDS = {field.name for field in dataclasses.fields(tuning.Settings)}
RULE = tuning.Settings(tile_kv=64, num_stages=3, min_split=256, num_programs=264)


def pools(name):
  shapes = named(name).shapes(num_seqs=1, num_blocks=9, max_blocks=1, num_tokens=1)
  return shapes["k"], shapes["v"]


# --- The table ------------------------------------------------------------------------


def test_the_installed_table_is_one():
  known = tune.classes(ARG_SPECS)
  for kind, kernels in tuning.measured().items():
    assert kind and kernels.keys() <= set(tuning.KERNELS)
    for entries in kernels.values():
      assert entries.keys() <= known.keys()
      for changes in entries.values():
        assert changes.keys() <= FIELDS
        assert all(value > 0 for value in changes.values())


@pytest.mark.parametrize(
  ("name", "shape_class"),
  [
    ("llama-3-8b", "128x128 bfloat16"),
    ("llama-3-8b fp8", "128x128 uint8"),
    ("deepseek-v3 tp8", "576xlatent bfloat16"),
  ],
)
def test_settings_are_looked_up_by_what_a_token_is(name, shape_class):
  assert tuning.shape_class(*pools(name)) == shape_class


def test_what_was_measured_on_a_kind_of_device_holds_there_alone(monkeypatch):
  entries = {"128x128 bfloat16": {"num_stages": 4, "min_split": 512}}
  table = {deviceless.DEVICE.device_kind: {"triton split": entries}}
  monkeypatch.setattr(tuning, "measured", lambda: table)
  k, v = pools("llama-3-8b")
  with deviceless.gpu():
    assert tuning.settle("triton split", k, v, RULE) == dataclasses.replace(
      RULE, num_stages=4, min_split=512
    )
    assert tuning.settle("triton fill", k, v, RULE) == RULE
    assert tuning.settle("triton split", *pools("llama-3-8b fp8"), RULE) == RULE
    with tuning.trying("triton split", {"tile_kv": 32}):
      assert tuning.settle("triton split", k, v, RULE) == dataclasses.replace(
        RULE, tile_kv=32
      )
  with deviceless.gpu(deviceless.A100):
    assert tuning.settle("triton split", k, v, RULE) == RULE


def test_kernels_cut_rows_by_their_settings():
  k, v = pools("llama-3-8b")
  outline = Outline(q=None, k=k, v=v, num_tokens=4, max_len=4096, max_query_len=1)
  changes = {"min_split": 1024, "num_programs": 528}
  for kernel, backend in (("triton split", triton), ("mosaic split", mosaic_sm90)):
    with tuning.trying(kernel, changes):
      (cut,) = backend.cuts(outline)
    assert (cut.tile_kv, cut.min_tiles, cut.max_splits) == (64, 16, 64)


# --- The search -----------------------------------------------------------------------


def test_the_search_keeps_what_is_faster_and_no_noise():
  choices = {"tile_kv": (16, 32, 128), "num_stages": (2, 3), "num_warps": (2, 8)}
  tried = []

  def seconds(changes):
    tried.append(dict(changes))
    if changes.get("tile_kv") == 128:
      return math.inf
    time = 1.0 if changes.get("tile_kv") == 32 else 2.0
    time -= 0.5 * (changes.get("num_warps") == 8)
    return time - 0.001 * (changes.get("num_stages") == 2)  # noise

  found = list(tune.search(lambda trials: list(map(seconds, trials)), choices, {}))
  assert [changes for changes, _ in found] == [
    {"tile_kv": 32},
    {"tile_kv": 32},
    {"tile_kv": 32, "num_warps": 8},
  ]
  assert [gain for _, gain in found] == pytest.approx([0.5, 0.5, 0.75])
  assert len(tried) == 1 + 3 + 2 + 2


@pytest.mark.parametrize(
  ("start", "found"),
  [
    ({"num_warps": 8}, [{"num_warps": 8}, {"num_warps": 8, "tile_kv": 32}]),
    ({"num_warps": 2}, [{}, {"tile_kv": 32}]),  # no better than the rules any more
  ],
)
def test_the_search_begins_with_what_was_found_before(start, found):
  def seconds(changes):
    return 1.0 - 0.5 * (changes.get("num_warps") == 8) - 0.1 * ("tile_kv" in changes)

  choices = {"tile_kv": (32,)}
  search = tune.search(lambda trials: list(map(seconds, trials)), choices, start)
  assert [changes for changes, _ in search] == found


def test_nothing_is_better_than_what_fails():
  with pytest.raises(RuntimeError, match="fails as it is"):
    next(tune.search(lambda trials: [math.inf] * len(trials), {"tile_kv": (16,)}, {}))


def test_a_class_is_tuned_on_its_widest_group_too():
  found = tune.classes(ARG_SPECS)
  names = [spec.name for spec in found["128x128 bfloat16"]]
  assert names == ["llama-3-8b", "qwen-3-235b-a22b"]
  assert all(found.values())


def test_the_table_keeps_other_devices_and_forgets_what_is_no_better():
  table = {"other": {"triton split": {"a": {"tile_kv": 16}}}}
  tune.enter(table, "mine", "triton split", "a", {"tile_kv": 32})
  tune.enter(table, "mine", "triton split", "b", {"num_warps": 8})
  tune.enter(table, "mine", "triton split", "a", {})
  assert table == {
    "other": {"triton split": {"a": {"tile_kv": 16}}},
    "mine": {"triton split": {"b": {"num_warps": 8}}},
  }


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
def test_a_dry_run_tries_settings_and_writes_a_table(tmp_path, capfd):
  path = tmp_path / "tuned.json"
  tune.main(["--dry-run", "--kernel", "split", "--out", str(path)])
  (found,) = json.loads(path.read_text("utf-8")).values()
  assert found.keys() == {"triton split"}
  assert found["triton split"].get("64x64 bfloat16", {}) in ({}, {"tile_kv": 32})
  out = capfd.readouterr().out
  assert "faster" in out and "done" in out and "Error" not in out


def case_of(results, **more):
  """A case whose trials yield such results, and take a second."""
  timer = types.SimpleNamespace(seconds=lambda: 1.0)
  begun = []
  case = tune.Case("triton split", (), tune.TINY, begun.append)
  case.batches = (types.SimpleNamespace(arrays=None),)
  case._wanted = [jnp.ones(3)]
  left = iter(results)

  def begin_trial(changes, pool):
    result = jnp.full(3, next(left))
    return [(lambda: lambda arrays: result, lambda: timer)]

  case._begin_trial = begin_trial
  return case, begun


def test_settings_with_wrong_results_are_not_taken():
  case, begun = case_of([1.01, 2.0, jnp.nan])
  trials = [{"tile_kv": size} for size in (16, 32, 64)]
  assert case.times(trials) == [pytest.approx(1.0), math.inf, math.inf]
  assert begun == trials


@pytest.mark.filterwarnings("ignore:The Pallas Triton:DeprecationWarning")
def test_programs_of_trials_are_those_of_their_settings():
  (batch,) = tune._batches((named("qwen-2.5-0.5b"),), tune.TINY, is_decode=True)
  case = tune.Case("triton split", [batch], tune.TINY, lambda changes: None)
  seen = []
  case._lower = lambda batch: seen.append(dict(tuning._trial.get()[1])) or (1 / 0)
  assert case.times([{"tile_kv": 16}, {"tile_kv": 32}]) == [math.inf] * 2
  assert seen == [{"tile_kv": 16}, {"tile_kv": 32}]


def hang_at_the_first(send, is_dry, todo, table):
  """Work that hangs at what it is given first, unless that is the last of all."""
  for kernel, name in todo:
    changes = {"tile_kv": 32}
    send(tune.Found(device="x", kernel=kernel, name=name, changes=changes, gain=0.5))
    if name != "b":
      send(Begun(name=(kernel, name, "{'num_stages': 7}"), seconds=0.1))
      time.sleep(60)
    send(((kernel, name), "done"))


def test_a_setting_that_hangs_ends_its_search_and_loses_nothing(monkeypatch, capsys):
  monkeypatch.setattr(tune, "work", hang_at_the_first)
  todo = [("triton split", "a"), ("triton split", "b")]
  found = list(tune.tune(todo, {}, is_dry=True, seconds=60.0))
  assert [x.name for x in found] == ["a", "b"]
  assert "{'num_stages': 7}: hung: killed after 0 s" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_said(capsys):
  assert list(tune.tune([("triton split", "a")], {}, is_dry=True, seconds=0.0)) == []
  assert "triton split, a: left out" in capsys.readouterr().out


def test_without_a_gpu_it_says_so():
  with pytest.raises(SystemExit, match="needs a GPU"):
    tune.main([])
  with pytest.raises(SystemExit, match="a dry run needs --out"):
    tune.main(["--dry-run"])
