"""Steps over pools of states: kernels interpreted and lowered, and the XLA beside them.

The pool holds NaN in every state that no row reads. Tiles are made so small that every
program owns only a part of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ssm
from pallas_kernels.ssm import triton
from pallas_kernels.ssm.arg_specs import ARG_SPECS, named
from pallas_kernels.ssm.rows import Rows
from tests.aot import deviceless
from tests.fixtures.thorough import more
from tests.pallas_kernels.test_ssm import draw, expect, starts

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
C = 40
SIZES = H, P, G, N = 4, 32, 2, 16
R, M, LAYER = 3, 24, 1
NULL = 0
# Row 1 goes on from a snapshot that row 3 reads too, row 4 begins, the others read what
# they write, or another state of their own.
READ = np.array([5, 1, 6, 1, NULL, 7], np.int32)
WRITE = np.array([5, 2, 6, 3, 4, 8], np.int32)
FORMS = {  # tokens of the rows, of the step, and states kept of each
  "decode": ((1, 1, 0, 1, 1, 1), 6, None),
  "packed": ((33, 1, 0, 2, 16, 1), 64, None),
  "draft": ((3, 3, 0, 2, 3, 1), 16, 3),
}
TOKENS = ("u", "x", "dt", "b", "c")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(triton, "_STEP_ELEMENTS", 256)
  monkeypatch.setattr(triton, "_CONV_TILE", 32)
  monkeypatch.setattr(triton, "_MAX_CHUNK", 16)
  monkeypatch.setattr(triton, "_NUM_CORES", 8)


class Scene:
  """A step of some form: inputs, pools, ids, and what it comes to in float64."""

  def __init__(self, form, *, dtype="float32", seed=0):
    self.form = form
    self.lens, num_tokens, entries = FORMS[form]
    inputs = draw(self.lens, num_tokens=num_tokens, seed=seed, channels=C, sizes=SIZES)
    narrow = (*TOKENS, "weight", "bias", "d")
    wide = ("dt",)
    for name in narrow:
      if name not in wide:
        inputs[name] = inputs[name].astype(jnp.dtype(dtype))
    inputs["conv"][READ == 1], inputs["ssm"][READ == 1] = (
      inputs[name][1] for name in ("conv", "ssm")
    )
    inputs["conv"][READ == NULL] = inputs["ssm"][READ == NULL] = 0.0
    self.starts = starts(self.lens)
    self.inputs = dict(inputs)
    if form == "decode":  # token s belongs to row s
      self.starts = np.arange(7, dtype=np.int32)
      order = np.cumsum(self.lens) - 1
      for name in TOKENS:
        inputs[name] = inputs[name][order].copy()
        inputs[name][np.array(self.lens) == 0] = np.nan
    self.arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    self.is_in = np.array(self.lens) > 0
    self.read = np.where(self.is_in, READ, NULL)
    self.write = np.where(self.is_in, WRITE, M)
    if entries:
      more = np.column_stack([WRITE, *np.arange(9, 21).reshape(2, 6)])
      is_token = np.arange(entries)[None] < np.array(self.lens)[:, None]
      self.write = np.where(is_token, more, M)
      self.write[3, 1] = M  # not wanted
    self.pools = {}
    for name in ("conv", "ssm"):
      pool = np.full((R, M, *inputs[name].shape[1:]), np.nan, np.float32)
      pool[:, NULL] = 0.0
      pool[LAYER, self.read] = inputs[name]
      pool[LAYER, NULL] = 0.0
      self.pools[name] = pool

  def run(self, conv1d, ssd, **changes):
    v = self.arrays | changes
    ids = (jnp.int32(LAYER), *map(jnp.asarray, (self.read, self.write, self.starts)))
    most = 1 if self.form == "decode" else None
    u = conv = None
    if conv1d is not None:
      u, conv = conv1d(
        v["u"], v["weight"], self.pools["conv"], *ids, v["bias"], max_query_len=most
      )
    arrays = (v["x"], v["dt"], v["a"], v["b"], v["c"], self.pools["ssm"])
    y, pool = ssd(*arrays, *ids, v["d"], max_query_len=most)
    return u, conv, y, pool

  def tokens(self, y):
    """Those of rows, packed."""
    y = np.asarray(y, np.float32)
    return y[self.is_in] if self.form == "decode" else y[: sum(self.lens)]

  def expected(self):
    """In float64: what tokens yield, and the pools."""
    u, _, y, _ = expect(self.inputs, self.lens)
    pools = {name: pool.copy() for name, pool in self.pools.items()}
    write = self.write.reshape(6, -1)
    for entry in range(write.shape[1]):
      # The state after the row's token `entry`, or after its last one.
      longest = max(self.lens) if self.form != "draft" else entry + 1
      cut = [min(n, longest) for n in self.lens]
      kept = np.concatenate(
        [np.arange(b, b + n) for b, n in zip(starts(self.lens), cut, strict=False)]
      )
      inputs = {
        name: x[kept] if name in TOKENS else x for name, x in self.inputs.items()
      }
      _, conv, _, state = expect(inputs, cut)
      is_kept = write[:, entry] < M
      for name, value in (("conv", conv), ("ssm", state)):
        pools[name][LAYER, write[is_kept, entry]] = value[is_kept]
    return u, pools["conv"], y, pools["ssm"]

  def check(self, got, *, tolerance=2e-5):
    u, conv, y, pool = got
    want_u, want_conv, want_y, want_pool = self.expected()
    close = functools.partial(
      np.testing.assert_allclose, rtol=tolerance, atol=tolerance
    )
    close(self.tokens(y), want_y)
    close(pool, want_pool)
    if u is not None:
      close(self.tokens(u), want_u)
      close(conv, want_conv)
    # Every other state is what it was, to the bit.
    for name, after in (("conv", conv), ("ssm", pool)):
      if after is not None:
        others = np.ones((R, M), bool)
        others[LAYER, self.write[self.write < M]] = False
        np.testing.assert_array_equal(after[others], self.pools[name][others])


@functools.partial(jax.jit, static_argnames="max_query_len")
def conv1d_kernel(*args, max_query_len):
  *inputs, bias = args
  inputs[-4:] = [Rows(*inputs[-4:])]
  return triton.step_conv1d(
    *inputs, bias=bias, max_query_len=max_query_len, interpret=True
  )


@functools.partial(jax.jit, static_argnames="max_query_len")
def ssd_kernel(*args, max_query_len):
  *inputs, d = args
  inputs[-4:] = [Rows(*inputs[-4:])]
  return triton.step_ssd(*inputs, d=d, max_query_len=max_query_len, interpret=True)


@functools.partial(jax.jit, static_argnames="max_query_len")
def conv1d_xla(*args, max_query_len):
  *args, bias = args
  return ssm.step_conv1d(*args, bias=bias, max_query_len=max_query_len)


@functools.partial(jax.jit, static_argnames="max_query_len")
def ssd_xla(*args, max_query_len):
  *args, d = args
  return ssm.step_ssd(*args, d=d, max_query_len=max_query_len, chunk_size=16)


def kernels(form):
  """The convolution of a mixed step is left to XLA."""
  return (None if form == "packed" else conv1d_kernel), ssd_kernel


@pytest.mark.parametrize("form", FORMS)
def test_kernels_equal_the_recurrences(form):
  scene = Scene(form)
  got = scene.run(*kernels(form))
  scene.check(got)
  # Of tokens of no row, and of rows not in the step.
  for y in (got[0], got[2]):
    if y is not None:
      assert np.isfinite(y).all()


@pytest.mark.parametrize("form", FORMS)
def test_xla_equals_the_recurrences(form):
  scene = Scene(form)
  scene.check(scene.run(conv1d_xla, ssd_xla))


@pytest.mark.parametrize("form", ["packed", "draft"])
def test_narrow_activations_keep_a_wide_state(form):
  scene = Scene(form, dtype="bfloat16")
  got = scene.run(*kernels(form))
  assert got[2].dtype == jnp.bfloat16 and got[3].dtype == jnp.float32
  scene.check(got, tolerance=0.05)
  if form == "draft":
    np.testing.assert_allclose(got[3], scene.expected()[3], rtol=2e-5, atol=2e-5)


def test_neighbours_do_not_change_bits():
  """Nor does where in the step a row stands."""
  scene = Scene("packed", seed=1)
  _, _, y, pool = scene.run(None, ssd_kernel)
  for row in (0, 4):
    begin, end = scene.starts[row : row + 2]
    alone = Scene("packed", seed=1)
    lens = np.zeros(6, np.int32)
    lens[row] = end - begin
    alone.starts = starts(lens)
    alone.write = np.where(np.arange(6) == row, scene.write, M)
    changes = {
      name: jnp.roll(scene.arrays[name], -begin, axis=0).at[end - begin :].set(jnp.nan)
      for name in TOKENS
    }
    _, _, y1, pool1 = alone.run(None, ssd_kernel, **changes)
    np.testing.assert_array_equal(y1[: end - begin], y[begin:end])
    target = scene.write[row]
    np.testing.assert_array_equal(pool1[LAYER, target], pool[LAYER, target])


def test_a_decoding_row_is_the_same_beside_prompts():
  """To the bit: one kernel computes both."""
  packed = Scene("packed")
  row, token = 1, packed.lens[0]
  _, _, y, pool = packed.run(None, ssd_kernel)
  decode = Scene("decode")
  changes = {
    name: jnp.broadcast_to(packed.arrays[name][token], decode.arrays[name].shape)
    for name in TOKENS
  }
  decode.pools = packed.pools
  _, _, y1, pool1 = decode.run(
    None, ssd_kernel, **changes, a=packed.arrays["a"], d=packed.arrays["d"]
  )
  np.testing.assert_array_equal(y1[row], y[token])
  np.testing.assert_array_equal(pool1[LAYER, WRITE[row]], pool[LAYER, WRITE[row]])


def test_a_pool_of_narrow_states_is_served():
  scene = Scene("decode")
  scene.pools = {name: np.asarray(x, jnp.bfloat16) for name, x in scene.pools.items()}
  got = scene.run(conv1d_kernel, ssd_kernel)
  want = scene.run(conv1d_xla, ssd_xla)
  assert got[1].dtype == got[3].dtype == jnp.bfloat16
  for left, right in zip(got[1::2], want[1::2], strict=True):
    np.testing.assert_allclose(
      left.astype(jnp.float32), right.astype(jnp.float32), rtol=1e-2
    )


# --- Lowering -------------------------------------------------------------------------


def lower(run, shapes, **options):
  run = functools.partial(run, **options)
  return deviceless.lower(run, **shapes).as_text().count("__gpu$xla.gpu.triton")


@pytest.mark.parametrize(
  "spec", [ARG_SPECS[0], *more(*ARG_SPECS[1:])], ids=lambda spec: spec.name
)
def test_every_named_shape_is_lowered(spec):
  sizes = {"num_seqs": 4, "num_states": 9, "num_layers": 2}
  found = []
  for entries, num_tokens, most in ((None, 4, 1), (3, 16, None), (None, 128, None)):
    form = {"num_tokens": num_tokens, "num_entries": entries, **sizes}
    options = {"max_query_len": most, "implementation": "triton"}
    found.append(lower(ssm.step_ssd, spec.ssd_shapes(**form), **options))
    if entries or most:
      found.append(lower(ssm.step_conv1d, spec.conv_shapes(**form), **options))
  assert found == [1, 1, 1, 1, 2]


def without(shapes, *names):
  return {name: shape for name, shape in shapes.items() if name not in names}


SMALL = {"num_seqs": 4, "num_states": 4}


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_states_that_are_no_pool_are_served_too(implementation):
  spec = named("mamba2-130m")
  for num_tokens, most, num in ((4, 1, 1), (64, None, 2)):
    shapes = spec.ssd_shapes(num_tokens=num_tokens, **SMALL)
    state = jax.ShapeDtypeStruct(shapes["pool"].shape[1:], jnp.float32)
    shapes = without(shapes, "pool", "layer", "read_ids", "write_ids")
    options = {"max_query_len": most, "implementation": implementation}
    assert lower(ssm.ssd, {**shapes, "state": state}, **options) == num
    shapes = spec.conv_shapes(num_tokens=num_tokens, **SMALL)
    state = jax.ShapeDtypeStruct(shapes["pool"].shape[1:], jnp.float32)
    shapes = {
      **without(shapes, "pool", "layer", "read_ids", "write_ids"),
      "state": state,
    }
    if most:
      assert lower(ssm.causal_conv1d, shapes, **options) == 1
    elif implementation is None:
      assert lower(ssm.causal_conv1d, shapes, **options) == 0


def test_what_triton_cannot_serve_is_served_by_xla():
  spec = named("mamba2-130m")

  def ssd(message, **changes):
    form = {"num_tokens": 64} | SMALL
    shapes = dataclasses.replace(spec, **changes.pop("spec", {})).ssd_shapes(**form)
    shapes |= changes.pop("shapes", {})
    assert lower(ssm.step_ssd, shapes, **changes) == 0
    with pytest.raises(NotImplementedError, match=message):
      lower(ssm.step_ssd, shapes, implementation="triton", **changes)

  ssd("a multiple of 16 elements per head", spec={"head_dim": 24})
  ssd("b must have one of", spec={"state_size": 48})
  ssd("chunk_size must be a power of two", chunk_size=24)
  wide = jax.ShapeDtypeStruct((64, 24, 64), jnp.float8_e4m3fn)
  ssd("arrays must be of", shapes={"x": wide})
  shapes = spec.ssd_shapes(num_tokens=64, num_seqs=4, num_states=1_500_000)
  with pytest.raises(NotImplementedError, match="pool must have less than"):
    lower(ssm.step_ssd, shapes, implementation="triton")

  shapes = spec.conv_shapes(num_tokens=64, **SMALL)
  assert lower(ssm.step_conv1d, shapes) == 0
  with pytest.raises(NotImplementedError, match="rows must have one token each"):
    lower(ssm.step_conv1d, shapes, implementation="triton")
  wide = dataclasses.replace(spec, conv_width=17)
  shapes = wide.conv_shapes(num_tokens=4, **SMALL)
  with pytest.raises(NotImplementedError, match="at most 16 taps"):
    lower(ssm.step_conv1d, shapes, max_query_len=1, implementation="triton")

  shapes = spec.ssd_shapes(num_tokens=64, **SMALL)
  state = jax.ShapeDtypeStruct(shapes["pool"].shape[1:], jnp.float32)
  shapes = without(shapes, "pool", "layer", "read_ids", "write_ids")
  with pytest.raises(NotImplementedError, match="can only be kept in a pool"):
    lower(ssm.ssd, {**shapes, "state": state}, num_states=2, implementation="triton")


def test_a_named_implementation_needs_its_device():
  scene = Scene("decode")
  run = functools.partial(ssm.step_ssd, implementation="triton")
  with pytest.raises(NotImplementedError, match="it needs a GPU, and programs are for"):
    scene.run(None, lambda *args, max_query_len: run(*args[:-1]))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pool": (4, 24, 64, 128)}, r"pool must be floating and have 5 axes"),
    ({"pool": (1, 4, 24, 128, 64)}, r"pool must be \(1, 4, 24, 64, 128\)"),
    ({"read_ids": (4, 1)}, "read_ids must be int32 and have 1 axes at most"),
    ({"write_ids": (4, 1, 1)}, "write_ids must be int32 and have 2 axes at most"),
    ({"write_ids": (3,)}, r"write_ids must be \[4, ...\]"),
    ({"write_ids": (4, 0)}, r"write_ids must be \[4, ...\]"),
    ({"cu_seqlens": (4,)}, r"cu_seqlens must be int32\[5\]"),
  ],
)
def test_misshapen_steps_are_refused(change, message):
  shapes = named("mamba2-130m").ssd_shapes(num_tokens=8, **SMALL)
  for name, shape in change.items():
    shapes[name] = jax.ShapeDtypeStruct(shape, shapes[name].dtype)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(ssm.step_ssd, **shapes)


def test_names_of_shapes_are_distinct():
  assert len({spec.name for spec in ARG_SPECS}) == len(ARG_SPECS)
  with pytest.raises(ValueError, match="one of ARG_SPECS, got 'mamba-9'"):
    named("mamba-9")


def test_bytes_of_a_state():
  """Granite 4 small: 4 MiB and 99 KiB of each sequence and layer."""
  spec = named("granite-4-h-small")
  shapes = spec.conv_shapes(num_tokens=1, num_seqs=1, num_states=1)
  assert spec.ssd_bytes == 4 << 20
  assert spec.conv_bytes == 4 * shapes["pool"].size == 99 << 10
