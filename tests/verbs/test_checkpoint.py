"""Work goes on from a checkpoint with the same bits, also in a new process."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import CheckpointError, SamplingParams, SchedulerConfig
from tests.fixtures import toy_model as toy
from tests.fixtures.places import ROOT

SIZES = toy.config(
  is_hybrid=True, num_blocks=25, block_size=4, max_seqs=4, max_seq_len=64
)
SCHEDULER = SchedulerConfig(token_budget=16, max_admissions=2)
PROMPTS = [
  np.random.default_rng(seed).integers(0, toy.VOCAB, 3 + 4 * seed).tolist()
  for seed in range(8)
]
SETTINGS = {
  "max_new_tokens": 14,
  "sampling_params": [
    SamplingParams(temperature=seed % 2, seed=seed) for seed in range(8)
  ],
  "logprobs": True,
  "scheduler": SCHEDULER,
  "slice_steps": 4,
}
fresh = jax.jit(toy.fresh, static_argnums=0)


def generate(prompts=PROMPTS, sizes=SIZES, **kwargs):
  return kvcache.generate(toy.model, fresh(sizes), prompts, **SETTINGS | kwargs)


@functools.cache
def undisturbed():
  return generate()


def assert_same(got, want):
  """Contexts to the last bit, and completions."""
  for left, right in zip(
    jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True
  ):
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
  assert got[1] == want[1]


class StopError(Exception):
  """Somebody pulls the plug."""


def stop_after(num_slices):
  seen = []

  def on_slice(one):
    seen.append(one)
    if len(seen) == num_slices:
      raise StopError

  return on_slice


@pytest.mark.thorough
def test_stopped_work_goes_on_with_the_same_bits(tmp_path):
  for num_slices in (1, 3):
    with pytest.raises(StopError):
      generate(checkpoints=tmp_path, on_slice=stop_after(num_slices))
  assert kvcache.has_checkpoint(tmp_path)
  assert_same(generate(checkpoints=tmp_path), undisturbed())
  assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
  # All is done: nothing is left to compute, and the results are still there.
  slices = []
  assert_same(generate(checkpoints=tmp_path, on_slice=slices.append), undisturbed())
  assert len(slices) == 1


PROGRAM = """
import os, sys
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
from tests.verbs import test_checkpoint as t

slices = []
def on_slice(one):
  slices.append(one)
  print(len(slices), len(one.finished), flush=True)
  if len(slices) == int(sys.argv[2]):
    os.kill(os.getpid(), 9)

t.generate(checkpoints=sys.argv[1], on_slice=on_slice)
"""


def test_a_killed_process_loses_no_finished_request(tmp_path):
  command = [sys.executable, "-c", PROGRAM, str(tmp_path), "5"]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == -9, run.stderr
  ends = [int(line.split()[1]) for line in run.stdout.splitlines()]
  assert len(ends) == 5 and 0 < sum(ends) < len(PROMPTS)
  first = []
  got = generate(checkpoints=tmp_path, on_slice=first.append)
  assert_same(got, undisturbed())
  assert len(first[0].finished) >= sum(ends)
  assert first[0].num_steps <= (5 + 1) * SETTINGS["slice_steps"]


def made(**kwargs):
  requests = kvcache.make_requests(PROMPTS, max_new_tokens=3, **kwargs)
  return kvcache.init(SIZES), requests


def test_save_and_restore_by_hand(tmp_path):
  ctx, requests = made()
  with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
    kvcache.restore_checkpoint(tmp_path, ctx, requests)
  assert not kvcache.has_checkpoint(tmp_path / "nowhere")
  later = requests.replace(num_steps=jnp.int32(7))
  assert kvcache.save_checkpoint(tmp_path, ctx, later) == tmp_path / "7"
  kvcache.save_checkpoint(tmp_path, ctx, later)  # replaces it
  got = kvcache.restore_checkpoint(tmp_path, ctx, requests)
  for left, right in zip(
    jax.tree.leaves(got), jax.tree.leaves((ctx, later)), strict=True
  ):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"sizes": dataclasses.replace(SIZES, num_blocks=26)},
      "num_blocks: 25, not 26$",
    ),
    ({"prompts": PROMPTS[:7]}, "another set of requests: prompts: 8, not 7; tokens"),
    ({"prompts": [[1, *prompt[1:]] for prompt in PROMPTS]}, "other prompts$"),
    ({"namespace": [1] * 8, "priority": [2] * 8}, "other priority, namespace$"),
    ({"stop_tokens": [5]}, "other stop_tokens$"),
    ({"stop_tokens": [5, 6]}, "another set of requests: stop tokens: 1, not 2$"),
    ({"sampling_params": SamplingParams(seed=1)}, "other sampling_params$"),
    ({"max_new_tokens": [1] + [3] * 7}, "other max_new_tokens$"),
  ],
)
def test_what_belongs_to_something_else_is_refused(tmp_path, change, message):
  ctx, requests = made()
  kvcache.save_checkpoint(tmp_path, ctx, requests)
  sizes = change.pop("sizes", SIZES)
  prompts = change.pop("prompts", PROMPTS)
  other = kvcache.make_requests(prompts, **{"max_new_tokens": 3} | change)
  with pytest.raises(CheckpointError, match=message):
    kvcache.restore_checkpoint(tmp_path, kvcache.init(sizes), other)


READ = """
import sys
from tests.verbs import test_checkpoint as t
import kvcache

try:
  kvcache.restore_checkpoint(sys.argv[1], *t.made())
except kvcache.CheckpointError as error:
  print(error)
"""


def test_a_truncated_checkpoint_is_named(tmp_path):
  """In a process of its own: the storage's threads complain when it ends."""
  kvcache.save_checkpoint(tmp_path, *made())
  data = [path for path in tmp_path.rglob("d/*") if path.is_file()]
  assert data
  for path in data:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  command = [sys.executable, "-c", READ, str(tmp_path)]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert "checkpoint 0 cannot be read" in run.stdout, run.stderr
