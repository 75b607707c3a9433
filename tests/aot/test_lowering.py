"""Every named shape is lowered for CUDA by every backend that says it can serve it.

Lowering needs no GPU. It finds primitives that a backend lacks, extents that are no
power of two, layouts that do not fit, and too much shared memory.
"""

import functools
import types

import jax
import pytest

from pallas_kernels import device
from pallas_kernels.paged_attention import api, paged_attention
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS, named
from tests.aot import deviceless
from tests.fixtures.thorough import more

pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
# What the text of a program calls its kernels.
CALLS = {"xla": "no kernel", "triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu"}
STEPS = {
  "decode": {"num_tokens": 4, "max_query_len": 1},
  "mixed": {"num_tokens": 128, "max_query_len": None},
}
# At least these are served by more than the portable backends.
ON_HOPPER = {
  "llama-3-8b",
  "llama-3-8b block 8",
  "llama-3-8b block 128",
  "llama-3-8b fp8",
  "llama-3-8b int8",
  "llama-3-70b tp8",
  "gpt-oss-120b window",
  "gemma-2-9b",
  "qwen-3-235b-a22b",
  "phi-2",
  "phi-3-mini",
  "deepseek-v3 tp8 fp8",
}


def lower(spec, implementation, *, num_tokens, max_query_len):
  shapes = spec.shapes(
    num_seqs=4, num_blocks=64, max_blocks=1024 // spec.block_size, num_tokens=num_tokens
  )
  run = functools.partial(
    paged_attention,
    implementation=implementation,
    max_query_len=max_query_len,
    **spec.options,
  )
  return deviceless.lower(run, **shapes).as_text()


@pytest.mark.parametrize(
  "spec",
  [ARG_SPECS[0], named("deepseek-v3 tp8"), *more(*ARG_SPECS[1:])],
  ids=lambda spec: spec.name,
)
def test_every_named_shape_is_lowered(spec):
  served = set()
  for implementation in api.IMPLEMENTATIONS:
    for name, step in STEPS.items():
      try:
        text = lower(spec, implementation, **step)
      except NotImplementedError as error:
        assert f"implementation {implementation!r}:" in str(error)
        continue
      served.add((implementation, name))
      found = {key for key, call in CALLS.items() if call in text}
      # The kernel for Hopper leaves the last part to Triton.
      assert found - {"triton"} == {implementation} - {"xla", "triton"}, implementation
      if implementation == "triton":
        assert text.count(CALLS["triton"]) == (2 if name == "decode" else 3)
  assert {(by, name) for by in ("xla", "triton") for name in STEPS} <= served
  if spec.name in ON_HOPPER:
    assert ("mosaic", "decode") in served


@pytest.mark.parametrize("name", ["llama-3-8b fp8", "deepseek-v3 tp8 fp8"])
def test_float8_is_served_by_gpus_that_do_not_know_it(name):
  with deviceless.gpu(deviceless.A100):
    texts = [lower(named(name), "triton", **step) for step in STEPS.values()]
  assert [text.count(CALLS["triton"]) for text in texts] == [2, 3]


@pytest.mark.parametrize(
  ("kind", "has_float8", "kilobytes"),
  [
    ("NVIDIA A100-SXM4-80GB", False, 163),
    ("NVIDIA A10G", False, 99),
    ("NVIDIA GeForce RTX 3090", False, 99),
    ("NVIDIA RTX A6000", False, 99),
    ("NVIDIA H100 80GB HBM3", True, 227),
    ("NVIDIA H200", True, 227),
    ("NVIDIA GH200 480GB", True, 227),
    ("NVIDIA B200", True, 227),
    ("NVIDIA L4", True, 99),
    ("NVIDIA L40S", True, 99),
    ("NVIDIA GeForce RTX 4090", True, 99),
    ("NVIDIA GeForce RTX 5090", True, 99),
    ("NVIDIA RTX 6000 Ada Generation", True, 99),
    ("unheard of", False, 99),
  ],
)
def test_devices_are_known_by_name(kind, has_float8, kilobytes):
  abstract = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=None, platform="gpu"
  )
  with deviceless.gpu(abstract):
    assert device.kind() == kind
    assert device.has_float8() == has_float8
    assert device.shared_bytes() == kilobytes << 10


def test_the_capability_of_a_device_that_is_there_is_asked(monkeypatch):
  found = types.SimpleNamespace(platform="gpu", compute_capability="8.6")
  monkeypatch.setattr(jax, "devices", lambda: [found])
  assert not device.has_float8() and device.shared_bytes() == 99 << 10
  found.compute_capability = "gfx942"
  assert not device.has_float8() and device.shared_bytes() == 99 << 10
  found.compute_capability = "10.0"
  assert device.has_float8() and device.shared_bytes() == 227 << 10
