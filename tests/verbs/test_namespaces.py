"""No way through the verbs lets one tenant hold, adopt or find another one's blocks.

Two tenants with the same prompts walk at random over all verbs, while hashes that
collide on purpose say nothing of namespaces and next to nothing of tokens. A ledger
notes who a block belongs to from the moment a row takes it until it is free again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import CacheConfig, SamplingParams, SchedulerConfig
from kvcache.parts import hashing, prefix
from tests.fixtures import small
from tests.fixtures import toy_model as toy

SIZES = CacheConfig(
  layers=small.LAYERS,
  num_blocks=24,
  block_size=2,
  max_seqs=6,
  max_seq_len=16,
  chunk_size=4,
  index_ways=4,
)
TENANTS = (1, -2)
TEXTS = ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9], [8, 8, 8, 8, 8, 8], [1, 2])
WIDTH, NUM_TOKENS = 15, 16


@pytest.fixture
def collisions(monkeypatch):
  """Hashes of one bit, the same in every namespace."""
  honest = hashing.digest

  def digest(tokens):
    return honest(tokens) & jnp.uint32(1)

  def root(salt, namespaces):
    del salt
    return jnp.zeros((*namespaces.shape, hashing.LANES), jnp.uint32)

  monkeypatch.setattr(hashing, "digest", digest)
  monkeypatch.setattr(hashing, "root", root)


class Tenants:
  """A context that two tenants share, and the ledger."""

  def __init__(self, seed: int):
    self.rng = np.random.default_rng(seed)
    self.ctx = kvcache.init(SIZES)
    self.ledger: dict[int, int] = {}
    self.num_hits = self.num_shared = 0

  @staticmethod
  def compile(verb):
    return jax.jit(verb)  # compiled here, after the hashes were replaced

  @functools.cached_property
  def programs(self):
    def append(ctx, tokens, query_lens):
      ctx, status = kvcache.extend(ctx, query_lens, num_tokens=NUM_TOKENS)
      query_lens = jnp.where(status == 0, query_lens, 0)
      view = kvcache.step_metadata(ctx, query_lens, num_tokens=NUM_TOKENS)
      at = view.positions - ctx.sequences.seq_lens[view.seq_ids]
      return kvcache.commit(ctx, tokens[view.seq_ids, at], view)

    def handoff(ctx, rows):
      state = kvcache.export_sequences(ctx, rows, max_len=16)
      return kvcache.import_sequences(ctx, state)

    verbs = {
      "admit": lambda c, t, n, s: kvcache.admit(c, t, n, namespace=s),
      "append": append,
      "handoff": handoff,
      "fork": kvcache.fork,
      "rewind": kvcache.rewind,
      "publish": kvcache.publish,
      "finish": kvcache.finish,
      "abandon": functools.partial(kvcache.finish, keep_prefix=False),
      "evict": kvcache.evict,
      "find": lambda c, t, n, s: kvcache.find(c, t, n, namespace=s),
    }
    return {name: self.compile(verb) for name, verb in verbs.items()}

  @property
  def live(self):
    return np.flatnonzero(self.ctx.sequences.is_active)

  def advance(self, name: str) -> None:
    verb, rng, S = self.programs[name], self.rng, SIZES.max_seqs
    rows = rng.choice(S, size=2).astype(np.int32)
    if name == "admit":  # the same prompt for both
      text = TEXTS[rng.integers(len(TEXTS))]
      tokens = np.zeros((2, WIDTH), np.int32)
      tokens[:, : len(text)] = text
      lengths, spaces = np.full(2, len(text), np.int32), np.array(TENANTS, np.int32)
      ids, num = self.programs["find"](self.ctx, tokens, lengths, spaces)
      for tenant, found in zip(TENANTS, np.asarray(ids), strict=True):
        assert all(self.ledger[b] == tenant for b in found.tolist() if b)
      self.num_hits += int(np.sum(num))
      self.ctx, _ = verb(self.ctx, tokens, lengths, spaces)
    elif name == "append":  # what the prompts go on with, or one token
      lens, texts = np.zeros(S, np.int32), np.zeros((S, WIDTH), np.int32)
      for s in self.live[rng.random(self.live.size) < 0.7]:
        start = int(self.ctx.sequences.seq_lens[s])
        rest = TEXTS[rng.integers(2)][start:] or [3]
        lens[s] = min(len(rest), rng.integers(1, 5))
        texts[s, : lens[s]] = rest[: lens[s]]
      self.ctx = verb(self.ctx, texts, lens)
    elif name in ("fork", "handoff"):
      self.ctx = verb(self.ctx, rows)[0]
    elif name == "rewind":
      counts = rng.integers(0, np.asarray(self.ctx.sequences.seq_lens) + 1)
      self.ctx = verb(self.ctx, np.where(rng.random(S) < 0.3, counts, 0).astype("i4"))[
        0
      ]
    elif name in ("finish", "abandon"):
      self.ctx = verb(self.ctx, np.isin(np.arange(S), rows))
    elif name == "evict":
      self.ctx = verb(self.ctx, np.int32(rng.integers(4)))[0]
    else:
      self.ctx = verb(self.ctx)
    self.check()

  def check(self) -> None:
    """Every block belongs to one tenant from when it is taken until it is free."""
    ctx = jax.device_get(self.ctx)
    kvcache.check_invariants(self.ctx)
    is_free = (ctx.pool.ref_counts == 0) & (ctx.prefix.way_of == 0)
    self.ledger = {b: t for b, t in self.ledger.items() if not is_free[b]}
    table = ctx.sequences
    for s in self.live:
      tenant = int(table.namespaces[s])
      assert tenant in TENANTS
      for block in table.block_tables[s, : table.num_blocks[s]].tolist():
        assert self.ledger.setdefault(block, tenant) == tenant, "another tenant's block"
    for block in np.flatnonzero(ctx.prefix.way_of).tolist():
      assert ctx.prefix.namespace[block] == self.ledger[block]
    self.num_shared += int((ctx.pool.ref_counts > 1).sum())


WALK = {
  "admit": 5,
  "append": 6,
  "fork": 1,
  "handoff": 1,
  "rewind": 1,
  "publish": 1,
  "finish": 2,
  "abandon": 1,
  "evict": 1,
}


def walk(names, seed, num_steps):
  tenants = Tenants(seed)
  odds = np.array([WALK[name] for name in names]) / sum(WALK[name] for name in names)
  for name in tenants.rng.choice(names, size=num_steps, p=odds):
    tenants.advance(str(name))
  return tenants


def test_no_verb_crosses_from_one_tenant_to_another(collisions):
  tenants = walk(list(WALK), seed=0, num_steps=300)
  assert tenants.num_hits > 20 and tenants.num_shared > 20


def test_the_walk_sees_a_block_that_crosses(collisions, monkeypatch):
  def is_same(index, candidates, tokens, namespaces):  # forgets to compare namespaces
    del namespaces
    same = jnp.all(index.block_tokens[candidates] == tokens, axis=-1)
    return same & (candidates != kvcache.NULL_BLOCK)

  monkeypatch.setattr(prefix, "_is_same", is_same)
  with pytest.raises(AssertionError):
    walk(["admit", "append", "finish"], seed=0, num_steps=100)


@pytest.mark.thorough
def test_the_loop_serves_each_tenant_from_its_own_blocks(collisions):
  """The toy model's keys depend on the namespace, and its tokens on every key."""
  prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 4 + [[1, 2, 3, 4, 5, 6]] * 4
  spaces = [1, -2, 1, -2] * 2
  sizes = toy.config(num_blocks=24, block_size=2, max_seqs=3, max_seq_len=24)
  ctx, done = kvcache.generate(
    toy.model,
    toy.fresh(sizes),
    prompts,
    max_new_tokens=6,
    namespace=spaces,
    sampling_params=SamplingParams(),
    scheduler=SchedulerConfig(token_budget=8, max_admissions=2),
  )
  want = toy.expected(
    prompts, 6, max_tokens_per_seq=sizes.max_tokens_per_seq, namespaces=spaces
  )
  assert [c.tokens for c in done] == [w.tokens for w in want]
  assert sum(c.num_cached for c in done) > 0
  assert done[0].tokens != done[1].tokens
  kvcache.check_invariants(ctx)
