"""Windows, sinks, caps, latent and quantised K/V: the fast path against the plain one.

The plain one is itself held against float64 in `test_attention`. Every slot that no
query of the step may see is NaN, those behind a window too.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache.parts import kv
from pallas_kernels.paged_attention import paged_attention, reference, xla
from pallas_kernels.paged_attention.call import Call
from tests.fixtures.thorough import more
from tests.verbs.test_attention import Batch, BLOCK, CHUNKS, D, K, LENGTHS, S

GROUP = 2
DV = 5
SINKS = jnp.linspace(-2.0, 3.0, K * GROUP)
STATIC = ("max_query_len", "sliding_window", "logits_soft_cap", "v_head_dim")

VARIANTS = {
  "window of one": {"sliding_window": 1},
  "window of a block": {"sliding_window": BLOCK},
  "window across tiles": {"sliding_window": 131},
  "window longer than all": {"sliding_window": 10_000},
  "sinks": {"sinks": SINKS},
  "soft cap": {"logits_soft_cap": 0.7},
  "all at once": {"sliding_window": 6, "sinks": SINKS, "logits_soft_cap": 2.0},
}
STORES = ["plain", "narrow values", "latent", "int8", "fp8", "latent int8"]


@functools.partial(jax.jit, static_argnames=STATIC)
def fast(*args, **kwargs):
  return paged_attention(*args, return_lse=True, implementation="xla", **kwargs)


def hide_what_is_behind(batch: Batch, window: int) -> None:
  """Makes NaN of what stands before the window of every query."""
  k, v = np.array(batch.k), np.array(batch.v)
  for row, length in enumerate(batch.lengths):
    first = length - int(batch.query_lens[row]) - window + 1
    for position in range(max(first, 0) if length else 0):
      at = batch.tables[row, position // BLOCK], slice(None), position % BLOCK
      k[at] = v[at] = np.nan
  batch.k, batch.v = jnp.asarray(k), jnp.asarray(v)


def arguments(batch: Batch, store: str):
  """The positional arguments and options of a batch kept in such a store."""
  q, k, v, *rest = batch.arguments
  options = {}
  if store == "narrow values":
    v = v[..., :DV]
  if store.startswith("latent"):
    v, options["v_head_dim"] = None, DV
  if store.endswith(("int8", "fp8")):
    dtype = jnp.int8 if store.endswith("int8") else jnp.float8_e4m3fn
    k, options["k_scale"] = kv.quantise(k, dtype)
    if v is not None:
      v, options["v_scale"] = kv.quantise(v, dtype)
  return (q, k, v, *rest), options


@pytest.mark.parametrize("chunks", [CHUNKS, *more(None)], ids=["packed", "decode"])
@pytest.mark.parametrize(
  ("variant", "store"),
  [
    *itertools.product(["all at once"], STORES),
    (None, "plain"),
    *more(
      *((variant, "plain") for variant in VARIANTS if variant != "all at once"),
      *((None, store) for store in STORES[1:]),
    ),
  ],
)
def test_variants_agree_with_the_plain_reference(chunks, variant, store):
  options = VARIANTS[variant] if variant else {}
  batch = Batch(GROUP, chunks=chunks, seed=3)
  if window := options.get("sliding_window"):
    hide_what_is_behind(batch, window)
  args, kept = arguments(batch, store)
  options = options | kept
  out, lse = fast(*args, **options, max_query_len=batch.max_query_len)
  live = batch.live
  q = jnp.where(live[:, None, None], args[0], 0.0)
  want, want_lse = reference.paged_attention(
    Call(q, *args[1:], sm_scale=D**-0.5, **options)
  )
  assert np.isfinite(want[live]).all()
  np.testing.assert_allclose(out[live], want[live], rtol=5e-5, atol=5e-6)
  np.testing.assert_allclose(lse[live], want_lse[live], rtol=5e-5, atol=5e-6)
  assert not out[~live].any()
  assert (lse[~live] == -np.inf).all()


@pytest.mark.parametrize(
  ("window", "rounds"),
  [(72, 1), (73, 2), *more((1, 1), (200, 2), (201, 3), (999, 8))],
)
def test_a_window_costs_a_window(monkeypatch, window, rounds):
  """A row of 968 tokens ends 72 tokens into the eighth tile of 128."""
  counts = []

  def while_loop(condition, body, state):
    def counted(carry):
      return carry[0] + 1, body(carry[1])

    count, state = jax.lax.while_loop(
      lambda carry: condition(carry[1]), counted, (jnp.int32(0), state)
    )
    counts.append(int(count))
    return state

  # Not as it is compiled for eager callers, which would trace it apart.
  monkeypatch.setattr(xla, "paged_attention", xla.paged_attention.__wrapped__)
  monkeypatch.setattr(xla, "lax", types.SimpleNamespace(while_loop=while_loop))
  pool = jnp.ones((300, 1, BLOCK, 2))
  table = jnp.arange(1, 251, dtype=jnp.int32)[None]
  lens, starts = jnp.array([968]), jnp.array([0, 1])
  q = jnp.ones((1, 1, 2))
  paged_attention(
    *(q, pool, pool, table, lens, starts), max_query_len=1, sliding_window=window
  )
  assert counts == [rounds]


def test_a_sink_alone_takes_its_share():
  """One visible token with logit 0 and a sink of log 3: a quarter of the value."""
  k, v = jnp.zeros((2, 1, 1, D)), jnp.ones((2, 1, 1, D))
  ids = jnp.ones((1, 1), jnp.int32), jnp.array([1]), jnp.array([0, 1])
  sinks = jnp.log(jnp.array([3.0]))
  out, lse = fast(jnp.ones((1, 1, D)), k, v, *ids, sinks=sinks, max_query_len=1)
  np.testing.assert_allclose(out, 0.25, rtol=1e-6)
  np.testing.assert_allclose(lse, np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize(
  "options", [VARIANTS["all at once"], {"sliding_window": 131}], ids=["all", "window"]
)
def test_neighbours_do_not_change_bits(options):
  batch = Batch(GROUP, chunks=None, seed=5)
  args, _ = arguments(batch, "plain")
  out, lse = fast(*args, **options, max_query_len=1)
  for row in (3, 6):
    lens = jnp.zeros_like(args[4]).at[row].set(LENGTHS[row])
    alone = fast(*args[:4], lens, args[5], **options, max_query_len=1)
    np.testing.assert_array_equal(alone[0][row], out[row])
    np.testing.assert_array_equal(alone[1][row], lse[row])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"sinks": jnp.zeros(3)}, r"sinks must be \[4\], got \(3,\)"),
    ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap must be positive, got 0.0"),
    ({"k_scale": jnp.zeros((S, K))}, r"k_scale must be .*, got \(8, 2\)"),
    ({"v_scale": jnp.zeros((S, K))}, r"v_scale must be .*, got \(8, 2\)"),
    ({"v_head_dim": 3}, "v_head_dim must be that of v .*, got 3"),
  ],
)
def test_bad_options_are_named(options, message):
  args, _ = arguments(Batch(GROUP, chunks=None), "plain")
  with pytest.raises(ValueError, match=message):
    paged_attention(*args, **options)


@pytest.mark.parametrize("v_head_dim", [None, 0, D + 1])
def test_a_latent_cache_needs_the_width_of_its_values(v_head_dim):
  (q, k, _, *rest), _ = arguments(Batch(GROUP, chunks=None), "plain")
  with pytest.raises(ValueError, match=f"from 1 to {D} without v, got {v_head_dim}"):
    paged_attention(q, k, None, *rest, v_head_dim=v_head_dim)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_quantised_elements_need_scales(dtype):
  (q, k, v, *rest), _ = arguments(Batch(GROUP, chunks=None), "plain")
  with pytest.raises(ValueError, match=f"k_scale is missing for elements of {dtype}"):
    paged_attention(q, k.astype(dtype), v, *rest)


def test_values_that_are_part_of_the_keys_have_no_scales_of_their_own():
  (q, k, _, *rest), options = arguments(Batch(GROUP, chunks=None), "latent int8")
  with pytest.raises(ValueError, match="v_scale must be None without v"):
    paged_attention(q, k, None, *rest, **options, v_scale=options["k_scale"])


# Through a Context.


@functools.partial(jax.jit, static_argnames="options")
def prompt_then_token(ctx, q, k, v, options=()):
  """Attends from a prompt of 9 tokens and then from one more, each in its own step."""
  ctx, _ = kvcache.admit(ctx, jnp.arange(9)[None], jnp.array([9]))
  outs = []
  for start, stop, num_tokens in ((0, 9, 9), (9, 10, None)):
    query_lens = jnp.array([stop - start])
    ctx, _ = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
    metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
    values = None if v is None else v[start:stop]
    ctx = kvcache.write_kv(ctx, 0, k[start:stop], values, metadata)
    outs.append(kvcache.attend(ctx, 0, q[start:stop], metadata, **dict(options)))
    ctx = kvcache.commit(ctx, jnp.arange(start, stop), metadata)
  return jnp.concatenate(outs)


@pytest.mark.parametrize(
  ("dtype", "is_latent", "options"),
  [
    ("int8", True, ()),
    ("float8_e4m3fn", False, (("sliding_window", 4),)),
    *more(("float32", False, ()), ("float32", True, (("sliding_window", 4),))),
  ],
)
def test_steps_over_a_context_equal_dense_attention(dtype, is_latent, options):
  layer = kvcache.AttentionLayer(
    num_kv_heads=K, head_dim=D, v_head_dim=DV, is_latent=is_latent, dtype=dtype
  )
  config = kvcache.CacheConfig(layers=(layer,), num_blocks=8, block_size=4, max_seqs=1)
  keys = jax.random.split(jax.random.key(7), 3)
  q = jax.random.normal(keys[0], (10, K, D))
  k = jax.random.normal(keys[1], (10, K, D))
  v = None if is_latent else jax.random.normal(keys[2], (10, K, DV))
  out = prompt_then_token(kvcache.init(config), q, k, v, options)

  def kept(x):
    return x if dtype == "float32" else kv.dequantise(*kv.quantise(x, dtype))

  k, v = kept(k), kept(k)[..., :DV] if v is None else kept(v)
  logits = np.einsum("qhd,thd->hqt", q, k) * D**-0.5
  distance = np.arange(10)[:, None] - np.arange(10)
  seen = (distance >= 0) & (distance < dict(options).get("sliding_window", 99))
  weights = np.where(seen, np.exp(logits), 0)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum("hqt,thd->qhd", weights, v)
  assert out.shape == (10, K, DV)
  np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("is_latent", [False, True])
def test_values_go_with_layers_that_keep_them(is_latent):
  layer = kvcache.AttentionLayer(num_kv_heads=K, head_dim=D, is_latent=is_latent)
  config = kvcache.CacheConfig(layers=(layer,), num_blocks=8, block_size=4, max_seqs=1)
  k = jnp.ones((10, K, D))
  with pytest.raises(ValueError, match=r"v must (be None|have shape .*got None)"):
    prompt_then_token(kvcache.init(config), k, k, k if is_latent else None)
