"""Contexts in the states that are measured.

Keys and values are as small as can be (one layer, one head, one element), so that
memory and time are the bookkeeping's. The free list is shuffled, as it is after hours
of work: blocks of a row are nowhere near each other in memory.
"""

import functools

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import AttentionLayer, CacheConfig, Context, Status

BLOCK_SIZE = 16
VOCAB = 1 << 15


def make_config(S: int, N: int, P: int, **sizes) -> CacheConfig:
  """A cache that is bookkeeping only."""
  return CacheConfig(
    layers=(AttentionLayer(num_kv_heads=1, head_dim=1),),
    num_blocks=N,
    block_size=BLOCK_SIZE,
    max_seqs=S,
    max_seq_len=P * BLOCK_SIZE,
    **sizes,
  )


def label(config: CacheConfig) -> str:
  """The sizes of a configuration, for a table."""
  S, N, P = config.max_seqs, config.num_blocks, config.max_blocks_per_seq
  return f"S={S} N={short(N)} P={P}"


def short(num: int) -> str:
  """4096 as 4k, 2^20 as 1M, 1000 as it is."""
  for shift, letter in ((20, "M"), (10, "k")):
    if num >> shift and not num & ((1 << shift) - 1):
      return f"{num >> shift}{letter}"
  return str(num)


def empty(config: CacheConfig) -> Context:
  """A context whose free blocks lie in no order."""
  ctx = jax.jit(kvcache.init, static_argnums=0)(config)
  ids = np.random.default_rng(0).permutation(config.num_blocks - 1) + 1
  free_list = jnp.asarray(np.append(ids, kvcache.NULL_BLOCK), jnp.int32)
  return ctx.replace(pool=ctx.pool.replace(free_list=free_list))


def prompts(num: int, length: int, *, seed: int = 0) -> Array:
  """`[num, length]` int32 random tokens, no two rows alike."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(VOCAB, size=(num, length)), jnp.int32)


def admitted(ctx: Context, tokens: Array, lengths: Array) -> Context:
  """Admits `lengths[i]` tokens of each of `tokens [num, length]`."""
  ctx, status = _admit(ctx, tokens, lengths)
  require_ok(status)
  return ctx


@functools.partial(jax.jit, donate_argnums=0)
def _admit(ctx: Context, tokens: Array, lengths: Array) -> tuple[Context, Array]:
  ctx, admission = kvcache.admit(ctx, tokens, lengths)
  return ctx, jnp.max(admission.status)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="num_tokens")
def _compute(
  ctx: Context, packed: Array, query_lens: Array, *, num_tokens: int
) -> tuple[Context, Array]:
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=num_tokens)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  return kvcache.commit(ctx, packed, metadata), jnp.max(status)


def filled(ctx: Context, tokens: Array, lengths: np.ndarray) -> Context:
  """Admits and computes `lengths[i]` tokens of each of `tokens [num, length]`.

  The rows of the context must be inactive, and prompt `i` becomes row `i`.
  """
  ctx = admitted(ctx, tokens, jnp.asarray(lengths, jnp.int32))
  cached = np.asarray(ctx.sequences.seq_lens)[: len(lengths)]
  host = np.asarray(tokens)
  packed = np.concatenate(
    [row[begin:end] for row, begin, end in zip(host, cached, lengths, strict=True)]
  )
  query_lens = np.zeros(ctx.config.max_seqs, np.int32)
  query_lens[: len(lengths)] = lengths - cached
  ctx, status = _compute(
    ctx, jnp.asarray(packed), jnp.asarray(query_lens), num_tokens=packed.size
  )
  require_ok(status)
  return ctx


def decoding(config: CacheConfig) -> tuple[Context, int]:
  """Every row is live and decodes; blocks are full at different steps.

  Returns:
    The context, and for how many steps every row still finds a block.
  """
  rows = np.arange(config.max_seqs)
  lengths = BLOCK_SIZE + 1 + rows % (BLOCK_SIZE - 1)
  ctx = filled(empty(config), prompts(rows.size, int(lengths.max())), lengths)
  per_row = min(config.max_blocks_per_seq, (config.num_blocks - 1) // rows.size)
  return ctx, min(128, (per_row - 2) * BLOCK_SIZE)


def require_ok(status: Array) -> None:
  """Raises unless every row was served: a refused row costs nothing."""
  if (code := int(jnp.max(status))) != Status.OK:
    raise RuntimeError(f"the benchmark is set up wrongly: {Status(code).name}")
