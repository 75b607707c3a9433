"""Attention of a step's queries over the keys and values of a Context."""

import functools

from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from kvcache.context import as_context, Context
from kvcache.parts.kv import KVStore
from kvcache.verbs import sharding
from kvcache.verbs.metadata import SharedPrefix, StepMetadata
from kvcache.verbs.stepping import locate, view_of
from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import Plan


def attend(
  ctx: Context,
  layer: ArrayLike,
  q: Array,
  metadata: StepMetadata,
  *,
  sm_scale: float | None = None,
  sliding_window: int | None = None,
  logits_soft_cap: float | None = None,
  sinks: Array | None = None,
  implementation: str | None = None,
  group: int | None = None,
) -> Array:
  """Attends from each token of a step to its sequence up to itself.

  Call it after `write_kv` of the same layer and step. With metadata made with
  `cascade=True`, a prefix that rows share is read once for all of them.

  Args:
    ctx: The context.
    layer: `[]` int32, index among the attention layers in model order. May be traced.
    q: `[T, H, D]`.
    metadata: Of this step.
    sm_scale: Factor of the logits, `D ** -0.5` if omitted.
    sliding_window: Tokens that a query sees, itself included; as many as the layer
      keeps if omitted.
    logits_soft_cap: Scaled logits become `cap * tanh(logit / cap)`.
    sinks: `[H]` logits that join each head's softmax and have no value.
    implementation: Name of an implementation of `pallas_kernels.paged_attention`, or
      None for the best that can serve.
    group: Index in `config.groups`, only for a traced layer where there are several.

  Returns:
    `[T, H, Dv]` in `q`'s dtype; zeros for padding.

  Raises:
    ValueError: Shapes do not fit the cache or the step, or the window is wider than
      what the layer keeps.
    NotImplementedError: The named implementation cannot serve.
  """
  ctx = as_context(ctx)
  config = ctx.config
  if q.ndim != 3 or q.shape[0] != metadata.num_tokens:
    raise ValueError(f"q must be [{metadata.num_tokens}, H, D], got {q.shape}")
  at, place = locate(config, layer, group)
  spec, store = config.groups[at].layer, ctx.kv[at]
  if spec.sliding_window is not None:
    if sliding_window is None:
      sliding_window = spec.sliding_window
    if sliding_window > spec.sliding_window:
      raise ValueError(
        f"sliding_window={sliding_window} is wider than what the layer keeps,"
        f" {spec.sliding_window} tokens"
      )

  def run(
    q: Array,
    store: KVStore,
    sinks: Array | None,
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens: Array,
    shared: SharedPrefix | None,
    plan: Plan | None,
  ) -> Array:
    attention = functools.partial(
      paged_attention.paged_attention, sliding_window=sliding_window, plan=plan
    )
    if shared is not None and sliding_window is None:
      attention = functools.partial(
        paged_attention.cascade_attention,
        num_prefix_blocks=shared.num_blocks,
        shares=shared.shares,
      )
    flat = store.flat()
    out = attention(
      q,
      flat.k,
      flat.v,
      block_tables,
      seq_lens,
      cu_seqlens,
      sm_scale=sm_scale,
      logits_soft_cap=logits_soft_cap,
      sinks=sinks,
      k_scale=flat.k_scale,
      v_scale=flat.v_scale,
      v_head_dim=spec.v_dim,
      max_query_len=1 if metadata.is_decode else None,
      implementation=implementation,
    )
    assert isinstance(out, Array)  # without `lse`
    return out

  heads = sharding.split(config.head_axes)
  queries, all_sinks = (heads.query_spec(q.shape[1], axis=axis) for axis in (1, 0))
  pool = heads.kv_spec(store.num_heads, axis=2)
  specs = (queries, pool, all_sinks, P(), P(), P(), P(), P())
  return heads.over(run, in_specs=specs, out_specs=queries)(
    q,
    store,
    sinks,
    view_of(config, at, metadata).block_tables + place * store.num_blocks,
    metadata.seq_lens,
    metadata.cu_seqlens,
    metadata.shared_prefix,
    metadata.plans[at] if metadata.plans else None,
  )
