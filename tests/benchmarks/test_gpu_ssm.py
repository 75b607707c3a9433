"""The benchmark of recurrent states, as far as it runs without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import sizes, ssm
from benchmarks.gpu.rows import Run
from tests.aot import deviceless

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def little(monkeypatch):
  monkeypatch.setattr(ssm, "IMPLEMENTATIONS", ("triton",))
  monkeypatch.setattr(ssm, "CHECKED", (1, 20, 0, 2))
  monkeypatch.setattr(ssm, "DRAFTS", (4, 1, 0, 2))


RUN = Run(sizes=sizes.TINY, interpret=True)


def one_millisecond(chain, seconds):
  """Every call hands on what the next one takes."""
  del seconds
  after = jax.eval_shape(chain.step, chain.state, chain.constants, chain.turns[0])
  before = jax.eval_shape(lambda: chain.state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), before
  )
  return 1e-3


@pytest.mark.thorough
def test_a_dry_run_checks_and_times(monkeypatch):
  monkeypatch.setattr(ssm, "call_seconds", one_millisecond)
  rows = list(ssm.measure(RUN))
  checks, times = rows[:5], rows[5:]
  assert {row.section for row in checks} == {"check"}
  assert all(0 < row.error < 0.05 and not row.is_bad for row in checks)
  assert [row.section for row in times] == ["ssd step", "conv1d step", "ssd prompt"]
  assert times[0].num_bytes == 2 * 2 * ssm.TINY.ssd_bytes
  assert times[0].rate == pytest.approx(times[0].num_bytes / 1e6)


def test_a_wrong_result_is_bad(monkeypatch):
  monkeypatch.setattr(ssm, "OPERATIONS", ("conv1d",))
  monkeypatch.setattr(ssm, "_error", lambda got, want: float("nan"))
  rows = list(ssm.check([ssm.TINY], RUN))
  assert rows and all(row.is_bad for row in rows)


def test_a_failure_is_a_row(monkeypatch):
  monkeypatch.setattr(ssm, "check", lambda *args, **kwargs: iter(()))

  def fail(chain, seconds):
    raise KeyError(seconds)

  monkeypatch.setattr(ssm, "call_seconds", fail)
  rows = list(ssm.measure(RUN))
  assert [row.what for row in rows] == [
    *("tiny, 2 rows", "tiny, 2 rows", "tiny, 1 x 40 tokens")
  ]
  assert all(row.is_bad and row.error.startswith("KeyError") for row in rows)


@pytest.mark.parametrize("operation", ssm.OPERATIONS)
def test_what_is_timed_is_lowered_for_a_gpu(operation):
  batch = ssm.make_batch(
    ssm.TINY, (1,) * 4, operation=operation, is_decode=True, num_layers=2
  )
  run = batch.run("triton", interpret=False)
  assert "triton" in deviceless.lower(run, **batch.arrays).as_text()


def test_states_stand_anywhere_but_never_in_the_null_state():
  batch = ssm.make_batch(ssm.TINY, (3, 0, 1), operation="ssd", num_entries=3)
  write = np.asarray(batch.arrays["write_ids"])
  kept = write[write < 10]
  assert len(set(kept)) == len(kept) == 4 and kept.min() > 0
  assert batch.arrays["read_ids"][1] == 0
  assert jnp.array_equal(batch.arrays["cu_seqlens"], jnp.array([0, 3, 3, 4]))
