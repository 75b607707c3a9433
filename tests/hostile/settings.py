"""Wrong configurations, sampling settings and schedulers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import (
  AttentionLayer,
  CacheConfig,
  PromptLookup,
  RecurrentLayer,
  SamplingParams,
  SchedulerConfig,
  Status,
)
from kvcache.serving import sampling
from tests.fixtures import small
from tests.hostile.table import area, LAYER, named, WrongUse, zeros

STATE = RecurrentLayer(state={"sum": (3,)})


def config(*layers, **sizes):
  return CacheConfig(**{"layers": layers or (LAYER,), "num_blocks": 8} | sizes)


def start(sizes, lengths, query_lens):
  """Admits two prompts and makes room for them: statuses, and the context."""

  @jax.jit
  def run(lengths, query_lens):
    ctx = kvcache.init(sizes)
    ctx, admission = kvcache.admit(ctx, zeros(2, 7), lengths)
    ctx, status = kvcache.extend(ctx, query_lens, num_tokens=8)
    return admission.status, status, ctx

  admitted, extended, ctx = run(small.ints(lengths), small.ints(query_lens))
  kvcache.check_invariants(ctx)
  return admitted.tolist(), extended.tolist(), ctx


def one_usable_block():
  """The null block and one more: what fits is served, the rest refused."""
  sizes = config(num_blocks=2, block_size=4, max_seqs=2, max_seq_len=16)
  admitted, extended, _ = start(sizes, [4, 5], [4, 0])
  return admitted + extended


def blocks_of_three():
  """No power of two: the cache does not mind."""
  sizes = config(block_size=3, max_seqs=2, max_seq_len=15)
  admitted, extended, ctx = start(sizes, [7, 1], [7, 1])
  return admitted + extended, ctx.sequences.num_blocks.tolist()


def params(**kwargs):
  return lambda: SamplingParams(**kwargs)


SETTINGS = sampling.make_settings([SamplingParams(temperature=1.0, seed=7)] * 2)


def draw(logits, positions=(3, 3)):
  logits = jnp.asarray(logits, jnp.float32)
  return sampling.sample(logits, SETTINGS, small.ints(positions)).tolist()


def same_seed():
  logits = np.random.default_rng(0).normal(size=(1, 50)).repeat(2, 0)
  left, right = draw(logits)
  return left == right


NAN, INF = math.nan, math.inf
row, refused = area("Settings")
USES: list[WrongUse] = [
  refused(
    "a pool of one block, which is the null block",
    lambda: config(num_blocks=1),
    r"num_blocks must be at least 2 \(block 0 is reserved\), got 1",
  ),
  row(
    "a pool of one usable block",
    one_usable_block,
    gives=named(Status.OK, Status.TOO_LONG, Status.OK, Status.OK),
    note="serves what fits into it",
  ),
  refused(
    "a fraction of a block",
    lambda: config(num_blocks=8.5),
    "num_blocks must be a positive int, got 8.5",
  ),
  refused(
    "blocks of no token",
    lambda: config(block_size=0),
    "block_size must be a positive int, got 0",
  ),
  row(
    "blocks of three tokens",
    blocks_of_three,
    gives=([0, 0, 0, 0], [3, 1]),
    note="works; a kernel that needs a power of two says so",
  ),
  refused(
    "more slots than int32 can address",
    lambda: config(num_blocks=2**27, block_size=16),
    r"num_blocks \* block_size must stay below 2\*\*31",
  ),
  refused(
    "no rows, negative rows",
    lambda: config(max_seqs=-1),
    "max_seqs must be a positive int, got -1",
  ),
  refused(
    "keys and values in int32",
    lambda: config(dtype="int32"),
    "dtype must be a floating type of 16 or 32 bits, int8 or float8_e4m3fn",
  ),
  refused(
    "one layer, not a tuple of layers",
    lambda: config(layers=LAYER),
    "layers must name all layers of the model, got AttentionLayer",
  ),
  refused(
    "keys and values in float64",
    lambda: config(dtype="float64"),
    "dtype must be a floating type of 16 or 32 bits, .* got float64",
  ),
  refused(
    "head_axes that are no names",
    lambda: config(head_axes=3),
    "head_axes must be names of mesh axes, got 3",
  ),
  refused(
    "a dtype that nobody knows",
    lambda: config(dtype="bf16"),
    "dtype must be one such as 'bfloat16': data type 'bf16' not understood",
  ),
  refused(
    "init: layers instead of a configuration",
    lambda: kvcache.init((LAYER,)),
    "config must be a CacheConfig, got tuple",
  ),
  refused(
    "from_memory: no number of bytes",
    lambda: CacheConfig.from_memory(NAN, layers=[LAYER]),
    "num_bytes must be finite, got nan",
  ),
  refused(
    "from_memory: bytes in words",
    lambda: CacheConfig.from_memory("8GB", layers=[LAYER]),
    "num_bytes must be a number, such as 8e9, got '8GB'",
  ),
  refused(
    "no layers", lambda: config(layers=()), "layers must name at least one layer"
  ),
  refused(
    "a layer that is none",
    lambda: config("attention"),
    "layers holds 'attention', which is no AttentionLayer",
  ),
  refused(
    "a layer without heads",
    lambda: AttentionLayer(num_kv_heads=0, head_dim=8),
    "num_kv_heads must be a positive int, got 0",
  ),
  refused(
    "a layer that shares with a later one",
    lambda: config(AttentionLayer(num_kv_heads=1, head_dim=2, shared_with=1), LAYER),
    "shared_with=1 of attention layer 0 must name an earlier layer",
  ),
  refused(
    "recurrent layers of two kinds",
    lambda: config(LAYER, STATE, RecurrentLayer(state={"sum": (4,)})),
    "all recurrent layers must be alike",
  ),
  refused(
    "a state without arrays",
    lambda: RecurrentLayer(state={}),
    "state must name shapes of arrays, got {}",
  ),
  refused(
    "a state of half a number",
    lambda: RecurrentLayer(state={"sum": (1.5,)}),
    r"state 'sum' must be a shape of positive sizes, got \(1.5,\)",
  ),
  refused(
    "snapshots where nothing recurs",
    lambda: config(num_snapshots=3),
    "num_snapshots is given, but no layer is recurrent",
  ),
  refused(
    "a negative number of drafts",
    lambda: config(max_drafts=-1),
    "max_drafts must be a non-negative int, got -1",
  ),
  refused(
    "a pool that cannot hold one window",
    lambda: config(
      AttentionLayer(num_kv_heads=1, head_dim=2, sliding_window=9),
      block_size=4,
      num_window_blocks=3,
    ),
    "num_window_blocks must be at least 4 for the null block and one",
  ),
  refused(
    "scrub, but not sure",
    lambda: config(scrub="yes"),
    "scrub must be True or False, got 'yes'",
  ),
  refused(
    "from_memory: a budget below one usable block",
    lambda: CacheConfig.from_memory(100, layers=[LAYER]),
    "num_bytes=100",
  ),
  refused(
    "from_memory: a budget and a number of blocks",
    lambda: CacheConfig.from_memory(10**6, layers=[LAYER], num_blocks=4),
    "from_memory computes num_blocks; pass num_bytes only",
  ),
  refused(
    "init: half a salt",
    lambda: kvcache.init(config(), salt=0.5),
    r"salt must be integers, got float32\[\]",
  ),
  refused(
    "init: a salt beyond int32",
    lambda: kvcache.init(config(), salt=2**40),
    "salt must fit into int32, got 1099511627776",
  ),
  refused(
    "sampling: a negative temperature",
    params(temperature=-0.1),
    "temperature must be .*-0.1",
  ),
  refused(
    "sampling: a temperature that is no number",
    params(temperature=NAN),
    "temperature must be .*nan",
  ),
  refused("sampling: top_p of nothing", params(top_p=0.0), "top_p must be above 0"),
  refused("sampling: a negative top_k", params(top_k=-1), "top_k must be .*-1"),
  refused(
    "sampling: a seed beyond uint32", params(seed=2**32), "seed must be .*4294967296"
  ),
  row(
    "sampling: the same seed for two requests",
    same_seed,
    gives=True,
    note="equal prompts and settings then get equal tokens",
  ),
  refused(
    "sampling: logits of one row, without its dimension",
    lambda: draw([1.0, 2.0]),
    r"logits must be \[S, V\] floats, got float32\[2\]",
  ),
  refused(
    "sampling: logits of three rows for the settings of two",
    lambda: draw(np.zeros((3, 4))),
    r"settings.temperature must be \[S\] = \(3,\), got \(2,\)",
  ),
  row(
    "sampling: NaN among the logits",
    lambda: draw([[NAN, NAN, 1.0], [NAN, 2.0, NAN]]),
    gives=[2, 1],
    note="NaN counts as minus infinity",
  ),
  row(
    "sampling: NaN or minus infinity everywhere",
    lambda: draw([[NAN] * 3, [-INF] * 3]),
    gives=[0, 0],
    note="token 0",
  ),
  row(
    "sampling: infinite logits",
    lambda: draw([[0.0, INF, 1.0], [INF, -INF, 0.0]]),
    gives=[1, 0],
    note="the likeliest; several are equally likely",
  ),
  refused(
    "scheduler: no token per step",
    lambda: SchedulerConfig(token_budget=0),
    "token_budget must be a positive int, got 0",
  ),
  refused(
    "scheduler: a negative watermark",
    lambda: SchedulerConfig(watermark=-1),
    "watermark must be a non-negative int, got -1",
  ),
  refused(
    "scheduler: half a block as watermark",
    lambda: SchedulerConfig(watermark=0.5),
    "watermark must be a non-negative int, got 0.5",
  ),
  refused(
    "scheduler: the name of a policy",
    lambda: SchedulerConfig(admission="fcfs"),
    "admission must be a policy, got 'fcfs'",
  ),
  refused(
    "drafter: no drafts",
    lambda: PromptLookup(num_drafts=0),
    "num_drafts must be a positive int, got 0",
  ),
]
