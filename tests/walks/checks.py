"""What a context must satisfy, in NumPy: its invariants, the oracle's view, the K/V.

Everything here takes contexts copied with `to_host`, and is written without a look at
`kvcache.check_invariants`.
"""

import functools

import jax
import ml_dtypes
import numpy as np

import kvcache
from kvcache import CacheConfig, Context
from tests.walks import window_checks as walk_windows
from tests.walks.reference import ReferenceCache
from tests.walks.reference_rows import Block, Prefix

PRINT_BITS = 22  # fingerprints are whole numbers that float32 holds exactly
SM_SCALE = 2.0**-PRINT_BITS  # keeps the logits of such keys small


def cached_prefixes(host: Context) -> dict[int, Prefix]:
  """The prefix of every cached block, found by following its parents."""
  index = host.prefix
  parents, spaces = index.parent.tolist(), index.namespace.tolist()
  tokens = index.block_tokens.tolist()
  prefixes: dict[int, Prefix] = {0: (0, ())}
  cached = np.flatnonzero(index.way_of)
  for block in cached[np.argsort(index.depth[cached], kind="stable")].tolist():
    _, before = prefixes[parents[block]]  # a KeyError: the parent is not cached
    prefixes[block] = (spaces[block], before + tuple(tokens[block]))
  del prefixes[0]
  return prefixes


def evictable_blocks(host: Context) -> list[int]:
  """The queue of evictable blocks, the next victim first."""
  waiting = np.flatnonzero(host.prefix.ring.queue_pos)
  return waiting[np.argsort(host.prefix.ring.queue_pos[waiting])].tolist()


# Invariants.


def check_invariants(host: Context) -> None:
  """Asserts everything that must hold after any sequence of verbs."""
  for part in (_check_pool, _check_rows, _check_index, _check_queue, _check_states):
    part(host)
  walk_windows.check_invariants(host)


def _check_pool(host):
  pool, N = host.pool, host.pool.ref_counts.size
  free = pool.free_list[: pool.num_free].tolist()
  assert len(free) == pool.num_free and len(set(free)) == len(free), "free ids repeat"
  assert all(0 < block < N for block in free), "a free id is out of range"
  held = np.bincount(host.sequences.block_tables.ravel(), minlength=N)
  held[0] = 0
  np.testing.assert_array_equal(pool.ref_counts, held, "ref_counts")
  is_free = np.zeros(N, bool)
  is_free[free] = True
  is_evictable = (host.prefix.way_of > 0) & (held == 0)
  kinds = is_free.astype(int) + is_evictable + (held > 0)
  assert (kinds[1:] == 1).all(), "a block is not exactly one of free, evictable, in use"
  assert is_evictable.sum() == host.prefix.num_evictable, "num_evictable"
  assert not host.prefix.way_of[0] and not host.prefix.ring.queue_pos[0], (
    "null block is used"
  )


def _check_rows(host):
  rows, block_size = host.sequences, host.prefix.block_size
  refs, way_of = host.pool.ref_counts, host.prefix.way_of
  column = np.arange(rows.max_blocks_per_seq)
  owned = column < rows.num_blocks[:, None]
  tables = rows.block_tables
  assert ((tables > 0) == owned).all(), "a table is not dense"
  assert (-(-rows.seq_lens // block_size) <= rows.num_blocks).all(), "num_blocks"
  assert (rows.seq_lens >= 0).all() and (rows.num_blocks <= column.size).all()
  num_full = rows.seq_lens // block_size
  assert (rows.num_published >= 0).all() and (rows.num_published <= num_full).all()
  for name in ("num_blocks", "seq_lens", "num_published", "is_sealed", "namespaces"):
    assert not getattr(rows, name)[~rows.is_active].any(), f"inactive row has {name}"
  for table, length in zip(tables.tolist(), rows.num_blocks.tolist(), strict=True):
    assert len(set(table[:length])) == length, "a row holds a block twice"
  full = column < num_full[:, None]
  own = owned & ~full
  assert (refs[tables[own]] == 1).all(), "a block that may be written is shared"
  assert not way_of[tables[own]].any(), "a block that may be written is cached"
  published = column < rows.num_published[:, None]
  assert way_of[tables[published]].all(), "a published block is not cached"
  pending = full & ~published & ~rows.is_sealed[:, None]
  assert (refs[tables[pending]] == 1).all(), "a shared block is not published"
  index, parents = host.prefix, np.pad(tables, ((0, 0), (1, 0)))[:, :-1]
  seen = owned & (way_of[tables] > 0)
  assert (index.depth[tables] == column)[seen].all(), "depth is not the column"
  assert (index.parent[tables] == parents)[seen].all(), "parent is not the block before"
  same_space = index.namespace[tables] == rows.namespaces[:, None]
  assert same_space[seen].all(), "a row holds a block of another namespace"


def _check_index(host):
  index = host.prefix
  cached = np.flatnonzero(index.way_of)
  prefixes = cached_prefixes(host)
  assert len(set(prefixes.values())) == cached.size, "two blocks cache one prefix"
  parents = index.parent[cached]
  depths = np.where(parents > 0, index.depth[parents] + 1, 0)
  assert (index.depth[cached] == depths).all(), "depth is not the parent's plus one"
  roots = parents == 0
  same_space = index.namespace[parents] == index.namespace[cached]
  assert (same_space | roots).all(), "parent and child differ in namespace"
  children = np.bincount(parents[~roots], minlength=index.num_blocks)
  assert (index.num_children[cached] == children[cached]).all(), "num_children"
  ids = index.way_ids.ravel()
  used = np.flatnonzero(ids)
  assert used.size == cached.size, "the table and way_of disagree"
  assert (index.way_of[ids[used]] == used + 1).all(), "way_of names another way"
  tags = index.way_tags.ravel()[used]
  assert (tags == index.prefix_hash[ids[used], 1]).all(), (
    "a tag is not its block's hash"
  )


def _check_queue(host):
  index, refs = host.prefix, host.pool.ref_counts
  ring = index.ring
  waits = ring.queue_pos > 0
  assert (waits == ((index.way_of > 0) & (refs == 0))).all(), "queue_pos"
  blocks = np.flatnonzero(waits)
  places = ring.queue_pos[blocks] - 1
  assert (ring.queue[places] == blocks).all(), "the ring has another block there"
  assert (ring.head <= places).all() and (places < ring.tail).all()
  parents = index.parent[blocks]
  before = waits[parents] & (ring.queue_pos[parents] - 1 < places)
  assert not before.any(), "a parent stands before its child"


def _check_states(host):
  rows = host.state_rows
  if rows is None:
    return
  M, is_active = rows.block_ids.size, host.sequences.is_active
  free = rows.pool.free_list[: rows.pool.num_free].tolist()
  live = rows.state_ids[is_active].ravel().tolist()
  snapshots = np.flatnonzero(rows.block_ids).tolist()
  assert sorted(free + live + snapshots) == list(range(1, M)), "states do not add up"
  held = np.zeros(M, int)
  held[live + snapshots] = 1
  np.testing.assert_array_equal(rows.pool.ref_counts, held, "references of states")
  assert not rows.state_ids[~is_active].any() and not rows.source_ids[~is_active].any()
  blocks = np.flatnonzero(rows.snapshot_ids)
  assert blocks.size == len(snapshots), "snapshots and blocks disagree"
  assert (rows.block_ids[rows.snapshot_ids[blocks]] == blocks).all()
  in_use = (host.pool.ref_counts > 0) | (host.prefix.way_of > 0)
  assert in_use[blocks].all(), "a free block has a snapshot"
  for pool in host.states.arrays.values():
    assert not pool[:, 0].any(), "the null state is not zero"


# The oracle's view.


def check_oracle(host: Context, oracle: ReferenceCache) -> None:
  """Asserts that the context is the oracle's state, up to the names of blocks."""
  rows = host.sequences
  wanted = {
    "is_active": [row.active for row in oracle.rows],
    "seq_lens": [len(row.tokens) for row in oracle.rows],
    "num_blocks": [len(row.blocks) for row in oracle.rows],
    "num_published": [row.num_published for row in oracle.rows],
    "num_frozen": [row.num_frozen for row in oracle.rows],
    "namespaces": [row.namespace for row in oracle.rows],
    "is_sealed": [row.is_sealed for row in oracle.rows],
  }
  for name, values in wanted.items():
    assert getattr(rows, name).tolist() == values, (name, getattr(rows, name), values)
  for name, value in oracle.counters.items():
    assert getattr(host.counters, name) == value, (name, host.counters, value)
  assert host.pool.num_free == oracle.num_free, ("num_free", oracle.num_free)
  assert host.prefix.num_evictable == oracle.num_evictable, "num_evictable"

  twins = {}  # block id -> the oracle's block
  tables = rows.block_tables.tolist()
  stored = host.prefix.block_tokens
  for s, row in enumerate(oracle.rows):
    table = tables[s][: len(row.blocks)]
    for block_id, block in zip(table, row.blocks, strict=True):
      assert twins.setdefault(block_id, block) is block, (
        f"row {s}: {block_id} is shared"
      )
    tokens = stored[table].ravel()[: len(row.tokens)].tolist()
    assert tokens == row.tokens, f"row {s}: tokens {tokens}, expected {row.tokens}"
  prefixes = cached_prefixes(host)
  assert set(prefixes.values()) == oracle.index.keys(), "cached prefixes"
  for block_id, prefix in prefixes.items():
    block = oracle.index[prefix]
    assert twins.setdefault(block_id, block) is block, f"{block_id} is not its twin"
  assert len(set(map(id, twins.values()))) == len(twins), "two ids, one block"
  refs = host.pool.ref_counts
  _check_oracle_states(host, oracle, twins)
  walk_windows.check_oracle(host, oracle, twins)
  for block_id, block in twins.items():
    assert refs[block_id] == block.refs, f"ref_counts of {block_id}, not {block.refs}"
    assert (block_id in prefixes) == (block.prefix is not None), "cached or not"
  queue = [prefixes[block_id] for block_id in evictable_blocks(host)]
  assert queue == oracle.lru_prefixes(), "the order of eviction"


def _check_oracle_states(host, oracle, twins):
  rows = host.state_rows
  if rows is None:
    return
  wanted = [row.wanted_len for row in oracle.rows]
  assert rows.wanted_lens.tolist() == wanted, "wanted_lens"
  snapshots = {}  # state id -> the oracle's snapshot
  for block_id, state_id in enumerate(rows.snapshot_ids.tolist()):
    block = twins.get(block_id)
    snapshot = None if block is None else block.snapshot
    assert (state_id > 0) == (snapshot is not None), f"snapshot of block {block_id}"
    if state_id:
      snapshots[state_id] = snapshot
  order = [snapshots[s] for s in sorted(snapshots, key=rows.last_used.__getitem__)]
  assert order == oracle.snapshots, "the order of snapshots"
  for s, row in enumerate(oracle.rows):
    source = int(rows.source_ids[s])
    assert snapshots.get(source) is row.reads, f"what row {s} reads"
    if row.reads is None:
      own = rows.state_ids[s].tolist() if row.tokens else [0]
      assert source in own, f"row {s} reads {source}, none of {own}"


def follow(oracle: ReferenceCache, host: Context) -> None:
  """Makes the oracle what a `publish` left that had no place for every block.

  Which blocks found a place is the context's to say. Asserts what holds in any case:
  tokens and lengths stay, and a row that did not publish all of its blocks is sealed.
  """
  prefixes, refs = cached_prefixes(host), host.pool.ref_counts.tolist()
  twins = {
    block: Block(serial=block, refs=refs[block], prefix=prefixes.get(block))
    for block in range(1, len(refs))
  }
  rows, tables = host.sequences, host.sequences.block_tables.tolist()
  for s, row in enumerate(oracle.rows):
    assert len(row.blocks) == rows.num_blocks[s], "num_blocks"
    num_full = len(row.tokens) // oracle.block_size
    assert rows.is_sealed[s] or rows.num_published[s] == num_full, "not published"
    row.blocks = [twins[block] for block in tables[s][: len(row.blocks)]]
    row.num_published = int(rows.num_published[s])
    row.num_frozen = max(row.num_frozen, row.num_published)
    row.is_sealed = bool(rows.is_sealed[s])
  oracle.index = {prefix: twins[block] for block, prefix in prefixes.items()}
  oracle.lru = [twins[block] for block in evictable_blocks(host)]
  oracle.num_free = int(host.pool.num_free)


def check_metadata(metadata, queries, effective, is_decode, before) -> None:
  """Asserts that a step's view is the oracle's plan."""
  rows, block_size = before.sequences, before.prefix.block_size
  num_tokens = metadata.slot_mapping.size
  slots = np.full(num_tokens, before.pool.num_blocks * block_size)
  last = {}
  for query in queries:
    block = rows.block_tables[query.row, query.position // block_size]
    slots[query.index] = block * block_size + query.position % block_size
    assert metadata.seq_ids[query.index] == query.row, "seq_ids"
    assert metadata.positions[query.index] == query.position, "positions"
    last[query.row] = query.index
  np.testing.assert_array_equal(metadata.slot_mapping, slots, "slot_mapping")
  np.testing.assert_array_equal(metadata.query_lens, effective, "query_lens")
  effective = np.array(effective)
  seq_lens = np.where(effective > 0, rows.seq_lens + effective, 0)
  np.testing.assert_array_equal(metadata.seq_lens, seq_lens, "seq_lens")
  starts = np.ones_like(effective) if is_decode else effective
  cu_seqlens = [0, *np.cumsum(starts)]
  np.testing.assert_array_equal(metadata.cu_seqlens, cu_seqlens, "cu_seqlens")
  num_logits = metadata.num_logits
  for s, index in last.items():
    wanted = [index]
    if num_logits > 1:
      first = index + 1 - effective[s]
      wanted = [min(first + i, num_tokens - 1) for i in range(num_logits)]
    got = metadata.logits_indices[s * num_logits : (s + 1) * num_logits]
    assert got.tolist() == wanted, "logits_indices"
  for name in ("seq_ids", "positions", "logits_indices"):  # padding is in range too
    values = getattr(metadata, name)
    assert (values >= 0).all(), name
  assert same_bits(metadata.block_tables, rows.block_tables), "block_tables"
  walk_windows.check_view(metadata.windows, queries, before)


def check_views(before: Context, ctx: Context, host: Context) -> None:
  """Asserts that `check_invariants`, `events` and `stats` agree with a plain look."""
  kvcache.check_invariants(ctx)
  events = to_host(_events(before, ctx))
  old, new = cached_prefixes(before), cached_prefixes(host)
  changed = {
    block for block in old.keys() | new.keys() if old.get(block) != new.get(block)
  }
  assert set(np.flatnonzero(events.stored)) == changed & new.keys(), "events.stored"
  assert set(np.flatnonzero(events.removed)) == changed & old.keys(), "events.removed"
  stats, refs = to_host(_stats(ctx)), host.pool.ref_counts
  wanted = {
    "num_sequences": host.sequences.is_active.sum(),
    "num_tokens": host.sequences.seq_lens.sum(),
    "num_free": host.pool.num_free,
    "num_evictable": host.prefix.num_evictable,
    "num_in_use": (refs > 0).sum(),
    "num_shared": (refs > 1).sum(),
    "num_references": refs.sum(),
    "num_cached": len(new),
    "num_window_free": [window.pool.num_free for window in host.windows],
    "num_window_evictable": [window.ring.num_waiting for window in host.windows],
  }
  for name, value in wanted.items():
    assert np.array_equal(getattr(stats, name), value), (
      name,
      getattr(stats, name),
      value,
    )


_events, _stats = jax.jit(kvcache.events), jax.jit(kvcache.stats)


# Contents: a fingerprint of the whole prefix, different in each place of K and V.


@functools.lru_cache(maxsize=1 << 14)
def fingerprints(namespace: int, tokens: tuple[int, ...]) -> np.ndarray:
  """One uint32 for each token, which depends on all tokens up to it."""
  positions = np.arange(1, len(tokens) + 1, dtype=np.uint32)
  weights = (positions * np.uint32(2654435761)) | np.uint32(1)
  sums = np.cumsum((np.array(tokens, np.uint32) + 1) * weights, dtype=np.uint32)
  return sums + np.uint32(namespace % 2**32 * 40503 % 2**32) + positions


def contents(cache: CacheConfig, prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """K and V `[L, *prints.shape, K, D]` of tokens with these fingerprints."""
  layer = cache.attention_layers[0]
  places = (2, cache.num_layers, layer.num_kv_heads, layer.head_dim)
  factors = np.arange(np.prod(places), dtype=np.uint32).reshape(places)
  factors = factors * np.uint32(0x9E3779B2) + np.uint32(0x85EBCA6B)  # all odd
  lead = (2, cache.num_layers, *(1,) * prints.ndim, *places[2:])
  mixed = prints[..., None, None] * factors.reshape(lead)
  keys, values = (mixed >> np.uint32(32 - PRINT_BITS)).astype(np.float32)
  return keys, values


def states_of(cache: CacheConfig, prints: np.ndarray) -> dict[str, np.ndarray]:
  """Name -> `[R, *prints.shape, ...]` of states whose last token has these prints."""
  layer, states = cache.recurrent_layer, {}
  for i, (name, array) in enumerate(layer.arrays.items() if layer else ()):
    places = (cache.num_recurrent_layers, *array.shape)
    factors = np.arange(i, i + np.prod(places), dtype=np.uint32).reshape(places)
    factors = factors * np.uint32(0x9E3779B2) + np.uint32(0xC2B2AE35)
    lead = (places[0], *(1,) * prints.ndim, *array.shape)
    mixed = prints.reshape(*prints.shape, *(1,) * len(array.shape))
    mixed = mixed * factors.reshape(lead)
    states[name] = (mixed >> np.uint32(32 - PRINT_BITS)).astype(np.float32)
  return states


def states_read(cache, oracle, effective) -> dict[str, np.ndarray]:
  """What `read_state` must return for all layers: `[R, S, ...]`, 0 for empty rows."""
  lens = [
    len(row.tokens) * (n > 0) for row, n in zip(oracle.rows, effective, strict=True)
  ]
  prints = [
    fingerprints(row.namespace, tuple(row.tokens))[-1] if n else 0
    for row, n in zip(oracle.rows, lens, strict=True)
  ]
  states = states_of(cache, np.array(prints, np.uint32))
  for array in states.values():
    array[:, np.array(lens) == 0] = 0
  return states


def rounded(cache: CacheConfig, x: np.ndarray) -> np.ndarray:
  """What the cache can keep of `x [..., D]`, as float32."""
  layer = cache.attention_layers[0]
  if not layer.is_quantised:
    return x.astype(layer.kv_dtype).astype(np.float32)
  largest = 127 if layer.kv_dtype == np.int8 else 448
  scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(largest)
  scaled = x / np.where(scale == 0, np.float32(1), scale)
  if layer.kv_dtype == np.int8:
    scaled = np.round(scaled)
  return scaled.astype(layer.kv_dtype).astype(np.float32) * scale


def stored(store) -> tuple[np.ndarray, np.ndarray]:
  """The K and V that a store holds, `[L, N, K, block_size, D]` float32."""
  kinds, pools = {"uint8": ml_dtypes.float8_e4m3fn}, []
  for pool, scale in ((store.k, store.k_scale), (store.v, store.v_scale)):
    pool = pool.view(kinds.get(pool.dtype.name, pool.dtype)).astype(np.float32)
    pools.append(pool if scale is None else pool * scale[..., None])
  return pools[0], pools[1]


def attend_densely(cache, oracle, queries, tokens, q) -> np.ndarray:
  """What `attend` must return for the last layer: `[T, H, D]`, 0 for padding."""
  out = np.zeros_like(q)
  texts = [list(row.tokens) for row in oracle.rows]
  for query in queries:
    texts[query.row].append(int(tokens[query.index]))
  for query in queries:
    text = tuple(texts[query.row][: query.position + 1])
    prints = fingerprints(oracle.rows[query.row].namespace, text)
    keys, values = (
      rounded(cache, x[-1, :, 0]).astype(np.float64) for x in contents(cache, prints)
    )
    width = cache.attention_layers[-1].sliding_window
    if width is not None:
      keys, values = keys[-width:], values[-width:]
    logits = q[query.index] @ keys.T * SM_SCALE  # [H, tokens]; there is one kv head
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    out[query.index] = weights @ values / weights.sum(axis=1, keepdims=True)
  return out


def check_contents(host: Context, oracle: ReferenceCache) -> None:
  """Asserts that every stored token of a row or a cached block has its K and V."""
  block_size = host.prefix.block_size
  row_prints = [fingerprints(r.namespace, tuple(r.tokens)) for r in oracle.rows]
  cached_prints = {
    block: fingerprints(namespace, tokens)[-block_size:]
    for block, (namespace, tokens) in cached_prefixes(host).items()
  }
  prints = np.zeros(host.prefix.block_tokens.shape, np.uint32)
  expected = np.zeros(prints.shape, bool)
  for own, table in zip(row_prints, host.sequences.block_tables, strict=True):
    position = np.arange(len(own))
    slots = table[position // block_size], position % block_size
    prints[slots], expected[slots] = own, True
  for block, own in cached_prints.items():
    if not expected[block].all():
      prints[block], expected[block] = own, True
  held = [(prints, expected)]
  for window in range(len(host.windows)):
    own = walk_windows.tokens_held(host, oracle, window, row_prints, cached_prints)
    held.append(own)
  for group, store in zip(host.config.groups, host.kv, strict=True):
    prints, expected = held[_pool_of(host.config, group)]
    wanted = contents(host.config, prints)
    for pool, values in zip(stored(store), wanted, strict=True):
      there = np.swapaxes(pool, 2, 3)  # [L, N, block_size, K, D], as `values` is
      values = rounded(host.config, values[list(group.members)])
      wrong = (~np.isclose(there, values, rtol=1e-6, atol=0)).any((0, 3, 4)) & expected
      assert not wrong.any(), f"wrong K/V in (block, offset) {np.argwhere(wrong)}"


def _pool_of(config: CacheConfig, group) -> int:
  """0 for the blocks of the context, else one plus the index of the window."""
  window = group.layer.sliding_window
  return 0 if window is None else 1 + config.windows.index(window)


def check_states(host: Context, oracle: ReferenceCache) -> None:
  """Asserts that rows and snapshots have the states of their tokens."""
  rows, cache = host.state_rows, host.config
  if rows is None:
    return
  wanted = states_read(cache, oracle, [1] * len(oracle.rows))
  for name, array in wanted.items():
    held = host.states.arrays[name][:, rows.source_ids]
    np.testing.assert_array_equal(held, array, f"state {name} of rows")
  cached = cached_prefixes(host)
  blocks = [block for block in np.flatnonzero(rows.snapshot_ids) if block in cached]
  prints = [fingerprints(*cached[block])[-1] for block in blocks]
  for name, array in states_of(cache, np.array(prints, np.uint32)).items():
    held = host.states.arrays[name][:, rows.snapshot_ids[blocks]]
    np.testing.assert_array_equal(held, array, f"snapshots of {name}")


def check_untouched(before: Context, after: Context) -> None:
  """Asserts that blocks which nobody owned before and after still hold only NaN."""
  owned = [np.zeros(w.pool.ref_counts.shape, bool) for w in (after, *after.windows)]
  for host in (before, after):
    owned[0] |= (host.pool.ref_counts > 0) | (host.prefix.way_of > 0)
    for window in range(len(host.windows)):
      owned[1 + window] |= walk_windows.owned(host, window)
  for group, store in zip(after.config.groups, after.kv, strict=True):
    in_use = owned[_pool_of(after.config, group)]
    for pool in stored(store):
      assert np.isnan(pool[:, ~in_use]).all(), "a block that nobody owns was written"


def to_host(tree):
  """Makes NumPy arrays of a pytree; quicker than `jax.device_get` for many."""
  return jax.tree.map(np.asarray, tree)


def same_bits(a, b) -> bool:
  """Whether two pytrees of arrays are equal to the last bit, NaN included."""
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)
