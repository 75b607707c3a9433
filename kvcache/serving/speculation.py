"""Speculation: guessing the next tokens of a row, so that one step checks several.

What a drafter guesses changes how fast tokens come and never which: the loop samples
every position as it would without drafts, with the noise that belongs to the request
and the position, and keeps drafts as far as they agree with what was sampled.

`PromptLookup` looks into the text so far; `kvcache.serving.draft_model` has a drafter
that is a small model.
"""

import dataclasses
from typing import Any, Protocol

import jax
from jax import Array
import jax.numpy as jnp

from kvcache.config import settle_ints
from kvcache.serving.requests import Batch, Requests
from kvcache.serving.sampling import Sampler


class Drafter(Protocol):
  """What `serve` expects of a drafter: a pytree, static if it has no arrays.

  What it learns while it drafts is a state that the loop carries, as it carries the
  context; `()` for drafters that look at the requests only.
  """

  @property
  def num_drafts(self) -> int:
    """`J`, most drafts per row. Static."""
    ...

  def init(self) -> Any:
    """Returns the state before the first call, any pytree."""
    ...

  def propose(
    self, state: Any, requests: Requests, batch: Batch, sampler: Sampler
  ) -> tuple[Any, Array, Array]:
    """Guesses what follows each row's tokens.

    Args:
      state: From `init`, or from the call before.
      requests: The requests.
      batch: The running rows.
      sampler: How the loop chooses tokens.

    Returns:
      The state after, `[S, J]` int32 drafts, and `[S]` int32 how many of each row
      count.
    """
    ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
  """Guesses that the text goes on as it did after the same words before.

  Looks for the last place where the row's newest `ngram` tokens stood already, in
  prompt or output, and proposes what followed. Costs one pass over the rows' tokens.
  Reference: Saxena, "Prompt lookup decoding", 2023.

  Attributes:
    num_drafts: `J`, most drafts per row.
    ngram: Tokens that must agree.
  """

  num_drafts: int = 4
  ngram: int = 2

  def __post_init__(self):
    settle_ints(self, "num_drafts", "ngram")

  def init(self) -> tuple[()]:
    """There is nothing to remember."""
    return ()

  def propose(
    self, state: tuple[()], requests: Requests, batch: Batch, sampler: Sampler
  ) -> tuple[tuple[()], Array, Array]:
    """See `Drafter`."""
    del sampler
    ids = jnp.minimum(batch.request_ids, requests.num_requests - 1)
    tokens, lengths = requests.tokens[ids], batch.lengths
    capacity = requests.capacity
    start = jnp.arange(capacity, dtype=jnp.int32)[None]
    # A place counts if the n-gram there ends before the newest one does.
    found = start + self.ngram < lengths[:, None]
    for i in range(self.ngram):
      at = jnp.clip(lengths - self.ngram + i, 0, capacity - 1)
      newest = jnp.take_along_axis(tokens, at[:, None], axis=1)
      found &= jnp.roll(tokens, -i, axis=1) == newest
    place = jnp.max(jnp.where(found, start, -1), axis=1)
    follows = place + self.ngram
    offset = jnp.arange(self.num_drafts, dtype=jnp.int32)[None]
    at = jnp.minimum(follows[:, None] + offset, capacity - 1)
    drafts = jnp.take_along_axis(tokens, at, axis=1)
    num = jnp.clip(lengths - follows, 0, self.num_drafts)
    return state, drafts, jnp.where(place >= 0, num, 0).astype(jnp.int32)
