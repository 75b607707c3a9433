"""Scrubbing: what is handed out is zeroed, if the configuration asks for it.

A block or a state that leaves the free list may hold what another tenant left there.
Nothing reads it: reads are masked and states written before they are read. Zeroing it
is for those who do not want to rely on that. Whoever takes blocks or states calls these
functions with the context before and after; they cost what was taken, and nothing is
compiled where `config.scrub` is False.

A `fork` or a `rewind` that copies a block overwrites all of it, with what belongs to
the same sequence.
"""

from jax import Array

from kvcache.context import Context
from kvcache.parts import blocks, kv, prefix, states


def clear_blocks(ctx: Context, before: Context, *, num_entries: int) -> Context:
  """Zeroes the blocks taken since `before`: keys, values, scales and tokens.

  Args:
    ctx: The context. None of these blocks is written yet, and none has come back.
    before: The context from whose free lists they were taken.
    num_entries: Static bound on the blocks taken from each pool.
  """
  config = ctx.config
  if not config.scrub:
    return ctx
  taken = blocks.taken(before.pool, ctx.pool, num_entries=num_entries)
  of_window: dict[int | None, Array] = {None: taken}
  for width, old, new in zip(config.windows, before.windows, ctx.windows, strict=True):
    of_window[width] = blocks.taken(old.pool, new.pool, num_entries=num_entries)
  stores = tuple(
    kv.clear_blocks(store, of_window[group.layer.sliding_window])
    for group, store in zip(config.groups, ctx.kv, strict=True)
  )
  return ctx.replace(kv=stores, prefix=prefix.clear_tokens(ctx.prefix, taken))


def clear_states(ctx: Context, before: Context, *, num_entries: int) -> Context:
  """Zeroes the recurrent states taken since `before`; see `clear_blocks`."""
  if not ctx.config.scrub or ctx.states is None:
    return ctx
  assert before.state_rows is not None and ctx.state_rows is not None
  pools = before.state_rows.pool, ctx.state_rows.pool
  taken = blocks.taken(*pools, num_entries=num_entries)
  return ctx.replace(states=states.clear(ctx.states, taken))
