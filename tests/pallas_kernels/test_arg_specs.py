"""The named shapes of real models are what their names say."""

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import arg_specs
from pallas_kernels.paged_attention.arg_specs import ARG_SPECS


def test_names_are_distinct():
  assert len({spec.name for spec in ARG_SPECS}) == len(ARG_SPECS)


def test_what_kernels_must_serve_is_there():
  assert {spec.group for spec in ARG_SPECS} >= {1, 2, 3, 4, 5, 6, 7, 8, 16, 128}
  assert {spec.head_dim for spec in ARG_SPECS} >= {64, 80, 96, 128, 256, 576}
  assert {spec.block_size for spec in ARG_SPECS} >= {8, 16, 64, 128}
  assert any(spec.num_kv_heads == 1 and not spec.is_latent for spec in ARG_SPECS)


@pytest.mark.parametrize(
  ("name", "num_bytes"),
  [
    ("llama-3-8b", 4096),
    ("llama-3-8b fp8", 2048 + 64),
    ("deepseek-v3 tp8", 1152),
    ("deepseek-v3 tp8 fp8", 576 + 4),
  ],
)
def test_bytes_of_a_token(name, num_bytes):
  assert arg_specs.named(name).bytes_per_token == num_bytes


def test_shapes_are_the_arguments_of_the_operation():
  spec = arg_specs.named("deepseek-v3 tp8 fp8")
  shapes = spec.shapes(num_seqs=3, num_blocks=20, max_blocks=5, num_tokens=7)
  found = {
    name: None if x is None else (x.shape, x.dtype) for name, x in shapes.items()
  }
  assert found == {
    "q": ((7, 16, 576), jnp.bfloat16),
    "k": ((20, 1, 64, 576), jnp.uint8),
    "v": None,
    "block_tables": ((3, 5), jnp.int32),
    "seq_lens": ((3,), jnp.int32),
    "cu_seqlens": ((4,), jnp.int32),
    "sinks": None,
    "k_scale": ((20, 1, 64), jnp.float32),
    "v_scale": None,
  }


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="one of ARG_SPECS, got 'llama-9'"):
    arg_specs.named("llama-9")
