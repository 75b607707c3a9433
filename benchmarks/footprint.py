"""What a decode step needs beside its arguments, and how many operations it is."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from benchmarks import bookkeeping, scenes
from benchmarks.report import Row
import kvcache
from kvcache import AttentionLayer, CacheConfig
from tests.aot import hlo, programs

TITLE = "Footprint of a decode step"
S, N = 16, 1 << 12
TEMPORARIES_PERCENT = 5.0
_WORK = (
  "fusion",
  "scatter",
  "gather",
  "reduce",
  "while",
  "sort",
  "conditional",
  "copy",
)


def with_model(ctx: kvcache.Context, tokens: jax.Array) -> kvcache.Context:
  """A decode step over a model that reads and writes every layer."""
  ones = jnp.ones_like(tokens)
  ctx, _ = kvcache.extend(ctx, ones)
  metadata = kvcache.step_metadata(ctx, ones)
  logits, ctx = programs.layered_model(tokens, metadata, ctx)
  tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
  return kvcache.commit(ctx, tokens, metadata)


def compiled(run, config: CacheConfig, argument: jax.ShapeDtypeStruct):
  """Compiles for abstract arguments: nothing is allocated."""
  ctx = jax.eval_shape(functools.partial(kvcache.init, config))
  return jax.jit(run, donate_argnums=0).lower(ctx, argument).compile()


def measure(is_quick: bool) -> Iterator[Row]:
  """Yields the rows of this section."""
  del is_quick
  layers = (AttentionLayer(num_kv_heads=3, head_dim=64),) * 30
  config = CacheConfig(layers=layers, num_blocks=N, max_seqs=S)
  tokens = jax.ShapeDtypeStruct((S,), jnp.int32)
  memory = compiled(with_model, config, tokens).memory_analysis()
  yield Row(
    section=TITLE,
    what="temporaries, of K/V pools",
    sizes=f"{scenes.label(config)}, 30 layers of 3x64",
    value=100 * memory.temp_size_in_bytes / config.num_bytes,
    unit="%",
    target=TEMPORARIES_PERCENT,
  )
  counts = {}
  for N_P in ((1 << 12, 64), (1 << 20, 2048)):
    sizes = scenes.make_config(bookkeeping.TARGET_S, *N_P)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    module = hlo.read(compiled(bookkeeping.decode_step, sizes, index).as_text())
    counts[N_P] = [module.count(opcode) for opcode in _WORK]
    yield Row(
      section=TITLE,
      what="operations of the bookkeeping",
      sizes=scenes.label(sizes),
      value=sum(counts[N_P]),
      unit="operations",
      target=sum(next(iter(counts.values()))),
    )
