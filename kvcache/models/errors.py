"""What goes wrong when a checkpoint is loaded, as one kind of exception."""

import importlib
from typing import Any


class LoadError(ValueError):
  """A checkpoint cannot be loaded; the message is one line and names the file."""


def require(module: str) -> Any:
  """Imports an optional dependency of the loaders.

  Raises:
    LoadError: It is not installed; the message says which extra brings it.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise LoadError(
      f"this needs the package {package!r}: pip install 'kvcache-jax[models]'"
    ) from error
