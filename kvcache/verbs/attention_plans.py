"""What the attention of a step computes once, for all layers: queues of its work.

On a GPU the work of a step is cut into pieces of equal size. The pieces depend on the
rows' lengths and not on the layer, so they are made with the metadata: in a scan over
layers XLA would compute them in every layer anew. Made they are for what is known of
the layers here, which does not include their query heads: in a decode step these do not
matter, and in a mixed step the tiles of rows with many queries are left to the layers.

That costs something only where layers are scanned: up to 5 small kernels per layer of a
mixed step. Where they are not, XLA sees that all layers cut tiles alike and does it
once. So nobody is asked for the number of query heads. It would have to be a field of
`AttentionLayer`, which says what a layer keeps, and layers that differ in it alone
would no longer share a pool; and the tiles depend on the queries' dtype as well.
"""

from collections.abc import Sequence

import jax

from kvcache.config import CacheConfig
from kvcache.parts.kv import KVStore
from kvcache.verbs import sharding
from kvcache.verbs.metadata import StepMetadata
from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import Plan


def make(
  config: CacheConfig, stores: Sequence[KVStore], metadata: StepMetadata
) -> tuple[Plan | None, ...]:
  """The plan of each of `config.groups`; None where there is nothing to plan."""
  heads = sharding.split(config.head_axes)

  def plan(store: KVStore, sliding_window: int | None) -> Plan | None:
    # Without touching the arrays, of which a view would be a copy outside of jit.
    shape = (store.num_blocks, heads.num_local(store.num_heads), store.block_size)
    k, v = (
      None if x is None else jax.ShapeDtypeStruct((*shape, x.shape[-1]), x.dtype)
      for x in (store.k, store.v)
    )
    assert k is not None
    return paged_attention.plan(
      k,
      v,
      metadata.seq_lens,
      metadata.cu_seqlens,
      num_tokens=metadata.num_tokens,
      max_blocks=metadata.block_tables.shape[-1],
      max_query_len=1 if metadata.is_decode else None,
      sliding_window=sliding_window,
    )

  return tuple(
    plan(store, group.layer.sliding_window)
    for store, group in zip(stores, config.groups, strict=True)
  )
