"""The rows of a step over states that stand in a pool."""

from typing import Any, NamedTuple

from jax import Array


class Rows(NamedTuple):
  """Which states the rows read and write, and which tokens they have.

  Kernels see `layer` as `[1]` and `write_ids` as `[S, E]`, whatever it was.
  """

  layer: Array | Any  # [] int32
  read_ids: Array | Any  # [S]
  write_ids: Array | Any  # [S], or [S, E] for the states after each token
  cu_seqlens: Array | Any  # [S + 1]

  @property
  def num_entries(self) -> int | None:
    """`E`; None if only the state after a row's last token is kept."""
    return None if self.write_ids.ndim == 1 else self.write_ids.shape[1]

  def is_decode(self, num_tokens: int, max_query_len: int | None) -> bool:
    """Whether token `s` belongs to row `s`, of states kept after the last token."""
    has_one = max_query_len == 1 and num_tokens == self.read_ids.shape[0]
    return has_one and self.num_entries is None
