"""What the benchmark on a GPU runs, compiled for an H100 without one.

Times mean something only if XLA leaves every call where it stands: these tests read the
compiled chains. The loop with a model of 8B has to fit into the device's memory.
"""

import re

import jax
import pytest

from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import layout as gpu_layout
from benchmarks.gpu import loop as gpu_loop
from benchmarks.gpu import scene as gpu_scene
from benchmarks.gpu import serve as gpu_serve
from benchmarks.gpu import sizes as gpu_sizes
from benchmarks.gpu.batch import make_batch, run_attention
from benchmarks.gpu.rows import Run
from pallas_kernels.paged_attention.arg_specs import named
from tests.aot import hlo

pytestmark = [
  pytest.mark.aot,
  pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
  ),
]
ROUNDS = 500
FULL = Run(sizes=gpu_sizes.FULL, interpret=False)
MEMORY = 0.75 * 79.6 * 2**30  # what jax takes of an H100's


def compiled(compiler, chain):
  """The program, and its loop's body."""
  program = compiler(
    chain.program(ROUNDS), chain.state, chain.constants, tuple(chain.turns), donate=0
  )
  module = hlo.read(program.text)
  (loop,) = module.whiles()
  # The host sends off all rounds without reading a predicate back.
  assert f'"known_trip_count":{{"n":"{ROUNDS}"}}' in program.text
  return module, loop.callees["body"]


@pytest.mark.parametrize(
  ("by", "kernels"),
  [
    ("triton", ["paged_attention_split", "paged_attention_combine"]),
    ("mosaic", ["CustomCall", "paged_attention_combine"]),
    (gpu_layout.NHD, ["paged_attention_split", "paged_attention_combine"]),
  ],
)
def test_each_call_of_a_chain_is_made_each_time(compiler, by, kernels):
  num_turns = 4
  rows = [(8192, 1), (300, 1)]
  batch = make_batch(named("llama-3-8b"), rows, is_decode=True, num_copies=2)
  arrays, call = batch.arrays, run_attention(batch, by)
  if by == gpu_layout.NHD:
    arrays, call = dict(gpu_layout.candidates(batch, interpret=False))[by]()
  turns = gpu_attention._turns(batch, arrays["block_tables"], num_turns)
  chain = gpu_attention.attention_chain(arrays, call, turns, 1e-5)
  module, body = compiled(compiler, chain)
  in_loop = [i for i in module.walk(body) if i.opcode == "custom-call"]
  assert len(in_loop) == 2 * num_turns
  assert len(in_loop) == sum(i.opcode == "custom-call" for i in module.walk())
  assert not [str(i) for i in module.rewrites(batch.arrays["k"].size)]
  # One graph holds the calls, one after the other.
  (path,) = (compiler.folder / "dump").glob("*.thunk_sequence_after_thunk_passes.txt")
  body = path.read_text("utf-8").partition("body:")[2]
  assert body.count("kCommandBuffer") == 1
  found = re.findall(r"paged_attention_\w+|(?<=: k)CustomCall", body)
  assert found == kernels * num_turns


def test_the_device_is_measured_at_what_it_is_said_to_do(compiler):
  chain = gpu_loop.copy_chain(1 << 16)
  module, body = compiled(compiler, chain)
  (copy,) = module.rewrites(1 << 16, body)
  assert copy.opcode in ("fusion", "add")
  chain = gpu_loop.matmul_chain(512)
  module, body = compiled(compiler, chain)
  products = [i for i in module.rewrites(1 << 18, body) if "dot_general" in i.op_name]
  assert len(products) >= len(chain.turns)


def test_the_loop_of_a_model_of_8b_fits_and_copies_no_pool(compiler):
  model = gpu_scene.llama(FULL, scan_layers=True)
  scene = max(gpu_serve.make_scenes(FULL, model), key=lambda s: s.config.num_bytes)
  function = gpu_scene.abstract(model)
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(function))
  assert 15e9 < weights < 17e9
  state, max_steps, function = gpu_scene.shapes(scene, function)
  program = compiler(scene.program(), state, max_steps, function, donate=0)
  module = hlo.read(program.text)
  (store,) = state[0].kv
  assert not [str(i) for i in module.rewrites(store.k.size)]
  assert not module.count("conditional")
  assert weights + scene.config.num_bytes + program.temp_bytes < MEMORY
