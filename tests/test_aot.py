"""Compiled for an H100 without one: kernels that fit, and loops that copy no pool.

`make aot` runs this in an environment with the CUDA compiler's wheels.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache import CacheConfig, SchedulerConfig
from kvcache.models.llama import Llama, LlamaConfig
from kvcache.nn import as_function
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from tests import hlo
from tests.deviceless import Compiler

pytestmark = [
  pytest.mark.aot,
  pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
  ),
]
MAX_SHARED_BYTES = 227 << 10  # what a program may have on an H100
REGISTERS = 64 << 10  # of a multiprocessor
# Programs that find room on a multiprocessor by their registers and shared memory: what
# was measured, held so that it is not lost.
MIN_RESIDENT = {
  "paged_attention_split": 1,
  "paged_attention_fill": 1,
  "paged_attention_combine": 4,
}
NAMED = [s for s in ARG_SPECS if " block " not in s.name and "tp2" not in s.name]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
  # A program from the cache would not be assembled, and say nothing.
  was_on = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield Compiler(tmp_path_factory.mktemp("aot"))
  jax.config.update("jax_enable_compilation_cache", was_on)


def resident(kernel):
  by_registers = REGISTERS // (kernel.registers * kernel.threads)
  by_shared = (228 << 10) // (kernel.shared_bytes + 1024)
  return min(by_registers, by_shared, 2048 // kernel.threads)


@pytest.mark.parametrize("spec", NAMED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("max_query_len", [1, None], ids=["decode", "mixed"])
def test_kernels_fit_and_spill_nothing(compiler, spec, max_query_len):
  shapes = spec.shapes(
    num_seqs=32,
    num_blocks=4096,
    max_blocks=8192 // spec.block_size,
    num_tokens=32 if max_query_len else 1024,
  )
  run = functools.partial(
    paged_attention,
    implementation="triton",
    max_query_len=max_query_len,
    **spec.options,
  )
  program = compiler(run, **shapes)
  ours = {name: k for name, k in program.kernels.items() if name in MIN_RESIDENT}
  assert len(ours) == (2 if max_query_len else 3)
  for name, kernel in ours.items():
    least = MIN_RESIDENT[name]
    if name == "paged_attention_split" and max_query_len and not spec.is_latent:
      least = 2
    assert kernel.spill_bytes == 0, (name, kernel)
    assert kernel.shared_bytes <= MAX_SHARED_BYTES, (name, kernel)
    assert resident(kernel) >= least, (name, kernel)
  assert not hlo.read(program.text).rewrites(shapes["k"].size)


@pytest.mark.parametrize(
  ("name", "num_resident"),
  [
    ("llama-3-8b", 2),
    ("llama-3-8b block 8", 2),
    ("llama-3-8b block 128", 2),
    ("llama-3-8b float16", 2),
    ("qwen-3-235b-a22b", 1),  # 16 columns
    ("gpt-oss-120b window", 2),
    ("gemma-2-9b", 1),  # a head of 256, and a soft cap
    ("deepseek-v3 tp8", 1),  # latent keys of 576
  ],
)
def test_the_decode_kernel_for_hopper_fits_and_spills_nothing(
  compiler, name, num_resident
):
  _, (kernel,) = compile_mosaic(compiler, name, max_query_len=1)
  assert kernel.spill_bytes == 0, kernel
  assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel
  assert resident(kernel) >= num_resident, kernel


# A warpgroup that computes has 232 registers a thread; with heads of 256 it keeps some
# numbers that it needs once per tile of queries in memory.
MAX_SPILL_BYTES = {64: 0, 128: 0, 256: 40}
MAX_TEMP_BYTES = 80 << 20  # queries and results by tiles, and those of the other rows
MAX_PREFILL_SHARED_BYTES = {64: 146 << 10, 128: 162 << 10, 256: 194 << 10}


@pytest.mark.parametrize(
  ("name", "num_seqs", "num_tokens"),
  [
    ("llama-3-8b", 1, 4096),
    ("llama-3-8b block 16", 1, 4096),
    ("llama-3-8b block 128", 32, 1024),
    ("llama-3-8b float16", 32, 1024),
    ("llama-3.2-3b", 32, 1024),  # three heads per kv head
    ("gpt-oss-120b window", 32, 1024),
    ("gemma-2-9b", 32, 1024),
  ],
)
def test_the_prefill_kernel_for_hopper_fits(compiler, name, num_seqs, num_tokens):
  program, kernels = compile_mosaic(
    compiler, name, num_seqs=num_seqs, num_tokens=num_tokens
  )
  prefill, split = sorted(kernels, key=lambda kernel: -kernel.threads)
  head_dim = named(name).head_dim
  assert prefill.threads == 384 and prefill.registers == 168
  assert prefill.spill_bytes <= MAX_SPILL_BYTES[head_dim], prefill
  assert prefill.shared_bytes <= MAX_PREFILL_SHARED_BYTES[head_dim], prefill
  assert split.spill_bytes == 0 and resident(split) >= 1, split
  assert program.temp_bytes <= MAX_TEMP_BYTES


def compile_mosaic(compiler, name, *, max_query_len=None, num_seqs=32, num_tokens=32):
  spec = named(name)
  shapes = spec.shapes(
    num_seqs=num_seqs,
    num_blocks=4096,
    max_blocks=8192 // spec.block_size,
    num_tokens=num_tokens,
  )
  run = functools.partial(
    paged_attention,
    implementation="mosaic",
    max_query_len=max_query_len,
    **spec.options,
  )
  program = compiler(run, **shapes)
  module = hlo.read(program.text)
  assert not module.rewrites(shapes["k"].size)
  assert not module.count("while") and not module.count("sort")
  return program, [k for name, k in program.kernels.items() if "sm90" in name]


MODEL = LlamaConfig(
  vocab_size=32_000,
  hidden_size=4096,
  intermediate_size=14_336,
  num_layers=8,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  dtype=jnp.bfloat16,
)
CONFIG = CacheConfig(
  layers=MODEL.cache_layers(),
  num_blocks=4096,
  block_size=64,
  max_seqs=64,
  max_seq_len=8192,
  dtype="bfloat16",
)


def test_the_loop_of_a_llama_copies_no_pool(compiler):
  model = nnx.eval_shape(lambda: Llama(MODEL, rngs=nnx.Rngs(0)))
  function = as_function(model)
  ctx = jax.eval_shape(functools.partial(kvcache.init, CONFIG))
  requests = jax.eval_shape(
    lambda: kvcache.make_requests([[1] * 100] * 128, max_new_tokens=100)
  )
  run = functools.partial(kvcache.serve, scheduler=SchedulerConfig(token_budget=512))
  program = compiler(run, function, ctx, requests, donate=(1, 2))
  module = hlo.read(program.text)
  elements = CONFIG.num_bytes // 2 // 2
  assert not [str(i) for i in module.rewrites(elements // 2)]
  assert not module.count("conditional")
  assert program.temp_bytes < 0.1 * CONFIG.num_bytes
  assert {"paged_attention_split", "paged_attention_fill"} <= program.kernels.keys()
  assert not any(k.spill_bytes for k in program.kernels.values())
