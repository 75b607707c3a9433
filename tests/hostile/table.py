"""What a row of the table of wrong uses is, and the contexts that they are tried on."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import kvcache
from kvcache import AttentionLayer, CacheConfig, Context, RecurrentLayer, Status
from tests.fixtures import small


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongUse:
  """One wrong use: what is done, and what must come of it.

  Attributes:
    area: What is misused.
    name: What is done.
    do: Does it, and returns what `gives` is compared with, if nothing is raised. With a
      context it may return `(ctx, result)`; the context must then be as it was, to the
      last bit, unless `changes` is set.
    raises: The exception.
    message: Regular expression that its message must contain.
    gives: What comes of it where nothing is raised. `Status` values are compared as
      such.
    changes: Whether the context may change.
    note: The outcome in words, where the value does not speak for itself.
  """

  area: str
  name: str
  do: Callable[..., Any]
  raises: type[BaseException] | None = None
  message: str = ""
  gives: Any = None
  changes: bool = False
  note: str = ""


def area(name: str) -> tuple[Callable[..., WrongUse], Callable[..., WrongUse]]:
  """What makes rows of one area, and what makes those in which something is raised."""

  def row(what: str, do: Callable[..., Any], **kwargs: Any) -> WrongUse:
    return WrongUse(area=name, name=what, do=do, **kwargs)

  def refused(
    what: str,
    do: Callable[..., Any],
    message: str,
    raises: type[BaseException] = ValueError,
    **kwargs: Any,
  ) -> WrongUse:
    return row(what, do, message=message, raises=raises, **kwargs)

  return row, refused


def named(*statuses: Status) -> list[int]:
  return [int(status) for status in statuses]


# Contexts. Everything is published, so that a refused call leaves every bit in place.

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


@functools.cache
def busy() -> Context:
  """Row 0 holds six tokens, row 1 three; rows 2 and 3 are inactive."""
  return small.publish(small.start(small.empty(), *TEXTS))


@functools.cache
def crowded() -> Context:
  """All four rows are taken."""
  return small.publish(small.start(busy(), [11, 12], [13]))


@functools.cache
def drained() -> Context:
  """Not a block is free: rows 0 and 1 have reserved what there was."""
  ctx, status = small.extend(busy(), small.rows({0: 10, 1: 13}), num_tokens=64)
  kvcache.raise_for_status(status)
  ctx, _ = small.extend(
    small.start(ctx, [1]), small.rows({2: 11}), num_tokens=small.NUM_TOKENS
  )
  return small.publish(ctx)


@functools.cache
def metadata() -> kvcache.StepMetadata:
  """Of a step of `busy` with sixteen packed tokens."""
  return jax.jit(functools.partial(kvcache.step_metadata, num_tokens=16))(
    busy(), small.rows({1: 1})
  )


LAYER = AttentionLayer(num_kv_heads=1, head_dim=2)
HYBRID = CacheConfig(
  layers=(
    LAYER,
    AttentionLayer(num_kv_heads=1, head_dim=2, sliding_window=6),
    RecurrentLayer(state={"sum": (3,)}),
  ),
  num_blocks=8,
  block_size=4,
  max_seqs=2,
  max_seq_len=16,
)


@functools.cache
def hybrid() -> Context:
  return kvcache.init(HYBRID)


def zeros(*shape: int, dtype=jnp.int32) -> jax.Array:
  return jnp.zeros(shape, dtype)
