"""What cannot be right is refused at trace time, by name and shape, in every verb."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache.parts import arguments
from tests.fixtures import small

# The sizes of `small`: S = 4, T = 16, K = 1, D = 2.
TOKENS = jnp.zeros((3, 8), jnp.int32)
LENGTHS = jnp.ones(3, jnp.int32)
ROWS = jnp.zeros(4, jnp.int32)
PACKED = jnp.zeros(16, jnp.int32)
KV = jnp.zeros((16, 1, 2))
HALVES = jnp.ones(4) / 2


@pytest.fixture(scope="module")
def ctx():
  return small.empty()


@pytest.fixture(scope="module")
def metadata(ctx):
  return small.step(ctx, PACKED, ROWS, num_tokens=16)[2]


def assert_refused(verb, *args, message, **kwargs):
  """The verb raises, in a trace and outside of one."""
  with pytest.raises(ValueError, match=re.escape(message)):
    verb(*args, **kwargs)
  with pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(lambda *args: verb(*args, **kwargs), *args)


@pytest.mark.parametrize(
  ("tokens", "lengths", "message"),
  [
    (TOKENS[0], LENGTHS, "tokens must have 2 dimensions, got shape (8,)"),
    (TOKENS[None], LENGTHS, "tokens must have 2 dimensions, got shape (1, 3, 8)"),
    (TOKENS / 2, LENGTHS, "tokens must be integers, got float32[3, 8]"),
    (TOKENS > 0, LENGTHS, "tokens must be integers, got bool[3, 8]"),
    (TOKENS, LENGTHS[:2], "lengths must have shape (3,), got (2,)"),
    (TOKENS, jnp.int32(1), "lengths must have shape (3,), got ()"),
    (TOKENS, LENGTHS / 2, "lengths must be integers, got float32[3]"),
  ],
)
@pytest.mark.parametrize("verb", [kvcache.admit, kvcache.find])
def test_admit_and_find(ctx, verb, tokens, lengths, message):
  assert_refused(verb, ctx, tokens, lengths, message=message)


@pytest.mark.parametrize("verb", [kvcache.admit, kvcache.find])
@pytest.mark.parametrize(
  ("namespace", "message"),
  [
    (LENGTHS[:2], "namespace must have shape () or (3,), got (2,)"),
    (LENGTHS[:1], "namespace must have shape () or (3,), got (1,)"),
    (0.5, "namespace must be integers, got float32[]"),
  ],
)
def test_namespaces(ctx, verb, namespace, message):
  assert_refused(verb, ctx, TOKENS, LENGTHS, namespace=namespace, message=message)


@pytest.mark.parametrize(
  ("budget", "message"),
  [
    (LENGTHS, "block_budget must have shape (), got (3,)"),
    (1.5, "block_budget must be integers, got float32[]"),
  ],
)
def test_budgets(ctx, budget, message):
  # Only in a trace: outside, `admit` publishes before it reads the budget.
  with pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(
      lambda c: kvcache.admit(c, TOKENS, LENGTHS, block_budget=budget), ctx
    )


def extend(ctx, query_lens, order=None):
  return kvcache.extend(ctx, query_lens, num_tokens=16, order=order)


@pytest.mark.parametrize(
  ("verb", "name"),
  [
    (extend, "query_lens"),
    (kvcache.step_metadata, "query_lens"),
    (kvcache.rewind, "num_tokens"),
  ],
)
def test_numbers_for_each_row(ctx, verb, name):
  for value, message in (
    (ROWS[:3], "must have shape (4,), got (3,)"),
    (ROWS[None], "must have shape (4,), got (1, 4)"),
    (HALVES, "must be integers, got float32[4]"),
  ):
    assert_refused(verb, ctx, value, message=f"{name} {message}")


def test_orders(ctx):
  assert_refused(
    extend, ctx, ROWS, ROWS[:2], message="order must have shape (4,), got (2,)"
  )
  assert_refused(
    extend, ctx, ROWS, HALVES, message="order must be integers, got float32[4]"
  )


def test_sources_of_forks(ctx):
  message = "src must have 1 dimensions, got shape ()"
  assert_refused(kvcache.fork, ctx, jnp.int32(0), message=message)
  message = "src must be integers, got float32[4]"
  assert_refused(kvcache.fork, ctx, HALVES, message=message)


@pytest.mark.parametrize("keep_prefix", [True, False])
def test_masks(ctx, keep_prefix):
  for mask, got in ((ROWS, "int32[4]"), (ROWS[:3] > 0, "bool[3]"), (True, "bool[]")):
    message = f"mask must be bool[4], got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
      jax.eval_shape(
        lambda c, m=mask: kvcache.finish(c, m, keep_prefix=keep_prefix), ctx
      )


def test_counts(ctx):
  message = "count must have shape (), got (4,)"
  assert_refused(kvcache.evict, ctx, ROWS, message=message)
  message = "count must be integers, got float32[]"
  assert_refused(kvcache.evict, ctx, 1.5, message=message)


def test_keys_and_values(ctx, metadata):
  def write(ctx, k, v):
    return kvcache.write_kv(ctx, 0, k, v, metadata)

  message = "k must have shape (16, 1, 2), got (15, 1, 2)"
  assert_refused(write, ctx, KV[1:], KV, message=message)
  message = "v must have shape (16, 1, 2), got (16, 2)"
  assert_refused(write, ctx, KV, KV[:, 0], message=message)


def test_queries(ctx, metadata):
  def attend(ctx, q):
    return kvcache.attend(ctx, 0, q, metadata)

  message = "q must be [16, H, D], got (4, 1, 2)"
  assert_refused(attend, ctx, KV[:4], message=message)
  message = "q must be [16, H, D], got (16, 2)"
  assert_refused(attend, ctx, KV[:, 0], message=message)


def test_committed_tokens(ctx, metadata):
  def commit(ctx, tokens, accepted=None):
    return kvcache.commit(ctx, tokens, metadata, accepted=accepted)

  message = "tokens must have shape (16,), got (4,)"
  assert_refused(commit, ctx, ROWS, message=message)
  message = "tokens must be integers, got float32[16]"
  assert_refused(commit, ctx, PACKED / 2, message=message)
  message = "accepted must have shape (4,), got (16,)"
  assert_refused(commit, ctx, PACKED, PACKED, message=message)
  message = "accepted must be integers, got float32[4]"
  assert_refused(commit, ctx, PACKED, HALVES, message=message)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint32])
def test_every_integer_type_is_read_as_int32(dtype):
  array = arguments.as_int32("x", np.array([3, 4], dtype), shape=(2,))
  assert array.dtype == jnp.int32 and array.tolist() == [3, 4]
  assert arguments.as_int32("x", [5, 6]).tolist() == [5, 6]
  assert arguments.as_int32("x", 7, shape=()) == 7


def test_one_namespace_serves_all_prompts():
  assert arguments.as_namespaces(7, 3).tolist() == [7, 7, 7]
  assert arguments.as_namespaces([7, -8, 9], 3).tolist() == [7, -8, 9]
