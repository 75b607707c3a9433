"""Published shapes by name, to size memory without a checkpoint at hand.

They are what the models' own `config.json` says; `load` takes none of them.
"""

from kvcache.models.deepseek2 import DeepSeek2Config
from kvcache.models.gemma2 import Gemma2Config
from kvcache.models.llama import LlamaConfig
from kvcache.models.weights import ModelConfig

_LLAMA3 = LlamaConfig(
  vocab_size=128256,
  hidden_size=4096,
  intermediate_size=14336,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  rope_theta=500000.0,
  max_position=8192,
)


def _llama31(
  hidden_size: int,
  intermediate_size: int,
  num_layers: int,
  num_heads: int,
  *,
  head_dim: int = 128,
  tie_embeddings: bool = False,
) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=128256,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=8,
    head_dim=head_dim,
    rope_theta=500000.0,
    tie_embeddings=tie_embeddings,
    max_position=131072,
  )


def _gemma2(
  hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int
) -> Gemma2Config:
  return Gemma2Config(
    vocab_size=256000,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    windows=(4096, None) * (num_layers // 2),
    num_heads=num_heads,
    num_kv_heads=num_heads // 2,
    head_dim=256,
    query_scalar=256,
  )


PRESETS: dict[str, ModelConfig] = {
  "smollm2-135m": LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    tie_embeddings=True,
    max_position=8192,
  ),
  "llama-3-8b": _LLAMA3,
  "llama-3.1-8b": _llama31(4096, 14336, 32, 32),
  "llama-3.1-70b": _llama31(8192, 28672, 80, 64),
  "llama-3.2-1b": _llama31(2048, 8192, 16, 32, head_dim=64, tie_embeddings=True),
  "llama-3.2-3b": _llama31(3072, 8192, 28, 24, tie_embeddings=True),
  "mistral-7b": LlamaConfig(  # the first version, the one with a window
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    sliding_window=4096,
    max_position=32768,
  ),
  "qwen2.5-7b": LlamaConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    norm_epsilon=1e-6,
    attention_bias=True,
    max_position=32768,
  ),
  "qwen3-8b": LlamaConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    norm_epsilon=1e-6,
    qk_norm=True,
    max_position=40960,
  ),
  "gemma-2-2b": _gemma2(2304, 9216, 26, 8),
  "gemma-2-9b": _gemma2(3584, 14336, 42, 16),
  "deepseek-v2-lite": DeepSeek2Config(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_layers=27,
    num_dense_layers=1,
    num_heads=16,
    kv_lora_rank=512,
    nope_head_dim=128,
    rope_head_dim=64,
    v_head_dim=128,
    num_experts=64,
    experts_per_token=6,
    expert_size=1408,
    num_shared_experts=2,
    max_position=163840,
  ),
}
"""Name -> shape."""
