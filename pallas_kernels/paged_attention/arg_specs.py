"""Arguments of real models, by name: what tests lower, compile and benchmarks time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """What one attention layer of a model hands to `paged_attention` on one device.

  Attributes:
    name: Of the model, and of how many devices share its heads (`tp8`).
    num_heads: `H` on one device.
    num_kv_heads: `K` on one device.
    head_dim: `D`.
    v_head_dim: `Dv` of a latent layer, whose values are the first part of its keys;
      None where keys and values are alike.
    block_size: Tokens per block.
    dtype: Of queries and, unless quantised, of keys and values.
    kv_dtype: `int8` or `float8_e4m3fn`, or None.
    sm_scale: Factor of the logits, `D ** -0.5` if None.
    sliding_window: Tokens that a query sees, or None.
    logits_soft_cap: Soft bound of the logits, or None.
    has_sinks: Whether each head has a sink.
  """

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  v_head_dim: int | None = None
  block_size: int = 64
  dtype: DTypeLike = jnp.bfloat16
  kv_dtype: DTypeLike | None = None
  sm_scale: float | None = None
  sliding_window: int | None = None
  logits_soft_cap: float | None = None
  has_sinks: bool = False

  @property
  def is_latent(self) -> bool:
    """Whether the values are the first part of the keys."""
    return self.v_head_dim is not None

  @property
  def group(self) -> int:
    """Query heads of one kv head."""
    return self.num_heads // self.num_kv_heads

  @property
  def stored_dtype(self) -> np.dtype:
    """Of the elements of the pools; `float8_e4m3fn` is kept as its bits."""
    if self.kv_dtype is None:
      return np.dtype(self.dtype)
    is_fp8 = np.dtype(self.kv_dtype) == np.dtype(jnp.float8_e4m3fn)
    return np.dtype(jnp.uint8) if is_fp8 else np.dtype(self.kv_dtype)

  @property
  def bytes_per_token(self) -> int:
    """Bytes of one token's keys and values, scales included."""
    width = self.head_dim * (1 if self.is_latent else 2)
    scales = 0 if self.kv_dtype is None else 4 * (1 if self.is_latent else 2)
    return self.num_kv_heads * (width * self.stored_dtype.itemsize + scales)

  @property
  def options(self) -> dict[str, Any]:
    """The static keyword arguments of `paged_attention`."""
    return {
      "sm_scale": self.sm_scale,
      "sliding_window": self.sliding_window,
      "logits_soft_cap": self.logits_soft_cap,
      "v_head_dim": self.v_head_dim,
    }

  def shapes(
    self, *, num_seqs: int, num_blocks: int, max_blocks: int, num_tokens: int
  ) -> dict[str, jax.ShapeDtypeStruct | None]:
    """The array arguments of `paged_attention`, by name.

    Args:
      num_seqs: `S`.
      num_blocks: `N`.
      max_blocks: `P`.
      num_tokens: `T`.
    """
    row = (num_blocks, self.num_kv_heads, self.block_size)
    pool = jax.ShapeDtypeStruct((*row, self.head_dim), self.stored_dtype)
    scale = None if self.kv_dtype is None else jax.ShapeDtypeStruct(row, jnp.float32)
    heads = (self.num_heads,)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, jnp.int32)

    return {
      "q": jax.ShapeDtypeStruct((num_tokens, *heads, self.head_dim), self.dtype),
      "k": pool,
      "v": None if self.is_latent else pool,
      "block_tables": ints(num_seqs, max_blocks),
      "seq_lens": ints(num_seqs),
      "cu_seqlens": ints(num_seqs + 1),
      "sinks": jax.ShapeDtypeStruct(heads, jnp.float32) if self.has_sinks else None,
      "k_scale": scale,
      "v_scale": None if self.is_latent else scale,
    }


def _model(name: str, heads: int, kv_heads: int, head_dim: int, **more: Any) -> ArgSpec:
  return ArgSpec(
    name=name, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **more
  )


_FP8 = jnp.float8_e4m3fn
# Latent queries are as wide as the compressed keys, but scaled for the 128 + 64
# elements of a head before compression.
_LATENT: dict[str, Any] = {"head_dim": 576, "v_head_dim": 512, "sm_scale": 192**-0.5}

ARG_SPECS = (
  _model("llama-3-8b", 32, 8, 128),
  _model("llama-3-8b block 8", 32, 8, 128, block_size=8),
  _model("llama-3-8b block 16", 32, 8, 128, block_size=16),
  _model("llama-3-8b block 128", 32, 8, 128, block_size=128),
  _model("llama-3-8b float16", 32, 8, 128, dtype=jnp.float16),
  _model("llama-3-8b float32", 32, 8, 128, dtype=jnp.float32),
  _model("llama-3-8b int8", 32, 8, 128, kv_dtype=jnp.int8),
  _model("llama-3-8b fp8", 32, 8, 128, kv_dtype=_FP8),
  _model("llama-3-8b fp8 block 16", 32, 8, 128, kv_dtype=_FP8, block_size=16),
  _model("llama-3-8b tp8", 4, 1, 128),
  _model("llama-3-70b", 64, 8, 128),
  _model("llama-3-70b tp8", 8, 1, 128),
  _model("llama-3.2-3b", 24, 8, 128),
  _model("qwen-2.5-0.5b", 14, 2, 64),
  _model("qwen-2.5-1.5b", 12, 2, 128),
  _model("qwen-3-8b", 32, 8, 128, block_size=16),
  _model("qwen-3-30b-a3b", 32, 4, 128),
  _model("qwen-3-235b-a22b", 64, 4, 128),
  _model("gpt-oss-120b full", 64, 8, 64, has_sinks=True),
  _model("gpt-oss-120b window", 64, 8, 64, has_sinks=True, sliding_window=128),
  _model("gemma-2-9b", 16, 8, 256, logits_soft_cap=50.0, sliding_window=4096),
  _model("gemma-3-4b", 8, 4, 256, sliding_window=1024),
  _model("gemma-3-27b", 32, 16, 128, sliding_window=1024, sm_scale=168**-0.5),
  _model("gemma-2b", 8, 1, 256),
  _model("phi-2", 32, 32, 80),
  _model("phi-3-mini", 32, 32, 96, sliding_window=2047),
  ArgSpec(name="deepseek-v3", num_heads=128, num_kv_heads=1, **_LATENT),
  ArgSpec(name="deepseek-v3 tp2", num_heads=64, num_kv_heads=1, **_LATENT),
  ArgSpec(name="deepseek-v3 tp8", num_heads=16, num_kv_heads=1, **_LATENT),
  ArgSpec(
    name="deepseek-v3 tp8 fp8", num_heads=16, num_kv_heads=1, kv_dtype=_FP8, **_LATENT
  ),
  _model("granite-4-h-small", 32, 8, 128, sm_scale=0.0078125),
  _model("granite-4-h-tiny", 12, 4, 128, sm_scale=0.0078125),
  _model("granite-4-micro", 40, 8, 64, sm_scale=0.015625),
)


def named(name: str) -> ArgSpec:
  """The one with a name."""
  for spec in ARG_SPECS:
    if spec.name == name:
      return spec
  raise ValueError(f"name must be one of ARG_SPECS, got {name!r}")
