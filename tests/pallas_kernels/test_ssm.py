"""The recurrent operations against float64 NumPy, in every way to cut a text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ssm
from pallas_kernels.ssm import reference
from tests.fixtures.thorough import more

C, W = 6, 4
H, P, G, N = SIZES = 6, 3, 2, 5
LENS = [1, 9, 0, 23, 1, 2, 0, 64]
NUM_TOKENS = 128  # 28 more than there are tokens
CHUNK = 8

conv = jax.jit(ssm.causal_conv1d, static_argnames=("max_query_len", "num_states"))
ssd = jax.jit(ssm.ssd, static_argnames=("max_query_len", "num_states", "chunk_size"))


def starts(lens):
  return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def draw(lens, *, num_tokens, seed=0, channels=C, sizes=SIZES):
  """Inputs of both operations; what is past the last row is NaN."""
  rng, S, C, (H, P, G, N) = np.random.default_rng(seed), len(lens), channels, sizes
  inputs = {
    "u": rng.normal(size=(num_tokens, C)),
    "x": rng.normal(size=(num_tokens, H, P)),
    "dt": rng.uniform(0.01, 2.0, size=(num_tokens, H)),
    "b": rng.normal(size=(num_tokens, G, N)),
    "c": rng.normal(size=(num_tokens, G, N)),
  }
  for array in inputs.values():
    array[sum(lens) :] = np.nan
  inputs |= {
    "weight": rng.normal(size=(C, W)),
    "bias": rng.normal(size=C),
    "a": -rng.uniform(0.1, 3.0, size=H),
    "d": rng.normal(size=H),
    "conv": rng.normal(size=(S, C, W - 1)),
    "ssm": rng.normal(size=(S, H, P, N)),
  }
  return {name: array.astype(np.float32) for name, array in inputs.items()}


def expect(inputs, lens):
  """Both recurrences in float64, a token at a time."""
  v = {name: array.astype(np.float64) for name, array in inputs.items()}
  H, G = v["x"].shape[1], v["b"].shape[1]
  conv_y, ssd_y = (np.zeros((sum(lens), *v[name].shape[1:])) for name in "ux")
  t = 0
  for s, length in enumerate(lens):
    for _ in range(length):
      window = np.concatenate([v["conv"][s], v["u"][t][:, None]], axis=1)
      conv_y[t] = (window * v["weight"]).sum(1) + v["bias"]
      v["conv"][s] = window[:, 1:]
      for h in range(H):
        b, c = v["b"][t, h * G // H], v["c"][t, h * G // H]
        decay = np.exp(v["dt"][t, h] * v["a"][h])
        new = v["dt"][t, h] * np.outer(v["x"][t, h], b)
        v["ssm"][s, h] = decay * v["ssm"][s, h] + new
        ssd_y[t, h] = v["ssm"][s, h] @ c + v["d"][h] * v["x"][t, h]
      t += 1
  return conv_y, v["conv"], ssd_y, v["ssm"]


def run(inputs, cu_seqlens, *, conv_state=None, ssm_state=None, **kwargs):
  v = inputs
  conv_state = v["conv"] if conv_state is None else conv_state
  ssm_state = v["ssm"] if ssm_state is None else ssm_state
  u, after = conv(v["u"], v["weight"], conv_state, cu_seqlens, bias=v["bias"], **kwargs)
  arrays = (v["x"], v["dt"], v["a"], v["b"], v["c"], ssm_state)
  y, state = ssd(*arrays, cu_seqlens, d=v["d"], chunk_size=CHUNK, **kwargs)
  return u, after, y, state


def assert_close(got, want, num=None):
  for i, (left, right) in enumerate(zip(got, want, strict=True)):
    left = np.asarray(left) if i % 2 else np.asarray(left)[: len(right)]
    np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  "lens", [LENS, [0] * 8, *more([1] * 8, [0, 0, 100], [8, 16, 24, 7])]
)
def test_packed_rows_equal_the_recurrence(lens):
  inputs = draw(lens, num_tokens=NUM_TOKENS)
  assert_close(run(inputs, starts(lens)), expect(inputs, lens))


def test_one_token_each_equals_the_recurrence():
  lens = [1] * 8
  inputs = draw(lens, num_tokens=8)
  assert_close(run(inputs, starts(lens), max_query_len=1), expect(inputs, lens))


def test_a_row_without_tokens_keeps_its_state():
  inputs = draw(LENS, num_tokens=NUM_TOKENS)
  _, after, _, state = run(inputs, starts(LENS))
  for s in (2, 6):
    np.testing.assert_array_equal(after[s], inputs["conv"][s])
    np.testing.assert_array_equal(state[s], inputs["ssm"][s])


@pytest.mark.parametrize("cut", [2, 9, *more(1, 3, 7, 8, 20)])
def test_a_text_in_two_steps_is_the_same_text(cut):
  """The states carry everything; also where a step is shorter than the convolution."""
  inputs, length = draw([23], num_tokens=23), 23
  whole = run(inputs, starts([length]))
  first = {
    n: x[:cut] if n in ("u", "x", "dt", "b", "c") else x for n, x in inputs.items()
  }
  rest = {
    n: x[cut:] if n in ("u", "x", "dt", "b", "c") else x for n, x in inputs.items()
  }
  u1, after, y1, state = run(first, starts([cut]))
  u2, after, y2, state = run(
    rest, starts([length - cut]), conv_state=after, ssm_state=state
  )
  pieces = (np.concatenate([u1, u2]), after, np.concatenate([y1, y2]), state)
  assert_close(pieces, whole)


def test_bits_do_not_depend_on_neighbours():
  """A row alone, and the same row among others, also in another place."""
  inputs = draw(LENS, num_tokens=NUM_TOKENS)
  together = run(inputs, starts(LENS))
  begin, row = sum(LENS[:3]), 3
  mine = slice(begin, begin + LENS[row])
  alone = {}
  for name, x in inputs.items():
    if name in ("u", "x", "dt", "b", "c"):
      alone[name] = np.concatenate([x[mine], np.full_like(x, np.nan)])[:NUM_TOKENS]
    else:
      alone[name] = x[row : row + 1] if name in ("conv", "ssm") else x
  u, after, y, state = run(alone, starts([LENS[row]]))
  np.testing.assert_array_equal(u[: LENS[row]], together[0][mine])
  np.testing.assert_array_equal(after[0], together[1][row])
  np.testing.assert_array_equal(y[: LENS[row]], together[2][mine])
  np.testing.assert_array_equal(state[0], together[3][row])


def test_the_state_after_each_token_is_that_of_a_decode_step():
  """And so is what the tokens yield, but for how compiled programs round."""
  lens = [1, 4, 0, 3, 2, 4]
  inputs = draw(lens, num_tokens=16)
  u, after, y, state = run(inputs, starts(lens), num_states=4)
  begin = starts(lens)
  conv_state, ssm_state = inputs["conv"], inputs["ssm"]
  for i in range(4):
    rows = [s for s, n in enumerate(lens) if i < n]
    at = begin[:-1] + i
    one = {
      name: x[np.minimum(at, 15)] if name in ("u", "x", "dt", "b", "c") else x
      for name, x in inputs.items()
    }
    u1, conv1, y1, ssm1 = run(
      one,
      starts([1] * len(lens)),
      conv_state=conv_state,
      ssm_state=ssm_state,
      max_query_len=1,
    )
    is_in = np.isin(np.arange(len(lens)), rows)
    conv_state = np.where(is_in[:, None, None], conv1, conv_state)
    ssm_state = np.where(is_in[:, None, None, None], ssm1, ssm_state)
    got = (u[at[rows]], y[at[rows]], after[:, i], state[:, i])
    want = (u1[np.array(rows)], y1[np.array(rows)], conv_state, ssm_state)
    for left, right in zip(got, want, strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
  assert_close((u, after[:, -1], y, state[:, -1]), expect(inputs, lens))


def test_a_decoding_row_is_the_same_beside_prompts():
  """But for how the two compiled programs round."""
  inputs = draw(LENS, num_tokens=NUM_TOKENS)
  u, after, y, state = run(inputs, starts(LENS))
  shared = ("weight", "bias", "a", "d")
  first = {n: x if n in shared else x[:1] for n, x in inputs.items()}
  alone = run(first, starts([1]), max_query_len=1)
  for got, want in zip((u[:1], after[:1], y[:1], state[:1]), alone, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_reference_beside_the_kernels_says_the_same():
  inputs = draw(LENS, num_tokens=NUM_TOKENS)
  v = {name: jnp.asarray(array) for name, array in inputs.items()}
  cu_seqlens, num = jnp.asarray(starts(LENS)), sum(LENS)
  u, after, y, state = expect(inputs, LENS)
  got = reference.causal_conv1d(
    v["u"], v["weight"], v["conv"], cu_seqlens, bias=v["bias"]
  )
  np.testing.assert_allclose(got[0][:num], u, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], after, rtol=1e-5, atol=1e-5)
  arrays = (v["x"], v["dt"], v["a"], v["b"], v["c"], v["ssm"], cu_seqlens)
  got = reference.ssd(*arrays)
  skip = inputs["d"][:, None] * inputs["x"][:num]
  np.testing.assert_allclose(got[0][:num] + skip, y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], state, rtol=1e-5, atol=1e-5)


def test_narrow_activations_keep_a_wide_state():
  inputs = draw([20], num_tokens=20)
  narrow = {
    name: jnp.asarray(x, jnp.bfloat16) if name not in ("conv", "ssm", "a") else x
    for name, x in inputs.items()
  }
  wide = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
  u, after, y, state = run(narrow, starts([20]))
  assert u.dtype == y.dtype == jnp.bfloat16
  assert after.dtype == state.dtype == jnp.float32
  want = expect(wide, [20])
  np.testing.assert_allclose(np.asarray(y, np.float32), want[2], rtol=1e-2, atol=1e-2)
  np.testing.assert_allclose(state, want[3], rtol=2e-5, atol=2e-5)


def test_under_vmap():
  lens = [3, 1, 12]
  several = [draw(lens, num_tokens=20, seed=seed) for seed in range(3)]
  stacked = {name: np.stack([v[name] for v in several]) for name in several[0]}
  got = jax.vmap(lambda v: run(v, starts(lens)))(stacked)
  for i, inputs in enumerate(several):
    assert_close([x[i] for x in got], expect(inputs, lens))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"state": (2, H, P, N)}, r"cu_seqlens must be int32\[3\]"),
    ({"x": (4, H)}, r"x must be \[T, H, P\]"),
    ({"dt": (4, H, 1)}, r"dt must be \(4, 6\), got \(4, 6, 1\)"),
    ({"a": (H, 1)}, r"a must be \(6,\)"),
    ({"c": (4, G, N + 1)}, r"c must be \(4, 2, 5\)"),
    ({"state": (1, H, N, P)}, r"state must be \(1, 6, 3, 5\)"),
    ({"d": (1,)}, r"d must be \(6,\)"),
    ({"b": (4, 4, N), "c": (4, 4, N)}, "6 heads, not a multiple of 4"),
  ],
)
def test_misshapen_recurrences_are_refused(change, message):
  shapes = {
    "x": (4, H, P),
    "dt": (4, H),
    "a": (H,),
    "b": (4, G, N),
    "c": (4, G, N),
    "state": (1, H, P, N),
    "d": (H,),
  }
  arrays = {name: jnp.zeros(shape) for name, shape in (shapes | change).items()}
  with pytest.raises(ValueError, match=message):
    ssm.ssd(**arrays, cu_seqlens=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"x": (4, C, 1)}, r"x must be \[T, C\]"),
    ({"weight": (C, 1)}, r"weight must be \[6, W >= 2\]"),
    ({"state": (1, W - 1, C)}, r"state must be \(1, 6, 3\)"),
    ({"bias": (1,)}, r"bias must be \[6\]"),
  ],
)
def test_misshapen_convolutions_are_refused(change, message):
  shapes = {"x": (4, C), "weight": (C, W), "state": (1, C, W - 1), "bias": (C,)}
  arrays = {name: jnp.zeros(shape) for name, shape in (shapes | change).items()}
  with pytest.raises(ValueError, match=message):
    ssm.causal_conv1d(**arrays, cu_seqlens=jnp.zeros(2, jnp.int32))


def test_no_states_are_refused():
  with pytest.raises(ValueError, match="num_states must be at least 1, got 0"):
    run(draw([1], num_tokens=4), starts([1]), num_states=0)


def test_unknown_implementations_are_refused():
  call = functools.partial(
    ssm.causal_conv1d,
    jnp.zeros((4, C)),
    jnp.zeros((C, W)),
    jnp.zeros((1, C, W - 1)),
    jnp.zeros(2, jnp.int32),
  )
  with pytest.raises(NotImplementedError, match="'cuda' is not one of"):
    call(implementation="cuda")
