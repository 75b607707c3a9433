"""What a random walk does next: configurations, phases, and arguments, legal or not."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from kvcache import AttentionLayer, CacheConfig, RecurrentLayer
from tests.walks.checks import contents, fingerprints, states_of
from tests.walks.reference import ReferenceCache

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkConfig:
  """What one kind of walk looks like; hashable, so that programs are compiled once."""

  cache: CacheConfig
  num_tokens: int = 12  # T of a mixed step
  num_admissions: int = 3  # A
  num_forks: int = 2  # F
  vocab: int = 3  # few tokens: hits, equal blocks and swaps are common
  phases: tuple[str, ...] = ("fill", "decode", "crowd", "speculate", "churn")
  prompt_blocks: int = 3  # blocks of the prompts that are shared
  width: int = 33  # columns of the prompts: more, or fewer, than a row can hold
  is_cramped: bool = False  # the index has no place for every block: rows get sealed

  @property
  def num_logits(self) -> int:
    """Tokens per row of a draft step."""
    return 1 + self.cache.max_drafts

  @property
  def is_hybrid(self) -> bool:
    """Whether there are recurrent layers."""
    return self.cache.num_recurrent_layers > 0


ATTENTION = AttentionLayer(num_kv_heads=1, head_dim=2)
RECURRENT = RecurrentLayer(state={"conv": (2,), "ssm": (1, 3)})


def _cache(**kwargs) -> CacheConfig:
  return CacheConfig(**{"layers": (ATTENTION, ATTENTION)} | kwargs)


CONFIGS = {
  "small": WalkConfig(
    cache=_cache(num_blocks=40, block_size=4, max_seqs=6, max_seq_len=32, chunk_size=8)
  ),
  "tiny": WalkConfig(
    cache=_cache(num_blocks=9, block_size=2, max_seqs=5, max_seq_len=12, chunk_size=3),
    num_tokens=7,
    vocab=2,
    width=13,
    phases=("crowd", "churn", "fill", "crowd", "speculate", "restart"),
  ),
  "single_token_blocks": WalkConfig(
    cache=_cache(num_blocks=32, block_size=1, max_seqs=4, max_seq_len=16, chunk_size=1),
    num_tokens=6,
    vocab=2,
    width=17,
    phases=("fill", "decode", "crowd", "speculate"),
    prompt_blocks=5,
  ),
  "long_decode": WalkConfig(
    cache=_cache(
      num_blocks=160, block_size=4, max_seqs=8, max_seq_len=96, chunk_size=16
    ),
    num_tokens=24,
    width=60,
    phases=("fill", "decode", "decode", "decode", "speculate"),
    prompt_blocks=8,
  ),
  "single_row": WalkConfig(
    cache=_cache(num_blocks=7, block_size=4, max_seqs=1, max_seq_len=30),
    num_admissions=1,
    width=20,
    num_forks=1,
    vocab=2,
    phases=("alone",),
  ),
}

CONFIGS["cramped"] = WalkConfig(
  cache=_cache(
    num_blocks=24,
    block_size=2,
    max_seqs=5,
    max_seq_len=12,
    chunk_size=4,
    index_ways=1,
  ),
  num_tokens=8,
  vocab=2,
  phases=("fill", "crowd", "speculate", "churn"),
  is_cramped=True,
)

for name, dtype in (("int8", "int8"), ("fp8", "float8_e4m3fn")):
  CONFIGS[name] = dataclasses.replace(
    CONFIGS["tiny"], cache=dataclasses.replace(CONFIGS["tiny"].cache, dtype=dtype)
  )

for name, like, num_snapshots, interval in (
  ("hybrid", "small", 8, 2),
  ("hybrid_tiny", "tiny", 4, 2),
  ("hybrid_decode", "long_decode", 12, 2),
  ("hybrid_short", "single_token_blocks", 2, 3),
):
  CONFIGS[name] = dataclasses.replace(
    CONFIGS[like],
    cache=dataclasses.replace(
      CONFIGS[like].cache,
      layers=(ATTENTION, RECURRENT, ATTENTION, RECURRENT, RECURRENT),
      num_snapshots=num_snapshots,
      snapshot_interval=interval,
    ),
    phases=("snapshots", "decode", "snapshots", "restart"),
  )

# Windows of one to three blocks, beside layers that keep everything.
for name, like, width, num, is_hybrid in (
  ("windows", "small", 7, 30, False),
  ("windows_tiny", "tiny", 3, 9, False),
  ("windows_decode", "long_decode", 9, 60, False),
  ("windows_short", "single_token_blocks", 2, 14, False),
  ("three_groups", "small", 6, 28, True),
):
  layer = dataclasses.replace(ATTENTION, sliding_window=width)
  layers = (ATTENTION, RECURRENT, layer) if is_hybrid else (ATTENTION, layer, layer)
  CONFIGS[name] = dataclasses.replace(
    CONFIGS[like],
    cache=dataclasses.replace(
      CONFIGS[like].cache,
      layers=layers,
      num_window_blocks=num,
      num_snapshots=8 if is_hybrid else None,
      snapshot_interval=2,
    ),
    phases=("windows", "decode", "crowd", "windows", "churn"),
  )
CONFIGS["hybrid_drafts"] = dataclasses.replace(
  CONFIGS["hybrid"],
  cache=dataclasses.replace(
    CONFIGS["hybrid"].cache, block_size=2, snapshot_interval=1, max_drafts=3
  ),
  phases=("drafts", "snapshots", "drafts"),
)

# What a phase does, and how often. A name with "+" is a sequence of transitions.
PHASES = {
  "fill": {"admit": 3, "extend+step": 8, "fork": 1, "evict": 1, "finish": 1},
  "decode": {
    "extend_decode+step_decode": 30,
    "admit": 1,
    "finish": 1,
    "extend+step": 1,
  },
  "crowd": {
    "admit": 3,
    "admit_few": 3,
    "extend+step": 8,
    "extend_decode+step_decode": 3,
    "extend": 4,
    "fork": 6,
    "rewind": 2,
    "finish": 1,
    "evict": 1,
  },
  "speculate": {
    "extend+speculate": 8,
    "rewind": 4,
    "fork": 2,
    "extend_decode+step_decode": 4,
    "admit": 1,
    "publish": 1,
  },
  "churn": {
    "admit": 6,
    "extend+step": 6,
    "step": 1,
    "finish": 3,
    "abandon": 2,
    "evict": 3,
    "publish": 1,
    "fork": 2,
    "handoff": 1,
    "rewind": 2,
    "reset": 0.1,
  },
  "alone": {
    "admit": 2,
    "extend+step": 6,
    "extend+speculate": 2,
    "extend_decode+step_decode": 6,
    "rewind": 2,
    "finish": 1,
    "evict": 1,
  },
  "snapshots": {
    "admit": 6,
    "extend+step": 10,
    "extend_decode+step_decode": 4,
    "finish": 2,
    "abandon": 2,
    "publish": 1,
    "fork": 2,
    "handoff": 2,
    "rewind": 3,
    "evict": 1,
    "evict_snapshots": 2,
    "reset": 0.1,
  },
  "windows": {
    "admit": 5,
    "extend+step": 12,
    "extend_decode+step_decode": 8,
    "publish": 3,
    "finish": 2,
    "abandon": 1,
    "fork": 2,
    "handoff": 2,
    "rewind": 4,
    "evict": 1,
    "evict_window_blocks": 2,
  },
  "drafts": {
    "extend_draft+draft": 12,
    "admit": 3,
    "extend+step": 3,
    "extend_decode+step_decode": 2,
    "finish": 1,
    "publish": 1,
    "fork": 1,
    "rewind": 1,
    "evict_snapshots": 2,
  },
  "restart": {"admit": 4, "extend+step": 8, "publish": 1, "reset_keep": 1},
}


_PUBLISHING = {"admit", "admit_few", "fork", "handoff", "finish", "reset_keep"}


def script(config: WalkConfig, rng: np.random.Generator) -> Iterator[str]:
  """Yields names of transitions for ever, in phases, whatever the cache says."""
  while True:
    weights = PHASES[str(rng.choice(config.phases))]
    names, odds = list(weights), np.array(list(weights.values()))
    for _ in range(rng.integers(8, 40)):
      for name in str(rng.choice(names, p=odds / odds.sum())).split("+"):
        if config.is_cramped and name in _PUBLISHING:
          yield "publish"  # on its own, so that the oracle can follow what came of it
        yield name


class Proposer:
  """Proposes arguments that suit what the oracle knows; a few of them illegal."""

  def __init__(self, config: WalkConfig, oracle: ReferenceCache, *, seed: int):
    self.config = config
    self.oracle = oracle
    self.rng = np.random.default_rng([seed, 1])
    self.texts = [[] for _ in oracle.rows]  # what each row is going to contain
    self.granted = np.zeros(len(oracle.rows), np.int32)  # by the last extend
    self.bases = [self._random_tokens(config.width) for _ in range(3)]

  def _random_tokens(self, count):
    return self.rng.integers(self.config.vocab, size=count).tolist()

  def _chance(self, probability):
    return self.rng.random() < probability

  def _prompt(self):
    """Half of a known text and a little more, so that prefixes meet."""
    texts = [*self.bases, *(row.tokens for row in self.oracle.rows if row.tokens)]
    text = texts[self.rng.integers(len(texts))]
    block_size = self.config.cache.block_size
    blocks = self.rng.integers(self.config.prompt_blocks + 1)
    extra = self._random_tokens(self.rng.integers(block_size + 2))
    return text[: blocks * block_size] + extra

  def propose(self, name: str) -> dict[str, np.ndarray]:
    """Arguments for a transition; a few of them illegal."""
    propose = getattr(self, f"_propose_{name}", None)
    return {} if propose is None else propose()

  def _propose_admit(self):
    A, width = self.config.num_admissions, self.config.width
    prompts = [self._prompt()[:width] for _ in range(A)]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if self._chance(0.2):
      bad = [0, -1, INT_MIN, width, width + 1, width + 2, INT_MAX]
      lengths[self.rng.integers(A)] = self.rng.choice(bad)
    tokens = self.rng.integers(self.config.vocab, size=(A, width), dtype=np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    namespaces = self.rng.choice([0, 0, 0, 0, 7, -3], size=A).astype(np.int32)
    return {
      "tokens": tokens,
      "lengths": lengths,
      "namespaces": namespaces,
      "block_budget": np.int32(INT_MAX),
    }

  def _propose_admit_few(self):
    num_usable = self.oracle.num_free + self.oracle.num_evictable
    budget = self.rng.choice([num_usable, num_usable // 2, 1, 0, -1, INT_MAX])
    return self._propose_admit() | {"block_budget": np.int32(budget)}

  def _wanted(self):
    """Tokens that each row has still to compute; one if it only decodes."""
    rows = zip(self.oracle.rows, self.texts, strict=True)
    todo = [max(len(text) - len(row.tokens), 1) * row.active for row, text in rows]
    return np.array(todo, np.int32)

  def _spoil(self, counts):
    """Replaces one entry by something odd, now and then."""
    if self._chance(0.15):
      odd = [-1, 1, 2, 3, self.config.num_tokens, INT_MAX, INT_MIN]
      counts[self.rng.integers(len(counts))] = self.rng.choice(odd)
    return counts

  def _propose_extend(self):
    query_lens = self._wanted()
    kind = self.rng.integers(4)
    if kind == 0:  # reserve ahead, or ask again for what is owned already
      query_lens *= self.rng.integers(0, 5, size=query_lens.size, dtype=np.int32)
    elif kind == 1:  # a share of the budget for each
      query_lens = np.minimum(query_lens, max(self.config.num_tokens // 4, 1))
    elif kind == 2:  # fill the budget to the last token, in row order
      before = np.cumsum(query_lens) - query_lens
      query_lens = np.clip(self.config.num_tokens - before, 0, query_lens)
    if self.config.is_hybrid and self._chance(0.8):  # as a scheduler would
      query_lens = np.minimum(query_lens, self.oracle.tokens_to_snapshot())
    order = self.rng.permutation(query_lens.size).astype(np.int32)
    return {"query_lens": self._spoil(query_lens.astype(np.int32)), "order": order}

  def _propose_extend_draft(self):
    active = [row.active for row in self.oracle.rows]
    query_lens = self.rng.integers(1, self.config.num_logits + 1, size=len(active))
    query_lens = (query_lens * active).astype(np.int32)
    order = self.rng.permutation(query_lens.size).astype(np.int32)
    return {"query_lens": self._spoil(query_lens), "order": order}

  def _propose_extend_decode(self):
    return {"query_lens": self._spoil(np.minimum(self._wanted(), 1))}

  def _propose_step(self, most=INT_MAX):
    query_lens = self.granted.copy()
    if self._chance(0.1):  # whatever fits into the blocks
      room = [self.oracle.room(s) for s in range(query_lens.size)]
      query_lens = np.array(room, np.int32)
    query_lens = self._spoil(query_lens)
    queries, effective = self.oracle.plan_step(
      np.minimum(query_lens, most).tolist(), num_tokens=self.config.num_tokens
    )
    accepted = np.array(effective, np.int32)
    num_states = None if most == INT_MAX else most
    return self._inputs(queries, self.config.num_tokens, num_states) | {
      "query_lens": query_lens,
      "accepted": accepted,
    }

  def _propose_speculate(self):
    arrays = self._propose_step()
    high = np.maximum(arrays["query_lens"], 0).clip(max=self.config.num_tokens) + 1
    accepted = self.rng.integers(0, high).astype(np.int32)
    return arrays | {"accepted": self._spoil(accepted)}

  def _propose_draft(self):
    num_logits = self.config.num_logits
    arrays = self._propose_step(most=num_logits)
    accepted = self.rng.integers(num_logits + 1, size=len(self.granted))
    return arrays | {"accepted": self._spoil(accepted.astype(np.int32))}

  def _propose_step_decode(self):
    query_lens = self._spoil(self.granted.copy())
    queries, _ = self.oracle.plan_step(query_lens.tolist())
    return self._inputs(queries, query_lens.size) | {"query_lens": query_lens}

  def _inputs(self, queries, num_tokens, num_states=None):
    """Tokens, and the K and V that a model would make of them; junk in the padding."""
    tokens = self.rng.integers(self.config.vocab, size=num_tokens, dtype=np.int32)
    new = {}
    for query in queries:
      new.setdefault(query.row, []).append(query)
    prints = self.rng.integers(1 << 20, size=num_tokens, dtype=np.uint32)
    for s, mine in new.items():
      row, text = self.oracle.rows[s], self.texts[s]
      start = len(row.tokens)
      given = text[start : start + len(mine)]
      here = [query.index for query in mine]
      tokens[here[: len(given)]] = given
      if len(given) < len(mine) and self._chance(0.7):  # equal rows go on equally
        tokens[here[len(given)]] = sum(row.tokens[-3:]) % self.config.vocab
      whole = fingerprints(row.namespace, (*row.tokens, *tokens[here].tolist()))
      prints[here] = whole[start:]
    keys, values = contents(self.config.cache, prints)
    q = self.rng.normal(size=(num_tokens, 2, keys.shape[-1])).astype(np.float32)
    states = self._states(new, tokens, num_states)
    return {"tokens": tokens, "keys": keys, "values": values, "q": q, "states": states}

  def _states(self, new, tokens, num_states):
    """The recurrent states that a model would leave after these tokens; junk else.

    After the last token of each row, or after each of the first `num_states`.
    """
    if not self.config.is_hybrid:
      return {}
    shape = (len(self.oracle.rows), num_states or 1)
    prints = self.rng.integers(1 << 20, size=shape, dtype=np.uint32)
    for s, mine in new.items():
      row = self.oracle.rows[s]
      text = (*row.tokens, *tokens[[query.index for query in mine]].tolist())
      whole = fingerprints(row.namespace, text)[len(row.tokens) :]
      if num_states is None:
        whole = whole[-1:]
      prints[s, : whole.size] = whole
    return states_of(self.config.cache, prints[:, 0] if num_states is None else prints)

  def _propose_fork(self):
    S = len(self.oracle.rows)
    src = self.rng.integers(S, size=self.config.num_forks).astype(np.int32)
    live = [s for s, row in enumerate(self.oracle.rows) if row.active]
    if live and self._chance(0.7):
      src = self.rng.choice(live, size=src.size).astype(np.int32)
    if self._chance(0.1):
      src[self.rng.integers(src.size)] = self.rng.choice([-1, S, INT_MAX, INT_MIN])
    return {"src": src}

  _propose_handoff = _propose_fork

  def _propose_rewind(self):
    lens = np.array([len(row.tokens) for row in self.oracle.rows])
    counts = self.rng.integers(0, lens + 1)
    if self.config.is_hybrid and self._chance(0.6):  # to where a state stands
      targets = [self.rng.choice(self.oracle.state_lens(s)) for s in range(lens.size)]
      return {"num_tokens": (lens - targets).astype(np.int32)}
    kind = self.rng.integers(3)
    if kind == 0:  # few tokens of all rows
      counts = np.minimum(counts, 3)
    elif kind == 1:  # some rows
      counts *= self._chance(0.5) * self.rng.integers(2, size=counts.size)
    return {"num_tokens": self._spoil(counts.astype(np.int32))}

  def _propose_finish(self):
    done = [len(row.tokens) >= self.oracle.max_len for row in self.oracle.rows]
    odds = self.rng.choice([0.2, 0.5, 1.0], p=[0.7, 0.2, 0.1])
    return {"mask": np.array(done) | (self.rng.random(len(done)) < odds)}

  _propose_abandon = _propose_finish

  def _propose_evict_snapshots(self):
    return self._propose_evict()

  def _propose_evict(self):
    counts = [0, 1, 1, 2, 3, 5, INT_MAX, -1, INT_MIN]
    return {"count": np.int32(self.rng.choice(counts))}

  def _propose_evict_window_blocks(self):
    counts = [self._propose_evict()["count"] for _ in self.oracle.windows]
    return {"counts": np.array(counts, np.int32)}
