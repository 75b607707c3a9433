"""The Llama family: Llama, Mistral, SmolLM, Qwen2 and Qwen3, one decoder.

The stack is written once as a `Block` and run in one of two ways. Unrolled, the
default, every block has its own arrays, and a step reads each weight once. Scanned, all
blocks' weights are stacked and the compiled program holds one block, but each block's
weights are copied out of the stack before they are multiplied:

*   By XLA:CPU always. It costs a decode step of few rows up to half its time.
*   By XLA for GPUs (the optimised HLO of jax 0.12 for an H100) where a product is a
    Triton fusion, which does not take a `dynamic-slice` in a loop: 436 MB read and
    written per layer of 8B parameters, 14 GB per step beside the 14 GB that are needed.
    A product that is a cuBLAS call takes the slice as an address and copies nothing
    (`--xla_gpu_enable_triton_gemm=false` makes all of them such), but which of the two
    it is, XLA decides on the device; without one it takes Triton. Other flags
    (`xla_gpu_enable_dynamic_slice_fusion`, `xla_gpu_enable_while_loop_unrolling`,
    `xla_gpu_experimental_gemm_fusion_v2`) change nothing. A static slice is fused:
    `lax.scan(..., unroll=num_layers)` copies nothing either.

What scanning saves is compilation: `serve` with 32 layers was compiled for an H100 in
58 seconds scanned and in 81 unrolled, a decode step alone in 4 and in 17, on two CPU
cores. The cache is the carry either way, and never copied.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from kvcache.config import AttentionLayer
from kvcache.context import Context
from kvcache.models.decoder import Decoder
from kvcache.nn.attention import PagedAttention
from kvcache.nn.feed_forward import FeedForward
from kvcache.nn.norm import RMSNorm
from kvcache.nn.rotary import Rotary
from kvcache.verbs import sharding
from kvcache.verbs.metadata import StepMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """The shape of a model; hashable.

  Attributes:
    vocab_size: Rows of the embedding.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the gated feed-forward layer.
    num_layers: `L`.
    num_heads: `H`.
    num_kv_heads: `K`.
    head_dim: `D`.
    rope_theta: Base of the rotary frequencies.
    rope_factors: Divisors of these frequencies, as in `kvcache.nn.Rotary`, or None.
    norm_epsilon: Epsilon of every RMSNorm.
    tie_embeddings: Whether the output matrix is the embedding.
    attention_bias: Whether queries, keys and values have a bias (Qwen2).
    attention_out_bias: Whether the attention's output projection has one.
    qk_norm: Whether each head of queries and keys is normalised (Qwen3).
    sliding_window: Tokens that a query sees, itself included (Mistral); all if None.
    max_position: Context length the model was trained for; not enforced here.
    dtype: Of weights and activations. Products are accumulated, and logits returned, in
      float32.
    scan_layers: Whether to stack the weights and scan: it compiles faster and decodes
      slower, see the module's docstring.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_factors: tuple[float, ...] | None = None
  norm_epsilon: float = 1e-5
  tie_embeddings: bool = False
  attention_bias: bool = False
  attention_out_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  max_position: int = 2048
  dtype: DTypeLike = jnp.float32
  scan_layers: bool = False

  def __post_init__(self):
    object.__setattr__(self, "dtype", np.dtype(self.dtype))

  def cache_layers(self) -> tuple[AttentionLayer, ...]:
    """Returns what each layer keeps per token, for `CacheConfig(layers=...)`."""
    layer = AttentionLayer(
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      sliding_window=self.sliding_window,
    )
    return (layer,) * self.num_layers

  @property
  def rotary(self) -> Rotary:
    """The position embedding that all layers share."""
    return Rotary(
      head_dim=self.head_dim, theta=self.rope_theta, factors=self.rope_factors
    )


class Block(nnx.Module):
  """One layer: attention and feed-forward, each normalised before and added after."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config)
    self.attention = PagedAttention(
      config.hidden_size,
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      rotary=config.rotary,
      use_bias=config.attention_bias,
      use_out_bias=config.attention_out_bias,
      qk_norm=config.qk_norm,
      norm_epsilon=config.norm_epsilon,
      dtype=config.dtype,
      rngs=rngs,
    )
    self.mlp_norm = _norm(config)
    self.mlp = FeedForward(
      config.hidden_size, config.intermediate_size, dtype=config.dtype, rngs=rngs
    )

  def __call__(
    self,
    x: jax.Array,
    layer: jax.Array | int,
    metadata: StepMetadata,
    ctx: Context,
    *,
    rotation: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, Context]:
    """Maps the residual stream `[T, hidden]`; arguments as in `PagedAttention`."""
    attended, ctx = self.attention(
      self.attention_norm(x), layer, metadata, ctx, rotation=rotation
    )
    x = x + attended
    mapped = self.mlp(self.mlp_norm(x))
    return x + sharding.sum_parts(metadata.head_axes, mapped), ctx


class Llama(Decoder[LlamaConfig]):
  """A decoder-only language model over a paged cache.

  Attributes:
    config: Its shape.
    embedding: `[vocab_size, hidden_size]`.
    layers: A list of `L` blocks, or one `Block` with stacked weights `[L, ...]`.
    norm: Normalisation before the output matrix.
    head: `[vocab_size, hidden_size]`, or None if the embedding serves.
  """

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    def make_layers() -> Any:
      keys = jax.random.split(rngs.params(), config.num_layers)
      if config.scan_layers:
        return nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
      return nnx.List([Block(config, rngs=nnx.Rngs(key)) for key in keys])

    super().__init__(
      config, make_layers, _norm(config), is_tied=config.tie_embeddings, rngs=rngs
    )

  def _run_layers(
    self, x: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    rotation = self.config.rotary(metadata.positions)
    if isinstance(self.layers, Block):
      graph, weights = nnx.split(self.layers)

      def scan_block(
        carry: tuple[jax.Array, Context],
        layer_and_weights: tuple[jax.Array, nnx.State[Any, Any]],
      ) -> tuple[tuple[jax.Array, Context], None]:
        layer, weights = layer_and_weights
        block = nnx.merge(graph, weights)
        return block(carry[0], layer, metadata, carry[1], rotation=rotation), None

      indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
      (x, ctx), _ = jax.lax.scan(scan_block, (x, ctx), (indices, weights))
    else:
      for layer, block in enumerate(self.layers):
        x, ctx = block(x, layer, metadata, ctx, rotation=rotation)
    return x, ctx


def _norm(config: LlamaConfig) -> RMSNorm:
  return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, dtype=config.dtype)
