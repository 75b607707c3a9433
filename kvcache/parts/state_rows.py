"""StateRows: which rows of the state pool are live, which are snapshots.

A recurrent state cannot be cut at a shorter length, so a sequence can only begin where
some state was kept. A snapshot is a state that stands at the end of a block; it shares
the block's fate, and is given up alone when another one needs its row.

No state is ever copied for a snapshot. A row of the sequence table reads its state from
`source_ids` and writes it to `state_ids`. Mostly they are the same. Where a snapshot is
wanted, the row just written stays as it is, belongs to the block from then on, and is
still read once; the sequence gets another one to write. A prefix hit reads the snapshot
in the same way, and a new sequence reads `NULL_STATE`, which is zero.

Each sequence has rows of its own for as long as it lives, and inactive ones are
counted as if they had them: only what is left beyond can become a snapshot. So `admit`
and `fork` never lack a state.

A draft step may keep any number of its tokens. It writes the state after each of them
to a row of its own, and accepting some is choosing the row to be read next.
"""

from jax import Array, lax
import jax.numpy as jnp

from kvcache.config import NULL_STATE
from kvcache.parts import blocks, loops, ragged
from kvcache.parts.blocks import BlockPool
from kvcache.printing import Node

_LATE = 2**31 - 1


class StateRows(Node, kw_only=True):
  """Bookkeeping of `M` states for `S` sequences and `N` blocks.

  `W = 1 + max_drafts` states belong to each sequence.

  Attributes:
    pool: The allocator of state rows. Live rows and snapshots have one reference.
    state_ids: `[S, W]` int32. The states that each sequence writes, `NULL_STATE` if it
      is inactive: the first one, or in a draft step one after each token.
    source_ids: `[S]` int32. The state that it reads, which stands at its `seq_lens`:
      one of its own, a snapshot of a block it holds, or `NULL_STATE` at length 0.
    wanted_lens: `[S]` int32. Length at which a snapshot is wanted besides the regular
      ones.
    snapshot_ids: `[N]` int32. The snapshot at each block's end, or `NULL_STATE`.
    block_ids: `[M]` int32. The block of each snapshot, or `NULL_BLOCK`.
    last_used: `[M]` int32. When each snapshot was taken or hit, by `clock`.
    clock: `[]` int32. Grows with each use.
  """

  pool: BlockPool
  state_ids: Array
  source_ids: Array
  wanted_lens: Array
  snapshot_ids: Array
  block_ids: Array
  last_used: Array
  clock: Array

  @property
  def num_states(self) -> int:
    """`M`, the null state included."""
    return self.block_ids.shape[-1]

  @property
  def num_spare(self) -> Array:
    """`[]` int32: free rows that may become snapshots."""
    return self.pool.num_free - ragged.sum_int(self.state_ids == NULL_STATE)


def init(
  *, num_states: int, num_blocks: int, max_seqs: int, max_drafts: int = 0
) -> StateRows:
  """Makes bookkeeping in which every state is free."""

  def zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.int32)

  return StateRows(
    pool=blocks.init(num_states),
    state_ids=zeros(max_seqs, 1 + max_drafts),
    source_ids=zeros(max_seqs),
    wanted_lens=zeros(max_seqs),
    snapshot_ids=zeros(num_blocks),
    block_ids=zeros(num_states),
    last_used=zeros(num_states),
    clock=zeros(),
  )


def next_wanted(rows: StateRows, seq_lens: Array, *, interval: int) -> Array:
  """The length above each of `seq_lens` at which a snapshot is wanted next.

  Args:
    rows: The bookkeeping.
    seq_lens: `[S]` or `[S, W]` int32.
    interval: Tokens from one regular snapshot to the next.
  """
  wanted_lens = rows.wanted_lens.reshape(-1, *(1,) * (seq_lens.ndim - 1))
  regular = (seq_lens // interval + 1) * interval
  extra = jnp.where(wanted_lens > seq_lens, wanted_lens, _LATE)
  return jnp.minimum(regular, extra)


def may_end(rows: StateRows, block_ids: Array) -> Array:
  """`[A, C]` bool: which of the blocks `[A, C]` have a state, so that a hit may end."""
  return rows.snapshot_ids[block_ids] != NULL_STATE


def start(
  rows: StateRows,
  seq_ids: Array,
  mask: Array,
  *,
  last_blocks: Array,
  wanted_lens: Array,
) -> StateRows:
  """Gives new sequences their states; they read the snapshot of their last block.

  Args:
    rows: The bookkeeping.
    seq_ids: `[A]` int32 inactive rows.
    mask: `[A]` bool. Entries that count.
    last_blocks: `[A]` int32, `NULL_BLOCK` to start from nothing.
    wanted_lens: `[A]` int32.
  """
  pool, state_ids = _allocate(rows, mask)
  source_ids, snapshot_ids = ragged.read(rows.snapshot_ids, last_blocks)
  to = ragged.masked(seq_ids, mask, rows.state_ids.shape[0])
  rows = rows.replace(
    pool=pool,
    snapshot_ids=snapshot_ids,
    state_ids=rows.state_ids.at[to].set(state_ids, mode="drop"),
    source_ids=rows.source_ids.at[to].set(source_ids, mode="drop"),
    wanted_lens=rows.wanted_lens.at[to].set(wanted_lens, mode="drop"),
  )
  is_read = mask & (source_ids != NULL_STATE)
  return _use(rows, source_ids, is_read, ragged.ranks(is_read))


def fork(
  rows: StateRows, source: Array, target: Array, mask: Array
) -> tuple[StateRows, tuple[Array, Array]]:
  """Gives each fork states of its own, and a copy of the one its source reads.

  Args:
    rows: The bookkeeping.
    source: `[F]` int32 live rows.
    target: `[F]` int32 inactive rows.
    mask: `[F]` bool. Entries that count.

  Returns:
    The bookkeeping after, and the states to copy: `[F]` int32 from and `[F]` int32 to,
    `M` where there is nothing to copy.
  """
  from_ids, wanted_lens = rows.source_ids[source], rows.wanted_lens[source]
  rows, own = adopt(rows, target, mask, from_ids != NULL_STATE)
  to = ragged.masked(target, mask, rows.state_ids.shape[0])
  wanted_lens = rows.wanted_lens.at[to].set(wanted_lens, mode="drop")
  return rows.replace(wanted_lens=wanted_lens), (from_ids, own)


def adopt(
  rows: StateRows, seq_ids: Array, mask: Array, has_state: Array
) -> tuple[StateRows, Array]:
  """Gives new sequences their states, and one that the caller brings along.

  Args:
    rows: The bookkeeping.
    seq_ids: `[F]` int32 inactive rows.
    mask: `[F]` bool. Entries that count.
    has_state: `[F]` bool. False for sequences of length 0.

  Returns:
    The bookkeeping after, and `[F]` int32: where to write the states, `M` to drop.
  """
  pool, state_ids = _allocate(rows, mask)
  own = state_ids[:, 0]
  to = ragged.masked(seq_ids, mask, rows.state_ids.shape[0])
  source_ids = jnp.where(has_state, own, NULL_STATE)
  rows = rows.replace(
    pool=pool,
    state_ids=rows.state_ids.at[to].set(state_ids, mode="drop"),
    source_ids=rows.source_ids.at[to].set(source_ids, mode="drop"),
    wanted_lens=rows.wanted_lens.at[to].set(0, mode="drop"),
  )
  return rows, ragged.masked(own, mask & has_state, rows.num_states)


def advance(
  rows: StateRows, moved: Array, stands_at: Array, wants: Array, block_ids: Array
) -> StateRows:
  """Follows a step: sequences have written their states, some become snapshots.

  Args:
    rows: The bookkeeping.
    moved: `[S]` bool. Sequences that were in the step.
    stands_at: `[S]` int32. Which of the states written each of them goes on from.
    wants: `[S, E]` bool. Which of the first `E` states written stand where a snapshot
      is wanted.
    block_ids: `[S, E]` int32. The blocks that end there, full and held by no other.
  """
  width = wants.shape[1]
  written, wants = rows.state_ids[:, :width].reshape(-1), wants.reshape(-1)
  block_ids = block_ids.reshape(-1)
  ranks = ragged.ranks(wants)
  granted = wants & (ranks < rows.num_spare)
  pool, fresh = blocks.allocate_one_each(rows.pool, granted, ranks=ranks)
  block = ragged.masked(block_ids, granted, rows.snapshot_ids.shape[0])
  state = ragged.masked(written, granted, rows.num_states)
  own = jnp.where(granted, fresh, written).reshape(-1, width)
  read = jnp.take_along_axis(rows.state_ids, stands_at[:, None], axis=1)[:, 0]
  rows = rows.replace(
    pool=pool,
    state_ids=jnp.concatenate([own, rows.state_ids[:, width:]], axis=1),
    source_ids=jnp.where(moved, read, rows.source_ids),
    snapshot_ids=rows.snapshot_ids.at[block].set(written, mode="drop"),
    block_ids=rows.block_ids.at[state].set(block_ids, mode="drop"),
  )
  return _use(rows, written, granted, ranks)


def clear(rows: StateRows, mask: Array) -> StateRows:
  """Takes the states of sequences that end; snapshots stay."""
  own = jnp.where(mask[:, None], rows.state_ids, NULL_STATE)
  return rows.replace(
    pool=_free(rows.pool, own.reshape(-1)),
    state_ids=jnp.where(mask[:, None], NULL_STATE, rows.state_ids),
    source_ids=jnp.where(mask, NULL_STATE, rows.source_ids),
    wanted_lens=jnp.where(mask, 0, rows.wanted_lens),
  )


def drop(rows: StateRows, block_ids: Array, mask: Array) -> StateRows:
  """Frees the snapshots of distinct blocks, which lose their content."""
  states, snapshot_ids = ragged.read(rows.snapshot_ids, block_ids)
  states = jnp.where(mask, states, NULL_STATE)
  has = states != NULL_STATE
  block = ragged.masked(block_ids, has, rows.snapshot_ids.shape[0])
  state = ragged.masked(states, has, rows.num_states)
  return rows.replace(
    pool=_free(rows.pool, states),
    snapshot_ids=snapshot_ids.at[block].set(NULL_STATE, mode="drop"),
    block_ids=rows.block_ids.at[state].set(0, mode="drop"),
  )


def merge(
  rows: StateRows, seq_ids: Array, block_ids: Array, canonical: Array, mask: Array
) -> StateRows:
  """Hands snapshots on to the equal blocks that sequences swap theirs for.

  Where the canonical block has a snapshot already the other one is freed, and a
  sequence that stands there reads the canonical one. It counts as used when either was,
  so that it does not matter whose block came first.

  Args:
    rows: The bookkeeping.
    seq_ids: `[E]` int32. Row that swaps.
    block_ids: `[E]` int32. Its own block, distinct.
    canonical: `[E]` int32. The equal block in the index; may repeat.
    mask: `[E]` bool. Entries that count.
  """
  mine = jnp.where(mask, rows.snapshot_ids[block_ids], NULL_STATE)
  has = mine != NULL_STATE
  vacant = rows.snapshot_ids[canonical] == NULL_STATE
  mine, has, vacant = ragged.hold(mine, has, vacant)
  num_blocks = rows.snapshot_ids.shape[0]
  own = ragged.masked(block_ids, has, num_blocks)
  heir = ragged.masked(canonical, has & vacant, num_blocks)
  snapshot_ids = rows.snapshot_ids.at[own].set(NULL_STATE, mode="drop")
  snapshot_ids = snapshot_ids.at[heir].max(mine, mode="drop")
  kept, snapshot_ids = ragged.read(snapshot_ids, canonical)
  is_lost = has & (kept != mine)
  stands = is_lost & (rows.source_ids[seq_ids] == mine)
  seq = ragged.masked(seq_ids, stands, rows.source_ids.shape[0])
  state = ragged.masked(mine, has, rows.num_states)
  heir_state = ragged.masked(kept, has, rows.num_states)
  used = ragged.hold(rows.last_used[mine])
  return rows.replace(
    last_used=rows.last_used.at[heir_state].max(used, mode="drop"),
    pool=_free(rows.pool, jnp.where(is_lost, mine, NULL_STATE)),
    snapshot_ids=snapshot_ids,
    block_ids=rows.block_ids.at[state].set(
      jnp.where(is_lost, 0, canonical), mode="drop"
    ),
    source_ids=rows.source_ids.at[seq].set(kept, mode="drop"),
  )


@loops.compiled()
def evict(rows: StateRows, count: Array) -> tuple[StateRows, Array]:
  """Frees up to `count` snapshots that no sequence reads, least recently used first.

  Returns:
    The bookkeeping after, and `[]` int32: how many.
  """

  def go(state: tuple[StateRows, Array, Array]) -> tuple[StateRows, Array, Array]:
    rows, left, _ = state
    is_read = jnp.zeros(rows.num_states, bool).at[rows.source_ids].set(True)
    may_go = (rows.block_ids > 0) & ~is_read
    order = jnp.argsort(jnp.where(may_go, rows.last_used, _LATE)).astype(jnp.int32)
    victims = may_go[order] & (jnp.arange(rows.num_states, dtype=jnp.int32) < left)
    rows = drop(rows, rows.block_ids[order], victims)
    return rows, jnp.int32(0), ragged.sum_int(victims)

  # Runs at most once. A `while` because the arrays are then updated in place, and
  # because mostly there is nothing to do.
  rows, _, num = lax.while_loop(
    lambda state: state[1] > 0, go, (rows, count, jnp.int32(0))
  )
  return rows, num


def _use(rows: StateRows, state_ids: Array, mask: Array, ranks: Array) -> StateRows:
  """Marks snapshots as used, in the order of their ranks; ids may repeat."""
  state = ragged.masked(state_ids, mask, rows.num_states)
  now = rows.clock + ranks
  return rows.replace(
    last_used=rows.last_used.at[state].max(now, mode="drop"),
    clock=rows.clock + ragged.sum_int(mask),
  )


def _allocate(rows: StateRows, mask: Array) -> tuple[BlockPool, Array]:
  """`W` states for each entry of `mask [F]`: `(pool, state_ids [F, W])`."""
  width = rows.state_ids.shape[1]
  pool, ids = blocks.allocate_one_each(rows.pool, jnp.repeat(mask, width))
  return pool, ids.reshape(-1, width)


def _free(pool: BlockPool, state_ids: Array) -> BlockPool:
  """Gives states back; `NULL_STATE` is ignored."""
  return blocks.release_exclusive(
    pool, state_ids, ragged.ranks(state_ids != NULL_STATE)
  )
