"""The Mosaic GPU kernel: right and free of races in interpret mode, on tiny shapes."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import mosaic_sm90, paged_attention, reference
from pallas_kernels.paged_attention.arg_specs import named
from tests import deviceless

# Of what jax offers, only this says whether the detector found anything, and starts
# anew after an exception.
interpreter = pytest.importorskip(
  "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
)
pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
K = 2


@pytest.fixture(autouse=True)
def fresh_interpreter(monkeypatch):
  monkeypatch.setattr(mosaic_sm90, "_NUM_PROGRAMS", 3)
  monkeypatch.setattr(mosaic_sm90, "_MIN_SPLIT", 128)
  yield
  interpreter.gpu_callbacks.reset_gpu_interpret_mode_state()


def make(lens, *, queries=1, group=2, head_dim=64, block_size=16, window=None):
  """Arguments in which everything that no query sees is NaN."""
  rng = np.random.default_rng(0)
  columns = -(-max(lens) // block_size) + 1
  num_blocks = len(lens) * columns + 1
  tables = 1 + rng.permutation(num_blocks - 1).reshape(len(lens), columns)
  pools = np.full((2, num_blocks, K, block_size, head_dim), np.nan, np.float32)
  for row, length in enumerate(lens):
    first = 0 if window is None else max(length - queries - window + 1, 0)
    at = np.arange(first, length)
    pools[:, tables[row, at // block_size], :, at % block_size] = rng.normal(
      size=(at.size, 2, K, head_dim)
    )
  q = rng.normal(size=(len(lens) * queries, K * group, head_dim))
  starts = np.arange(len(lens) + 1) * queries
  floats = (jnp.asarray(x, jnp.bfloat16) for x in (q, *pools))
  return *floats, *(jnp.asarray(x, jnp.int32) for x in (tables, lens, starts))


@pytest.mark.parametrize(
  ("lens", "settings", "options"),
  [
    ([1, 0, 130, 300], {}, {}),
    ([70, 200], {"block_size": 64, "head_dim": 128}, {}),
    ([1, 200], {"block_size": 128}, {}),
    ([9, 80], {"queries": 3, "block_size": 8}, {}),
    (
      [40, 200],
      {"window": 70},
      {"sliding_window": 70, "logits_soft_cap": 2.0, "sinks": jnp.arange(4.0)},
    ),
    ([90], {"group": 10}, {}),
  ],
  ids=["ragged", "block 64", "block 128", "drafts", "window", "16 columns"],
)
def test_it_agrees_with_the_plain_reference_and_has_no_races(lens, settings, options):
  args = make(lens, **settings)
  head_dim = args[0].shape[-1]
  run = functools.partial(
    mosaic_sm90.paged_attention,
    sm_scale=head_dim**-0.5,
    max_query_len=settings.get("queries", 1),
    interpret=plgpu.InterpretGPUParams(detect_races=True),
    **options,
  )
  with deviceless.gpu():
    out, lse = jax.jit(run)(*args)
  assert not interpreter.get_races().races_found
  want, want_lse = reference.paged_attention(*args, sm_scale=head_dim**-0.5, **options)
  assert np.isfinite(want.astype(np.float32)).all()
  np.testing.assert_allclose(
    out.astype(np.float32), want.astype(np.float32), rtol=0.02, atol=0.02
  )
  np.testing.assert_allclose(lse, want_lse, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
  "name", ["llama-3-8b", "llama-3-8b block 8", "llama-3-8b block 128", "gemma-3-4b"]
)
def test_named_shapes_are_lowered(name):
  spec = named(name)
  shapes = spec.shapes(num_seqs=4, num_blocks=64, max_blocks=16, num_tokens=4)
  run = functools.partial(
    paged_attention, implementation="mosaic", max_query_len=1, **spec.options
  )
  assert "mosaic_gpu" in deviceless.lower(run, **shapes).as_text()


@pytest.mark.parametrize(
  ("name", "max_query_len", "reason"),
  [
    ("llama-3-8b", None, "max_query_len times 4 heads per kv head must be at most 16"),
    ("llama-3-8b fp8", 1, "q, k and v must be of one type"),
    ("llama-3-8b float32", 1, "q must be bfloat16 or float16, got float32"),
    ("deepseek-v3 tp8", 1, "it needs v"),
    ("phi-2", 1, "head_dim must be 64, 128 or 256, got 80"),
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
