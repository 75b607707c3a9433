"""What all models here are: tokens embedded, a stack of layers, logits."""

from collections.abc import Callable
from typing import Any, Protocol

from flax import nnx
import jax

from kvcache.config import AttentionLayer, RecurrentLayer
from kvcache.context import Context
from kvcache.nn.linear import multiply
from kvcache.nn.norm import RMSNorm
from kvcache.parts import arguments
from kvcache.verbs.metadata import StepMetadata


class _Shape(Protocol):
  """What a decoder must know of its configuration."""

  @property
  def vocab_size(self) -> int: ...
  @property
  def hidden_size(self) -> int: ...
  @property
  def dtype(self) -> Any: ...
  def cache_layers(self) -> tuple[AttentionLayer | RecurrentLayer, ...]: ...


class Decoder[ShapeT: _Shape](nnx.Module):
  """A decoder-only language model over a cache; a family says what its layers do.

  Attributes:
    config: Its shape.
    embedding: `[vocab_size, hidden_size]`.
    layers: Its blocks.
    norm: Normalisation before the output matrix.
    head: `[vocab_size, hidden_size]`, or None if the embedding serves.
  """

  def __init__(
    self,
    config: ShapeT,
    make_layers: Callable[[], Any],
    norm: RMSNorm,
    *,
    is_tied: bool,
    rngs: nnx.Rngs,
  ):
    self.config = config
    shape = (config.vocab_size, config.hidden_size)
    init = nnx.initializers.normal(0.02)
    self.embedding = nnx.Param(init(rngs.params(), shape, config.dtype))
    self.layers = make_layers()
    self.norm = norm
    self.head = None if is_tied else nnx.Param(init(rngs.params(), shape, config.dtype))

  def __call__(
    self, tokens: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    """Computes one step.

    Args:
      tokens: `[T]` int32, the packed tokens of the step.
      metadata: Which sequence and position each token has, from `step_metadata`.
      ctx: The cache, made for `config.cache_layers()`.

    Returns:
      Float32 logits `[S, vocab_size]` after each row's last token (or of all of
      `metadata.logits_indices`), without meaning for rows that are not in the step, and
      the cache with what the step's tokens leave in it.
    """
    arguments.check_layers(ctx.config, self.config.cache_layers())
    # Clipped, because padding tokens may be anything.
    x = self.embedding[...].at[tokens].get(mode="clip")
    x, ctx = self._run_layers(x, metadata, ctx)
    last = self.norm(x.at[metadata.logits_indices].get(mode="clip"))
    head = self.embedding if self.head is None else self.head
    return self._finish_logits(multiply(last, head[...])), ctx

  def _run_layers(
    self, x: jax.Array, metadata: StepMetadata, ctx: Context
  ) -> tuple[jax.Array, Context]:
    """Maps embedded tokens `[T, hidden_size]` through all layers."""
    raise NotImplementedError

  def _finish_logits(self, logits: jax.Array) -> jax.Array:
    """What a family does to its logits in the end."""
    return logits
