"""Wrong uses of the public kernels: refused before anything is computed."""

import jax
import jax.numpy as jnp

from pallas_kernels import paged_attention, ssm
from pallas_kernels.paged_attention import mosaic_sm90
from pallas_kernels.paged_attention.call import Call
from tests.hostile.table import area, WrongUse, zeros

FLOAT, INT = jnp.float32, jnp.int32


def attention(
  q=(4, 2, 8),
  k=(6, 1, 4, 8),
  v=(6, 1, 4, 8),
  tables=((2, 3), INT),
  lens=((2,), INT),
  starts=(3,),
  dtype=FLOAT,
  **options,
):
  """Traced only: shapes and dtypes are all that is looked at."""

  def run():
    return paged_attention.paged_attention(
      jnp.zeros(q),
      jnp.zeros(k, dtype),
      None if v is None else jnp.zeros(v, dtype),
      zeros(*tables[0], dtype=tables[1]),
      zeros(*lens[0], dtype=lens[1]),
      zeros(*starts),
      **options,
    )

  return lambda: jax.eval_shape(run)


def convolution(x=(4, 3), weight=(3, 4), state=(2, 3, 3), **options):
  def run():
    arrays = [jnp.zeros(shape) for shape in (x, weight, state)]
    return ssm.causal_conv1d(*arrays, zeros(3), **options)

  return lambda: jax.eval_shape(run)


def on_hopper(block_size):
  k = jax.ShapeDtypeStruct((6, 1, block_size, 64), jnp.bfloat16)
  q = jax.ShapeDtypeStruct((2, 2, 64), jnp.bfloat16)
  ids = (jax.ShapeDtypeStruct(shape, INT) for shape in ((2, 3), (2,), (3,)))
  return mosaic_sm90.why_not(Call(q, k, k, *ids, sm_scale=0.125, max_query_len=1))


row, refused = area("Kernels")

USES: list[WrongUse] = [
  refused(
    "queries without heads", attention(q=(4, 8)), r"q must be \[T, H, D\], got \(4, 8\)"
  ),
  refused(
    "keys of another head dimension",
    attention(k=(6, 1, 4, 16)),
    r"k must be \[N, K, block_size, 8\], got \(6, 1, 4, 16\)",
  ),
  refused(
    "heads that do not divide",
    attention(q=(4, 3, 8), k=(6, 2, 4, 8), v=(6, 2, 4, 8)),
    "q has 3 heads, not a multiple of 2",
  ),
  refused(
    "values of other blocks", attention(v=(5, 1, 4, 8)), r"v must be .*, got \(5, 1, 4"
  ),
  refused(
    "block tables of half numbers",
    attention(tables=((2, 3), FLOAT)),
    "block_tables must be int32, got float32",
  ),
  refused(
    "lengths in uint32",
    attention(lens=((2,), jnp.uint32)),
    "seq_lens must be int32, got uint32",
  ),
  refused(
    "lengths of other rows",
    attention(lens=((3,), INT)),
    r"block_tables must be \[S, P\] and seq_lens \[S\], got \(2, 3\) and \(3,\)",
  ),
  refused(
    "starts without the end",
    attention(starts=(2,)),
    r"cu_seqlens must be \[3\], got \(2,\)",
  ),
  refused(
    "quantised keys without scales",
    attention(dtype=jnp.int8),
    "k_scale is missing for elements of int8",
  ),
  refused(
    "scales of other blocks",
    attention(dtype=jnp.int8, k_scale=jnp.ones((5, 1, 4)), v_scale=jnp.ones((6, 1, 4))),
    r"k_scale must be \(6, 1, 4\), got \(5, 1, 4\)",
  ),
  refused(
    "neither values nor their width",
    attention(v=None),
    "v_head_dim must be from 1 to 8",
  ),
  refused(
    "a window of no token",
    attention(sliding_window=0),
    "sliding_window must be at least 1, got 0",
  ),
  refused(
    "a window that looks ahead",
    attention(sliding_window=4, is_causal=False),
    "sliding_window needs is_causal",
  ),
  refused(
    "a soft cap of nothing",
    attention(logits_soft_cap=0.0),
    "logits_soft_cap must be positive, got 0.0",
  ),
  refused(
    "sinks of other heads",
    attention(sinks=jnp.zeros(3)),
    r"sinks must be \[2\], got \(3,\)",
  ),
  refused(
    "a GPU kernel on a CPU",
    attention(q=(4, 2, 16), k=(6, 1, 4, 16), v=(6, 1, 4, 16), implementation="triton"),
    "implementation 'triton': it needs a GPU, and programs are for cpu",
    NotImplementedError,
  ),
  row(
    "Hopper's kernel: blocks of twelve tokens",
    lambda: on_hopper(12),
    gives="block_size must be one of (8, 16, 32, 64, 128) with bfloat16, got 12",
    note="says why it cannot serve; the best kernel that can is taken",
  ),
  row(
    "Hopper's kernel: blocks of sixteen tokens", lambda: on_hopper(16), note="serves"
  ),
  refused(
    "convolution: tokens without channels",
    convolution(x=(4,)),
    r"x must be \[T, C\], got \(4,\)",
  ),
  refused(
    "convolution: weights of other channels",
    convolution(weight=(2, 4)),
    r"weight must be \[3, W >= 2\], got \(2, 4\)",
  ),
  refused(
    "convolution: a state of another width",
    convolution(state=(2, 3, 2)),
    r"state must be \(2, 3, 3\), got \(2, 3, 2\)",
  ),
  refused(
    "convolution: an implementation nobody has written",
    convolution(implementation="cuda"),
    "cuda",
    NotImplementedError,
  ),
]
