"""Paged attention: right against two references, blind to dead memory, stable bits.

One table serves all tests: eight rows whose lengths are 0, 1, a block, one more, and
around the kernel's K/V tile of 128 tokens. Block ids are permuted, the table's entries
past a row's length are blocks of others, and every slot that holds no token is NaN.
"""

import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from pallas_kernels.paged_attention import paged_attention, reference, xla
from pallas_kernels.paged_attention.call import Call
from tests.fixtures import small
from tests.fixtures.thorough import more

S, P, N, K, BLOCK, D = 8, 64, 256, 2, 4, 8
LENGTHS = [0, 1, 4, 5, 128, 127, 129, 250]
# T = 64: a fresh prompt in two query tiles, an exact query tile, decoding rows, a row
# that is not in the step, and padding at the end.
CHUNKS = [0, 1, 3, 5, 17, 0, 1, 16]
T = 64


def attention64(q, k, v, tables, lengths, starts, sm_scale):
  """Each token on its own, in float64, by slot; tokens of no row give zeros."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  group = q.shape[1] // k.shape[1]
  out = np.zeros((*q.shape[:2], v.shape[-1]))
  for row, length in enumerate(lengths):
    start, stop = starts[row], starts[row + 1]
    for token in range(start, stop if length else start):
      last = length - (stop - token)  # this token's position
      slots = [(tables[row][t // BLOCK], t % BLOCK) for t in range(last + 1)]
      for head in range(q.shape[1]):
        keys = np.stack([k[block, head // group, at] for block, at in slots])
        values = np.stack([v[block, head // group, at] for block, at in slots])
        logits = keys @ q[token, head] * sm_scale
        weights = np.exp(logits - logits.max())
        out[token, head] = weights @ values / weights.sum()
  return out


class Batch:
  """Arrays of one call, in the layout asked for."""

  def __init__(self, group, *, chunks, seed=0, dtype=jnp.float32, head_dim=D):
    """`chunks` None is the decode layout: one token for each row."""
    rng = np.random.default_rng(seed)
    self.lengths = np.array(LENGTHS, np.int32)
    self.tables = np.zeros((S, P), np.int32)
    ids = rng.permutation(np.arange(1, N)).astype(np.int32)
    pools = np.full((2, N, K, BLOCK, head_dim), np.nan, np.float32)
    for row, length in enumerate(LENGTHS):
      num = -(-length // BLOCK)
      mine, ids = ids[:num], ids[num:]
      self.tables[row, :num] = mine
      self.tables[row, num:] = rng.integers(N, size=P - num)
      for t in range(length):
        pools[:, mine[t // BLOCK], :, t % BLOCK] = rng.normal(size=(2, K, head_dim))
    decode = chunks is None
    self.query_lens = np.minimum(LENGTHS, 1) if decode else np.array(chunks)
    if decode:
      self.starts = np.arange(S + 1, dtype=np.int32)
      live = self.lengths > 0
    else:
      self.starts = np.append(0, np.cumsum(self.query_lens)).astype(np.int32)
      self.lengths = np.where(self.query_lens > 0, self.lengths, 0).astype(np.int32)
      live = np.arange(T) < self.starts[-1]
    q = rng.normal(size=(live.size, K * group, head_dim))
    q = np.where(live[:, None, None], q, np.nan)  # padding is never looked at
    self.q, self.k, self.v = (jnp.asarray(x, dtype) for x in (q, *pools))
    self.max_query_len = 1 if decode else None
    self.live = live

  @property
  def arguments(self):
    ids = (self.tables, self.lengths, self.starts)
    return (self.q, self.k, self.v, *map(jnp.asarray, ids))

  def kernel(self):
    return np.asarray(kernel(*self.arguments, max_query_len=self.max_query_len))

  def exact(self, sm_scale=D**-0.5):
    arrays = (self.q, self.k, self.v, self.tables, self.lengths, self.starts)
    return attention64(*arrays, sm_scale)


@functools.partial(jax.jit, static_argnames=("max_query_len", "sm_scale"))
def kernel(*args, max_query_len, sm_scale=None):
  kwargs = {"max_query_len": max_query_len, "sm_scale": sm_scale}
  return paged_attention(*args, **kwargs, implementation="xla")


@pytest.mark.parametrize("group", [2, *more(1, 3, 4)])
@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])
def test_every_length_and_group_is_right(chunks, group):
  batch = Batch(group, chunks=chunks)
  out = batch.kernel()
  assert out.dtype == np.float32 and out.shape == batch.q.shape
  np.testing.assert_allclose(out, batch.exact(), rtol=2e-5, atol=2e-6)
  assert not out[~batch.live].any()


@pytest.mark.parametrize(
  "chunks",
  [
    [0, 1, 4, 5, 32, 0, 0, 22],  # prompts from their first token on; T is full
    [0, 0, 0, 0, 0, 0, 64, 0],  # one row alone
    [0, 1, 1, 1, 1, 1, 1, 1],  # decoding, in the packed layout
    [0, 0, 0, 0, 0, 0, 0, 0],
  ],
)
def test_every_mixture_of_prompts_and_decoding_is_right(chunks):
  batch = Batch(2, chunks=chunks, seed=1)
  out = batch.kernel()
  np.testing.assert_allclose(out, batch.exact(), rtol=2e-5, atol=2e-6)
  assert not out[~batch.live].any()


def test_the_reference_beside_the_kernel_says_the_same():
  batch = Batch(2, chunks=[0, 1, 3, 0, 17, 0, 0, 0], seed=2)
  # The reference is for memory that holds no NaN.
  clean = [jnp.nan_to_num(x) for x in batch.arguments[:3]]
  call = Call(*clean, *batch.arguments[3:], sm_scale=D**-0.5)
  want, _ = reference.paged_attention(call)
  np.testing.assert_allclose(batch.kernel(), want, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(want, batch.exact(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])
def test_half_precision_is_as_good_as_its_inputs(chunks):
  batch = Batch(2, chunks=chunks, dtype=jnp.bfloat16)
  out = batch.kernel()
  assert out.dtype == jnp.bfloat16
  # The weights and the output are rounded to 8 bits; the sums are not.
  np.testing.assert_allclose(out.astype(np.float32), batch.exact(), atol=0.02)


def test_a_cache_of_half_precision_serves_queries_of_full_precision():
  batch = Batch(2, chunks=CHUNKS)
  batch.k, batch.v = batch.k.astype(jnp.bfloat16), batch.v.astype(jnp.bfloat16)
  out = batch.kernel()
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, batch.exact(), atol=0.02)


def test_the_scale_is_a_factor_of_the_logits():
  batch = Batch(2, chunks=CHUNKS)
  out = kernel(*batch.arguments, max_query_len=None, sm_scale=0.1)
  np.testing.assert_allclose(out, batch.exact(0.1), rtol=2e-5, atol=2e-6)


def test_large_logits_do_not_overflow():
  batch = Batch(2, chunks=CHUNKS)
  batch.q = batch.q * 1000.0
  out = batch.kernel()
  np.testing.assert_allclose(out, batch.exact(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])
def test_dead_memory_may_hold_anything(chunks):
  """Other values in dead slots, other ids behind the rows' ends: the same bits."""
  want = Batch(3, chunks=chunks).kernel()
  used = np.arange(P)[None] < -(-np.array(LENGTHS)[:, None] // BLOCK)
  for fill, block in ((np.inf, 0), (-1e30, N - 1), (7.0, 1)):
    batch = Batch(3, chunks=chunks)
    batch.k = jnp.nan_to_num(batch.k, nan=fill)
    batch.v = jnp.nan_to_num(batch.v, nan=fill)
    batch.tables = np.where(used, batch.tables, block)
    np.testing.assert_array_equal(batch.kernel(), want)


# Bits.


def row_of(batch, row):
  """The output of one row's tokens."""
  start = batch.starts[row]
  return batch.kernel()[start : start + batch.query_lens[row]]


def only(batch, row):
  """The same step shape with no other row in it."""
  alone = copy.copy(batch)
  alone.lengths = np.where(np.arange(S) == row, batch.lengths, 0)
  if batch.max_query_len is None:
    alone.query_lens = np.where(np.arange(S) == row, batch.query_lens, 0)
    alone.starts = np.append(0, np.cumsum(alone.query_lens)).astype(np.int32)
    alone.q = jnp.roll(batch.q, -batch.starts[row], axis=0)
  return alone


def moved(batch, order):
  """The same rows in another order: row `i` is the old row `order[i]`."""
  other = copy.copy(batch)
  other.tables, other.lengths = batch.tables[order], batch.lengths[order]
  other.query_lens = batch.query_lens[order]
  tokens = [
    np.arange(batch.starts[row], batch.starts[row + 1], dtype=int) for row in order
  ]
  if batch.max_query_len is None:
    other.starts = np.append(0, np.cumsum(other.query_lens)).astype(np.int32)
    tokens.append(np.arange(batch.starts[-1], T))
  other.q = batch.q[np.concatenate(tokens)]
  return other


@pytest.mark.parametrize("row", [2, 7, *more(1, 3, 4, 6)])
@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])
def test_a_rows_bits_are_the_same_alone(chunks, row):
  batch = Batch(2, chunks=chunks)
  np.testing.assert_array_equal(row_of(only(batch, row), row), row_of(batch, row))


@pytest.mark.parametrize("seed", [0, *more(1, 2)])
@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["decode", "packed"])
def test_a_rows_bits_are_the_same_in_another_row(chunks, seed):
  batch = Batch(2, chunks=chunks)
  order = np.random.default_rng(seed).permutation(S)
  other = moved(batch, order)
  for new, old in enumerate(order):
    np.testing.assert_array_equal(row_of(other, new), row_of(batch, old))


@pytest.mark.parametrize("hit", [8, *more(4, 16, 28)])
def test_a_tokens_bits_are_the_same_after_a_prefix_hit(hit):
  """The last tokens of a prompt of which the first ones need not be computed."""
  chunks = [0, 0, 0, 0, 0, 0, 32, 0]
  whole = Batch(2, chunks=chunks)
  rest = Batch(2, chunks=[n and n - hit for n in chunks])
  rest.q = jnp.roll(whole.q, -hit, axis=0)
  np.testing.assert_array_equal(row_of(rest, 6), row_of(whole, 6)[hit:])


# Cost.


def counter(monkeypatch, *, max_blocks, decode):
  """A jitted `(lengths [2], query_lens [2])` -> how often the loop over K/V ran."""
  counts = []

  def while_loop(condition, body, state):
    count, state = jax.lax.while_loop(
      lambda carry: condition(carry[1]),
      lambda carry: (carry[0] + 1, body(carry[1])),
      (jnp.int32(0), state),
    )
    counts.append(count)
    return state

  def run(lengths, query_lens):
    tables = jnp.zeros((2, max_blocks), jnp.int32)
    pool = jnp.zeros((3, 1, BLOCK, 2))
    q = jnp.zeros((2 if decode else 8, 1, 2))
    starts = jnp.pad(jnp.cumsum(query_lens), (1, 0))
    max_query_len = 1 if decode else None
    paged_attention(q, pool, pool, tables, lengths, starts, max_query_len=max_query_len)
    return counts.pop()

  # Not as it is compiled for eager callers, which would trace it apart.
  monkeypatch.setattr(xla, "paged_attention", xla.paged_attention.__wrapped__)
  monkeypatch.setattr(xla, "lax", types.SimpleNamespace(while_loop=while_loop))
  return jax.jit(run)


@pytest.mark.parametrize("max_blocks", [64, 1024])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "packed"])
def test_the_longest_live_row_decides_the_number_of_rounds(
  monkeypatch, decode, max_blocks
):
  count = counter(monkeypatch, max_blocks=max_blocks, decode=decode)
  for lengths, rounds in (
    ([0, 0], 0),
    ([1, 0], 1),
    ([128, 3], 1),
    ([5, 129], 2),
    ([256, 256], 2),
  ):
    assert count(small.ints(lengths), small.ints([1, 1])) == rounds
  if not decode:  # A row without queries costs nothing, however long it is.
    assert count(small.ints([250, 3]), small.ints([0, 1])) == 1
    assert count(small.ints([250, 3]), small.ints([0, 0])) == 0


def test_a_round_does_the_same_work_for_wider_tables(monkeypatch):
  monkeypatch.setattr(xla, "paged_attention", xla.paged_attention.__wrapped__)

  def sizes(max_blocks):
    batch = Batch(2, chunks=CHUNKS)
    wide = jnp.zeros((S, max_blocks), jnp.int32)
    arrays = (*batch.arguments[:3], wide, *batch.arguments[4:])
    jaxpr = jax.make_jaxpr(lambda *args: paged_attention(*args))(*arrays)
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"]
    body = loop.params["body_jaxpr"].jaxpr
    return [var.aval.size for eqn in body.eqns for var in eqn.outvars]

  assert sizes(P) == sizes(4 * P)


# Arguments.


@pytest.mark.parametrize(
  ("name", "shape", "message"),
  [
    ("q", (4, 2), r"q must be \[T, H, D\], got \(4, 2\)"),
    ("q", (4, 3, 8), "q has 3 heads, not a multiple of 2"),
    ("k", (9, 2, 8), r"k must be .*got \(9, 2, 8\)"),
    ("k", (9, 2, 4, 7), r"k must be \[N, K, block_size, 8\], got \(9, 2, 4, 7\)"),
    ("v", (9, 2, 5, 8), r"v must be .*got \(9, 2, 5, 8\)"),
    ("block_tables", (3,), r"block_tables must be \[S, P\].*got \(3,\)"),
    ("seq_lens", (2,), r"seq_lens \[S\].*\(2,\)"),
    ("cu_seqlens", (3,), r"cu_seqlens must be \[4\], got \(3,\)"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
  shapes = {"q": (4, 2, 8), "k": (9, 2, 4, 8), "v": (9, 2, 4, 8)}
  shapes |= {"block_tables": (3, 5), "seq_lens": (3,), "cu_seqlens": (4,)}
  shapes[name] = shape
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.float32 if name in "qkv" else jnp.int32)
    for name, shape in shapes.items()
  ]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(paged_attention, *arrays)


@pytest.mark.parametrize("place", [3, 4])
def test_ids_and_lengths_must_be_int32(place):
  arrays = list(Batch(1, chunks=None).arguments)
  arrays[place] = arrays[place].astype(jnp.int16)
  name = ("block_tables", "seq_lens")[place - 3]
  with pytest.raises(ValueError, match=f"{name} must be int32, got int16"):
    jax.eval_shape(paged_attention, *arrays)


def test_an_implementation_that_is_not_there_is_not_replaced():
  batch = Batch(1, chunks=None)
  with pytest.raises(NotImplementedError, match="'fast' is not one of"):
    paged_attention(*batch.arguments, implementation="fast")


# Over a Context.


@jax.jit
def attend_all(ctx, query_lens, q):
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=small.NUM_TOKENS)

  def layer(ctx, index):
    return ctx, kvcache.attend(ctx, index, q, metadata)

  return jax.lax.scan(layer, ctx, jnp.arange(2))[1]


def test_attend_reads_the_layer_asked_for():
  """V is minus the token in layer 0, and tenfold in layer 1; K is nothing in both."""
  ctx = small.start(small.empty(), [1, 2, 3, 4, 5], [7, 8])
  ctx = small.append(ctx, {0: [6]})
  ctx = ctx.replace(kv=(ctx.kv[0].replace(k=jnp.zeros_like(ctx.kv[0].k)),))
  query_lens = small.rows({0: 2, 1: 1})
  ctx, _ = small.extend(ctx, query_lens, num_tokens=small.NUM_TOKENS)

  @jax.jit
  def write(ctx):
    metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=small.NUM_TOKENS)
    tokens = small.ints([9, 12, 9] + [-1] * 13)
    _, v = small.contents(tokens)
    ctx = kvcache.write_kv(ctx, 0, 0 * v, v, metadata)
    return kvcache.write_kv(ctx, 1, 0 * v, 10 * v, metadata)

  q = jnp.ones((small.NUM_TOKENS, 3, 2))
  out = attend_all(write(ctx), query_lens, q)
  # Equal logits: the mean of all tokens up to each one, itself included.
  row0, row1 = [1, 2, 3, 4, 5, 6, 9, 12], [7, 8, 9]
  want = [-np.mean(row0[:7]), -np.mean(row0), -np.mean(row1)] + [0.0] * 13
  for layer, factor in ((0, 1), (1, 10)):
    means = np.broadcast_to(np.array(want)[:, None, None] * factor, (16, 3, 2))
    np.testing.assert_allclose(out[layer], means, rtol=1e-6)
