"""What a decode step needs beside its arguments, and how many operations it is."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks import bookkeeping, scenes
from benchmarks.report import Row
from benchmarks.sizes import Size
import kvcache
from kvcache import AttentionLayer, CacheConfig
from tests.aot import hlo, programs

TITLE = "Footprint of a decode step"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is compiled. Nothing is run.

  Attributes:
    with_model: `(S, N, layers)` of the step with a model.
    rows: `S` of the steps without one.
    pools: `(N, P)` of these, which should be of as many operations.
  """

  with_model: tuple[int, int, int]
  rows: int
  pools: tuple[tuple[int, int], ...]


_FULL = Sizes(
  with_model=(16, 1 << 12, 30),
  rows=bookkeeping.TARGET_S,
  pools=((1 << 12, 64), (1 << 20, 2048)),
)
SIZES = {
  Size.FULL: _FULL,
  Size.QUICK: _FULL,
  Size.TINY: Sizes(with_model=(2, 16, 2), rows=2, pools=((16, 4), (32, 4))),
}


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


def measure(size: Size) -> Iterator[Row]:
  """Yields the rows of this section."""
  wanted = SIZES[size]
  S, N, num_layers = wanted.with_model
  layers = (AttentionLayer(num_kv_heads=3, head_dim=64),) * num_layers
  config = CacheConfig(layers=layers, num_blocks=N, max_seqs=S)
  tokens = jax.ShapeDtypeStruct((S,), jnp.int32)
  memory = compiled(with_model, config, tokens).memory_analysis()
  yield Row(
    section=TITLE,
    what="temporaries, of K/V pools",
    sizes=f"{scenes.label(config)}, {num_layers} layers of 3x64",
    value=100 * memory.temp_size_in_bytes / config.num_bytes,
    unit="%",
    target=TEMPORARIES_PERCENT,
  )
  first = None
  for N, P in wanted.pools:
    sizes = scenes.make_config(wanted.rows, N, P)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    module = hlo.read(compiled(bookkeeping.decode_step, sizes, index).as_text())
    count = sum(module.count(opcode) for opcode in _WORK)
    first = first or count
    yield Row(
      section=TITLE,
      what="operations of the bookkeeping",
      sizes=scenes.label(sizes),
      value=count,
      unit="operations",
      target=first,
    )
