"""Small, readable reference models and their weight loaders.

`load(path)` reads a GGUF file, a Hugging Face folder, or a model of the Hugging Face
Hub by its name; without a path it takes the demo model. `load_config(path)` reads a
model's shape alone.
"""

from kvcache.models.deepseek2 import DeepSeek2, DeepSeek2Config
from kvcache.models.errors import LoadError
from kvcache.models.gemma2 import Gemma2, Gemma2Config
from kvcache.models.granite_hybrid import GraniteHybrid, GraniteHybridConfig
from kvcache.models.llama import Llama, LlamaConfig
from kvcache.models.loaded import Loaded
from kvcache.models.loading import DEMO_PACKAGE, demo_path, load, load_config
from kvcache.models.presets import PRESETS
from kvcache.models.tensor_parallel import cut_llama
from kvcache.models.tokenizer import TextStream, Tokenizer

__all__ = [
  "DEMO_PACKAGE",
  "PRESETS",
  "DeepSeek2",
  "DeepSeek2Config",
  "Gemma2",
  "Gemma2Config",
  "GraniteHybrid",
  "GraniteHybridConfig",
  "Llama",
  "LlamaConfig",
  "LoadError",
  "Loaded",
  "TextStream",
  "Tokenizer",
  "cut_llama",
  "demo_path",
  "load",
  "load_config",
]
