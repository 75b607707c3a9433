"""What the compiled programs copy: nothing that is as large as the cache.

Every verb, a step and the loop are compiled with the context donated, for pools that
are large against everything else, and their optimised HLO is read. Nothing runs, so
nothing is allocated. The findings hold for the CPU backend; others insert their own
copies, but none where this one, the most conservative about aliasing, needs none.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, RecurrentLayer, SchedulerConfig
from tests.aot import hlo, programs
from tests.fixtures.thorough import more

CONFIG = CacheConfig(
  layers=(AttentionLayer(num_kv_heads=2, head_dim=8),) * 3,
  num_blocks=1 << 16,
  max_seqs=8,
  max_seq_len=256,
  chunk_size=32,
)
SCHEDULER = SchedulerConfig(token_budget=24, max_admissions=4)
NUM_BLOCKS = CONFIG.num_blocks
RING_SIZE = 3 * NUM_BLOCKS  # slots of the eviction ring
POOL_ELEMENTS = CONFIG.num_bytes // 2 // CONFIG.dtype.itemsize  # of k, and of v
MAX_TEMPORARIES = 0.05  # of the pools' bytes
VERBS = programs.verbs(CONFIG, num_tokens=SCHEDULER.token_budget)
LOOPS = ("step", "serve")
# How often a program lets rows go of blocks. Each may compact the eviction ring, which
# costs its size, but only once in at least N pushes.
NUM_RELEASES = {
  "rewind": 1,
  "finish": 1,
  "abandon": 1,
  "reset_keep": 1,
  "step": 2,  # finished requests, preempted requests
  "serve": 2,
}
# `reset` makes new tables without looking at the old ones; only K/V stay in place.
KEEPS_TABLES = [name for name in (*VERBS, *LOOPS) if name != "reset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A program for the CPU: its HLO, bytes of aliased arguments and of temporaries."""

  alias_bytes: int
  temp_bytes: int
  module: hlo.Module


def abstract_context(config):
  return jax.eval_shape(functools.partial(kvcache.init, config))


def num_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_program(run, *arguments, donate=0):
  compiled = jax.jit(run, donate_argnums=donate).lower(*arguments).compile()
  memory = compiled.memory_analysis()
  return Compiled(
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    module=hlo.read(compiled.as_text()),
  )


@functools.cache
def compiled(name, config=CONFIG):
  if name not in LOOPS:
    program = programs.verbs(config, num_tokens=SCHEDULER.token_budget)[name]
    run, arguments = program.run, program.arguments
  else:
    loop = {"step": programs.step, "serve": programs.serve}[name]
    run = functools.partial(loop, scheduler=SCHEDULER)
    requests = jax.eval_shape(
      lambda: kvcache.make_requests([[1, 2, 3, 4, 5]] * 12, max_new_tokens=20)
    )
    arguments = (requests,)
  return compile_program(run, abstract_context(config), *arguments)


def is_compaction(module, loop):
  """Whether a loop's own body reads the whole eviction ring."""
  body = loop.callees["body"]
  nested = {
    id(i)
    for inner in module.whiles(body)
    for i in module.scans(RING_SIZE, inner.callees["body"])
  }
  return any(id(i) not in nested for i in module.scans(RING_SIZE, body))


def compactions(module):
  loops = [i for i in module.walk() if i.opcode == "while"]
  return [loop for loop in loops if is_compaction(module, loop)]


def table_rewrites(module):
  """Instructions that write a whole `[N]` table, or more, outside of the compaction."""
  excused = {loop.callees["body"] for loop in compactions(module)}
  return [
    str(i)
    for i in module.rewrites(NUM_BLOCKS)
    if not (i.computation in excused and i.num_elements == RING_SIZE)
  ]


# --- Donation -------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEEPS_TABLES)
def test_donation_aliases_the_whole_context(name):
  ctx = abstract_context(CONFIG)
  program = compiled(name)
  assert program.alias_bytes >= num_bytes(ctx)
  leaves = range(len(jax.tree.leaves(ctx)))
  assert [program.module.aliases.get(leaf) for leaf in leaves] == list(leaves)


def test_reset_leaves_keys_and_values_in_place():
  program = compiled("reset")
  assert program.alias_bytes >= CONFIG.num_bytes
  assert not program.module.rewrites(POOL_ELEMENTS)


# --- Temporaries ----------------------------------------------------------------------


@pytest.mark.parametrize("name", (*VERBS, *LOOPS))
def test_temporaries_are_small_against_the_pools(name):
  temporaries = compiled(name).temp_bytes
  assert temporaries < MAX_TEMPORARIES * CONFIG.num_bytes


@pytest.mark.parametrize("name", sorted(VERBS.keys() - NUM_RELEASES.keys() - {"reset"}))
def test_temporaries_are_smaller_than_one_table(name):
  """Also where updates would be made in a second buffer, which is no instruction."""
  assert compiled(name).temp_bytes < 4 * NUM_BLOCKS


# --- Copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*VERBS, *LOOPS))
def test_no_instruction_writes_a_whole_pool(name):
  """A layer of it neither."""
  elements = POOL_ELEMENTS // CONFIG.num_layers
  assert not [str(i) for i in compiled(name).module.rewrites(elements)]


@pytest.mark.parametrize("name", KEEPS_TABLES)
def test_no_instruction_writes_a_whole_table(name):
  assert not table_rewrites(compiled(name).module)


@pytest.mark.parametrize("name", KEEPS_TABLES)
def test_nothing_reads_a_whole_table_but_the_compaction_of_the_ring(name):
  module = compiled(name).module
  loops = compactions(module)
  assert len(loops) == NUM_RELEASES.get(name, 0)
  excused = {id(i) for w in loops for i in module.scans(NUM_BLOCKS, w.callees["body"])}
  assert not [str(i) for i in module.scans(NUM_BLOCKS) if id(i) not in excused]


# --- The decode loop ------------------------------------------------------------------


def steps_of_serve():
  """The body of each loop that runs model steps, by the tokens `T` of a step."""
  module = compiled("serve").module
  (group,) = CONFIG.groups
  per_token = group.layer.num_kv_heads * group.layer.head_dim
  bodies = {}
  for outer in module.whiles():
    for inner in module.whiles(outer.callees["body"]):
      body = inner.callees["body"]
      for i in module.walk(body, into_fusions=True):
        if i.opcode == "scatter" and i.sizes[0] == POOL_ELEMENTS:
          _, _, updates = module.operands(i)
          bodies[updates.sizes[0] // per_token] = body
  return module, bodies


def test_serve_has_one_loop_of_mixed_and_one_of_decode_steps():
  _, bodies = steps_of_serve()
  assert bodies.keys() == {SCHEDULER.token_budget, CONFIG.max_seqs}


def test_decode_loop_is_straight_line():
  module, bodies = steps_of_serve()
  body = bodies[CONFIG.max_seqs]
  instructions = list(module.walk(body, into_fusions=True))
  assert not [str(i) for i in instructions if i.opcode in ("sort", "conditional")]
  loops = [i for i in instructions if i.opcode == "while"]
  own = [str(i) for i in loops if programs.MODEL_SCOPE not in i.op_name]
  assert not own
  assert len(loops) == 2  # the model's: over layers, and attention over K/V tiles


def test_decode_loop_writes_no_table():
  """Not even in a compaction."""
  module, bodies = steps_of_serve()
  body = bodies[CONFIG.max_seqs]
  assert not [str(i) for i in module.rewrites(NUM_BLOCKS, body)]
  assert not [str(i) for i in module.scans(NUM_BLOCKS, body)]


@functools.cache
def decode_step(num_blocks, max_seq_len):
  config = dataclasses.replace(
    CONFIG, num_blocks=num_blocks, max_seq_len=max_seq_len, max_seqs=256
  )
  rows = jax.ShapeDtypeStruct((256,), jnp.int32)
  return compile_program(programs.decode_step, abstract_context(config), rows, rows)


@pytest.mark.parametrize(
  ("num_blocks", "max_seq_len"),
  [(1 << 20, 1 << 15), *more((1 << 20, 1024), (4096, 1 << 15))],
)
def test_decode_step_is_the_same_work_for_any_size(num_blocks, max_seq_len):
  def opcodes(program):
    walk = program.module.walk(into_fusions=True)
    return collections.Counter(i.opcode for i in walk)

  small, large = decode_step(4096, 1024), decode_step(num_blocks, max_seq_len)
  assert opcodes(large) == opcodes(small)
  assert opcodes(small)["fusion"] and opcodes(small)["scatter"]
  assert large.temp_bytes <= small.temp_bytes


# --- Recurrent states -----------------------------------------------------------------

HYBRID = dataclasses.replace(
  CONFIG,
  layers=(*CONFIG.layers, *(RecurrentLayer(state={"ssm": (8, 16, 24)}),) * 3),
  num_snapshots=64,
)


@pytest.mark.parametrize(
  "name",
  ["decode_step", *more("admit", "publish", "fork", "finish", "evict", "serve")],
)
def test_no_instruction_writes_all_states(name):
  """Nor those of one layer."""
  ctx, program = abstract_context(HYBRID), compiled(name, HYBRID)
  leaves = range(len(jax.tree.leaves(ctx)))
  assert [program.module.aliases.get(leaf) for leaf in leaves] == list(leaves)
  elements = HYBRID.num_states * HYBRID.bytes_per_state // 4 // 3
  assert not [str(i) for i in program.module.rewrites(elements)]
  assert not table_rewrites(program.module)
  assert program.temp_bytes < MAX_TEMPORARIES * HYBRID.num_bytes


def test_evicting_snapshots_costs_the_states_and_not_the_blocks():
  module = compiled("evict_snapshots", HYBRID).module
  assert not module.scans(NUM_BLOCKS) and not table_rewrites(module)


@pytest.mark.thorough
def test_speculation_copies_neither_pool_nor_states():
  """A model drafts for a hybrid: two contexts in the carry."""
  layer = RecurrentLayer(state={"ssm": (4, 16, 24)})
  config = dataclasses.replace(
    HYBRID, layers=(*CONFIG.layers, *(layer,) * 3), max_drafts=3
  )
  drafter = kvcache.DraftModel(
    model=programs.layered_model, config=CONFIG, num_drafts=3, chunk_size=16
  )
  ctx, state = abstract_context(config), jax.eval_shape(drafter.init)
  requests = jax.eval_shape(
    lambda: kvcache.make_requests([[1, 2, 3, 4, 5]] * 12, max_new_tokens=20)
  )

  def run(ctx, requests, state):
    return kvcache.serve(
      programs.layered_model,
      ctx,
      requests,
      scheduler=SCHEDULER,
      drafter=drafter,
      draft_state=state,
    )

  program = compile_program(run, ctx, requests, state, donate=(0, 1, 2))
  assert program.alias_bytes >= num_bytes((ctx, state))
  elements = POOL_ELEMENTS // CONFIG.num_layers
  assert not [str(i) for i in program.module.rewrites(elements)]
  elements = config.num_states * config.bytes_per_state // 4
  assert not [str(i) for i in program.module.rewrites(elements)]
  assert not table_rewrites(program.module)
  assert program.temp_bytes < MAX_TEMPORARIES * config.num_bytes


# --- Sliding windows ------------------------------------------------------------------

# Their pool is as large as the context's, so that the same sizes are looked for.
WINDOWED = dataclasses.replace(
  CONFIG,
  layers=(CONFIG.layers[0], dataclasses.replace(CONFIG.layers[0], sliding_window=33)),
  num_window_blocks=NUM_BLOCKS,
)


@pytest.mark.parametrize(
  "name",
  [
    "decode_step",
    *more("admit", "fork", "rewind", "abandon", "publish", "evict"),
    *more("evict_window_blocks", "mixed_step", "serve"),
  ],
)
def test_no_instruction_writes_all_of_a_window_s_pool(name):
  ctx, program = abstract_context(WINDOWED), compiled(name, WINDOWED)
  leaves = range(len(jax.tree.leaves(ctx)))
  assert [program.module.aliases.get(leaf) for leaf in leaves] == list(leaves)
  elements = POOL_ELEMENTS // CONFIG.num_layers
  assert not [str(i) for i in program.module.rewrites(elements)]
  assert not table_rewrites(program.module)
  assert program.temp_bytes < MAX_TEMPORARIES * WINDOWED.num_bytes
  if name == "decode_step":
    assert not [i for i in program.module.walk() if i.opcode == "while"]
    assert not program.module.scans(NUM_BLOCKS)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", *more("bfloat16", "int8")])
def test_narrow_pools_are_never_rewritten(dtype):
  """XLA would convert a whole float8 pool to write a row; here nothing is converted."""

  def run(ctx, query_lens, tokens):
    ctx, _ = kvcache.extend(ctx, query_lens)
    metadata = kvcache.step_metadata(ctx, query_lens)
    logits, ctx = programs.layered_model(tokens, metadata, ctx)
    return kvcache.commit(ctx, tokens, metadata), logits

  config = dataclasses.replace(CONFIG, dtype=dtype)
  rows = jax.ShapeDtypeStruct((config.max_seqs,), jnp.int32)
  ctx = abstract_context(config)
  program = compile_program(run, ctx, rows, rows)
  assert program.alias_bytes >= num_bytes(ctx)
  scales = POOL_ELEMENTS // config.attention_layers[0].head_dim
  assert not [str(i) for i in program.module.rewrites(scales)]
  assert program.temp_bytes < MAX_TEMPORARIES * config.num_bytes
