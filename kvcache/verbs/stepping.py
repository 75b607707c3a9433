"""A step of a model over a Context: make room, look, write, read, commit."""

from collections.abc import Callable, Mapping

import jax
from jax import Array
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
import numpy as np

from kvcache.config import CacheConfig, NULL_STATE
from kvcache.context import as_context, Context, recurrent_parts, shortage
from kvcache.errors import Status
from kvcache.parts import (
  arguments,
  blocks,
  kv,
  prefix,
  ragged,
  sequences,
  state_rows,
  states,
  windows,
)
from kvcache.parts.state_rows import StateRows
from kvcache.verbs import attention_plans, metadata, scrubbing, sharding
from kvcache.verbs.metadata import StepMetadata, WindowView

Model = Callable[[Array, StepMetadata, Context], tuple[Array, Context]]


def extend(
  ctx: Context,
  query_lens: ArrayLike,
  *,
  num_tokens: int | None = None,
  order: ArrayLike | None = None,
) -> tuple[Context, Array]:
  """Makes room for each row's next tokens. Never evicts.

  A row whose status is not `OK` is to be left out of the step: make its `query_lens` 0
  before `step_metadata`.

  Args:
    ctx: The context.
    query_lens: `[S]` int32. New tokens of each row; 0 for rows not in the step.
    num_tokens: Static bound on their sum. The work is `S + num_tokens // block_size`
      entries. Omitted for a decode step: at most one token per row.
    order: `[S]` int32 permutation. The row served first, second and so on; row order if
      omitted.

  Returns:
    `(ctx, status [S])`. Rows are served first come, first served: one that does not
    fit, and every later one that needs a block, gets `NO_BLOCKS`, or `NO_WINDOW_BLOCKS`
    where the context's pool has enough for it and those before it, but a sliding
    window's has not; likewise `OVER_BUDGET` for tokens past `num_tokens`. `TOO_LONG`,
    `INACTIVE` and `INVALID` (negative) rows take nothing from others.

  Example:
    >>> grow = jax.jit(kv.extend)  # a decode step: a token for each row
    >>> ctx, status = grow(started, jnp.array([1, 1]))
    >>> [kv.Status(code).name for code in status.tolist()]
    ['OK', 'INACTIVE']
  """
  ctx = as_context(ctx)
  config, table = ctx.config, ctx.sequences
  arguments.check_static("num_tokens", num_tokens)
  query_lens = arguments.as_int32("query_lens", query_lens, shape=(config.max_seqs,))
  if order is not None:
    order = arguments.as_int32("order", order, shape=(config.max_seqs,))
  asks = query_lens > 0
  room = config.max_tokens_per_seq - table.seq_lens
  status = jnp.full(config.max_seqs, Status.OK, jnp.int32)
  status = jnp.where(asks & (query_lens > room), Status.TOO_LONG, status)
  status = jnp.where(asks & ~table.is_active, Status.INACTIVE, status)
  status = jnp.where(query_lens < 0, Status.INVALID, status)
  if num_tokens is None:
    in_budget = query_lens <= 1
  else:
    wanted = jnp.where(status == Status.OK, query_lens, 0)
    _, in_budget = ragged.first_come(wanted, jnp.int32(num_tokens), order=order)
  status = jnp.where((status == Status.OK) & ~in_budget, Status.OVER_BUDGET, status)

  num_wanted = (table.seq_lens + query_lens + (config.block_size - 1)) // (
    config.block_size
  )
  need = jnp.maximum(num_wanted - table.num_blocks, 0)
  need = jnp.where((status == Status.OK) & asks, need, 0)
  takes, recycles = [need], []
  for window in ctx.windows:
    own = jnp.zeros(config.max_seqs, bool)
    if num_tokens is None:
      own = windows.can_recycle(window, table.seq_lens)
    recycles.append(own)
    takes.append(jnp.where(own, 0, need))
  free = [ctx.pool.num_free, *(window.pool.num_free for window in ctx.windows)]
  ranks, fits = ragged.first_come(jnp.stack(takes), jnp.stack(free), order=order)
  is_enough = ranks[0] + need <= ctx.pool.num_free
  status = jnp.where(fits, status, shortage(ctx, is_enough))
  need = jnp.where(fits, need, 0)

  rows = jnp.arange(config.max_seqs, dtype=jnp.int32)
  num_entries = config.max_seqs + (num_tokens or 0) // config.block_size
  if num_tokens is None:
    wants = need > 0
    # With an order, which may name a row twice, they are counted anew.
    known = list(ranks) if order is None else [None] * (1 + len(ctx.windows))
    pool, block_ids = blocks.allocate_one_each(ctx.pool, wants, ranks=known[0])
    columns, block_rows = table.num_blocks, rows
    window_blocks = tuple(
      windows.extend_one_each(window, table, wants, own, ranks=before)
      for window, own, before in zip(ctx.windows, recycles, known[1:], strict=True)
    )
  else:
    pool, given = blocks.allocate(ctx.pool, need, num_entries=num_entries)
    block_rows, block_ids, wants = given.rows, given.block_ids, given.is_valid
    columns = table.num_blocks[block_rows] + given.offsets
    window_blocks = tuple(
      windows.extend(window, rows, table.num_blocks, need, num_entries=num_entries)
      for window in ctx.windows
    )
  table = sequences.set_blocks(table, block_rows, columns, block_ids, wants)
  table = table.replace(num_blocks=table.num_blocks + need)
  after = ctx.replace(pool=pool, sequences=table, windows=window_blocks)
  return scrubbing.clear_blocks(after, ctx, num_entries=num_entries), status


def step_metadata(
  ctx: Context,
  query_lens: ArrayLike,
  *,
  num_tokens: int | None = None,
  num_logits: int = 1,
  cascade: bool = False,
) -> StepMetadata:
  """Builds the view of the context that one model step needs.

  The tokens of a step are packed in the order of the rows, those of rows with tokens in
  the step alone: read them by `seq_ids` and `positions`, such as
  `texts[metadata.seq_ids, metadata.positions]`.

  Args:
    ctx: The context, after `extend`.
    query_lens: `[S]` int32. New tokens of each row, 0 for those that `extend` refused.
      Rows get no more than they have room for.
    num_tokens: `T`, static: the rows' tokens are packed into it. Omitted for a decode
      step: `T = S` and token `s` belongs to row `s`.
    num_logits: Static. Logits wanted of each row: of its last token, or of its first
      `num_logits` tokens, to check drafts. More than 1 needs `num_tokens`, and with
      recurrent layers rows get no more than `num_logits` tokens.
    cascade: Whether to look for first blocks that rows share, so that `attend` reads
      them once for all. It pays where many rows have a long prefix in common; sums are
      then taken in another order, so bits depend on who shares.

  Raises:
    ValueError: Shapes or dtypes do not fit, or `num_logits` is out of range: with
      recurrent layers it is at most `1 + config.max_drafts`.

  Example:
    >>> metadata = jax.jit(kv.step_metadata)(started, jnp.array([1, 0]))
    >>> metadata.positions.tolist(), metadata.is_padding.tolist()
    ([10, 0], [False, True])
  """
  ctx = as_context(ctx)
  config = ctx.config
  arguments.check_static("num_tokens", num_tokens)
  if num_logits < 1 or (num_logits > 1 and num_tokens is None):
    raise ValueError(
      f"num_logits must be 1 in a decode step and at least 1 else, got {num_logits}"
    )
  query_lens = arguments.as_int32("query_lens", query_lens, shape=(config.max_seqs,))
  if num_logits > 1 and ctx.state_rows is not None:
    if num_logits > 1 + config.max_drafts:
      raise ValueError(
        f"num_logits must be at most 1 + max_drafts = {1 + config.max_drafts} with"
        f" recurrent layers, got {num_logits}"
      )
    query_lens = jnp.minimum(query_lens, num_logits)
  view = metadata.build(
    ctx.sequences,
    query_lens,
    num_tokens=num_tokens,
    num_blocks=config.num_blocks,
    block_size=config.block_size,
    num_logits=num_logits,
    windows=ctx.windows,
    head_axes=config.head_axes,
  )
  if cascade:
    found = metadata.find_shared_prefix(view, block_size=config.block_size)
    view = view.replace(shared_prefix=found)
  return view.replace(plans=attention_plans.make(config, ctx.kv, view))


def locate(
  config: CacheConfig, layer: ArrayLike, group: int | None = None
) -> tuple[int, Array]:
  """Finds an attention layer: its group, and its place in the group's store.

  Args:
    config: Static sizes.
    layer: `[]` int32, index among the attention layers in model order.
    group: Its index in `config.groups`. Needed only if `layer` is traced and there are
      several.

  Raises:
    ValueError: There is no such layer, it is in another group, or which group it is in
      cannot be known.
  """
  num_groups = len(config.groups)
  if group is not None and not 0 <= group < num_groups:
    raise ValueError(f"group must be from 0 to {num_groups - 1}, got {group}")
  layer = _settle_index(layer, config.num_layers, "attention")
  if isinstance(layer, int):
    found, place = config.places[layer]
    if group not in (None, found):
      raise ValueError(f"layer {layer} is in group {found}, got group={group}")
    return found, jnp.int32(place)
  if group is None and num_groups != 1:
    raise ValueError(
      f"group must be given with a traced layer where there are {num_groups} groups of"
      " attention layers"
    )
  places = [place for _, place in config.places]
  is_in_order = places == list(range(config.num_layers))
  return group or 0, layer if is_in_order else jnp.asarray(places, jnp.int32)[layer]


def _settle_index(layer: ArrayLike, num_layers: int, kind: str) -> int | Array:
  """A layer's index among those of a kind, an int unless traced; `ValueError` else."""
  array = arguments.as_int32("layer", layer, shape=())
  if isinstance(layer, Tracer):
    return array
  index = int(np.asarray(layer))
  if not 0 <= index < num_layers:
    raise ValueError(
      f"layer must be the index of one of {num_layers} {kind} layers, got {index}"
    )
  return index


def locate_state(config: CacheConfig, layer: ArrayLike) -> Array:
  """Returns the index of a recurrent layer as int32.

  Raises:
    ValueError: There is no such layer.
  """
  return jnp.int32(_settle_index(layer, config.num_recurrent_layers, "recurrent"))


def write_kv(
  ctx: Context,
  layer: ArrayLike,
  k: Array,
  v: Array | None,
  metadata: StepMetadata,
  *,
  group: int | None = None,
) -> Context:
  """Stores the keys and values of a step's tokens in one layer.

  Args:
    ctx: The context.
    layer: `[]` int32, index among the attention layers in model order. May be traced.
    k: `[T, K, D]`, cast or quantised to the layer's dtype.
    v: `[T, K, Dv]`; None for latent layers, whose values are the first part of `k`.
    metadata: Of this step.
    group: Index in `config.groups`, only for a traced layer where there are several.

  Raises:
    ValueError: Shapes do not fit, or the layer has no keys and values of its own.
  """
  ctx = as_context(ctx)
  config = ctx.config
  at, place = locate(config, layer, group)
  spec = config.groups[at].layer
  if not isinstance(layer, Tracer):
    owner = config.attention_layers[int(np.asarray(layer))].shared_with
    if owner is not None:
      raise ValueError(f"layer {layer} reads the keys and values of layer {owner}")
  store = ctx.kv[at]
  shape = (metadata.num_tokens, store.num_heads)
  if k.shape != (*shape, spec.head_dim):
    raise ValueError(f"k must have shape {(*shape, spec.head_dim)}, got {k.shape}")
  if spec.is_latent:
    if v is not None:
      raise ValueError("v must be None: values of latent layers are part of k")
  elif v is None or v.shape != (*shape, spec.v_dim):
    got = None if v is None else v.shape
    raise ValueError(f"v must have shape {(*shape, spec.v_dim)}, got {got}")
  slots = view_of(config, at, metadata).slot_mapping
  heads = sharding.split(config.head_axes)
  pool, new = (heads.kv_spec(store.num_heads, axis=axis) for axis in (2, 1))
  write = heads.over(kv.write, in_specs=(pool, P(), new, new, P()), out_specs=pool)
  store = write(store, place, k, v, slots)
  return ctx.replace(kv=(*ctx.kv[:at], store, *ctx.kv[at + 1 :]))


def view_of(
  config: CacheConfig, group: int, metadata: StepMetadata
) -> StepMetadata | WindowView:
  """Where a step's tokens stand in the pool of a group."""
  if len(metadata.windows) != len(config.windows):
    raise ValueError("metadata is of a context with other layers")
  window = config.groups[group].layer.sliding_window
  return metadata if window is None else metadata.windows[config.windows.index(window)]


def call_model(
  model: Model, tokens: Array, metadata: StepMetadata, ctx: Context
) -> tuple[Array, Context]:
  """Computes a step's tokens: `(logits, ctx)`, whole on every device.

  Raises:
    ValueError: What the model returned cannot come of this step: among others a context
      in which a group of layers, or a recurrent state, is the very array that it was
      before. (What was not written is not noticed where the model is jitted by itself.)
  """
  result = model(tokens, metadata, ctx)
  match result:
    case (Array() | np.ndarray() as logits, Context() as after):
      pass
    case _:
      parts = result if isinstance(result, tuple) else (result,)
      got = ", ".join(type(part).__name__ for part in parts)
      raise ValueError(f"the model must return (logits, ctx), got ({got})")
  wanted = metadata.logits_indices.shape[0]
  is_floating = jnp.issubdtype(logits.dtype, jnp.floating)
  if logits.ndim != 2 or logits.shape[0] != wanted or not is_floating:
    raise ValueError(
      f"the model must return floating logits [{wanted}, vocab], one for each of"
      f" metadata.logits_indices, got {logits.dtype}{list(logits.shape)}"
    )
  if _types(ctx) != _types(after):
    raise ValueError("the model returned a context of other shapes, dtypes or sizes")
  pairs = zip(_written(ctx), _written(after), strict=True)
  unwritten = [name for (name, old), (_, new) in pairs if old is new]
  if unwritten:
    raise ValueError(
      f"the model returned a context in which {' and '.join(unwritten)} are unwritten:"
      " return the one that write_kv, write_state or recurrent.step_* gave you"
    )
  return sharding.gather_logits(metadata.head_axes, logits), after


def _types(ctx: Context) -> tuple[object, ...]:
  leaves, structure = jax.tree.flatten(ctx)
  return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _written(ctx: Context) -> list[tuple[str, Array]]:
  """What every step writes, with its name."""
  groups = zip(ctx.config.groups, ctx.kv, strict=True)
  parts = [
    (f"keys and values of layers {', '.join(map(str, group.members))}", store.k)
    for group, store in groups
  ]
  if ctx.states is not None:
    parts += [(f"states {name!r}", x) for name, x in ctx.states.arrays.items()]
  return parts


def read_state(
  ctx: Context, layer: ArrayLike, metadata: StepMetadata
) -> dict[str, Array]:
  """Reads the states of one recurrent layer that a step starts from.

  Args:
    ctx: The context, after `extend` and before `commit`.
    layer: `[]` int32, may be traced: index among the recurrent layers in model order.
    metadata: Of this step.

  Returns:
    Name -> `[S, ...]`: each row's state before its new tokens; zeros where it has none.

  Raises:
    ValueError: There is no such recurrent layer.
  """
  ctx = as_context(ctx)
  _, store = recurrent_parts(ctx)
  source_ids, _ = state_ids(ctx, metadata)
  return states.read(store, locate_state(ctx.config, layer), source_ids)


def write_state(
  ctx: Context, layer: ArrayLike, state: Mapping[str, Array], metadata: StepMetadata
) -> Context:
  """Stores the states of one recurrent layer after a step's tokens.

  Every recurrent layer must be written in every step before `commit`.

  Args:
    ctx: The context.
    layer: `[]` int32, may be traced: index among the recurrent layers in model order.
    state: Name -> `[S, ...]`, cast to the layer's dtypes; in a draft step
      `[S, num_logits, ...]`, entry `i` after the row's token `i`. Rows that are not in
      the step, and entries past a row's tokens, are ignored.
    metadata: Of this step.

  Raises:
    ValueError: There is no such recurrent layer, or names or shapes are not its own.
  """
  ctx = as_context(ctx)
  _, store = recurrent_parts(ctx)
  _, target_ids = state_ids(ctx, metadata)
  wanted = {
    name: (*target_ids.shape, *pool.shape[2:]) for name, pool in store.arrays.items()
  }
  got = {name: jnp.shape(array) for name, array in state.items()}
  if got != wanted:
    raise ValueError(f"state must have shapes {wanted}, got {got}")
  place = locate_state(ctx.config, layer)
  return ctx.replace(states=states.write(store, place, state, target_ids))


def state_ids(ctx: Context, metadata: StepMetadata) -> tuple[Array, Array]:
  """Which recurrent states a step reads and writes, in every recurrent layer.

  Returns:
    `(source_ids [S], target_ids)`: the state before each row's new tokens, `NULL_STATE`
    for rows not in the step; and the one after them, `M` for rows not in the step. In a
    draft step the latter are `[S, num_logits]`, after each token, `M` past the last
    one. No row's target is another one's source.
  """
  rows, store = recurrent_parts(ctx)
  in_step, target_ids = metadata.query_lens > 0, rows.state_ids[:, 0]
  source_ids = jnp.where(in_step, rows.source_ids, NULL_STATE)
  if metadata.num_logits > 1:
    entry = jnp.arange(metadata.num_logits, dtype=jnp.int32)[None]
    in_step = entry < metadata.query_lens[:, None]
    target_ids = rows.state_ids[:, : metadata.num_logits]
  return source_ids, ragged.masked(target_ids, in_step, store.num_states)


def commit(
  ctx: Context,
  tokens: ArrayLike,
  metadata: StepMetadata,
  *,
  accepted: ArrayLike | None = None,
) -> Context:
  """Makes a step's tokens part of their sequences.

  A row that comes to a length where a snapshot of its recurrent state is wanted (every
  `config.snapshot_tokens`, and after the last block of its prompt that an equal prompt
  could adopt) leaves one behind if a state is spare; `evict_snapshots` makes some so.
  In a draft step so does a row that passes such a length.

  Args:
    ctx: The context.
    tokens: `[T]` int32, the tokens the model computed.
    metadata: Of this step.
    accepted: `[S]` int32. How many of each row's tokens stay; all if omitted, none if
      negative. The next step overwrites the others. With recurrent layers only in a
      draft step, and there a row in the step keeps its first token in any case: the
      state before it may be overwritten.

  Raises:
    ValueError: `accepted` is given, a layer is recurrent, and the step is no draft
      step: only the states after the rows' last tokens were kept.
  """
  ctx = as_context(ctx)
  tokens = arguments.as_int32("tokens", tokens, shape=(metadata.num_tokens,))
  num_new = metadata.query_lens
  if accepted is not None:
    least = 0 if ctx.state_rows is None else 1
    if least and metadata.num_logits == 1:
      raise ValueError(
        "accepted needs a draft step (num_logits > 1) with recurrent layers: they keep"
        " the state after a row's last token only"
      )
    accepted = arguments.as_int32("accepted", accepted, shape=(ctx.config.max_seqs,))
    num_new = jnp.minimum(jnp.maximum(accepted, least), num_new)
  index = prefix.store_tokens(ctx.prefix, metadata.slot_mapping, tokens)
  table = ctx.sequences.replace(seq_lens=ctx.sequences.seq_lens + num_new)
  rows = ctx.state_rows
  if rows is not None:
    rows = _advance_states(ctx, rows, num_new, metadata.num_logits)
  after = ctx.replace(sequences=table, prefix=index, state_rows=rows)
  num_entries = ctx.config.max_seqs * metadata.num_logits
  return scrubbing.clear_states(after, ctx, num_entries=num_entries)


def tokens_to_snapshot(ctx: Context) -> Array:
  """`[S]` int32: tokens from each row's length to where its state is wanted next.

  A loop ends its chunks there, since states are kept between steps, and in draft steps
  only. Without recurrent layers they are many.
  """
  seq_lens = ctx.sequences.seq_lens
  if ctx.state_rows is None:
    return jnp.full_like(seq_lens, 2**31 - 1)
  interval = ctx.config.snapshot_tokens
  return state_rows.next_wanted(ctx.state_rows, seq_lens, interval=interval) - seq_lens


def _advance_states(
  ctx: Context, rows: StateRows, num_new: Array, num_logits: int
) -> StateRows:
  """Lets sequences go on from the states just written; keeps some as snapshots."""
  config, before = ctx.config, ctx.sequences.seq_lens[:, None]
  ends = before + num_new[:, None]  # [S, W]: the lengths at which states were written
  if num_logits > 1:
    ends = before + jnp.arange(1, num_logits + 1, dtype=jnp.int32)[None]
    before = ends - 1
  wanted = state_rows.next_wanted(rows, before, interval=config.snapshot_tokens)
  stays = (ends > before) & (ends <= (ctx.sequences.seq_lens + num_new)[:, None])
  column = jnp.clip(ends // config.block_size - 1, 0, config.max_blocks_per_seq - 1)
  block_ids = jnp.take_along_axis(ctx.sequences.block_tables, column, axis=1)
  stands_at = jnp.maximum(num_new - 1, 0) if num_logits > 1 else jnp.zeros_like(num_new)
  return state_rows.advance(
    rows, num_new > 0, stands_at, stays & (ends == wanted), block_ids
  )
