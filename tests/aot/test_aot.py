"""Compiled for GPUs without one: kernels that fit, and copy no pool.

`make aot` runs this in an environment with the CUDA compiler's wheels.
"""

import functools

import pytest

from pallas_kernels import ssm
from pallas_kernels.paged_attention import (
  mosaic_decode_sm90,
  mosaic_prefill_sm90,
  paged_attention,
)
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from pallas_kernels.ssm.arg_specs import ARG_SPECS as SSM_SPECS
from tests.aot import deviceless, hlo
from tests.aot.deviceless import Compiler

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


def resident(kernel, *, barrier_bytes=0):
  by_registers = REGISTERS // (kernel.registers * kernel.threads)
  by_shared = (228 << 10) // (kernel.shared_bytes + barrier_bytes + 1024)
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
    ("qwen-3-235b-a22b", 2),  # 16 columns
    ("gpt-oss-120b window", 2),
    ("gemma-2-9b", 1),  # a head of 256, and a soft cap
    ("deepseek-v3 tp8", 1),  # latent keys of 576
    ("llama-3-8b fp8", 2),
    ("llama-3-8b int8", 2),
    ("deepseek-v3 tp8 fp8", 1),
    ("phi-2", 2),
    ("phi-3-mini", 2),
  ],
)
def test_the_decode_kernel_for_hopper_fits_and_spills_nothing(
  compiler, name, num_resident
):
  _, (kernel,) = compile_mosaic(compiler, name, max_query_len=1)
  assert kernel.spill_bytes == 0, kernel
  assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel
  assert resident(kernel, barrier_bytes=128) >= num_resident, kernel
  if name == "deepseek-v3 tp8 fp8":  # The only one that shares registers out anew.
    assert kernel.threads == 384
    assert sum(mosaic_decode_sm90._REGISTERS) <= 3 * kernel.registers


# With heads of 256 a warpgroup keeps in memory some numbers that it needs once per tile
# of queries.
MAX_SPILL_BYTES = {256: 8}
MAX_TEMP_BYTES = 80 << 20  # queries and results by tiles, and those of the other rows
MAX_PREFILL_SHARED_BYTES = {
  64: 146 << 10,
  80: 182 << 10,
  96: 170 << 10,
  128: 162 << 10,
  256: 194 << 10,
  "quantised": 198 << 10,
}


@pytest.mark.parametrize(
  ("name", "num_seqs", "num_tokens"),
  [
    ("llama-3-8b", 1, 4096),
    ("llama-3-8b block 8", 1, 4096),
    ("llama-3-8b block 16", 1, 4096),
    ("llama-3-8b block 128", 32, 1024),
    ("llama-3-8b float16", 32, 1024),
    ("llama-3.2-3b", 32, 1024),  # three heads per kv head
    ("gpt-oss-120b window", 32, 1024),
    ("gemma-2-9b", 32, 1024),
    ("llama-3-8b fp8", 32, 1024),
    ("llama-3-8b int8", 32, 1024),
    ("phi-2", 32, 1024),
    ("phi-3-mini", 32, 1024),
  ],
)
def test_the_prefill_kernel_for_hopper_fits(compiler, name, num_seqs, num_tokens):
  program, kernels = compile_mosaic(
    compiler, name, num_seqs=num_seqs, num_tokens=num_tokens
  )
  prefill, split = sorted(kernels, key=lambda kernel: -kernel.threads)
  head_dim, is_quantised = named(name).head_dim, named(name).kv_dtype is not None
  form = (512, 128) if is_quantised else (384, 168)
  max_shared = MAX_PREFILL_SHARED_BYTES["quantised" if is_quantised else head_dim]
  assert (prefill.threads, prefill.registers) == form
  # Warpgroups cannot share out more registers than they start with: they would wait.
  shared_out = mosaic_prefill_sm90._registers(head_dim, is_quantised=is_quantised)
  num_shared_out = shared_out[0] + sum(shared_out)
  assert num_shared_out <= prefill.registers * prefill.threads // 128
  assert prefill.spill_bytes <= MAX_SPILL_BYTES.get(head_dim, 0), prefill
  assert prefill.shared_bytes <= max_shared, prefill
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


@pytest.mark.parametrize("max_query_len", [1, None], ids=["decode", "mixed"])
@pytest.mark.parametrize(
  ("device", "names", "max_shared_bytes"),
  [
    # Without instructions for float8.
    (deviceless.A100, ("llama-3-8b fp8", "deepseek-v3 tp8 fp8"), 163 << 10),
    # Programs may have less than half the shared memory.
    (deviceless.L4, ("llama-3-8b", "gemma-2-9b", "deepseek-v3 tp8"), 99 << 10),
  ],
  ids=["A100", "L4"],
)
def test_other_gpus_are_served(
  compiler, tmp_path, device, names, max_shared_bytes, max_query_len
):
  del compiler  # which leaves the cache of programs alone
  compile_for = Compiler(tmp_path, device=device)
  for name in names:
    spec = named(name)
    num_tokens = 32 if max_query_len else 1024
    shapes = spec.shapes(
      num_seqs=32, num_blocks=4096, max_blocks=128, num_tokens=num_tokens
    )
    run = functools.partial(
      paged_attention,
      implementation="triton",
      max_query_len=max_query_len,
      **spec.options,
    )
    kernels = compile_for(run, **shapes).kernels
    ours = [kernel for by, kernel in kernels.items() if by in MIN_RESIDENT]
    assert len(ours) == (2 if max_query_len else 3)
    for kernel in ours:
      assert kernel.spill_bytes == 0, (name, kernel)
      assert kernel.shared_bytes <= max_shared_bytes, (name, kernel)


@pytest.mark.parametrize("name", ["llama-3-8b fp8", "llama-3-8b int8"])
def test_pools_of_2_to_4_gib_are_read_where_they_are(compiler, name):
  spec = named(name)
  shapes = spec.shapes(num_seqs=32, num_blocks=60_000, max_blocks=128, num_tokens=32)
  run = functools.partial(
    paged_attention, implementation="triton", max_query_len=1, **spec.options
  )
  program = compiler(run, **shapes)
  kernel = program.kernels["paged_attention_split"]
  assert kernel.spill_bytes == 0, kernel
  assert resident(kernel) >= 2, kernel
  assert not hlo.read(program.text).rewrites(shapes["k"].size // 2)


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
