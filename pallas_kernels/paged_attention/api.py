"""The public paged attention operation; picks an implementation by name."""

from jax import Array
import jax.numpy as jnp

from pallas_kernels.paged_attention import xla

IMPLEMENTATIONS = ("xla",)


def paged_attention(
  q: Array,
  k: Array,
  v: Array,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float | None = None,
  max_query_len: int | None = None,
  implementation: str | None = None,
) -> Array:
  """Causal attention of packed, ragged queries over paged keys and values.

  One operation for decode, chunked prefill and mixtures: row `s` has the query tokens
  `cu_seqlens[s]` up to `cu_seqlens[s + 1]`, which are the last of its `seq_lens[s]`
  tokens. Whatever stands in blocks past a row's length, NaN included, has no influence.

  Args:
    q: `[T, H, D]`.
    k: `[N, K, block_size, D]`, `H` a multiple of `K`.
    v: `[N, K, block_size, D]`.
    block_tables: `[S, P]` int32. Entries past a row's length are ids in range.
    seq_lens: `[S]` int32. Stored tokens of each row, the query tokens included. Rows of
      length 0 give zeros.
    cu_seqlens: `[S + 1]` int32, first entry 0.
    sm_scale: Factor of the logits, `D ** -0.5` if omitted.
    max_query_len: Static bound on the rows' query tokens. 1 with `T == S` is a decode
      step.
    implementation: `"xla"`, or None for the best that can serve.

  Returns:
    `[T, H, D]` in `q`'s dtype; zeros for tokens past `cu_seqlens[-1]`.

  Raises:
    ValueError: Shapes or dtypes do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  _check(q, k, v, block_tables, seq_lens, cu_seqlens)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise NotImplementedError(
      f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}"
    )
  return xla.paged_attention(
    q,
    k,
    v,
    block_tables,
    seq_lens,
    cu_seqlens,
    sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
    max_query_len=max_query_len,
  )


def _check(
  q: Array, k: Array, v: Array, block_tables: Array, seq_lens: Array, cu_seqlens: Array
) -> None:
  if q.ndim != 3:
    raise ValueError(f"q must be [T, H, D], got {q.shape}")
  if k.ndim != 4 or k.shape[-1] != q.shape[-1]:
    raise ValueError(f"k must be [N, K, block_size, {q.shape[-1]}], got {k.shape}")
  if v.shape[:-1] != k.shape[:-1]:
    raise ValueError(f"v must be {[*k.shape[:-1], 'D']}, got {v.shape}")
  if q.shape[1] % k.shape[1]:
    raise ValueError(f"q has {q.shape[1]} heads, not a multiple of {k.shape[1]}")
  num_seqs = block_tables.shape[0]
  if block_tables.ndim != 2 or seq_lens.shape != (num_seqs,):
    raise ValueError(
      f"block_tables must be [S, P] and seq_lens [S], got {block_tables.shape} and"
      f" {seq_lens.shape}"
    )
  if cu_seqlens.shape != (num_seqs + 1,):
    raise ValueError(f"cu_seqlens must be [{num_seqs + 1}], got {cu_seqlens.shape}")
  for name, ids in (("block_tables", block_tables), ("seq_lens", seq_lens)):
    if ids.dtype != jnp.int32:
      raise ValueError(f"{name} must be int32, got {ids.dtype}")
