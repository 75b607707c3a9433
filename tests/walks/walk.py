"""Seeded random walks over all verbs, each transition compared with the oracle.

`python -m tests.walks.walk --config small --seed 12 --steps 300` replays one walk.
The toy model stores in K and V a fingerprint of the whole prefix of a token, so that a
block shared wrongly, lost in a copy or handed out too early is seen; blocks that nobody
owns are filled with NaN after every transition.
"""

import argparse
import collections
from collections.abc import Iterable, Mapping
import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import Context, Status
from tests.walks import checks as walk_checks
from tests.walks.moves import CONFIGS, Proposer, script, WalkConfig
from tests.walks.reference import ReferenceCache

# The device's side: one pure function per transition.


def _write_all(ctx, keys, values, metadata):
  for layer in range(keys.shape[0]):
    ctx = kvcache.write_kv(ctx, layer, keys[layer], values[layer], metadata)
  return ctx


def _step(
  ctx,
  query_lens,
  tokens,
  keys,
  values,
  q,
  *,
  num_tokens,
  states,
  accepted=None,
  num_logits=1,
):
  metadata = kvcache.step_metadata(
    ctx, query_lens, num_tokens=num_tokens, num_logits=num_logits
  )
  read = []
  for layer in range(ctx.config.num_recurrent_layers):
    read.append(kvcache.read_state(ctx, layer, metadata))
    state = {name: array[layer] for name, array in states.items()}
    ctx = kvcache.write_state(ctx, layer, state, metadata)
    accepted = None if num_logits == 1 else accepted  # is there a way back?
  ctx = _write_all(ctx, keys, values, metadata)
  layer, sm_scale = keys.shape[0] - 1, walk_checks.SM_SCALE
  out = kvcache.attend(ctx, layer, q, metadata, sm_scale=sm_scale)
  ctx = kvcache.commit(ctx, tokens, metadata, accepted=accepted)
  return ctx, metadata, out, read


def _admit(ctx, tokens, lengths, namespaces, block_budget):
  return kvcache.admit(
    ctx, tokens, lengths, namespace=namespaces, block_budget=block_budget
  )


def _handoff(ctx, src):
  """Rows leave and come back as new ones, beside the old ones."""
  return kvcache.import_sequences(ctx, kvcache.export_sequences(ctx, src))


def transitions(config: WalkConfig):
  """The transitions by name: `(ctx, **arrays) -> (ctx, *results)`."""
  extend, finish, reset = kvcache.extend, kvcache.finish, kvcache.reset
  T = config.num_tokens

  def alone(verb, **kwargs):
    return lambda ctx, **arrays: (verb(ctx, **arrays, **kwargs),)

  drafts = {}
  if config.num_logits > 1:
    draft = functools.partial(_step, num_tokens=T, num_logits=config.num_logits)
    drafts["draft"] = draft
  return drafts | {
    "admit": _admit,
    "extend": functools.partial(extend, num_tokens=T),
    "extend_decode": extend,
    "step": functools.partial(_step, num_tokens=T),
    "step_decode": functools.partial(_step, num_tokens=None),
    "publish": alone(kvcache.publish),
    "fork": kvcache.fork,
    "handoff": _handoff,
    "rewind": kvcache.rewind,
    "finish": alone(finish),
    "abandon": alone(finish, keep_prefix=False),
    "evict": kvcache.evict,
    "evict_snapshots": kvcache.evict_snapshots,
    "evict_window_blocks": kvcache.evict_window_blocks,
    "reset": alone(reset),
    "reset_keep": alone(reset, keep_prefix=True),
  }


def poison(ctx: Context) -> Context:
  """Fills the K/V of every block that nobody owns, the null block too, with NaN.

  And every recurrent state that nobody may read.
  """
  in_context = (ctx.pool.ref_counts == 0) & (ctx.prefix.way_of == 0)
  in_windows = [(w.pool.ref_counts == 0) & (w.owner_ids == 0) for w in ctx.windows]

  def spoil(pool: jax.Array, lost: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(pool.dtype, jnp.floating)
    garbage = jnp.array(jnp.nan if is_float else 127, pool.dtype)
    where = lost.reshape(1, -1, *(1,) * (pool.ndim - 2))
    return jnp.where(where, garbage, pool)

  stores = []
  for group, store in zip(ctx.config.groups, ctx.kv, strict=True):
    window, lost = group.layer.sliding_window, in_context
    if window is not None:
      lost = in_windows[ctx.config.windows.index(window)]
    stores.append(jax.tree.map(functools.partial(spoil, lost=lost), store))
  ctx = ctx.replace(kv=tuple(stores))
  if ctx.state_rows is None:
    return ctx
  unread = jnp.ones(ctx.config.num_states, bool)
  for used in (
    ctx.state_rows.source_ids,
    ctx.state_rows.snapshot_ids,
    jnp.zeros(1, int),
  ):
    unread = unread.at[used].set(False)

  def spoil_states(pool: jax.Array) -> jax.Array:
    return jnp.where(unread.reshape(1, -1, *(1,) * (pool.ndim - 2)), jnp.nan, pool)

  return ctx.replace(states=jax.tree.map(spoil_states, ctx.states))


@functools.cache
def programs(config: WalkConfig, *, batched: bool = False):
  """The compiled transitions: `(ctx, arrays) -> (ctx, poisoned ctx, result)`."""

  def program(transition):
    def run(ctx, arrays):
      after, *result = transition(ctx, **arrays)
      return after, poison(after), result

    return jax.jit(jax.vmap(run) if batched else run)

  compiled = {name: program(f) for name, f in transitions(config).items()}
  same = {"admit_few": "admit", "speculate": "step", "extend_draft": "extend"}
  return compiled | {alias: compiled[name] for alias, name in same.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """What the oracle expects of one transition."""

  result: tuple = ()  # what the verb reports, in the order of its fields
  is_idle: bool = False  # nothing may change, to the last bit
  still_rows: tuple[int, ...] = ()  # rows that may not change, to the last bit
  statuses: tuple[Status, ...] = ()


class Walk:
  """One walk: a context, its oracle, and a proposer of arguments."""

  def __init__(self, config: WalkConfig, *, seed: int):
    self.config = config
    self.ctx = poison(kvcache.init(config.cache, salt=seed))
    self.host = walk_checks.to_host(self.ctx)
    self.oracle = ReferenceCache(
      num_blocks=config.cache.num_blocks,
      block_size=config.cache.block_size,
      max_seqs=config.cache.max_seqs,
      max_blocks_per_seq=config.cache.max_blocks_per_seq,
      num_snapshots=config.cache.num_snapshots if config.is_hybrid else None,
      snapshot_tokens=config.cache.snapshot_tokens,
      windows=[(w, config.cache.window_pool_size(w)) for w in config.cache.windows],
    )
    self.proposer = Proposer(config, self.oracle, seed=seed)
    self.num_steps = 0
    self.seen = collections.Counter()  # what happened how often, as (name, status)

  def advance(self, name: str) -> None:
    """Takes one transition and checks everything about it."""
    arrays = self.proposer.propose(name)
    self.apply(name, arrays, *programs(self.config)[name](self.ctx, arrays))

  def apply(self, name, arrays, after, poisoned, result) -> None:
    """Checks a transition that was taken already, and stands where it leads."""
    try:
      before = self.host
      pools = {"kv": poisoned.kv, "states": poisoned.states}
      self.host, pools, result = walk_checks.to_host((after, pools, result))
      if name == "publish" and self.config.is_cramped:
        walk_checks.follow(self.oracle, self.host)
        prediction = Prediction()
      else:
        prediction = getattr(self, f"_predict_{name}")(**arrays)
      self._note(name, before, prediction)
      self._check(before, result, prediction)
      if self.num_steps % 64 == 0:
        walk_checks.check_views(before, after, self.host)
    except Exception as error:
      error.add_note(f"at step {self.num_steps}, in {name} with {arrays}")
      raise
    self.ctx, self.host = poisoned, self.host.replace(**pools)
    self.num_steps += 1

  def _note(self, name, before, prediction):
    self.seen.update((name, status) for status in prediction.statuses)
    index, rows = self.host.prefix, self.host.sequences
    was_reset = name.startswith("reset")
    events = {
      "ring compacted": index.ring.tail < before.prefix.ring.tail and not was_reset,
      "hit": self.host.counters.hit_tokens > before.counters.hit_tokens,
      "evicted": self.host.counters.num_evicted > before.counters.num_evicted,
      "sealed": rows.is_sealed.any(),
      "nothing changed": prediction.is_idle,
    }
    self.seen.update(event for event, happened in events.items() if happened)

  def _check(self, before, result, prediction):
    host = self.host
    check_result(result, prediction.result, before)
    walk_checks.check_invariants(host)
    walk_checks.check_oracle(host, self.oracle)
    walk_checks.check_contents(host, self.oracle)
    walk_checks.check_states(host, self.oracle)
    walk_checks.check_untouched(before, host)
    if prediction.is_idle:
      assert walk_checks.same_bits(before, host), "a refused call changed something"
    still = list(prediction.still_rows)
    rows = [jax.tree.map(lambda x: x[still], h.sequences) for h in (before, host)]
    assert walk_checks.same_bits(*rows), f"one of the rows {still} changed"

  # The oracle's side.

  def _predict_admit(self, tokens, lengths, namespaces, block_budget):
    is_published = self.oracle.num_pending() == 0
    prompts = [
      row[: max(n, 0)].tolist() for row, n in zip(tokens, lengths, strict=True)
    ]
    results = self.oracle.admit(
      prompts,
      lengths=lengths.tolist(),
      width=self.config.width,
      namespaces=namespaces.tolist(),
      block_budget=block_budget,
    )
    for prompt, (s, _, status) in zip(prompts, results, strict=True):
      if status == Status.OK:
        self.proposer.texts[s] = prompt
    seq_ids, num_cached, status = zip(*results, strict=True)
    return Prediction(
      result=(seq_ids, num_cached, status),
      is_idle=is_published and all(status),
      statuses=status,
    )

  _predict_admit_few = _predict_admit

  def _predict_extend(self, query_lens, order=None):
    statuses = self.oracle.extend(
      query_lens.tolist(),
      num_tokens=None if order is None else self.config.num_tokens,
      order=None if order is None else order.tolist(),
    )
    is_granted = np.array(statuses) == Status.OK
    self.proposer.granted = np.where(is_granted, query_lens, 0).astype(np.int32)
    still = tuple(np.flatnonzero(self.proposer.granted == 0))
    return Prediction(
      result=(statuses,),
      is_idle=len(still) == len(statuses),
      still_rows=still,
      statuses=tuple(statuses),
    )

  _predict_extend_decode = _predict_extend_draft = _predict_extend

  def _predict_step(
    self, query_lens, tokens, keys, values, q, states, accepted=None, is_draft=False
  ):
    del keys, values, states  # the contents are checked against the tokens
    num_tokens = None if accepted is None else self.config.num_tokens
    queries, effective = self.oracle.plan_step(
      query_lens.tolist(), num_tokens=num_tokens
    )
    out = walk_checks.attend_densely(self.config.cache, self.oracle, queries, tokens, q)
    read = walk_checks.states_read(self.config.cache, self.oracle, effective)
    before = [len(row.tokens) for row in self.oracle.rows]
    self.oracle.commit(
      queries,
      tokens.tolist(),
      effective,
      accepted=None if accepted is None else accepted.tolist(),
      is_draft=is_draft,
    )
    self.proposer.granted[:] = 0
    after = [len(row.tokens) for row in self.oracle.rows]
    still = tuple(s for s in range(len(before)) if before[s] == after[s])
    return Prediction(
      result=(queries, effective, num_tokens is None, out, read), still_rows=still
    )

  _predict_step_decode = _predict_speculate = _predict_step

  def _predict_draft(self, query_lens, **arrays):
    query_lens = np.minimum(query_lens, self.config.num_logits)
    return self._predict_step(query_lens, **arrays, is_draft=True)

  def _predict_publish(self):
    is_idle = self.oracle.num_pending() == 0
    self.oracle.publish()
    return Prediction(is_idle=is_idle)

  def _predict_fork(self, src, *, verb="fork"):
    is_published = self.oracle.num_pending() == 0
    results = getattr(self.oracle, verb)(src.tolist())
    for source, (s, status) in zip(src, results, strict=True):
      if status == Status.OK:
        self.proposer.texts[s] = list(self.proposer.texts[source])
    seq_ids, status = zip(*results, strict=True)
    return Prediction(
      result=(seq_ids, status),
      is_idle=is_published and all(status),
      statuses=status,
    )

  def _predict_handoff(self, src):
    return self._predict_fork(src, verb="handoff")

  def _predict_rewind(self, num_tokens):
    statuses = self.oracle.rewind(num_tokens.tolist())
    moved = (num_tokens != 0) & (np.array(statuses) == Status.OK)
    still = tuple(np.flatnonzero(~moved))
    return Prediction(
      result=(statuses,),
      is_idle=not moved.any(),
      still_rows=still,
      statuses=tuple(statuses),
    )

  def _predict_finish(self, mask, *, keep_prefix=True):
    is_published = not keep_prefix or self.oracle.num_pending() == 0
    active = [row.active for row in self.oracle.rows]
    self.oracle.finish(mask.tolist(), keep_prefix=keep_prefix)
    return Prediction(is_idle=is_published and not (mask & active).any())

  def _predict_abandon(self, mask):
    return self._predict_finish(mask, keep_prefix=False)

  def _predict_evict(self, count):
    num_evicted = self.oracle.evict(int(count))
    return Prediction(result=(num_evicted,), is_idle=num_evicted == 0)

  def _predict_evict_snapshots(self, count):
    num_evicted = self.oracle.evict_snapshots(int(count))
    return Prediction(result=(num_evicted,), is_idle=num_evicted == 0)

  def _predict_evict_window_blocks(self, counts):
    evicted = self.oracle.evict_window_blocks(counts.tolist())
    return Prediction(result=(evicted,), is_idle=not any(evicted))

  def _predict_reset(self):
    self.oracle.reset()
    return Prediction()

  def _predict_reset_keep(self):
    self.oracle.reset(keep_prefix=True)
    return Prediction()


def check_result(result, expected, before: Context) -> None:
  """Asserts that a verb reported what the oracle expects."""
  if result and isinstance(result[0], kvcache.StepMetadata):
    metadata, out, read = result
    *plan, wanted, states = expected
    for layer, state in enumerate(read):
      for name, array in state.items():
        np.testing.assert_array_equal(array, states[name][layer], "read_state")
    walk_checks.check_metadata(metadata, *plan, before)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, err_msg="attend")
    return
  leaves = jax.tree.leaves(result)
  assert len(leaves) == len(expected)
  for leaf, values in zip(leaves, expected, strict=True):
    assert leaf.tolist() == (values if np.ndim(values) == 0 else list(values)), (
      f"reported {leaf}, expected {values}"
    )


def run(config: WalkConfig, *, seed: int, num_steps: int) -> Walk:
  """Walks; an error carries notes that say how to see it again."""
  walk = Walk(config, seed=seed)
  names = script(config, np.random.default_rng([seed, 0]))
  try:
    for name in itertools.islice(names, num_steps):
      walk.advance(name)
  except Exception as error:
    label = next((name for name, known in CONFIGS.items() if known == config), "?")
    error.add_note(
      f"replay: python -m tests.walks.walk --config {label} --seed {seed}"
      f" --steps {walk.num_steps + 1}"
    )
    raise
  return walk


NUM_STEPS = 1000  # of a walk in the everyday tests


@functools.cache
def walked(name: str, seed: int) -> Walk:
  """Walks, checked all the way, and is kept for the test that looks at it again."""
  return run(CONFIGS[name], seed=seed, num_steps=NUM_STEPS)


def rare(seeds: Mapping[str, int], wanted: Iterable) -> dict:
  """Which of the wanted events hardly happened in these walks."""
  seen = collections.Counter()
  for name, count in seeds.items():
    for seed in range(count):
      seen += walked(name, seed).seen + walked(name, seed).oracle.seen
  return {event: seen[event] for event in wanted if seen[event] < 5}


def main() -> None:
  """Replays one walk, or runs many."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", choices=CONFIGS, default="small")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
  parser.add_argument("--steps", type=int, default=1000)
  args = parser.parse_args()
  for seed in range(args.seed, args.seed + args.seeds):
    started = time.perf_counter()
    walk = run(CONFIGS[args.config], seed=seed, num_steps=args.steps)
    seconds = time.perf_counter() - started
    print(f"{args.config} seed {seed}: {walk.num_steps} transitions, {seconds:.1f} s")


if __name__ == "__main__":
  main()
