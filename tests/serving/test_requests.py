"""Tests of requests: how they are made, and what one sampled token changes in them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache import FinishReason, make_requests, RequestStatus, SamplingParams, Status
from kvcache.serving import requests as rq

PROMPTS = [[5, 6, 7], [], [8], [9, 9]]


def test_prompts_lie_at_the_front_of_their_rows():
  requests = make_requests(PROMPTS, max_new_tokens=[2, 9, 4, 1])
  assert (requests.num_requests, requests.capacity) == (4, 9)  # [] may get 9 tokens
  lens = np.asarray(requests.prompt_lens)
  assert lens.tolist() == [3, 0, 1, 2]
  for row, length, prompt in zip(requests.tokens, lens, PROMPTS, strict=True):
    assert row[:length].tolist() == prompt and not row[length:].any()
  assert requests.lengths.tolist() == [3, 0, 1, 2]
  assert requests.max_lens.tolist() == [5, 9, 5, 3]


def test_requests_begin_waiting_and_without_a_row():
  requests = make_requests(PROMPTS, max_new_tokens=1)
  for field, value in [
    ("status", RequestStatus.WAITING),
    ("finish_reason", FinishReason.NONE),
    ("refusals", Status.OK),
    ("seq_ids", -1),
    ("priority", 0),
    ("namespaces", 0),
    ("num_cached", 0),
    ("num_preemptions", 0),
  ]:
    array = getattr(requests, field)
    assert array.dtype == jnp.int32 and array.tolist() == [value] * 4, field
  assert int(requests.num_steps) == 0 and requests.logprobs is None


def test_settings_are_kept_for_each_request():
  params = [SamplingParams(temperature=t / 2, seed=2**32 - 1 - t) for t in range(4)]
  requests = make_requests(
    PROMPTS,
    max_new_tokens=1,
    sampling_params=params,
    priority=[-1000, 0, 7, 1000],
    namespace=[3, 2, 1, -1],
    stop_tokens=[[1], [], [2, 3], [4]],
    logprobs=True,
  )
  assert requests.settings.temperature.tolist() == [0.0, 0.5, 1.0, 1.5]
  assert requests.settings.seed.tolist() == [2**32 - 1 - t for t in range(4)]
  assert requests.priority.tolist() == [-1000, 0, 7, 1000]
  assert requests.namespaces.tolist() == [3, 2, 1, -1]
  none = rq.NO_TOKEN
  assert requests.stop_tokens.tolist() == [[1, none], [none, none], [2, 3], [4, none]]
  assert requests.logprobs.shape == requests.tokens.shape


@pytest.mark.parametrize("one", [7, np.int32(7), np.int64(7)])
def test_one_value_serves_all(one):
  stops = [one, 8]
  requests = make_requests(PROMPTS, max_new_tokens=one, stop_tokens=stops)
  assert requests.max_lens.tolist() == [10, 7, 8, 9]
  assert requests.stop_tokens.tolist() == [[7, 8]] * 4


@pytest.mark.parametrize("as_array", [np.array, jnp.array, tuple])
def test_stop_tokens_may_be_arrays(as_array):
  for_all = make_requests(PROMPTS, max_new_tokens=1, stop_tokens=as_array([7, 8]))
  assert for_all.stop_tokens.tolist() == [[7, 8]] * 4
  lists = [as_array([7]), as_array([]), [8, 9], [1]]
  for_each = make_requests(PROMPTS, max_new_tokens=1, stop_tokens=lists)
  assert for_each.stop_tokens.tolist() == [[7, -1], [-1, -1], [8, 9], [1, -1]]


def test_there_is_nothing_to_tell_of_requests_that_do_not_exist():
  requests = make_requests(PROMPTS, max_new_tokens=1)
  assert requests.explain(-1).startswith("request 3: waiting")
  for ask in (requests.explain, requests.waited):
    with pytest.raises(IndexError):
      ask(4)
  batch = jax.tree.map(lambda x: x[None], requests)
  with pytest.raises(ValueError, match=r"requests are a batch of \(1,\)"):
    batch.explain(0)


def test_prompts_may_be_arrays():
  requests = make_requests(
    [np.array([1, 2]), np.array([3], np.int64)], max_new_tokens=1
  )
  assert requests.tokens.tolist() == [[1, 2, 0], [3, 0, 0]]


def test_capacity_bounds_the_buffer_and_not_the_wishes():
  requests = make_requests(PROMPTS, max_new_tokens=2**40, capacity=2)
  assert requests.tokens.tolist() == [[5, 6], [0, 0], [8, 0], [9, 9]]
  assert requests.prompt_lens.tolist() == [3, 0, 1, 2]
  assert requests.max_lens.tolist() == [2**31 - 1] * 4
  assert make_requests(PROMPTS, max_new_tokens=1, capacity=99).capacity == 4


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": [1, 2, -3, 4]}, "max_new_tokens must be at least 1, got -3"),
    ({"max_new_tokens": [1, 2, 3]}, "max_new_tokens has 3 entries for 4 prompts"),
    ({"priority": [0] * 5}, "priority has 5 entries for 4 prompts"),
    ({"priority": [0, 0, 0, 1001]}, "priority must be within +-1000"),
    ({"priority": [0, 0, -1001, 0]}, "priority must be within +-1000"),
    ({"namespace": [1]}, "namespace has 1 entries for 4 prompts"),
    ({"stop_tokens": [[1], [2]]}, "stop_tokens has 2 lists for 4 prompts"),
    ({"sampling_params": []}, "sampling_params has 0 entries for 4 prompts"),
    (
      {"sampling_params": [SamplingParams()] * 3},
      "sampling_params has 3 entries for 4 prompts",
    ),
  ],
)
def test_wrong_arguments_are_named(wrong, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make_requests(PROMPTS, **{"max_new_tokens": 1} | wrong)


def test_no_prompts_are_an_error():
  with pytest.raises(ValueError, match="prompts must not be empty"):
    make_requests([], max_new_tokens=1)


# The running requests by row.


def running(*, capacity=None, max_tokens_per_seq=100):
  """Requests 3 and 0 in rows 0 and 2 of four."""
  requests = make_requests(
    PROMPTS,
    max_new_tokens=[2, 9, 4, 3],
    stop_tokens=[[4], [], [], [0, 1]],
    sampling_params=[SamplingParams(seed=seed) for seed in range(4)],
    logprobs=True,
    capacity=capacity,
  )
  requests = requests.replace(seq_ids=jnp.array([2, -1, -1, 0], jnp.int32))
  batch = rq.load_batch(requests, max_seqs=4, max_tokens_per_seq=max_tokens_per_seq)
  return requests, batch


def test_a_batch_holds_the_requests_of_its_rows():
  requests, batch = running()
  assert rq.request_of_row(requests, 4).tolist() == [3, 4, 0, 4]
  assert batch.request_ids.tolist() == [3, 4, 0, 4]
  assert batch.lengths.tolist() == [2, 0, 3, 0]
  assert batch.max_lens[jnp.array([0, 2])].tolist() == [5, 5]
  assert batch.settings.seed[jnp.array([0, 2])].tolist() == [3, 0]
  assert batch.stop_tokens[jnp.array([0, 2])].tolist() == [[0, 1], [4, rq.NO_TOKEN]]
  assert batch.is_finished.tolist() == [False] * 4


def sampled(batch, requests, tokens, mask=(True, False, True, False)):
  tokens = jnp.array(tokens, jnp.int32)
  logprobs = -tokens.astype(jnp.float32)
  return rq.append(requests, batch, tokens, jnp.array(mask), logprobs=logprobs)


def reasons(batch):
  return [FinishReason(code).name for code in batch.finish_reason.tolist()]


def test_append_writes_only_where_asked():
  before, batch = running()
  requests, after = sampled(batch, before, [20, 21, 22, 23], [True, False, False, True])
  assert requests.tokens[3].tolist() == [9, 9, 20] + [0] * 6
  assert requests.logprobs[3].tolist() == [0, 0, -20] + [0] * 6
  assert requests.tokens[:3].tolist() == before.tokens[:3].tolist()
  assert not requests.logprobs[:3].any()
  assert after.lengths[:3].tolist() == [3, 0, 3]
  stored = rq.store_batch(requests, after)
  assert stored.lengths.tolist() == [3, 0, 1, 3]
  assert stored.finish_reason.tolist() == [FinishReason.NONE] * 4


def test_a_request_ends_by_length_or_stop_token():
  requests, batch = running()
  requests, batch = sampled(batch, requests, [20, 0, 21, 0])
  assert reasons(batch) == ["NONE"] * 4
  requests, batch = sampled(batch, requests, [1, 0, 1, 0])
  # Token 1 ends request 3 and is none of request 0's stop tokens; that one is complete.
  assert reasons(batch) == ["STOP", "NONE", "LENGTH", "NONE"]
  assert batch.is_finished.tolist() == [True, False, True, False]
  requests = rq.store_batch(requests, batch)
  assert requests.tokens[0, :6].tolist() == [5, 6, 7, 21, 1, 0]
  names = [FinishReason(code).name for code in requests.finish_reason.tolist()]
  assert names == ["LENGTH", "NONE", "NONE", "STOP"]


def test_a_stop_token_counts_before_length_and_capacity():
  requests, batch = running(max_tokens_per_seq=3)
  _, batch = sampled(batch, requests, [20, 0, 4, 0])
  assert reasons(batch) == ["NONE", "NONE", "STOP", "NONE"]
  requests, batch = running()
  requests, batch = sampled(batch, requests, [20, 0, 20, 0])
  _, batch = sampled(batch, requests, [20, 0, 4, 0])
  assert reasons(batch) == ["NONE", "NONE", "STOP", "NONE"]


@pytest.mark.parametrize("limit", ["row", "buffer"])
def test_a_request_ends_where_its_row_or_the_buffer_does(limit):
  # A row that stores 3 tokens can sample a fourth, which is never stored.
  sizes = {"max_tokens_per_seq": 3} if limit == "row" else {"capacity": 4}
  requests, batch = running(**sizes)
  requests, batch = sampled(batch, requests, [20, 0, 20, 0])
  assert reasons(batch) == ["NONE", "NONE", "CAPACITY", "NONE"]
  assert requests.tokens[0, :4].tolist() == [5, 6, 7, 20]
