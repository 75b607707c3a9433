"""A cache for models that were written for another one.

Models hand one object called the cache from layer to layer. `StepCache` is such an
object: the context, and which tokens the step computes. So the call that appends keys
and values to the old cache and attends becomes one call here, and nothing around it
changes.
"""

from typing import Any

from flax import nnx
import jax
from jax.typing import ArrayLike

from kvcache.context import Context
from kvcache.printing import Node
from kvcache.verbs.attention import attend
from kvcache.verbs.metadata import StepMetadata
from kvcache.verbs.stepping import write_kv


class StepCache(Node, kw_only=True):
  """A context in the middle of a step.

  Attributes:
    ctx: The cache.
    metadata: What the step computes.
  """

  ctx: Context
  metadata: StepMetadata

  def attend(
    self,
    layer: ArrayLike,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    **options: Any,
  ) -> tuple[jax.Array, "StepCache"]:
    """Stores the step's keys and values in a layer, and attends to all of its row.

    The axes before the heads are the caller's, `[1, T]` in models that expect a batch;
    together they are the `T` tokens of the step, in order.

    Args:
      layer: `[]` int32, index among the attention layers. May be traced.
      q: `[..., H, D]`, rotated if the model does so.
      k: `[..., K, D]`, likewise.
      v: `[..., K, Dv]`; None for latent layers.
      **options: Of `kvcache.attend`: `sm_scale`, `sliding_window`, and so on.

    Returns:
      `[..., H, Dv]` in `q`'s dtype, and the cache after.

    Raises:
      ValueError: Shapes do not fit the cache or the step.
    """
    num_tokens = self.metadata.num_tokens

    def pack(x: jax.Array) -> jax.Array:
      return x.reshape(-1, *x.shape[-2:])

    if pack(q).shape[0] != num_tokens:
      raise ValueError(f"q must have {num_tokens} tokens before [H, D], got {q.shape}")
    ctx = write_kv(
      self.ctx,
      layer,
      pack(k),
      None if v is None else pack(v),
      self.metadata,
      group=options.get("group"),
    )
    out = attend(ctx, layer, pack(q), self.metadata, **options)
    return out.reshape(*q.shape[:-1], out.shape[-1]), self.replace(ctx=ctx)


def attend_with(
  module: nnx.MultiHeadAttention,
  x: jax.Array,
  layer: ArrayLike,
  cache: StepCache,
  *,
  group: int | None = None,
) -> tuple[jax.Array, StepCache]:
  """Does what a Flax attention module does, with a paged cache instead of its own.

  The module's projections and norms are used as they are, so its weights need no
  conversion. Attention is causal, and any number of tokens may come at a time.

  Args:
    module: The module; neither `decode` nor `init_cache` matters.
    x: `[..., features]`, with the step's tokens before the features.
    layer: `[]` int32, index among the attention layers. May be traced.
    cache: The cache.
    group: Index in `config.groups`, only for a traced layer where there are several.

  Returns:
    `[..., out_features]`, and the cache after.

  Raises:
    ValueError: Shapes do not fit, or the module has an `attention_fn` of its own, which
      would not be called.
  """
  if module.attention_fn is not nnx.dot_product_attention:
    raise ValueError(
      "attention_fn must be nnx.dot_product_attention, since a paged cache attends"
      f" itself, got {module.attention_fn}"
    )
  q, k, v = module.query(x), module.key(x), module.value(x)
  if module.query_ln is not None and module.key_ln is not None:
    q, k = module.query_ln(q), module.key_ln(k)
  out, cache = cache.attend(layer, q, k, v, group=group)
  return module.out(out), cache
