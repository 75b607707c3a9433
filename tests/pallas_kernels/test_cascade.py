"""Partial attention: merged parts are the whole, shared prefixes change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache.parts import kv
from pallas_kernels.paged_attention import (
  cascade,
  cascade_attention,
  merge,
  paged_attention,
)
from tests.fixtures.thorough import more

S, H, K, D, BLOCK, P, N = 5, 4, 2, 8, 4, 48, 128
LENGTHS = np.array([170, 161, 0, 165, 180], np.int32)
NUM_SHARED = 40  # blocks, 160 tokens: more than one tile of keys
SINKS = jnp.linspace(-1.0, 2.0, H)


@pytest.fixture
def scene():
  """Rows whose first 40 blocks are the same, and NaN wherever no token is."""
  rng = np.random.default_rng(0)
  ids = rng.permutation(np.arange(1, N)).astype(np.int32)
  tables = np.zeros((S, P), np.int32)
  tables[:, :NUM_SHARED] = ids[:NUM_SHARED]
  tables[:, NUM_SHARED:] = ids[NUM_SHARED : NUM_SHARED + S * 8].reshape(S, 8)
  pools = np.full((2, N, K, BLOCK, D), np.nan, np.float32)
  for row, length in enumerate(LENGTHS):
    for t in range(length):
      if t >= NUM_SHARED * BLOCK or row == 0:
        pools[:, tables[row, t // BLOCK], :, t % BLOCK] = rng.normal(size=(2, K, D))
  return tables, *map(jnp.asarray, pools)


def queries(chunks, lengths=LENGTHS):
  """`q` with NaN padding, starts, lengths, and which tokens are live."""
  if chunks is None:
    starts, live = np.arange(S + 1), lengths > 0
  else:
    starts = np.append(0, np.cumsum(chunks))
    live = np.arange(24) < starts[-1]
    lengths = np.where(np.array(chunks) > 0, lengths, 0)
  q = np.random.default_rng(1).normal(size=(live.size, H, D))
  q = np.where(live[:, None, None], q, np.nan).astype(np.float32)
  return jnp.asarray(q), starts.astype(np.int32), lengths.astype(np.int32), live


@functools.partial(jax.jit, static_argnames=("max_query_len", "logits_soft_cap"))
def both(*args, num_prefix_blocks, shares=None, **options):
  shared = cascade_attention(
    *args, num_prefix_blocks=num_prefix_blocks, shares=shares, **options
  )
  return shared, paged_attention(*args, **options)


@pytest.mark.parametrize("num_prefix_blocks", [32, *more(0, 1, NUM_SHARED)])
@pytest.mark.parametrize("chunks", [None, [10, 1, 0, 5, 4]], ids=["decode", "packed"])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS, "logits_soft_cap": 2.0}])
def test_a_shared_prefix_changes_nothing(scene, chunks, num_prefix_blocks, options):
  tables, k, v = scene
  q, starts, lengths, live = queries(chunks)
  shared, plain = both(
    *(q, k, v, tables, lengths, starts),
    num_prefix_blocks=jnp.int32(num_prefix_blocks),
    max_query_len=1 if chunks is None else None,
    **options,
  )
  np.testing.assert_allclose(shared[live], plain[live], rtol=2e-5, atol=2e-6)
  assert not shared[~live].any()
  assert np.abs(plain[live]).min(axis=(1, 2)).all()


@pytest.fixture
def mixed(scene):
  """The scene, but row 3 has blocks of its own and row 0 ends inside the prefix."""
  tables, k, v = scene
  spare = np.setdiff1d(np.arange(1, N), tables)[:NUM_SHARED]
  tables = tables.copy()
  tables[3, :NUM_SHARED] = spare
  pools = np.random.default_rng(3).normal(size=(2, NUM_SHARED, K, BLOCK, D))
  k, v = k.at[spare].set(pools[0]), v.at[spare].set(pools[1])
  return tables, k, v, np.array([100, 161, 0, 165, 180], np.int32)


@pytest.mark.parametrize("num_prefix_blocks", [25, *more(0, 1, NUM_SHARED, P + 1)])
@pytest.mark.parametrize(
  "chunks",
  # Row 4's queries begin behind the prefix, at it, before it; it is not in the step.
  [None, [3, 1, 0, 5, 4], [0, 0, 0, 3, 20], [2, 0, 0, 0, 21], [3, 0, 0, 5, 0]],
  ids=["decode", "behind", "at", "before", "nobody"],
)
@pytest.mark.parametrize("is_told", [False, *more(True)], ids=["found", "told"])
def test_rows_that_do_not_share_are_served_too(
  mixed, chunks, num_prefix_blocks, is_told
):
  tables, k, v, lengths = mixed
  q, starts, lengths, live = queries(chunks, lengths)
  shares = {"shares": jnp.array([True, True, False, False, True])} if is_told else {}
  shared, plain = both(
    *(q, k, v, tables, lengths, starts),
    num_prefix_blocks=jnp.int32(num_prefix_blocks),
    max_query_len=1 if chunks is None else None,
    sinks=SINKS,
    **shares,
  )
  np.testing.assert_allclose(shared[live], plain[live], rtol=2e-5, atol=2e-6)
  assert not shared[~live].any()
  assert np.abs(plain[live]).min(axis=(1, 2)).all()


def test_what_is_shared_is_read_from_one_row_alone(mixed):
  """Row 4's own columns of the prefix are not read if row 1's stand for them."""
  tables, k, v, lengths = mixed
  q, starts, lengths, live = queries(None, lengths)
  sharing = np.array([False, True, False, False, True])
  _, plain = both(
    *(q, k, v, tables, lengths, starts), num_prefix_blocks=0, max_query_len=1
  )
  tables = tables.copy()
  tables[4, :NUM_SHARED] = 0  # NaN
  shared, _ = both(
    *(q, k, v, tables, lengths, starts),
    num_prefix_blocks=NUM_SHARED,
    max_query_len=1,
    shares=jnp.asarray(sharing),
  )
  np.testing.assert_allclose(shared[live], plain[live], rtol=2e-5, atol=2e-6)


def test_rows_that_share_are_found(mixed, monkeypatch):
  """Though the first row of the step, which ends inside the prefix, has another."""
  tables, k, v, lengths = mixed
  tables[0] = tables[3]
  q, starts, lengths, _ = queries(None, lengths)
  seen = []

  def record(*args, **options):
    seen.append(np.asarray(args[4]).tolist())
    return jnp.zeros((S, H, D)), jnp.zeros((S, H))

  monkeypatch.setattr(cascade, "paged_attention", record)
  args = map(jnp.asarray, (q, k, v, tables, lengths, starts))
  cascade_attention(*args, num_prefix_blocks=NUM_SHARED)
  assert seen == [[160], [100, 1, 0, 165, 20]]


def test_quantised_prefixes_are_shared_too(scene):
  tables, k, v = scene
  q, starts, lengths, live = queries(None)
  (k, k_scale), (v, v_scale) = kv.quantise(k, "int8"), kv.quantise(v, "int8")
  shared, plain = both(
    *(q, k, v, tables, lengths, starts),
    num_prefix_blocks=NUM_SHARED,
    max_query_len=1,
    k_scale=k_scale,
    v_scale=v_scale,
  )
  np.testing.assert_allclose(shared[live], plain[live], rtol=2e-5, atol=2e-6)


def test_nobody_in_the_step_gives_zeros(scene):
  tables, k, v = scene
  q, starts, lengths, _ = queries(None)
  shared, _ = both(
    *(q, k, v, tables, np.zeros_like(lengths), starts),
    num_prefix_blocks=NUM_SHARED,
    max_query_len=1,
  )
  assert not shared.any()


def test_merged_parts_are_the_softmax_over_all():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(3, 2, 30)) * 30
  values = rng.normal(size=(30, 4))

  def part(at):
    weights = np.exp(logits[..., at] - logits[..., at].max(-1, keepdims=True))
    total = weights.sum(-1)
    lse = np.log(total) + logits[..., at].max(-1)
    out = weights @ values[at] / total[..., None]
    return jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)

  cuts = [slice(0, 1), slice(1, 20), slice(20, 30)]
  out, lse = merge([part(at) for at in cuts])
  want, want_lse = part(slice(0, 30))
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_a_part_that_sees_nothing_has_no_influence():
  some = jnp.full((1, 1, 2), 3.0), jnp.array([[1.5]])
  none = jnp.full((1, 1, 2), jnp.nan), jnp.array([[-jnp.inf]])
  for parts in ([some, none], [none, some]):
    out, lse = merge(parts)
    assert out.tolist() == [[[3.0, 3.0]]] and lse.tolist() == [[1.5]]
  out, lse = merge([none, none])
  assert out.tolist() == [[[0.0, 0.0]]] and lse.tolist() == [[-np.inf]]


def test_misuse_is_named(scene):
  tables, k, v = scene
  q, starts, lengths, _ = queries(None)
  args = (q, k, v, tables, lengths, starts)
  with pytest.raises(ValueError, match="at least one"):
    merge([])
  with pytest.raises(ValueError, match="sliding_window is no option"):
    cascade_attention(*args, num_prefix_blocks=1, sliding_window=3)
  with pytest.raises(ValueError, match=r"shares must be \[5\] bool, got \(4,\) bool"):
    cascade_attention(*args, num_prefix_blocks=1, shares=jnp.ones(4, bool))
  with pytest.raises(ValueError, match="sliding_window needs is_causal"):
    paged_attention(*args, sliding_window=3, is_causal=False)
