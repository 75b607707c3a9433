"""Worked cases with their answers, across modules.

Chunks, preemption and the loop are in `test_scheduler.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, Status
from kvcache.parts import blocks, hashing, ragged
from tests.fixtures import scenes
from tests.fixtures.scenes import Scene
from tests.fixtures.thorough import more

OK, NO_BLOCKS = Status.OK, Status.NO_BLOCKS
PAGES = scenes.config(num_blocks=64, block_size=32, max_seqs=12, max_seq_len=256)
# Each block holds one token, which is its name.
NAMES = scenes.config(
  num_blocks=41, block_size=1, max_seqs=6, max_seq_len=12, chunk_size=8
)


def text(length, *, seed=0):
  """A text that shares no prefix with those of other seeds."""
  rng = np.random.default_rng(seed)
  return [seed, *rng.integers(1000, size=length - 1).tolist()]


# Sizing.


def test_a_budget_of_bytes_gives_blocks():
  layers = [AttentionLayer(num_kv_heads=2, head_dim=8)] * 4
  sizes = CacheConfig.from_memory(0.03 * 2**30, layers=layers, block_size=128)
  assert sizes.bytes_per_block == 65_536
  assert sizes.num_blocks == 491
  assert int(kvcache.init(sizes).pool.num_free) == 490


# Blocks.


def take(pool, num):
  _, (fits,) = ragged.first_come(jnp.array([num]), pool.num_free)
  if not fits:
    return pool, None
  pool, allocation = blocks.allocate(pool, jnp.array([num]), num_entries=4)
  return pool, allocation.block_ids[:num]


def give(pool, block_ids):
  return blocks.release(pool, block_ids, keep=jnp.zeros(len(block_ids), bool))[0]


def test_blocks_are_taken_given_back_and_refused():
  pool, four = take(blocks.init(491), 4)
  assert pool.num_free == 486
  pool = give(pool, four[:2])
  assert pool.num_free == 488
  pool, _ = take(pool, 1)
  assert pool.num_free == 487
  pool, refused = take(pool, 488)
  assert refused is None and pool.num_free == 487


def test_two_owners_let_go_of_one_block_in_one_call():
  pool, (block,) = take(blocks.init(9), 1)
  pool = blocks.share(pool, block[None])
  assert pool.ref_counts[block] == 2 and pool.num_free == 7
  pool = give(pool, jnp.stack([block, block]))
  assert pool.ref_counts[block] == 0 and pool.num_free == 8
  assert sorted(pool.free_list[:8].tolist()) == list(range(1, 9))


def test_what_is_free_already_is_not_freed_again():
  pool, taken = take(blocks.init(9), 2)
  pool = give(pool, taken)
  pool = give(pool, jnp.array([kvcache.NULL_BLOCK, 5, *taken.tolist()]))
  assert pool.num_free == 8
  assert sorted(pool.free_list[:8].tolist()) == list(range(1, 9))


# Eviction. Texts name their blocks; a prefix is named by its last block.


def victims(scene, count):
  """Evicts, and tells the names of the blocks that went."""
  return [prefix[-1] for prefix in scene.evict(count)]


def run_through(scene, *texts):
  """Computes and finishes texts, one after another."""
  for names in texts:
    row, _ = scene.start(names)
    scene.finish(row)


def test_a_root_never_goes_before_its_leaf():
  scene = Scene(NAMES)
  run_through(scene, [0, 1, 2])
  assert victims(scene, 1) == [2]
  assert victims(scene, 1) == [1]
  assert victims(scene, 1) == [0]


def test_leaves_go_in_the_order_in_which_they_were_let_go():
  scene = Scene(NAMES)
  a, _ = scene.start([0, 1])
  b, _ = scene.start([0, 2])
  scene.finish(a)
  scene.finish(b)
  assert [victims(scene, 1) for _ in range(3)] == [[1], [2], [0]]


def test_what_was_matched_again_goes_last():
  scene = Scene(NAMES)
  run_through(scene, [0, 1], [3])
  row, num_cached, _ = scene.admit([0, 1, 9])
  assert num_cached == 2
  scene.finish(row)
  assert [victims(scene, 1) for _ in range(3)] == [[3], [1], [0]]


def test_what_is_held_is_never_a_victim():
  scene = Scene(NAMES)
  row, _ = scene.start([0, 1])
  run_through(scene, [0, 2])
  assert victims(scene, 2) == [2]
  assert scene.read(row) == [0, 1]


def test_evicting_more_than_there_is():
  scene = Scene(NAMES)
  run_through(scene, [0, 1])
  assert victims(scene, 3) == [1, 0]
  assert victims(scene, 3) == []
  assert scene.num_free == 40


def test_a_matched_prefix_is_not_evicted_for_its_own_prompt():
  scene = Scene(NAMES)
  run_through(scene, [100, 101], [200])
  for seed in range(4):
    scene.start([1000 * seed + i for i in range(300, 300 + (12 if seed < 3 else 1))])
  assert scene.num_free == 0
  row, num_cached, _ = scene.admit([100, 101, 102])
  assert num_cached == 2
  assert scene.extend({row: 1})[row] == NO_BLOCKS
  assert victims(scene, 1) == [200]
  assert scene.extend({row: 1})[row] == OK
  scene.step({row: [102]})
  assert scene.read(row) == [100, 101, 102]


def greedy_victim(last_use, held):
  """The leaf that nobody holds and that was let go longest ago, or None."""
  parents = {prefix[:-1] for prefix in last_use}
  leaves = [prefix for prefix in last_use if prefix not in parents | held]
  return min(leaves, key=last_use.get, default=None)


def prefixes_of(names):
  return [tuple(names[:end]) for end in range(1, len(names) + 1)]


@pytest.mark.parametrize("seeds", [range(25), *more(range(25, 50))], ids=str)
def test_forests_are_evicted_leaves_first(seeds):
  for seed in seeds:
    check_forest(np.random.default_rng(seed))


def check_forest(rng):
  scene = Scene(NAMES)
  live, last_use, now = {}, {}, 0
  for _ in range(18):
    names = rng.integers(3, size=rng.integers(1, 6)).tolist()
    if len(live) == 6 or (live and rng.random() < 0.5):
      row = int(rng.choice(list(live)))
      scene.finish(row)
      now += 1
      last_use.update(dict.fromkeys(prefixes_of(live.pop(row)), now))
    elif scene.num_free >= len(names):
      row, num_cached = scene.start(names)
      best = 0
      while best < len(names) - 1 and tuple(names[: best + 1]) in last_use:
        best += 1
      assert num_cached == best
      live[row] = names
      scene.publish()
      last_use.update(dict.fromkeys(prefixes_of(names), now))
    if rng.random() < 0.2:
      evict_one(scene, live, last_use)
    check_closed(scene, last_use)
  while evict_one(scene, live, last_use):
    check_closed(scene, last_use)


def check_closed(scene, last_use):
  """The cached prefixes are the expected ones, and so is each prefix of them."""
  cached = scene.cached()
  assert cached == last_use.keys()
  assert all(prefix[:-1] in cached for prefix in cached if len(prefix) > 1)


def evict_one(scene, live, last_use):
  """Evicts one block, the expected one; returns whether there was any."""
  held = {prefix for names in live.values() for prefix in prefixes_of(names)}
  victim = greedy_victim(last_use, held)
  assert scene.evict(1) == [victim] * (victim is not None)
  last_use.pop(victim, None)
  return victim is not None


# Prefixes. Blocks of 32 tokens.


def test_ten_equal_prompts_share_their_blocks():
  scene, prompt = Scene(PAGES), text(96)
  hits = [scene.start(prompt)[1] for _ in range(10)]
  assert hits == [0] + [64] * 9
  scene.publish()
  assert scene.num_in_use == 3
  assert all(scene.table(row) == scene.table(0) for row in range(10))
  assert scene.num_references == 30
  assert scene.host.pool.ref_counts[scene.table(0)].tolist() == [10, 10, 10]


def test_hits_leave_the_last_token_to_compute():
  scene, prompt = Scene(PAGES), text(97)
  scene.start(prompt)
  assert scene.start(prompt)[1] == 96
  assert scene.start(prompt[:33])[1] == 32
  assert scene.start(prompt[:32])[1] == 0


def test_a_different_middle_block_ends_the_hit():
  scene, prompt = Scene(PAGES), text(97)
  scene.start(prompt)
  changed = [*prompt[:40], -1, *prompt[41:]]
  row, num_cached = scene.start(changed)
  assert num_cached == 32
  scene.publish()
  mine, others = scene.table(row), scene.table(0)
  assert [a == b for a, b in zip(mine, others, strict=True)] == [True] + [False] * 3
  assert scene.read(row) == changed and scene.read(0) == prompt


def test_decoded_tokens_are_found_like_prompts():
  scene, whole = Scene(PAGES), text(104)
  row, _ = scene.start(whole[:64])
  for token in whole[64:]:
    scene.append({row: [token]})
  assert scene.start(whole)[1] == 96


def test_namespaces_share_nothing():
  scene, prompt = Scene(PAGES), text(97)
  scene.start(prompt, namespace=1)
  assert scene.start(prompt, namespace=2)[1] == 0
  assert scene.start(prompt, namespace=1)[1] == 96
  assert scene.num_in_use == 3 + 3 + 3  # the shared ones, and a last one for each row


def test_prompts_with_one_hash_are_told_apart(monkeypatch):
  monkeypatch.setattr(
    hashing, "digest", lambda tokens: jnp.zeros((*tokens.shape[:-1], 2), jnp.uint32)
  )
  # A size of its own, since programs compiled for others have the true hash.
  scene = Scene(scenes.config(num_blocks=24, block_size=4, max_seqs=8, max_seq_len=16))
  one, two = text(9, seed=1), text(9, seed=2)
  assert scene.start(one)[:2] == (0, 0)
  assert scene.start(two)[:2] == (1, 0)
  scene.publish()
  # A bucket holds a hash once: the second prompt's blocks are never found, and its row
  # goes on unpublished.
  assert scene.host.sequences.num_published.tolist()[:2] == [2, 0]
  assert scene.host.sequences.is_sealed.tolist()[:2] == [False, True]
  mixed = [[*one[:4], *two[4:]], [*two[:4], *one[4:]]]
  for prompt, num_cached in zip((one, two, *mixed), (8, 0, 4, 0), strict=True):
    row, found = scene.start(prompt)
    assert scene.read(row) == prompt and found == num_cached
  assert scene.read(0) == one and scene.read(1) == two


def drain(scene, *, leave=0):
  """Lets other rows reserve all but `leave` free blocks; returns those rows."""
  rows = []
  while scene.num_free > leave:
    num_blocks = min(8, scene.num_free - leave)
    row, *_ = scene.admit([1_000 + len(rows)])
    assert scene.extend({row: 32 * num_blocks}, num_tokens=256)[row] == OK
    rows.append(row)
  return rows


def test_a_hit_without_a_block_for_the_rest_waits():
  scene, prompt = Scene(PAGES), text(96)
  scene.start(prompt)
  hoarders = drain(scene)
  row, num_cached, status = scene.admit(prompt)
  assert (num_cached, status) == (64, OK)
  before = scene.host.sequences
  assert scene.extend({row: 32})[row] == NO_BLOCKS
  assert scene.length(row) == 64 and len(scene.table(row)) == 2
  assert scene.host.sequences.num_blocks.tolist() == before.num_blocks.tolist()
  scene.finish(hoarders[0])
  assert scene.extend({row: 32})[row] == OK
  scene.step({row: prompt[64:]})
  assert scene.read(row) == prompt


# Steps.


def test_at_a_block_edge_the_earlier_row_gets_the_last_block():
  scene = Scene(PAGES)
  first, second = (scene.start(text(32, seed=seed))[0] for seed in (1, 2))
  hoarders = drain(scene, leave=1)
  status = scene.extend({first: 1, second: 1})
  assert (status[first], status[second]) == (OK, NO_BLOCKS)
  assert len(scene.table(second)) == 1 and scene.length(second) == 32
  scene.step({first: [7]})
  scene.finish(hoarders[0])
  assert scene.extend({second: 1})[second] == OK


def test_all_rows_finish_in_one_step():
  scene = Scene(PAGES)
  for seed in range(12):
    scene.start(text(40 + seed, seed=seed))
  scene.finish(*range(12))
  sequences = scene.host.sequences
  assert not sequences.is_active.any() and not sequences.block_tables.any()
  assert scene.num_in_use == 0 and scene.num_free == 63 - 12
  assert len(scene.evict(63)) == 12
  assert scene.num_free == 63


# Fork, rewind, speculation.


def test_forks_share_full_blocks_and_copy_the_partial_one():
  scene, prompt = Scene(PAGES), text(70)
  row, _ = scene.start(prompt)
  branches, status = scene.fork(row, row, row)
  assert status == [OK] * 3
  family = [row, *branches]
  assert scene.num_in_use == 2 + 4
  assert scene.host.pool.ref_counts[scene.table(row)].tolist() == [4, 4, 1]
  assert len({scene.table(branch)[2] for branch in family}) == 4
  assert all(scene.read(branch) == prompt for branch in family)
  scene.append({branch: [10_000 + branch, 7] for branch in family})
  for branch in family:
    assert scene.read(branch) == [*prompt, 10_000 + branch, 7]


def test_rewinding_into_a_shared_block_copies_it():
  scene, prompt = Scene(PAGES), text(34)
  row, _ = scene.start(prompt)
  (branch,), _ = scene.fork(row)
  shared = scene.table(row)[0]
  assert scene.rewind({row: 5})[row] == OK
  assert scene.length(row) == 29 and len(scene.table(row)) == 1
  assert scene.table(row) != [shared] and scene.table(branch)[0] == shared
  scene.append({row: [1, 2, 3, 4]})
  assert scene.read(row) == [*prompt[:29], 1, 2, 3, 4]
  assert scene.read(branch) == prompt


def test_rewinding_into_a_block_of_ones_own_copies_nothing():
  scene, prompt = Scene(PAGES), text(34)
  row, _ = scene.start(prompt)
  own, num_free = scene.table(row)[0], scene.num_free
  assert scene.rewind({row: 5})[row] == OK
  assert scene.table(row) == [own] and scene.num_free == num_free + 1
  scene.append({row: [1, 2]})
  assert scene.read(row) == [*prompt[:29], 1, 2]


def test_rejected_drafts_are_overwritten():
  scene, prompt = Scene(PAGES), text(30)
  row, _ = scene.start(prompt)
  scene.append({row: [501, 502, 503, 504]}, accepted={row: 2})  # 3 drafts, 1 accepted
  assert scene.length(row) == 32
  scene.append({row: [601, 602]})
  assert scene.read(row) == [*prompt, 501, 502, 601, 602]
  scene.publish()
  assert tuple([*prompt, 501, 502]) in scene.cached()
