"""The public paged attention operation; picks an implementation by name."""

import functools
from types import ModuleType

from jax import Array
import jax.numpy as jnp

from pallas_kernels import choice, device
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.call import Call, Outline, Shaped
from pallas_kernels.paged_attention.work_queue import Plan, plan_rows

IMPLEMENTATIONS = ("xla", "triton", "mosaic")


def paged_attention(
  q: Array,
  k: Array,
  v: Array | None,
  block_tables: Array,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  sm_scale: float | None = None,
  max_query_len: int | None = None,
  is_causal: bool = True,
  sliding_window: int | None = None,
  logits_soft_cap: float | None = None,
  sinks: Array | None = None,
  k_scale: Array | None = None,
  v_scale: Array | None = None,
  v_head_dim: int | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
  plan: Plan | None = None,
) -> Array | tuple[Array, Array]:
  """Causal attention of packed, ragged queries over paged keys and values.

  One operation for decode, chunked prefill and mixtures: row `s` has the query tokens
  `cu_seqlens[s]` up to `cu_seqlens[s + 1]`, which are the last of its `seq_lens[s]`
  tokens. Whatever stands in blocks past a row's length or behind its window, NaN
  included, has no influence.

  Args:
    q: `[T, H, D]`.
    k: `[N, K, block_size, D]`, `H` a multiple of `K`. Floating, or with `k_scale` int8
      or `float8_e4m3fn` bits in uint8.
    v: `[N, K, block_size, Dv]`, or None: the values are the first `v_head_dim` elements
      of the keys (multi-head latent attention).
    block_tables: `[S, P]` int32. Entries past a row's length are ids in range.
    seq_lens: `[S]` int32. Stored tokens of each row, the query tokens included. Rows of
      length 0 give zeros.
    cu_seqlens: `[S + 1]` int32, first entry 0.
    sm_scale: Factor of the logits, `D ** -0.5` if omitted.
    max_query_len: Static bound on the rows' query tokens. 1 with `T == S` is a decode
      step.
    is_causal: Whether a query sees its row up to itself; all of its row if False.
    sliding_window: Tokens that a query sees, itself included; all before it if omitted.
      The cost is that of the window.
    logits_soft_cap: Scaled logits become `cap * tanh(logit / cap)`.
    sinks: `[H]` logits that join each head's softmax and have no value.
    k_scale: `[N, K, block_size]` float32 factors of each token's keys.
    v_scale: `[N, K, block_size]` float32 factors of each token's values.
    v_head_dim: `Dv` where `v` is None.
    return_lse: Whether to return the logarithm of the softmax's denominator too, with
      which partial results can be merged.
    implementation: `"xla"`, `"triton"` (a CUDA GPU, Ampere or later), `"mosaic"` (a
      Hopper GPU), or None for the best that can serve: on a GPU Triton if it can, else
      XLA.
    plan: What `plan` made of the same `seq_lens` and `cu_seqlens`, so that layers that
      are scanned need not each compute it.

  Returns:
    `out [T, H, Dv]` in `q`'s dtype; zeros for tokens past `cu_seqlens[-1]`. With
    `return_lse` `(out, lse)`, `lse [T, H]` float32 and `-inf` for these tokens.

  Raises:
    ValueError: Shapes, dtypes or options do not fit.
    NotImplementedError: The named implementation cannot serve.
  """
  if q.ndim != 3:
    raise ValueError(f"q must be [T, H, D], got {q.shape}")
  call = Call(
    *(q, k, v, block_tables, seq_lens, cu_seqlens),
    sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
    max_query_len=max_query_len,
    is_causal=is_causal,
    sliding_window=sliding_window,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
    k_scale=k_scale,
    v_scale=v_scale,
    v_head_dim=v_head_dim,
  )
  _check(call)

  def kernel(name: str) -> str | choice.Run:
    backend = _backend(name)
    reason = backend.why_not(call)
    return reason or functools.partial(backend.paged_attention, call, plan=plan)

  out, lse = choice.run(
    implementation,
    IMPLEMENTATIONS,
    fallback=functools.partial(xla.paged_attention, call),
    kernel=kernel,
  )
  return (out, lse) if return_lse else out


def plan(
  k: Shaped,
  v: Shaped | None,
  seq_lens: Array,
  cu_seqlens: Array,
  *,
  num_tokens: int,
  max_blocks: int,
  q: Shaped | None = None,
  max_query_len: int | None = None,
  sliding_window: int | None = None,
  implementation: str | None = None,
) -> Plan | None:
  """Makes ahead what `paged_attention` computes of the rows of a step alone.

  A plan is for all layers of these shapes and options, whatever their tables. One that
  does not fit a layer is of no use to it, and does no harm.

  Args:
    k: As in `paged_attention`; only its shape and dtype count.
    v: As in `paged_attention`; only its shape and dtype count.
    seq_lens: `[S]` int32.
    cu_seqlens: `[S + 1]` int32.
    num_tokens: `T`.
    max_blocks: `P`.
    q: `[T, H, D]`, of which only shape and dtype count. Without it a plan serves decode
      steps whole, and of mixed steps of up to 8 query heads per kv head the rows with
      few queries.
    max_query_len: As in `paged_attention`.
    sliding_window: As in `paged_attention`.
    implementation: As in `paged_attention`.

  Returns:
    The plan, or None if the implementation has no use for one; XLA has none.
  """
  if implementation == "xla" or not device.is_gpu():
    return None
  backend = _backend(implementation or "triton")
  outline = Outline(
    q=q,
    k=k,
    v=v,
    num_tokens=num_tokens,
    max_len=max_blocks * k.shape[2],
    max_query_len=max_query_len,
    sliding_window=sliding_window,
  )
  return plan_rows(seq_lens, cu_seqlens, backend.cuts(outline))


def _backend(name: str) -> ModuleType:
  """The module of that name."""
  if name == "triton":
    from pallas_kernels.paged_attention import triton as backend
  else:
    from pallas_kernels.paged_attention import mosaic_sm90 as backend
  return backend


def _check(call: Call) -> None:
  """Whether all fits together, queries `[T, H, D]` given."""
  q, k, v, num_seqs = call.q, call.k, call.v, call.block_tables.shape[0]
  if k.ndim != 4 or k.shape[-1] != q.shape[-1]:
    raise ValueError(f"k must be [N, K, block_size, {q.shape[-1]}], got {k.shape}")
  if q.shape[1] % k.shape[1]:
    raise ValueError(f"q has {q.shape[1]} heads, not a multiple of {k.shape[1]}")
  if call.block_tables.ndim != 2 or call.seq_lens.shape != (num_seqs,):
    raise ValueError(
      "block_tables must be [S, P] and seq_lens [S], got"
      f" {call.block_tables.shape} and {call.seq_lens.shape}"
    )
  if call.cu_seqlens.shape != (num_seqs + 1,):
    raise ValueError(
      f"cu_seqlens must be [{num_seqs + 1}], got {call.cu_seqlens.shape}"
    )
  for name in ("block_tables", "seq_lens"):
    if (dtype := getattr(call, name).dtype) != jnp.int32:
      raise ValueError(f"{name} must be int32, got {dtype}")
  _check_values(k, v, call.v_head_dim)
  _check_scales(k, call.k_scale, "k_scale")
  if v is not None:
    _check_scales(v, call.v_scale, "v_scale")
  elif call.v_scale is not None:
    raise ValueError("v_scale must be None without v: the values have k_scale")
  if call.sinks is not None and call.sinks.shape != (call.num_heads,):
    raise ValueError(f"sinks must be [{call.num_heads}], got {call.sinks.shape}")
  window, cap = call.sliding_window, call.logits_soft_cap
  if window is not None and window < 1:
    raise ValueError(f"sliding_window must be at least 1, got {window}")
  if window is not None and not call.is_causal:
    raise ValueError("sliding_window needs is_causal")
  if cap is not None and not cap > 0:
    raise ValueError(f"logits_soft_cap must be positive, got {cap}")


def _check_values(k: Array, v: Array | None, v_head_dim: int | None) -> None:
  if v is None:
    if v_head_dim is None or not 0 < v_head_dim <= k.shape[-1]:
      raise ValueError(
        f"v_head_dim must be from 1 to {k.shape[-1]} without v, got {v_head_dim}"
      )
  elif v.ndim != 4 or v.shape[:-1] != k.shape[:-1]:
    raise ValueError(f"v must be {[*k.shape[:-1], 'Dv']}, got {v.shape}")
  elif v_head_dim not in (None, v.shape[-1]):
    raise ValueError(f"v_head_dim must be that of v {v.shape}, got {v_head_dim}")


def _check_scales(pool: Array, scale: Array | None, name: str) -> None:
  if scale is None:
    if not jnp.issubdtype(pool.dtype, jnp.floating) or pool.dtype.itemsize < 2:
      raise ValueError(f"{name} is missing for elements of {pool.dtype}")
  elif scale.shape != pool.shape[:-1]:
    raise ValueError(f"{name} must be {pool.shape[:-1]}, got {scale.shape}")
