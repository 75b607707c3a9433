"""What a loader returns."""

import dataclasses

from kvcache.models.tokenizer import Tokenizer
from kvcache.models.weights import Model, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """A model with what is needed to talk to it.

  Attributes:
    model: The module. `kvcache.nn.as_function(model)` is what a loop wants.
    config: Its shape; `config.cache_layers()` makes a `CacheConfig`.
    tokenizer: Text to ids and back, or None if the checkpoint has none.
    stop_tokens: Ids that end an answer.
    source: The file or folder it came from.
  """

  model: Model
  config: ModelConfig
  tokenizer: Tokenizer | None
  stop_tokens: tuple[int, ...]
  source: str

  @property
  def chat_template(self) -> str | None:
    """The Jinja source of the model's chat format, or None."""
    return self.tokenizer.chat_template if self.tokenizer is not None else None
