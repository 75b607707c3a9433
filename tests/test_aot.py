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
from kvcache.models.granite_hybrid import GraniteHybrid, GraniteHybridConfig
from kvcache.models.llama import Llama, LlamaConfig
from kvcache.nn import as_function
from pallas_kernels import ssm
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from pallas_kernels.ssm.arg_specs import ARG_SPECS as SSM_SPECS
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
  ],
)
def test_the_kernel_for_hopper_fits_and_spills_nothing(compiler, name, num_resident):
  spec = named(name)
  shapes = spec.shapes(
    num_seqs=32, num_blocks=4096, max_blocks=8192 // spec.block_size, num_tokens=32
  )
  run = functools.partial(
    paged_attention, implementation="mosaic", max_query_len=1, **spec.options
  )
  program = compiler(run, **shapes)
  (kernel,) = (k for name, k in program.kernels.items() if "sm90" in name)
  assert kernel.spill_bytes == 0, kernel
  assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel
  assert resident(kernel) >= num_resident, kernel
  assert not hlo.read(program.text).rewrites(shapes["k"].size)


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


# --- Recurrent states -----------------------------------------------------------------

# Two programs of a multiprocessor go through chunks, but one where a state has 256
# elements, or where the products of float32 fill the registers.
SSM_RESIDENT = {"ssm_ssd_step": 6, "ssm_conv1d_step": 16, "ssm_ssd_chunks": 2}
LONE_CHUNKS = ("nemotron-h-56b", "mamba2-130m float32")
SSM_NAMED = [s for s in SSM_SPECS if "float16" not in s.name and "tp8" not in s.name]


@pytest.mark.parametrize("spec", SSM_NAMED, ids=lambda spec: spec.name)
def test_steps_over_states_fit_and_copy_no_pool(compiler, spec):
  """A decode step, a draft step and a mixed one, each over a donated pool."""
  sizes = {"num_seqs": 32, "num_states": 97, "num_layers": 4}
  for entries, num_tokens, most in ((None, 32, 1), (4, 128, None), (None, 1024, None)):
    form = {"num_tokens": num_tokens, "num_entries": entries, **sizes}
    ssd, conv = spec.ssd_shapes(**form), spec.conv_shapes(**form)
    pools = {"ssd": ssd.pop("pool"), "conv": conv.pop("pool")}
    is_mixed = not (entries or most)

    def run(pools, ssd, conv, is_mixed=is_mixed, most=most):
      options = {"max_query_len": most, "implementation": "triton"}
      y, pool = ssm.step_ssd(**ssd, pool=pools["ssd"], **options)
      if is_mixed:
        options["implementation"] = "xla"
      u, other = ssm.step_conv1d(**conv, pool=pools["conv"], **options)
      return {"ssd": pool, "conv": other}, y, u

    program = compiler(run, pools, ssd, conv, donate=(0,))
    kernels = {n: k for n, k in program.kernels.items() if n in SSM_RESIDENT}
    last = "ssm_ssd_chunks" if is_mixed else "ssm_conv1d_step"
    assert kernels.keys() == {"ssm_ssd_step", last}
    for name, kernel in kernels.items():
      is_lone = name == "ssm_ssd_chunks" and spec.name in LONE_CHUNKS
      assert kernel.spill_bytes == 0, (name, kernel)
      assert kernel.shared_bytes <= MAX_SHARED_BYTES, (name, kernel)
      assert resident(kernel) >= (1 if is_lone else SSM_RESIDENT[name]), (name, kernel)
    module = hlo.read(program.text)
    # The smaller pool is still larger than what the tokens bring.
    assert not [str(i) for i in module.rewrites(pools["conv"].size)]
    assert {0, 1} <= module.aliases.keys()


HYBRID = GraniteHybridConfig(
  vocab_size=32_000,
  hidden_size=1536,
  intermediate_size=4096,
  layer_types=("mamba", "mamba", "attention", "mamba"),
  num_heads=12,
  num_kv_heads=4,
  head_dim=128,
  mamba_heads=48,
  mamba_head_dim=64,
  mamba_state_size=128,
  dtype=jnp.bfloat16,
)
HYBRID_CONFIG = CacheConfig(
  layers=HYBRID.cache_layers(),
  num_blocks=4096,
  block_size=64,
  max_seqs=64,
  max_seq_len=8192,
  dtype="bfloat16",
  num_snapshots=960,
)


def test_the_loop_of_a_hybrid_copies_no_states(compiler):
  model = nnx.eval_shape(lambda: GraniteHybrid(HYBRID, rngs=nnx.Rngs(0)))
  function = as_function(model)
  ctx = jax.eval_shape(functools.partial(kvcache.init, HYBRID_CONFIG))
  requests = jax.eval_shape(
    lambda: kvcache.make_requests([[1] * 100] * 128, max_new_tokens=100)
  )
  run = functools.partial(kvcache.serve, scheduler=SchedulerConfig(token_budget=512))
  program = compiler(run, function, ctx, requests, donate=(1, 2))
  module = hlo.read(program.text)
  # Of one layer; nothing else in the program is as large.
  elements = ctx.states.arrays["ssm"].size // HYBRID_CONFIG.num_recurrent_layers
  assert not [str(i) for i in module.rewrites(elements)]
  assert not module.count("conditional")
  assert program.temp_bytes < 0.1 * HYBRID_CONFIG.num_bytes
  wanted = {"ssm_conv1d_step", "ssm_ssd_step", "ssm_ssd_chunks"}
  assert wanted <= {name.rstrip("_0123456789") for name in program.kernels}
  assert not any(k.spill_bytes for k in program.kernels.values())
