"""History: how the memory and the requests were doing, step after step.

A ring of fixed size that `serve` writes on the device: one sample in each round of its
outer loop, so a row of samples per admission, completion or burst of decode steps. It
is read on the host once per slice.
"""

from typing import Protocol

from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from kvcache.context import Context
from kvcache.printing import Node

FIELDS = (
  "step",
  "free",
  "cached",
  "in_use",
  "references",
  "running",
  "waiting",
  "finished",
  "tokens",
  "preemptions",
  "prompt_tokens",
  "hit_tokens",
  "evicted",
)
"""What a sample holds: `step` and all from `finished` on are totals, the others are as
of its moment."""


class Counted(Protocol):
  """Work that a history follows; `kvcache.Requests` is."""

  def counts(self) -> dict[str, Array]:
    """Returns `FIELDS` that are known of the work: `[]` int32 each, by name."""
    ...


class History(Node, kw_only=True):
  """The last `E` samples.

  Attributes:
    samples: `[E, len(FIELDS)]` int32. Sample `i` is at `i % E`.
    num_samples: `[]` int32. How many were taken, the overwritten ones included.
  """

  samples: Array
  num_samples: Array

  @property
  def size(self) -> int:
    """`E`."""
    return self.samples.shape[-2]

  def series(self) -> dict[str, np.ndarray]:
    """The samples that are left, the oldest first, as one array for each field.

    Besides `FIELDS` there are, each for the time since the sample before,
    `tokens_per_step`, `new_preemptions` and `new_evicted`; and `hit_rate`, the share of
    all prompt tokens so far that were cached. Call it outside `jax.jit`.
    """
    if self.samples.ndim != 2:
      raise ValueError(f"history is a batch of {self.samples.shape[:-2]}: pick one")
    num, samples = int(self.num_samples), np.asarray(self.samples)
    order = np.arange(max(0, num - self.size), num) % self.size
    table = samples[order].astype(np.int64)
    found = {name: table[:, i] for i, name in enumerate(FIELDS)}

    def growth(name: str, *, before: int | None = None) -> np.ndarray:
      values = found[name]
      first = values[:1] if before is None else [before] * min(num, 1)
      return np.diff(values, prepend=np.asarray(first, np.int64))

    # What was before the oldest sample is known of the first one of a run only.
    before = 0 if num <= self.size else None
    steps = np.maximum(growth("step", before=before), 1)
    evicted = growth("evicted") % 2**32
    for name in ("prompt_tokens", "hit_tokens", "evicted"):  # counted modulo 2^32
      found[name] = found[name] % 2**32
    return found | {
      "tokens_per_step": growth("tokens", before=before) / steps,
      "new_preemptions": growth("preemptions", before=before),
      "new_evicted": evicted,
      "hit_rate": found["hit_tokens"] / np.maximum(found["prompt_tokens"], 1),
    }


def make_history(size: int = 1024) -> History:
  """Makes an empty history of `size` samples.

  Raises:
    ValueError: `size` is not positive.
  """
  if size < 1:
    raise ValueError(f"size must be positive, got {size}")
  return History(
    samples=jnp.zeros((size, len(FIELDS)), jnp.int32), num_samples=jnp.int32(0)
  )


def record(history: History, ctx: Context, requests: Counted) -> History:
  """Appends a sample; the oldest one goes when there is no room.

  Costs a pass over `[Q]` and over `[S]`, nothing of the size of the pool.
  """
  pool, counters = ctx.pool, ctx.counters
  num_cached = ctx.prefix.num_evictable
  values = requests.counts() | {
    "free": pool.num_free,
    "cached": num_cached,
    "in_use": pool.num_blocks - 1 - pool.num_free - num_cached,
    "references": jnp.sum(ctx.sequences.num_blocks, dtype=jnp.int32),
    "prompt_tokens": counters.prompt_tokens.astype(jnp.int32),
    "hit_tokens": counters.hit_tokens.astype(jnp.int32),
    "evicted": counters.num_evicted.astype(jnp.int32),
  }
  sample = jnp.stack([values[name] for name in FIELDS])
  at = (history.num_samples % history.size, jnp.int32(0))
  return history.replace(
    samples=lax.dynamic_update_slice(history.samples, sample[None], at),
    num_samples=history.num_samples + 1,
  )
