"""A cache one can talk to in a test: texts in, statuses out, everything checked.

The toy model stores each token in K, and its negative in V; `Scene.read` reads a row
back through its block table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import AttentionLayer, CacheConfig, Status
from tests.walk_checks import (
  cached_prefixes,
  check_invariants,
  evictable_blocks,
  to_host,
)

LAYERS = (AttentionLayer(num_kv_heads=1, head_dim=1),) * 2


def config(**sizes) -> CacheConfig:
  return CacheConfig(layers=LAYERS, **sizes)


def _jit(verb, *static):
  # Compiling takes longer than running, so LLVM is told not to optimise.
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(verb, static_argnames=static, compiler_options=options)


_admit, _publish, _evict = map(_jit, (kvcache.admit, kvcache.publish, kvcache.evict))
_fork, _rewind = map(_jit, (kvcache.fork, kvcache.rewind))
_extend = _jit(kvcache.extend, "num_tokens")
_finish = _jit(kvcache.finish, "keep_prefix")


def _compute(ctx, tokens, query_lens, accepted, *, num_tokens):
  metadata = kvcache.step_metadata(ctx, query_lens, num_tokens=num_tokens)
  keys = tokens.astype(jnp.float32)[:, None, None]
  for layer in range(len(LAYERS)):
    ctx = kvcache.write_kv(ctx, layer, keys + layer, -keys - layer, metadata)
  return kvcache.commit(ctx, tokens, metadata, accepted=accepted)


_step = _jit(_compute, "num_tokens")


class Scene:
  """A context that changes; every change is followed by a check of the invariants."""

  def __init__(self, sizes: CacheConfig, *, num_tokens: int = 128):
    self.config = sizes
    self.num_tokens = num_tokens
    self.ctx = kvcache.init(sizes)
    self.ctx = self.ctx.replace(
      kv=jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), self.ctx.kv)
    )

  def _move(self, ctx):
    self.ctx = ctx
    check_invariants(self.host)

  @property
  def host(self):
    return to_host(self.ctx)

  # Verbs.

  def admit(self, text, *, namespace=0):
    """Admits one prompt; returns its row, how much of it is cached, and the status."""
    sizes = self.config
    tokens = np.full((1, sizes.max_tokens_per_seq + 1), -1, np.int32)
    tokens[0, : len(text)] = text
    lengths = np.array([len(text)], np.int32)
    ctx, admission = _admit(self.ctx, tokens, lengths, namespace=jnp.int32(namespace))
    self._move(ctx)
    (row,), (cached,), (status,) = to_host(
      (admission.seq_ids, admission.num_cached, admission.status)
    )
    return int(row), int(cached), Status(status)

  def extend(self, counts, *, num_tokens=None):
    """Makes room for `counts[row]` tokens; returns the status of every row."""
    if num_tokens is None:
      num_tokens = self.num_tokens
    ctx, status = _extend(self.ctx, self._rows(counts), num_tokens=num_tokens)
    self._move(ctx)
    return [Status(code) for code in status.tolist()]

  def step(self, texts, *, accepted=None):
    """Computes and stores tokens of rows that have room for them."""
    flat = [token for row in sorted(texts) for token in texts[row]]
    tokens = np.full(self.num_tokens, -1, np.int32)
    tokens[: len(flat)] = flat
    counts = {row: len(text) for row, text in texts.items()}
    accepted = self._rows(counts if accepted is None else accepted)
    step = functools.partial(_step, num_tokens=self.num_tokens)
    self._move(step(self.ctx, tokens, self._rows(counts), accepted))

  def append(self, texts, *, accepted=None):
    """Makes room and stores; all must fit."""
    status = self.extend({row: len(text) for row, text in texts.items()})
    assert set(status) == {Status.OK}, status
    self.step(texts, accepted=accepted)

  def start(self, text, *, namespace=0):
    """Admits a prompt and computes the rest of it; returns its row and the hit."""
    row, num_cached, status = self.admit(text, namespace=namespace)
    assert status == Status.OK, status
    for at in range(num_cached, len(text), self.num_tokens):
      self.append({row: text[at : at + self.num_tokens]})
    return row, num_cached

  def publish(self):
    self._move(_publish(self.ctx))

  def fork(self, *sources):
    """Forks; returns the new rows and the statuses."""
    ctx, rows, status = _fork(self.ctx, np.array(sources, np.int32))
    self._move(ctx)
    return rows.tolist(), [Status(code) for code in status.tolist()]

  def rewind(self, counts):
    ctx, status = _rewind(self.ctx, self._rows(counts))
    self._move(ctx)
    return [Status(code) for code in status.tolist()]

  def finish(self, *rows, keep_prefix=True):
    mask = np.isin(np.arange(self.config.max_seqs), rows)
    self._move(_finish(self.ctx, mask, keep_prefix=keep_prefix))

  def evict(self, count):
    """Evicts; returns the prefixes that went, the first victim first."""
    before = self.host
    order = evictable_blocks(before)
    ctx, num_evicted = _evict(self.ctx, jnp.int32(count))
    self._move(ctx)
    prefixes = cached_prefixes(before)
    gone = prefixes.keys() - cached_prefixes(self.host).keys()
    assert len(gone) == num_evicted
    return [prefixes[block][1] for block in order if block in gone]

  def _rows(self, counts):
    return np.array([counts.get(s, 0) for s in range(self.config.max_seqs)], np.int32)

  # Views.

  @property
  def num_free(self):
    return self.ctx.pool.num_free.item()

  @property
  def num_in_use(self):
    return int((self.host.pool.ref_counts > 0).sum())

  @property
  def num_references(self):
    return int(self.host.pool.ref_counts.sum())

  def length(self, row):
    return self.ctx.sequences.seq_lens[row].item()

  def table(self, row):
    """Ids of the row's blocks."""
    rows = self.host.sequences
    return rows.block_tables[row, : rows.num_blocks[row]].tolist()

  def cached(self):
    """The cached prefixes."""
    return {tokens for _, tokens in cached_prefixes(self.host).values()}

  def read(self, row):
    """The row's tokens, read from K and V of all layers."""
    host, length = self.host, self.length(row)
    texts = []
    for layer in range(len(LAYERS)):
      for pool, sign in ((host.kv[0].k, 1), (host.kv[0].v, -1)):
        stored = pool[layer, self.table(row), 0, :, 0].reshape(-1)[:length]
        texts.append((stored * sign - layer).tolist())
    assert all(text == texts[0] for text in texts), texts
    ids = host.prefix.block_tokens[self.table(row)].reshape(-1)[:length]
    assert ids.tolist() == texts[0]
    return texts[0]
