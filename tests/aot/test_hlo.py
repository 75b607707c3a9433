"""The reader of compiled programs sees what it is there to see: planted copies."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from tests.aot import hlo

L, N, D = 3, 4096, 8
POOL = jax.ShapeDtypeStruct((L, N, D), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)


def compile_program(run, *arguments, donate=(0,)):
  lowered = jax.jit(run, donate_argnums=donate).lower(*arguments)
  return hlo.read(lowered.compile().as_text())


# --- Programs that leave the pool in place --------------------------------------------


def write(pool, ids):
  return pool.at[0, ids].set(1.0, mode="drop")


def write_in_loops(pool, ids):
  def layer(pool, index):
    def again(i, pool):
      return pool.at[index, ids + i].add(1.0, mode="drop")

    return lax.fori_loop(0, ids[0], again, pool), None

  return lax.scan(layer, pool, jnp.arange(L, dtype=jnp.int32))[0]


def write_one(pool, ids):
  value = jnp.ones((1, 1, D), pool.dtype)
  return lax.dynamic_update_slice(pool, value, (ids[0], ids[1], jnp.int32(0)))


def read_then_write(pool, ids):
  values, pool = lax.optimization_barrier((pool[0, ids], pool))
  return pool.at[0, ids].set(2.0, mode="drop"), values


def take_a_layer(pool, ids):
  return lax.dynamic_slice_in_dim(pool, ids[0], 1)


# --- Programs that do not -------------------------------------------------------------


def read_and_write(pool, ids):
  return pool.at[0, ids].set(2.0, mode="drop"), pool[0, ids]


def mask_all(pool, ids):
  return jnp.where(jnp.arange(N, dtype=jnp.int32)[None, :, None] < ids[0], pool, 0.0)


def start_anew(pool, ids):
  del pool
  return jnp.zeros(POOL.shape, POOL.dtype).at[0, ids].set(1.0, mode="drop")


def scan_layers(pool, ids):
  def layer(carry, keys):
    return carry, keys.at[ids].set(1.0, mode="drop")

  return lax.scan(layer, jnp.int32(0), pool)[1]


def copy_in_a_loop(pool, ids):
  def body(i, state):
    pool, total = state
    return pool.at[0, ids].add(1.0, mode="drop"), total + pool[0, ids + i]

  return lax.fori_loop(0, ids[0], body, (pool, jnp.zeros((4, D), pool.dtype)))


GOOD = (write, write_in_loops, write_one, read_then_write)
BAD = (read_and_write, mask_all, start_anew, scan_layers, copy_in_a_loop)


@pytest.mark.parametrize("run", GOOD)
def test_updates_in_place_are_no_rewrites(run):
  module = compile_program(run, POOL, IDS)
  assert not [str(i) for i in module.rewrites(N * D)]
  assert module.aliases[0] == 0


@pytest.mark.parametrize("run", BAD)
def test_copies_are_seen(run):
  assert compile_program(run, POOL, IDS).rewrites(N * D)


def test_a_pool_that_is_not_donated_is_copied():
  module = compile_program(write, POOL, IDS, donate=())
  assert module.rewrites(L * N * D)
  assert not module.aliases


def test_small_results_are_no_rewrites():
  assert not compile_program(mask_all, POOL, IDS).rewrites(L * N * D + 1)


@pytest.mark.parametrize(
  ("aliasing", "num_rewrites"),
  [
    ("", 2),
    (", output_to_operand_aliasing={{0}: (1, {})}", 2),
    (", output_to_operand_aliasing={{0}: (1, {}), {1}: (0, {})}, metadata={}", 0),
  ],
)
def test_custom_calls_say_what_they_update_in_place(aliasing, num_rewrites):
  """Each result for itself: the second may be in place and the first not."""
  module = hlo.read(f"""HloModule m
ENTRY %main (p: f32[64], q: f32[64]) -> (f32[64], f32[64], f32[8]) {{
  %p = f32[64]{{0}} parameter(0)
  %q = f32[64]{{0}} parameter(1)
  %c = (f32[64]{{0}}, f32[64]{{0}}, f32[8]{{0}}) custom-call(%p, %q){aliasing}
  ROOT %d = (f32[64]{{0}}, f32[64]{{0}}, f32[8]{{0}}) custom-call(%p, %q){aliasing}
}}""")
  assert len(module.rewrites(64)) == num_rewrites
  assert len(module.rewrites(8)) == 2


def test_aliases_name_output_and_argument():
  def swap(a, ids, b):
    return ids + 1, b.at[0].set(0.0), a.at[0].set(1.0)

  a, b = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (8, 16))
  assert compile_program(swap, a, IDS, b, donate=(0, 2)).aliases == {1: 2, 2: 0}


# --- Scans, loops, counts -------------------------------------------------------------


@pytest.mark.parametrize(("run", "num"), [(take_a_layer, N * D), (mask_all, 0)])
def test_what_computes_nothing_is_a_move(run, num):
  module = compile_program(run, POOL, IDS, donate=())
  moved = [i for i in module.moves() if i.num_elements >= N]
  assert sum(i.num_elements for i in moved) == num


@pytest.mark.parametrize("run", (jnp.sum, jnp.argmax, jnp.sort, jnp.cumsum))
def test_whole_reads_are_seen(run):
  table = jax.ShapeDtypeStruct((N,), jnp.float32)
  assert compile_program(run, table, donate=()).scans(N)


def test_gathers_are_no_whole_reads():
  def gather(table, ids):
    return jnp.sum(jnp.where(table[ids] > 0, 1, 0), dtype=jnp.int32)

  table = jax.ShapeDtypeStruct((N,), jnp.float32)
  assert not compile_program(gather, table, IDS, donate=()).scans(N)


def test_loops_are_nested_as_written():
  module = compile_program(write_in_loops, POOL, IDS)
  (outer,) = module.whiles()
  (inner,) = module.whiles(outer.callees["body"])
  assert not module.whiles(inner.callees["body"])
  assert module.count("while") == 2


@pytest.mark.parametrize(
  ("opcode", "run"),
  [
    ("sort", lambda x: lax.fori_loop(0, 3, lambda i, x: jnp.sort(x) * 2 + i, x)),
    (
      "conditional",
      lambda x: lax.cond(x[0] > 0, jnp.sort, functools.partial(jnp.roll, shift=1), x),
    ),
    ("scatter", lambda x: x.at[x[:2]].add(1)),
  ],
)
def test_opcodes_are_counted(opcode, run):
  table = jax.ShapeDtypeStruct((256,), jnp.int32)
  assert compile_program(run, table).count(opcode) == 1
