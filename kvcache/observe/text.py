"""A context in one line: what `print` and error messages show of it."""

import dataclasses
import math

from kvcache.config import CacheConfig
from kvcache.context import Context
from kvcache.observe import block_map
from kvcache.printing import count

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe(ctx: Context) -> str:
  """Returns `Context(...)` with sizes and use, or why the use cannot be read."""
  reason, config = block_map.obstacle(ctx), ctx.config
  if reason == "not arrays":  # as after `jax.tree.map(jnp.shape, ctx)`
    fields = (f"{f.name}={getattr(ctx, f.name)!r}" for f in dataclasses.fields(ctx))
    return f"Context({', '.join(fields)})"
  if reason is not None:
    return f"Context({sizes(config)}; {reason})"
  found = block_map.map_blocks(ctx)
  tokens = count(int(found.tables.sequences.seq_lens.sum()), "token")
  parts = [
    sizes(config),
    f"{len(found.rows):,} of {config.max_seqs:,} rows hold {tokens}",
    *(f"{pool.name}: {pool.summary}" for pool in found.pools),
  ]
  return f"Context({'; '.join(parts)})"


def sizes(config: CacheConfig) -> str:
  """Returns the static sizes in a few words."""
  parts = [
    f"{count(config.num_blocks - 1, 'block')} of {count(config.block_size, 'token')}"
  ]
  for group in config.groups:
    layer, num = group.layer, group.num_layers
    window = layer.sliding_window
    parts.append(
      f"{count(num, 'attention layer')}"
      f" {layer.num_kv_heads}x{layer.head_dim} {layer.kv_dtype}"
      + ("" if window is None else f" with window {window}")
    )
  if config.num_recurrent_layers:
    num = config.num_recurrent_layers
    parts.append(count(num, "recurrent layer"))
  return ", ".join([*parts, num_bytes(config.num_bytes)])


def num_bytes(num: int) -> str:
  """Returns a number of bytes with its unit, `"1.25 GiB"`."""
  power = min(int(math.log(max(num, 1), 1024)), len(_UNITS) - 1)
  return f"{num / 1024**power:.4g} {_UNITS[power]}"
