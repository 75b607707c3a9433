"""The Mosaic GPU kernels: right and free of races in interpret mode, on tiny shapes."""

import functools
import re

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
  mosaic_prefill_sm90,
  mosaic_ring,
  mosaic_sm90,
  paged_attention,
  reference,
  tuning,
)
from pallas_kernels.paged_attention.arg_specs import named
from pallas_kernels.paged_attention.call import Call
from tests.aot import deviceless
from tests.fixtures.thorough import more

# Of what jax offers, only this says whether the detector found anything, and starts
# anew after an exception.
interpreter = pytest.importorskip(
  "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
)
pytestmark = [
  pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
  ),
  # Products with dead keys, whose logits are masked.
  pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
]
K = 2


@pytest.fixture(autouse=True)
def fresh_interpreter(monkeypatch):
  monkeypatch.setattr(mosaic_prefill_sm90, "NUM_PROGRAMS", 3)
  monkeypatch.setattr(
    mosaic_ring, "product", functools.partial(seen, mosaic_ring.product)
  )
  with tuning.trying("mosaic split", {"num_programs": 3, "min_split": 128}):
    yield
  interpreter.gpu_callbacks.reset_gpu_interpret_mode_state()


def seen(product, x, y, shape):
  """Reads before a product what it reads: the detector does not look at products.

  They read as copies write, so no fence is needed for what follows; here one is.
  """
  total = sum(jnp.sum(ref[...].astype(jnp.float32)) for ref in (x, y))
  plgpu.commit_smem()
  return product(x, y, shape) + jnp.where(total == total, 0.0, 0.0)


def make(rows, *, group=2, head_dim=64, block_size=16, window=None, dtype="bfloat16"):
  """Arguments in which everything that no query sees is NaN.

  `rows` are `(length, queries)`; two tokens of the step belong to none.
  """
  rng = np.random.default_rng(0)
  columns = -(-max(length for length, _ in rows) // block_size) + 1
  num_blocks = len(rows) * columns + 1
  tables = 1 + rng.permutation(num_blocks - 1).reshape(len(rows), columns)
  pools = np.full((2, num_blocks, K, block_size, head_dim), np.nan, np.float32)
  for row, (length, queries) in enumerate(rows):
    first = 0 if window is None else max(length - queries - window + 1, 0)
    at = np.arange(first, length)
    pools[:, tables[row, at // block_size], :, at % block_size] = rng.normal(
      size=(at.size, 2, K, head_dim)
    )
  lens, query_lens = zip(*rows, strict=True)
  starts = np.append(0, np.cumsum(query_lens))
  q = rng.normal(size=(starts[-1] + 2, K * group, head_dim))
  floats = (jnp.asarray(x, dtype) for x in (q, *pools))
  return *floats, *(jnp.asarray(x, jnp.int32) for x in (tables, lens, starts))


def quantised(args, kv_dtype):
  """The same with quantised pools; scales that no query needs are NaN, too."""
  q, *pools, tables, lens, starts = args
  stored, scales = [], []
  for pool in pools:
    if pool is None:
      stored.append(None)
      continue
    pool = np.asarray(pool, np.float32)
    most = 127 if kv_dtype == "int8" else 448
    scale = np.abs(pool).max(axis=-1) / most
    with np.errstate(invalid="ignore"):
      pool = pool / scale[..., None]
      if kv_dtype == "int8":
        pool = np.nan_to_num(np.round(pool), nan=99).astype(np.int8)
      else:
        pool = pool.astype(jnp.float8_e4m3fn).view(np.uint8)
    stored.append(jnp.asarray(pool))
    scales.append(jnp.asarray(scale))
  names = ("k_scale", "v_scale")
  return (q, *stored, tables, lens, starts), dict(zip(names, scales, strict=False))


def interpreted(args, **options):
  """Runs the kernels, which must have no races."""

  def run(*args):
    return mosaic_sm90.paged_attention(
      Call(*args, sm_scale=args[0].shape[-1] ** -0.5, **options),
      interpret=plgpu.InterpretGPUParams(detect_races=True),
    )

  with deviceless.gpu():
    out, lse = jax.jit(run)(*args)
  assert not interpreter.get_races().races_found
  return out, lse


def check(args, *, max_query_len=None, **options):
  """Compares with the plain reference."""
  out, lse = interpreted(args, max_query_len=max_query_len, **options)
  q, *pools, tables, lens, starts = args
  for i, name in enumerate(("k_scale", "v_scale")):
    if name in options:  # Quantised tiles become tiles of the queries' type.
      pool = reference.dequantise(pools[i], options.pop(name))
      pools[i] = pool.astype(q.dtype)
  want, want_lse = reference.paged_attention(
    Call(q, *pools, tables, lens, starts, sm_scale=q.shape[-1] ** -0.5, **options)
  )
  out, want = (np.asarray(x, np.float32) for x in (out, want))
  assert np.isfinite(want).all()
  assert not out[-2:].any()
  np.testing.assert_allclose(out, want, rtol=0.02, atol=0.02)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("lens", "settings", "options"),
  [
    ([1, 0, 130, 300], {}, {}),
    ([9, 80], {"queries": 3, "block_size": 8}, {}),
    *more(
      (
        [40, 200],
        {"window": 70},
        {"sliding_window": 70, "logits_soft_cap": 2.0, "sinks": jnp.arange(4.0)},
      ),
      ([70, 200], {"block_size": 64, "head_dim": 128}, {}),
      ([1, 200], {"block_size": 128}, {}),
      ([90], {"group": 10}, {}),
    ),
  ],
  ids=["ragged", "drafts", "window", "block 64", "block 128", "16 columns"],
)
def test_few_queries_are_split_along_their_keys(lens, settings, options):
  queries = settings.pop("queries", 1)
  args = make([(length, queries) for length in lens], **settings)
  check(args, max_query_len=queries, **options)


WINDOW = {"sliding_window": 40, "logits_soft_cap": 2.0, "sinks": jnp.arange(8.0)}


@pytest.mark.parametrize(
  ("rows", "settings", "options"),
  [
    ([(1, 1), (129, 129), (0, 0), (300, 70), (130, 1), (9, 9)], {}, {}),
    *more(
      ([(330, 150), (40, 30)], {"group": 4, "window": 40, "block_size": 32}, WINDOW),
      ([(128, 128), (127, 127)], {"group": 1, "block_size": 128}, {}),
      ([(150, 50)], {"group": 3, "block_size": 64, "head_dim": 128}, {}),
      ([(600, 40)], {"group": 4, "window": 260}, {"sliding_window": 260}),
      ([(40, 40), (33, 2), (30, 3)], {"group": 8, "dtype": "float16"}, {}),
      ([(70, 5), (1, 1)], {"group": 20, "head_dim": 256, "block_size": 128}, {}),
    ),
  ],
  ids=["mixed", "window", "exact", "group 3", "wide window", "group 8", "no splits"],
)
def test_prompt_chunks_go_beside_decoding(rows, settings, options):
  check(make(rows, **settings), **options)


@pytest.mark.thorough
@pytest.mark.parametrize("kv_dtype", ["float8", "int8"])
@pytest.mark.parametrize(
  ("rows", "settings", "options"),
  [
    ([(1, 1), (0, 0), (300, 70), (130, 1)], {"block_size": 32}, {}),
    *more(
      (
        [(330, 150), (200, 1)],
        {"group": 4, "window": 40, "block_size": 64, "head_dim": 128},
        WINDOW,
      ),
      (
        [(150, 1), (64, 9)],
        {"head_dim": 96, "block_size": 128, "dtype": "float16"},
        {},
      ),
      ([(70, 5)], {"group": 20, "head_dim": 256, "block_size": 128}, {}),
    ),
  ],
  ids=["mixed", "window", "float16", "wide"],
)
def test_quantised_tiles_are_made_floats_on_their_way(
  rows, settings, options, kv_dtype
):
  args, scales = quantised(make(rows, **settings), kv_dtype)
  check(args, **options, **scales)


@pytest.mark.thorough
@pytest.mark.parametrize("head_dim", [80, 96])
def test_heads_that_fill_no_tile(head_dim):
  rows = [(1, 1), (300, 70), (130, 1), (9, 9)]
  check(make(rows, group=3, head_dim=head_dim, block_size=8))


@pytest.mark.thorough
def test_quantised_latent_keys():
  q, k, _, *ids = make([(150, 1), (64, 1)], group=16, head_dim=192, block_size=32)
  args, scales = quantised((q, k, None, *ids), "float8")
  check(args, max_query_len=1, v_head_dim=128, **scales)


def test_latent_keys_have_their_values_in_front():
  q, k, _, *ids = make([(150, 1), (0, 1), (64, 1)], group=16, head_dim=192)
  check((q, k, None, *ids), max_query_len=1, v_head_dim=128)


@pytest.mark.thorough
def test_bits_depend_on_nothing_but_the_row():
  q, k, v, tables, lens, starts = make([(200, 40), (170, 1), (200, 170), (5, 5)])
  # Two rows of the same tokens, most of which the first had before.
  tables = tables.at[0].set(tables[2])
  q = q.at[:40].set(q[starts[3] - 40 : starts[3]])
  out, lse = interpreted((q, k, v, tables, lens, starts))
  for x in (out, lse):
    np.testing.assert_array_equal(x[:40], x[starts[3] - 40 : starts[3]])
  alone = interpreted((q, k, v, tables, jnp.zeros_like(lens).at[2].set(200), starts))
  for x, y in zip(alone, (out, lse), strict=True):
    np.testing.assert_array_equal(x[41:211], y[41:211])
    assert x[211].max() in (0, -jnp.inf)


@pytest.mark.parametrize(
  "name",
  [
    "llama-3-8b",
    *more("llama-3-8b block 8", "llama-3-8b block 128", "llama-3-8b int8"),
    *more("gemma-3-4b", "phi-2", "phi-3-mini"),
  ],
)
@pytest.mark.parametrize("max_query_len", [1, None], ids=["decode", "mixed"])
def test_named_shapes_are_lowered(name, max_query_len):
  spec = named(name)
  shapes = spec.shapes(num_seqs=4, num_blocks=64, max_blocks=16, num_tokens=64)
  run = functools.partial(
    paged_attention,
    implementation="mosaic",
    max_query_len=max_query_len,
    **spec.options,
  )
  text = deviceless.lower(run, **shapes).as_text()
  kernels = set(re.findall(r"paged_attention_\w+_sm90", text))
  assert len(kernels) == (1 if max_query_len else 2)


@pytest.mark.parametrize(
  ("name", "max_query_len", "reason"),
  [
    ("llama-3-8b float32", 1, "q must be bfloat16 or float16, got float32"),
    ("deepseek-v3 tp8", 2, "values must be as wide as keys"),
    (
      "llama-3-8b fp8 block 16",
      1,
      "block_size must be one of .32, 64, 128. with uint8",
    ),
  ],
)
def test_what_it_cannot_serve_is_refused(name, max_query_len, reason):
  spec = named(name)
  shapes = spec.shapes(num_seqs=4, num_blocks=64, max_blocks=16, num_tokens=4)
  run = functools.partial(
    paged_attention,
    implementation="mosaic",
    max_query_len=max_query_len,
    **spec.options,
  )
  with pytest.raises(NotImplementedError, match=reason):
    deviceless.lower(run, **shapes)
