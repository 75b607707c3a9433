"""The Triton kernels: right in interpret mode, and lowered for every named shape.

Interpret mode runs the kernels' bodies in XLA. Three programs share the queue, and
pieces are as short as a tile, so that every row of some length is split and combined.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.paged_attention import (
  paged_attention,
  reference,
  triton,
  triton_walk,
)
from pallas_kernels.paged_attention.arg_specs import named
from pallas_kernels.paged_attention.call import Call
from tests.aot import deviceless
from tests.fixtures.thorough import more
from tests.pallas_kernels.test_attention_variants import (
  arguments,
  hide_what_is_behind,
  VARIANTS,
)
from tests.verbs.test_attention import Batch, CHUNKS, LENGTHS

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
D = 48  # in two parts, of 32 and 16
STATIC = (
  "max_query_len",
  "sliding_window",
  "logits_soft_cap",
  "v_head_dim",
  "is_causal",
)
BOTH = pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(triton, "_NUM_PROGRAMS", 3)
  monkeypatch.setattr(triton, "_MIN_SPLIT", 64)


@functools.partial(jax.jit, static_argnames=STATIC)
def interpreted(q, k, v, *ids, **options):
  call = Call(q, k, v, *ids, sm_scale=q.shape[-1] ** -0.5, **options)
  return triton.paged_attention(call, interpret=True)


def check(batch, args, options, *, tolerance=5e-6):
  """Against the plain reference; dead memory holds NaN."""
  out, lse = interpreted(*args, **options, max_query_len=batch.max_query_len)
  live = batch.live
  q = jnp.where(live[:, None, None], args[0], 0.0)
  call = Call(q, *args[1:], sm_scale=q.shape[-1] ** -0.5, **options)
  want, want_lse = reference.paged_attention(call)
  assert out.dtype == args[0].dtype and np.isfinite(want[live]).all()
  out, want = (x.astype(jnp.float32) for x in (out, want))
  np.testing.assert_allclose(out[live], want[live], rtol=10 * tolerance, atol=tolerance)
  np.testing.assert_allclose(
    lse[live], want_lse[live], rtol=10 * tolerance, atol=tolerance
  )
  assert not out[~live].any()
  assert (lse[~live] == -np.inf).all()


@BOTH
@pytest.mark.parametrize("group", [3, *more(1)])
def test_every_length_is_right(chunks, group):
  batch = Batch(group, chunks=chunks, head_dim=D)
  check(batch, batch.arguments, {})


@pytest.mark.parametrize(
  ("chunks", "variant", "store"),
  [
    (None, "all at once", "plain"),
    (CHUNKS, "sinks", "int8"),
    *more(
      (None, "soft cap", "latent int8"),
      (CHUNKS, "all at once", "plain"),
      (None, "window across tiles", "fp8"),
      (CHUNKS, None, "latent"),
    ),
  ],
)
def test_variants_agree_with_the_plain_reference(monkeypatch, chunks, variant, store):
  monkeypatch.setattr("tests.pallas_kernels.test_attention_variants.DV", 32)
  options = VARIANTS[variant] if variant else {}
  batch = Batch(2, chunks=chunks, seed=3, head_dim=D)
  if window := options.get("sliding_window"):
    hide_what_is_behind(batch, window)
  args, kept = arguments(batch, store)
  check(batch, args, options | kept)


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_good_as_its_inputs(chunks, dtype):
  batch = Batch(2, chunks=chunks, dtype=dtype, head_dim=64)
  check(batch, batch.arguments, {}, tolerance=0.01)


def test_keys_wider_than_their_values_and_queries_wider_than_both():
  batch = Batch(2, chunks=None, head_dim=D)
  q, k, v, *ids = batch.arguments
  args = (q, k.astype(jnp.bfloat16), v[..., :32], *ids)
  check(batch, args, {})


@pytest.mark.thorough
def test_rows_that_are_seen_whole():
  """Without causality: the queries of a shared prefix, as in cascade attention."""
  batch = Batch(2, chunks=CHUNKS, head_dim=D)
  q, k, v, tables, *_ = batch.arguments
  q = jnp.where(batch.live[:, None, None], q, 0.0)
  ids = (tables[6:7], jnp.array([129]), jnp.array([0, q.shape[0]]))
  out, lse = interpreted(q, k, v, *ids, is_causal=False)
  want = paged_attention(
    q, k, v, *ids, is_causal=False, return_lse=True, implementation="xla"
  )
  np.testing.assert_allclose(out, want[0], rtol=5e-5, atol=5e-6)
  np.testing.assert_allclose(lse, want[1], rtol=5e-5, atol=5e-6)


@BOTH
def test_neighbours_do_not_change_bits(chunks):
  batch = Batch(2, chunks=chunks, seed=5, head_dim=D)
  args, most = batch.arguments, batch.max_query_len
  out, lse = interpreted(*args, max_query_len=most)
  for row in (4, 7):
    lens = jnp.zeros_like(args[4]).at[row].set(LENGTHS[row])
    mine = slice(*batch.starts[row : row + 2].tolist())
    alone = interpreted(*args[:4], lens, args[5], max_query_len=most)
    np.testing.assert_array_equal(alone[0][mine], out[mine])
    np.testing.assert_array_equal(alone[1][mine], lse[mine])


@pytest.mark.thorough
@pytest.mark.parametrize("store", ["fp8", "latent int8"])
def test_pairs_of_elements_are_the_elements(monkeypatch, store):
  """And so are elements that are put together of their bits."""
  monkeypatch.setattr("tests.pallas_kernels.test_attention_variants.DV", 32)
  batch = Batch(2, chunks=None, seed=3, head_dim=D)
  args, options = arguments(batch, store)

  def run():
    # A function of its own, since how it is traced is no argument.
    traced = jax.jit(lambda *args: interpreted.__wrapped__(*args, **options))
    return traced(*args)

  whole = run()
  monkeypatch.setattr(triton, "_MAX_OFFSET", 100)
  monkeypatch.setattr(device, "has_float8", lambda: False)
  for x, y in zip(run(), whole, strict=True):
    np.testing.assert_array_equal(x, y)


def test_floats_of_eight_bits_are_made_of_their_bits():
  bits = jnp.arange(256).astype(jnp.uint8)
  want = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float16)
  np.testing.assert_array_equal(jax.jit(triton_walk.float8)(bits), want)
  assert np.isfinite(want).sum() == 254


def test_ids_outside_of_the_pool_are_never_followed():
  batch = Batch(1, chunks=None, head_dim=D)
  q, k, v, tables, lens, starts = batch.arguments
  k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)
  wild = jnp.where(tables % 2 == 0, -7, tables)
  tame = jnp.where(tables % 2 == 0, 0, tables)
  out, _ = interpreted(q, k, v, wild, lens * 100, starts, max_query_len=1)
  want, _ = interpreted(q, k, v, tame, lens * 100, starts, max_query_len=1)
  np.testing.assert_array_equal(out, want)


# --- Lowering -------------------------------------------------------------------------


def lower(spec, implementation, *, num_tokens, max_query_len):
  shapes = spec.shapes(
    num_seqs=4, num_blocks=64, max_blocks=1024 // spec.block_size, num_tokens=num_tokens
  )
  run = functools.partial(
    paged_attention,
    implementation=implementation,
    max_query_len=max_query_len,
    **spec.options,
  )
  return deviceless.lower(run, **shapes).as_text()


def test_the_best_on_a_gpu_is_triton():
  text = lower(named("llama-3-8b"), None, num_tokens=4, max_query_len=1)
  assert text.count("__gpu$xla.gpu.triton") == 2


def test_what_triton_cannot_serve_is_served_by_xla():
  q, k = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 2, 20), (9, 2, 4, 20))
  )
  ids = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4, 2), (4,), (5,))]
  text = deviceless.lower(paged_attention, q, k, k, *ids).as_text()
  assert "triton" not in text
  run = functools.partial(paged_attention, implementation="triton")
  with pytest.raises(NotImplementedError, match="head_dim must be a multiple of 16"):
    deviceless.lower(run, q, k, k, *ids)


@pytest.mark.parametrize(
  ("num_blocks", "is_paired"), [(32_768, False), (32_769, True), (65_537, False)]
)
def test_pools_are_read_in_pairs_where_offsets_would_overflow(num_blocks, is_paired):
  """From 2 to 4 GiB; in larger arrays offsets have 64 bits."""
  spec = named("llama-3-8b fp8")
  shapes = spec.shapes(num_seqs=4, num_blocks=num_blocks, max_blocks=4, num_tokens=4)
  run = functools.partial(paged_attention, implementation="triton", max_query_len=1)
  text = deviceless.lower(run, **shapes).as_text()
  assert (f"{num_blocks * 8 * 64}x64xui16" in text) == is_paired


def test_too_many_tokens_are_refused():
  spec = named("llama-3-8b fp8")
  shapes = spec.shapes(num_seqs=4, num_blocks=1 << 22, max_blocks=4, num_tokens=4)
  run = functools.partial(paged_attention, implementation="triton")
  with pytest.raises(NotImplementedError, match="less than 2\\^31 tokens and heads"):
    deviceless.lower(run, **shapes)


def test_a_named_implementation_needs_its_device():
  args = Batch(1, chunks=None, head_dim=D).arguments
  with pytest.raises(NotImplementedError, match="it needs a GPU, and programs are for"):
    paged_attention(*args, implementation="triton")
  with pytest.raises(NotImplementedError, match="'cuda' is not one of"):
    paged_attention(*args, implementation="cuda")
