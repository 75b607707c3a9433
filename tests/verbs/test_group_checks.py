"""The invariants of sliding windows and recurrent states, each broken by hand.

`test_checks` does the same for a context that has neither.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, RecurrentLayer
from kvcache.verbs import checks

CONFIG = CacheConfig(
  layers=(
    RecurrentLayer.short_conv(num_channels=1, conv_width=2),
    AttentionLayer(num_kv_heads=1, head_dim=2),
    AttentionLayer(num_kv_heads=1, head_dim=2, sliding_window=6),
  ),
  num_blocks=16,
  num_window_blocks=12,
  block_size=4,
  max_seqs=4,
  max_seq_len=24,
  chunk_size=3,
  index_ways=4,
  num_snapshots=6,
  snapshot_interval=1,
)
A = list(range(1, 11))
B = list(range(101, 115))
C = [*B[:8], 7, 8, 9]

admit, finish, publish = map(jax.jit, (kvcache.admit, kvcache.finish, kvcache.publish))


@jax.jit
def step(ctx, tokens, query_lens):
  ctx, status = kvcache.extend(ctx, query_lens, num_tokens=4)
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=4)
  return kvcache.commit(ctx, tokens, metadata), status


def start(ctx, text):
  """Admits a prompt and computes it in chunks that end where snapshots are kept."""
  tokens = jnp.zeros((1, 20), jnp.int32).at[0, : len(text)].set(jnp.array(text))
  ctx, admission = admit(ctx, tokens, jnp.array([len(text)]))
  row = admission.seq_ids[0]
  for at in range(int(admission.num_cached[0]), len(text), 4):
    chunk = text[at : at + 4]
    tokens = jnp.array(chunk + [0] * (4 - len(chunk)))
    query_lens = jnp.zeros(4, jnp.int32).at[row].set(len(chunk))
    ctx, status = step(ctx, tokens, query_lens)
    kvcache.raise_for_status(status)
  return ctx


@functools.cache
def sound():
  """Three rows: one alone, one that shares two blocks with it, one after a prefix hit.

  The window's block 3 is cached and held by nobody; row 0 has left it behind.
  """
  ctx = finish(start(kvcache.init(CONFIG), A), jnp.arange(4) == 0)
  ctx = publish(start(ctx, B))
  ctx = start(start(ctx, C), A)
  (window,) = ctx.windows
  tables = [[0, 0, 5, 6, 0, 0], [0, 4, 7, 0, 0, 0], [1, 2, 8, 0, 0, 0], [0] * 6]
  assert window.block_tables.tolist() == tables
  assert window.first_blocks.tolist() == [2, 1, 0, 0]
  assert window.owner_ids.tolist() == [0, 1, 2, 3, 4, 5] + [0] * 6
  assert window.ring.queue_pos.tolist() == [0, 0, 0, 5] + [0] * 8
  assert window.pool.free_list[: window.pool.num_free].tolist() == [11, 10, 9]
  rows = ctx.state_rows
  assert rows.state_ids.ravel().tolist() == [6, 7, 8, 0]
  assert rows.snapshot_ids.tolist() == [0, 1, 2, 3, 4, 5] + [0] * 10
  assert rows.pool.free_list[: rows.pool.num_free].tolist() == [10, 9]
  return ctx


def change(node, path, value):
  """Puts a value, or `{place: value}`, at a path of fields and indices."""
  name, _, rest = path.partition(".")
  if isinstance(node, dict):
    old = node[name]
  else:
    old = node[int(name)] if name.isdecimal() else getattr(node, name)
  if rest:
    new = change(old, rest, value)
  else:
    places = value if isinstance(value, dict) else {...: value}
    new = old
    for place, entry in places.items():
      new = new.at[place].set(entry)
  if isinstance(node, dict):
    return {**node, name: new}
  if isinstance(node, tuple):
    return (*node[: int(name)], new, *node[int(name) + 1 :])
  return node.replace(**{name: new})


WINDOW = "sliding window of 6: "
# What is said -> where something else is written, and what.
BREAKAGES = {
  WINDOW + "num_free is between 0 and N - 1": ("windows.0.pool.num_free", -1),
  WINDOW + "free ids are in range": ("windows.0.pool.free_list", {0: 12}),
  WINDOW + "free ids are distinct": ("windows.0.pool.free_list", {0: 10}),
  WINDOW + "free blocks have no references": ("windows.0.pool.ref_counts", {9: 1}),
  WINDOW + "exactly what is cached and held by nobody is in the ring": (
    "windows.0.ring.queue_pos",
    {3: 0},
  ),
  WINDOW + "num_evictable counts it": ("windows.0.ring.num_waiting", 2),
  WINDOW + "ring entries name their blocks": ("windows.0.ring.head", 5),
  WINDOW + "every block is free, attached and unheld, or referenced": (
    "windows.0.pool.num_free",
    2,
  ),
  WINDOW + "tables are in range and dense from their first block on": (
    "windows.0.block_tables",
    {(0, 1): 3},
  ),
  WINDOW + "ref_counts equal the table entries naming each block": (
    "windows.0.pool.ref_counts",
    {5: 2},
  ),
  WINDOW + "rows hold what their next token needs": ("windows.0.first_blocks", {0: 3}),
  WINDOW + "blocks being written have one reference and are not attached": (
    "windows.0.block_tables",
    {(1, 2): 3},
  ),
  WINDOW + "attached blocks and their owners name each other": (
    "windows.0.attached_ids",
    {3: 4},
  ),
  WINDOW + "owners are cached": ("prefix.way_of", {5: 0}),
  WINDOW + "who holds an attached block holds its owner in that column": (
    "windows.0.block_tables",
    {(2, 0): 4},
  ),
  "states: num_free is between 0 and N - 1": ("state_rows.pool.num_free", -1),
  "states: free ids are in range": ("state_rows.pool.free_list", {0: 11}),
  "states: free ids are distinct": ("state_rows.pool.free_list", {0: 9}),
  "states: free blocks have no references": ("state_rows.pool.ref_counts", {9: 1}),
  "states: every state is free, live in one row, or the snapshot of one block": (
    "state_rows.state_ids",
    {(0, 0): 7},
  ),
  "states: live rows, and they alone, own states": ("sequences.is_active", {3: True}),
  "states: states in use have one reference": ("state_rows.pool.ref_counts", {6: 0}),
  "states: snapshots and blocks name each other": ("state_rows.snapshot_ids", {5: 4}),
  "states: blocks of snapshots are not free": ("pool.free_list", {0: 5}),
  "states: rows read a state of their own, their last block's snapshot, or zeros": (
    "state_rows.source_ids",
    {0: 7},
  ),
  "states: every inactive row has states to come": ("state_rows.pool.num_free", 0),
  "states: the null state is zero": ("states.arrays.conv", {(0, 0): 1.0}),
}


def broken(sentence):
  return change(sound(), *BREAKAGES[sentence])


def test_a_sound_context_passes():
  kvcache.check_invariants(sound())


def test_every_invariant_of_windows_and_states_is_broken_once():
  sentences = set(jax.eval_shape(checks.invariants, sound()))
  assert set(BREAKAGES) == {s for s in sentences if s.startswith((WINDOW, "states: "))}


def said(raised):
  """The invariants that an error names."""
  return set(str(raised.value).removeprefix("broken invariants: ").split("; "))


@functools.cache
def pass_on():
  """A transition that does nothing, checked."""
  return kvcache.checked(lambda ctx: ctx)


@pytest.mark.parametrize("sentence", BREAKAGES)
def test_the_error_names_what_is_broken(sentence):
  """Eagerly, and inside jit the same."""
  ctx = broken(sentence)
  with pytest.raises(kvcache.InvariantError) as raised:
    kvcache.check_invariants(ctx)
  assert sentence in said(raised)
  with pytest.raises(kvcache.InvariantError) as inside:
    pass_on()(ctx)
  assert said(inside) == said(raised)


def test_checked_lets_a_sound_context_pass():
  pass_on()(sound())
