"""The ring of samples, why requests waited, and the names of the loop's parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import observe, RequestStatus, SchedulerConfig, WaitReason
from kvcache.observe.history import FIELDS
from tests.aot import hlo
from tests.fixtures import toy_model as toy

CONFIG = toy.config(num_blocks=9, block_size=4, max_seqs=2, max_seq_len=32)
SCHEDULER = SchedulerConfig(token_budget=6, max_admissions=2, watermark=0)
NUM, WIDTH = 6, 33
# The first two take the rows; the two need more blocks than there are.
PROMPTS = [list(range(9)), list(range(20, 29)), [3], [4, 5], list(range(9)), [7]]


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def serve(ctx, requests, history, max_steps):
  return kvcache.serve(
    toy.model,
    ctx,
    requests,
    scheduler=SCHEDULER,
    max_steps=max_steps,
    history=history,
  )


def run(*slices, size):
  """Serves in slices; returns the last context, the requests and the history."""
  ctx = jax.jit(functools.partial(toy.fresh, CONFIG))()
  requests = toy.make_requests(PROMPTS, 12, num=NUM, width=WIDTH)
  history = kvcache.make_history(size)
  for steps in slices:
    ctx, requests, history = serve(ctx, requests, history, jnp.int32(steps))
  return ctx, requests, history


@functools.cache
def whole():
  return jax.device_get(run(1000, size=64))


def test_samples_agree_with_the_run():
  ctx, requests, history = whole()
  found = history.series()
  num = int(history.num_samples)
  assert 4 < num <= 64 and all(values.shape == (num,) for values in found.values())
  usable = CONFIG.num_blocks - 1
  assert (found["free"] + found["cached"] + found["in_use"] == usable).all()
  assert (found["references"] >= found["in_use"]).all()
  assert (found["running"] + found["waiting"] + found["finished"] <= NUM).all()
  assert found["running"].max() == 2 and found["waiting"][0] == NUM - 2
  assert (np.diff(found["step"]) >= 0).all() and found["step"][-1] == requests.num_steps
  sampled = (requests.lengths - requests.prompt_lens).sum()
  assert found["tokens"][-1] == sampled
  steps = np.diff(found["step"], prepend=0)
  assert (found["tokens_per_step"] * steps).sum() == pytest.approx(sampled)
  assert found["preemptions"][-1] == requests.num_preemptions.sum() > 0
  assert found["new_preemptions"].sum() == requests.num_preemptions.sum()
  assert found["evicted"][-1] == ctx.counters.num_evicted
  assert found["hit_rate"][-1] == pytest.approx(
    float(jax.jit(kvcache.stats)(ctx).hit_rate)
  )


def test_slices_append():
  """What slices record is what one run records, but for where they cut a burst."""
  _, requests, history = jax.device_get(run(5, 9, 1000, size=64))
  found, want = history.series(), whole()[2].series()
  assert {5, 14} <= set(found["step"].tolist())
  assert (np.diff(found["step"]) >= 0).all()
  assert (
    found["step"][-1] == want["step"][-1] and found["tokens"][-1] == want["tokens"][-1]
  )
  both = np.isin(found["step"], want["step"])
  assert both.sum() == len(want["step"])
  np.testing.assert_array_equal(found["tokens"][both], want["tokens"])
  np.testing.assert_array_equal(requests.num_waited, whole()[1].num_waited)


@pytest.mark.thorough
def test_the_ring_keeps_the_newest():
  _, _, history = jax.device_get(run(1000, size=3))
  found, want = history.series(), whole()[2].series()
  assert history.num_samples == whole()[2].num_samples
  for name in FIELDS:
    np.testing.assert_array_equal(found[name], want[name][-3:])
  assert found["tokens_per_step"][0] == 0  # what came before is not known
  np.testing.assert_array_equal(
    found["tokens_per_step"][1:], want["tokens_per_step"][-2:]
  )


def test_an_empty_history_has_no_samples():
  series = kvcache.make_history(4).series()
  assert not any(values.size for values in series.values())
  with pytest.raises(ValueError, match="size"):
    kvcache.make_history(0)


def test_counters_wrap():
  history = kvcache.make_history(4)
  samples = np.zeros((4, len(FIELDS)), np.int32)
  at = FIELDS.index("evicted")
  samples[:2, at] = [-2, 3]  # uint32 that passed 2^32
  found = history.replace(samples=samples, num_samples=np.int32(2)).series()
  assert found["evicted"].tolist() == [2**32 - 2, 3]
  assert found["new_evicted"].tolist() == [0, 5]


# --- Why requests waited --------------------------------------------------------------


def test_requests_know_why_they_waited():
  requests = whole()[1]
  waited = [requests.waited(i) for i in range(NUM)]
  # Prompts of nine and a budget of six: the second one starts later.
  assert waited[0] == {}
  assert waited[1][WaitReason.BUDGET] == 1
  # Only two rows: later ones wait for a row.
  assert waited[2][WaitReason.NO_ROW] > 3 and waited[5][WaitReason.NO_ROW] > 3
  preempted = int(np.flatnonzero(requests.num_preemptions)[0])
  assert waited[preempted][WaitReason.NO_BLOCKS] > 0
  text = requests.explain(preempted)
  assert "preempted 1 time" in text and "for blocks" in text
  assert text.startswith(f"request {preempted}: finished (length); 9 prompt tokens")


def test_what_a_request_waits_for_now_counts():
  _, requests, _ = jax.device_get(run(3, size=64))
  assert requests.wait_reason[5] == WaitReason.NO_ROW
  assert requests.waited(5) == {WaitReason.NO_ROW: 3}
  assert requests.num_scheduled < requests.num_steps == 3
  assert "waiting" in requests.explain(5) and "3 for a row" in requests.explain(5)


@jax.jit
def one_step(ctx, requests):
  scheduler = SchedulerConfig(token_budget=8, max_admissions=3, watermark=0)
  return kvcache.serve(toy.model, ctx, requests, scheduler=scheduler, max_steps=1)


@pytest.mark.thorough
@pytest.mark.parametrize(
  ("num_blocks", "num_window_blocks", "why"),
  [
    (60, 9, WaitReason.NO_WINDOW_BLOCKS),
    (11, 60, WaitReason.NO_BLOCKS),
  ],
  ids=["window", "context"],
)
def test_the_pool_that_is_short_is_named(num_blocks, num_window_blocks, why):
  sizes = toy.config(
    sliding_window=7,
    num_blocks=num_blocks,
    block_size=4,
    max_seqs=3,
    max_seq_len=32,
    num_window_blocks=num_window_blocks,
  )
  ctx = toy.fresh(sizes)
  # The last prompt takes several steps, beside two rows that decode.
  prompts = [list(range(5)), list(range(10, 16)), list(range(22))[::-1]]
  requests = toy.make_requests(prompts, [12, 12, 6], num=3, width=33)
  reasons, seen = set(), set()
  while (requests.status != RequestStatus.FINISHED).any():
    before = requests
    ctx, requests = one_step(ctx, before)
    reasons.add(WaitReason(int(requests.wait_reason[2])))
    if requests.wait_reason[2] == why:
      is_sent_back = int(requests.num_preemptions[2] - before.num_preemptions[2])
      seen.add((RequestStatus(int(requests.status[2])).name, is_sent_back))
  # A chunk for which there was no block; a row sent back; a prompt not let in.
  assert seen == {("RUNNING", 0), ("WAITING", 1), ("WAITING", 0)}
  assert reasons == {WaitReason.NONE, WaitReason.BUDGET, why}
  told = "blocks" if why == WaitReason.NO_BLOCKS else "blocks of a window"
  assert f"{int(requests.num_waited[2, why])} for {told}, " in requests.explain(2)


def test_a_refusal_is_explained():
  requests = toy.make_requests(PROMPTS, 12, num=NUM, width=WIDTH)
  requests = requests.replace(
    status=requests.status.at[0].set(2),
    finish_reason=requests.finish_reason.at[0].set(4),
    refusals=requests.refusals.at[0].set(4),
  )
  assert "finished, refused (TOO_LONG)" in requests.explain(0)


# --- What it costs, and what it is called ---------------------------------------------


@functools.cache
def program(*, records):
  ctx = jax.eval_shape(functools.partial(toy.fresh, CONFIG))
  requests = jax.eval_shape(
    lambda: toy.make_requests(PROMPTS, 12, num=NUM, width=WIDTH)
  )
  history = kvcache.make_history(64) if records else None
  lowered = serve.lower(ctx, requests, history, jnp.int32(1))
  return hlo.read(lowered.compile().as_text())


def decode_loop(module):
  """The loop with the most inside, among those in the outer one."""
  (outer,) = [i for i in module.whiles() if "body" in i.callees]
  inner = module.whiles(outer.callees["body"])
  steps = [
    i
    for i in inner
    if any(
      "sample" in j.op_name for j in module.walk(i.callees["body"], into_fusions=True)
    )
  ]
  assert len(steps) == 2  # mixed and decode
  return steps[1].callees["body"]


@pytest.mark.thorough
def test_a_history_costs_the_decode_loop_nothing():
  sizes = [
    sum(1 for _ in module.walk(decode_loop(module), into_fusions=True))
    for module in (program(records=False), program(records=True))
  ]
  assert sizes[0] == sizes[1] > 50


@pytest.mark.thorough
def test_nothing_is_recorded_unless_asked():
  names = [i.op_name for i in program(records=False).walk(into_fusions=True)]
  assert not any("/history/" in name for name in names)
  recorded = [i.op_name for i in program(records=True).walk(into_fusions=True)]
  assert any("/history/" in name for name in recorded)


def test_the_parts_of_the_loop_have_names():
  names = {i.op_name for i in program(records=True).walk(into_fusions=True)}
  for part in ("schedule", "extend", "model", "commit", "sample", "history"):
    assert any(f"/{part}/" in name for name in names), part
  assert not any("/schedule/" in name and "/model/" in name for name in names)


# --- generate -------------------------------------------------------------------------


@pytest.mark.thorough
def test_generate_hands_out_the_history_and_the_context(monkeypatch, capsys):
  monkeypatch.setattr("kvcache.observe.terminal.is_terminal", lambda stream: True)
  parts, maps = [], []

  def look(part):
    parts.append(part)
    maps.append(observe.map_blocks(part.ctx))

  ctx = jax.jit(functools.partial(toy.fresh, CONFIG))()
  _, completions = kvcache.generate(
    toy.model,
    ctx,
    PROMPTS,
    max_new_tokens=12,
    scheduler=SCHEDULER,
    slice_steps=40,
    on_slice=look,
    history=64,
    progress=True,
  )
  shown = capsys.readouterr().err
  assert f"{len(PROMPTS)}/{len(PROMPTS)} finished" in shown and "tokens/s" in shown
  steps = [part.history.series()["step"] for part in parts]
  assert len(parts) > 1 and len(steps[-1]) > len(steps[0])
  np.testing.assert_array_equal(steps[-1][: len(steps[0])], steps[0])
  assert steps[0][-1] == parts[0].num_steps
  first = maps[0]
  assert len(first.rows) == len(parts[0].running) or parts[0].running
  assert set(parts[0].waits.values()) <= set(WaitReason) - {WaitReason.NONE}
  for completion in completions:
    i = completion.request_id
    assert completion.waited.get(WaitReason.NO_ROW, 0) == whole()[1].waited(i).get(
      WaitReason.NO_ROW, 0
    )
