"""What others offer for the same decode step, as far as it imports and serves here.

Each peer is a function of a batch's arrays, made once for the batch: pools that it
wants in another layout are copied before the clock starts. None of them is needed.
"""

from collections.abc import Callable, Iterator
from typing import Any
import warnings

import jax
import jax.numpy as jnp

from benchmarks.gpu.batch import Arrays, Batch

Run = Callable[[Arrays], jax.Array]


def jax_triton(batch: Batch) -> tuple[Arrays, Run]:
  """jax's own `paged_attention`, deprecated; pools `[K, N, block_size, D]`."""
  from jax.experimental.pallas.ops.gpu import paged_attention as module

  arrays = batch.arrays
  pools = {name: jnp.swapaxes(arrays[name], 0, 1) for name in ("k", "v")}
  scale = batch.spec.sm_scale or batch.spec.head_dim**-0.5

  # Its 16 splits are of equal size, and from 8 blocks on of whole eights.
  columns = arrays["block_tables"].shape[1]
  padding = -columns % (16 if columns < 128 else 128)
  tables = jnp.pad(arrays["block_tables"], ((0, 0), (0, padding)))

  def run(arrays: Arrays) -> jax.Array:
    # It scales nothing itself.
    return module.paged_attention(
      arrays["q"] * jnp.asarray(scale, arrays["q"].dtype),
      arrays["k"],
      arrays["v"],
      arrays["block_tables"],
      arrays["seq_lens"],
      attn_logits_soft_cap=batch.spec.logits_soft_cap,
      # More do not fit into shared memory.
      pages_per_compute_block=max(1, min(8, 128 // batch.spec.block_size)),
    )

  return arrays | pools | {"block_tables": tables}, run


def cudnn(batch: Batch) -> tuple[Arrays, Run]:
  """cuDNN's paged attention, through an entry of jax that is private.

  It wants a pool of exactly `S * P` blocks, so each copy of the batch gets a pool of
  its own, and the arrays are those of the first one; see `own_pools`.
  """
  from jax._src.cudnn import fused_attention_stablehlo as module

  scale = batch.spec.sm_scale or batch.spec.head_dim**-0.5

  def run(arrays: Arrays) -> jax.Array:
    tables = arrays["block_tables"][:, None, :, None]
    ones = jnp.ones_like(arrays["seq_lens"])
    out = module.paged_attention(
      arrays["q"][:, :, None],  # BNTH
      arrays["k"],
      arrays["v"],
      ones,
      arrays["seq_lens"],
      tables,
      tables,
      scale=scale,
      mask_type=module.MaskType.PADDING,
      qkv_layout="BNTH",
    )
    assert isinstance(out, jax.Array)  # without a residual
    return out[:, :, 0]

  return batch.arrays | own_pools(batch, 0), run


def own_pools(batch: Batch, copy: int) -> Arrays:
  """Tables and pools of one copy of a batch, in pools of `S * P` blocks."""
  arrays, (rows, columns) = batch.arrays, batch.arrays["block_tables"].shape
  size = rows * columns
  start = copy * batch.blocks_per_copy + 1  # its block 0 is nobody's

  def cut(pool: jax.Array) -> jax.Array:
    own = pool[start : start + min(size, batch.blocks_per_copy - 1)]
    return jnp.pad(own, ((0, size - own.shape[0]), *((0, 0),) * (own.ndim - 1)))

  tables = jnp.maximum(arrays["block_tables"] - 1, 0)
  return {"k": cut(arrays["k"]), "v": cut(arrays["v"]), "block_tables": tables}


def turns(batch: Batch, name: str, num: int) -> list[Arrays] | None:
  """What differs from call to call, if it is not the tables alone."""
  if name != "cuDNN":
    return None
  pools = [own_pools(batch, copy) for copy in range(batch.num_copies)]
  return [pools[i % batch.num_copies] for i in range(num)]


PEERS = {"jax paged_attention": jax_triton, "cuDNN": cudnn}


def serving(batch: Batch) -> Iterator[tuple[str, Callable[[], tuple[Arrays, Run]]]]:
  """Names of the peers that say they can serve a batch, and how to make them."""
  spec = batch.spec
  is_plain = spec.kv_dtype is None and not spec.is_latent and not spec.has_sinks
  if not is_plain or spec.sliding_window or batch.max_query_len != 1:
    return
  for name, make in PEERS.items():
    if name == "cuDNN" and spec.logits_soft_cap:
      continue

    def quiet(make: Any = make) -> tuple[Arrays, Run]:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(batch)

    yield name, quiet
