"""Wrong uses of the verbs: what cannot be right is refused when it is traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import InvariantError, Status
from tests.fixtures import small
from tests.hostile.table import (
  area,
  busy,
  hybrid,
  LAYER,
  metadata,
  named,
  WrongUse,
  zeros,
)

TOKENS, LENGTHS = zeros(2, 15), jnp.ones(2, jnp.int32)


def use_what_was_donated():
  ctx = jax.jit(lambda ctx: jax.tree.map(jnp.copy, ctx))(busy())
  jax.jit(kvcache.publish, donate_argnums=0)(ctx)
  kvcache.publish(ctx)


def commit_twice():
  ctx = kvcache.commit(busy(), zeros(16), metadata())
  for _ in range(3):
    ctx = kvcache.commit(ctx, zeros(16), metadata())
  kvcache.check_invariants(ctx)


def free_what_is_held():
  pool = busy().pool
  taken = busy().sequences.block_tables[0, 0]
  pool = pool.replace(
    free_list=pool.free_list.at[pool.num_free].set(taken), num_free=pool.num_free + 1
  )
  kvcache.check_invariants(busy().replace(pool=pool))


def import_from(other, into):
  export = functools.partial(kvcache.export_sequences, max_len=8)
  state = jax.eval_shape(export, other(), zeros(1))
  return jax.eval_shape(kvcache.import_sequences, into(), state)


def write(k=(16, 1, 2), v=(16, 1, 2), layer=0):
  v = None if v is None else jnp.zeros(v)
  return kvcache.write_kv(busy(), layer, jnp.zeros(k), v, metadata())


def attend(q=(16, 1, 2), **kwargs):
  return kvcache.attend(busy(), 0, jnp.zeros(q), metadata(), **kwargs)


def hybrid_view(**kwargs):
  return kvcache.step_metadata(hybrid(), zeros(2), num_tokens=4, **kwargs)


def write_state(shape, layer=0):
  state = {"sum": jnp.zeros(shape)}
  return kvcache.write_state(hybrid(), layer, state, hybrid_view())


def write_shared():
  layers = (LAYER, dataclasses.replace(LAYER, shared_with=0))
  config = kvcache.CacheConfig(layers=layers, num_blocks=4, max_seqs=1)

  def run():
    ctx, x = kvcache.init(config), jnp.zeros((1, 1, 2))
    view = kvcache.step_metadata(ctx, zeros(1))
    return kvcache.write_kv(ctx, np.int64(1), x, x, view)

  jax.eval_shape(run)


def batch():
  return jax.tree.map(lambda x: jnp.stack([x, x]), busy())


def use_numpy():
  """Contexts as `jax.device_get` and pickle return them."""
  host = jax.device_get(busy())
  after, admission = kvcache.admit(host, TOKENS[:1] + 99, LENGTHS[:1])
  kvcache.extend(after, zeros(4).at[0].set(1))
  kvcache.check_invariants(kvcache.finish(host, np.ones(4, bool)))
  return kvcache.publish(host), admission.status.tolist()


row, refused = area("Verbs, refused when traced")
USES: list[WrongUse] = [
  refused(
    "admit: one prompt, not a list of prompts",
    lambda: kvcache.admit(busy(), TOKENS[0], LENGTHS),
    r"tokens must have 2 dimensions, got shape \(15,\)",
  ),
  refused(
    "admit: lists of unequal lengths",
    lambda: kvcache.admit(busy(), [[1, 2, 3], [4]], [3, 1]),
    "tokens must be an array: setting an array element with a sequence",
  ),
  refused(
    "admit: embeddings instead of tokens",
    lambda: kvcache.admit(busy(), TOKENS / 2, LENGTHS),
    r"tokens must be integers, got float32\[2, 15\]",
  ),
  refused(
    "admit: a length too few",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS[:1]),
    r"lengths must have shape \(2,\), got \(1,\)",
  ),
  refused(
    "admit: a length beyond int32",
    lambda: kvcache.admit(busy(), TOKENS, [1, 2**32 + 1]),
    "lengths must fit into int32, got 4294967297",
  ),
  refused(
    "admit: tokens beyond int32, in int64",
    lambda: kvcache.admit(busy(), np.full((2, 15), 2**40), LENGTHS),
    "tokens must fit into int32, got 1099511627776",
  ),
  refused(
    "admit: three namespaces for two prompts",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS, namespace=[1, 2, 3]),
    r"namespace must have shape \(\) or \(2,\), got \(3,\)",
  ),
  refused(
    "admit: half a block as budget",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS, block_budget=0.5),
    r"block_budget must be integers, got float32\[\]",
  ),
  refused(
    "find: a mask instead of tokens",
    lambda: kvcache.find(busy(), TOKENS > 0, LENGTHS),
    r"tokens must be integers, got bool\[2, 15\]",
  ),
  refused(
    "extend: counts for three of four rows",
    lambda: kvcache.extend(busy(), zeros(3)),
    r"query_lens must have shape \(4,\), got \(3,\)",
  ),
  refused(
    "extend: an order of half numbers",
    lambda: kvcache.extend(busy(), zeros(4), order=jnp.ones(4) / 2),
    r"order must be integers, got float32\[4\]",
  ),
  refused(
    "step_metadata: no logits at all",
    lambda: kvcache.step_metadata(busy(), zeros(4), num_tokens=8, num_logits=0),
    "num_logits must be 1 in a decode step and at least 1 else, got 0",
  ),
  refused(
    "step_metadata: drafts in the decode shape",
    lambda: kvcache.step_metadata(busy(), zeros(4), num_logits=2),
    "num_logits must be 1 in a decode step",
  ),
  refused(
    "step_metadata: more drafts than states are kept for",
    lambda: hybrid_view(num_logits=2),
    r"num_logits must be at most 1 \+ max_drafts = 1 with recurrent layers",
  ),
  refused(
    "write_kv: keys of two heads for one",
    lambda: write(k=(16, 2, 2)),
    r"k must have shape \(16, 1, 2\), got \(16, 2, 2\)",
  ),
  refused(
    "write_kv: no values",
    lambda: write(v=None),
    r"v must have shape \(16, 1, 2\), got None",
  ),
  refused(
    "write_kv: a layer that does not exist",
    lambda: write(layer=2),
    "layer must be the index of one of 2 attention layers, got 2",
  ),
  refused(
    "write_kv: a layer that does not exist, as an array",
    lambda: write(layer=jnp.int32(7)),
    "layer must be the index of one of 2 attention layers, got 7",
  ),
  refused(
    "write_kv: between two layers",
    lambda: write(layer=0.5),
    r"layer must be integers, got float32\[\]",
  ),
  refused(
    "attend: a window of no token",
    lambda: kvcache.attend(
      hybrid(), 1, jnp.zeros((4, 1, 2)), hybrid_view(), sliding_window=0
    ),
    "sliding_window must be at least 1, got 0",
  ),
  refused(
    "attend: metadata of a context with other layers",
    lambda: kvcache.attend(hybrid(), 0, jnp.zeros((16, 1, 2)), metadata()),
    "metadata is of a context with other layers",
  ),
  refused(
    "write_kv: a negative layer",
    lambda: write(layer=-1),
    "layer must be the index of one of 2 attention layers, got -1",
  ),
  refused(
    "write_kv: a layer that reads what another one wrote, in numpy's words",
    write_shared,
    "layer 1 reads the keys and values of layer 0",
  ),
  refused(
    "attend: queries of another step",
    lambda: attend(q=(4, 1, 2)),
    r"q must be \[16, H, D\], got \(4, 1, 2\)",
  ),
  refused(
    "attend: an implementation nobody has written",
    lambda: attend(implementation="cuda"),
    "implementation 'cuda' is not one of",
    raises=NotImplementedError,
  ),
  refused(
    "attend: a wider window than the layer keeps",
    lambda: kvcache.attend(
      hybrid(), 1, jnp.zeros((4, 1, 2)), hybrid_view(), sliding_window=7
    ),
    "sliding_window=7 is wider than what the layer keeps, 6 tokens",
  ),
  refused(
    "read_state: no layer is recurrent",
    lambda: kvcache.read_state(busy(), 0, metadata()),
    "the context has no recurrent layer; name it in config.layers",
  ),
  refused(
    "read_state: the index among all layers",
    lambda: kvcache.read_state(hybrid(), 2, hybrid_view()),
    "layer must be the index of one of 1 recurrent layers, got 2",
  ),
  refused(
    "write_state: a negative layer",
    lambda: write_state((2, 3), layer=-1),
    "layer must be the index of one of 1 recurrent layers, got -1",
  ),
  refused(
    "recurrent.step_conv1d: a layer that does not exist",
    lambda: kvcache.recurrent.step_conv1d(
      hybrid(),
      np.int32(1),
      jnp.zeros((4, 3)),
      jnp.zeros((3, 2)),
      hybrid_view(),
      name="sum",
    ),
    "layer must be the index of one of 1 recurrent layers, got 1",
  ),
  refused(
    "write_state: a state of another shape",
    lambda: write_state((2, 4)),
    r"state must have shapes .*\(2, 3\).*, got .*\(2, 4\)",
  ),
  refused(
    "commit: tokens of another step",
    lambda: kvcache.commit(busy(), zeros(4), metadata()),
    r"tokens must have shape \(16,\), got \(4,\)",
  ),
  refused(
    "commit: part of a step is taken back where states are kept",
    lambda: kvcache.commit(hybrid(), zeros(4), hybrid_view(), accepted=zeros(2)),
    "accepted needs a draft step",
  ),
  refused(
    "fork: a row, not a list of rows",
    lambda: kvcache.fork(busy(), 0),
    r"src must have 1 dimensions, got shape \(\)",
  ),
  refused(
    "rewind: one number for all rows",
    lambda: kvcache.rewind(busy(), 1),
    r"num_tokens must have shape \(4,\), got \(\)",
  ),
  refused(
    "finish: row ids instead of a mask",
    lambda: kvcache.finish(busy(), zeros(4)),
    r"mask must be bool\[4\], got int32\[4\]",
  ),
  refused(
    "evict: half a block",
    lambda: kvcache.evict(busy(), 0.5),
    r"count must be integers, got float32\[\]",
  ),
  refused(
    "evict_snapshots: no layer is recurrent",
    lambda: kvcache.evict_snapshots(busy(), 1),
    "the context has no recurrent layer",
  ),
  refused(
    "evict_window_blocks: no layer has a window",
    lambda: kvcache.evict_window_blocks(busy(), [1]),
    r"counts must have shape \(0,\), got \(1,\)",
  ),
  refused(
    "export_sequences: sequences of no token",
    lambda: kvcache.export_sequences(busy(), [0], max_len=0),
    "max_len must be at least 1, got 0",
  ),
  refused(
    "import_sequences: sequences of other layers",
    lambda: import_from(busy, hybrid),
    "the sequences come from layers that keep other things",
  ),
  refused(
    "events: contexts of different sizes",
    lambda: kvcache.events(busy(), hybrid()),
    "different configurations",
  ),
  refused(
    "any verb: a configuration instead of a context",
    lambda: kvcache.admit(busy().config, TOKENS, LENGTHS),
    "ctx must be a Context, as kvcache.init makes it, got CacheConfig",
  ),
  refused(
    "any verb: a batch of contexts",
    lambda: kvcache.stats(batch()),
    r"ctx is a batch \(2,\) of contexts: call this in jax.vmap",
  ),
  refused(
    "any verb: the shapes of a context",
    lambda: kvcache.stats(jax.eval_shape(lambda: busy())),
    "ctx holds shapes only: call this in jax.eval_shape",
  ),
  row(
    "any verb: a context in numpy's arrays",
    use_numpy,
    gives=named(Status.OK),
    note="it is taken to the device",
  ),
  refused(
    "any verb: a context that was donated",
    use_what_was_donated,
    "Array has been deleted: ctx was donated to an earlier call",
    raises=RuntimeError,
  ),
  refused(
    "commit: the metadata of one step, again and again",
    commit_twice,
    "rows have blocks for their tokens",
    raises=InvariantError,
    note="found by `check_invariants` and `checked`",
  ),
  refused(
    "a context changed by hand: a block is free and held",
    free_what_is_held,
    "free",
    raises=InvariantError,
    note="found by `check_invariants` and `checked`",
  ),
  refused(
    "extend, step_metadata: a number of tokens that is traced",
    lambda: jax.jit(lambda n: kvcache.extend(busy(), zeros(4), num_tokens=n))(3),
    "num_tokens must be static, because shapes depend on it",
  ),
  refused(
    "raise_for_status: an admission instead of its status",
    lambda: kvcache.raise_for_status(
      jax.eval_shape(small.admit, busy(), zeros(2, 16), zeros(2))[1]
    ),
    "status must be int32 codes, as Admission.status has, got Admission",
  ),
  refused(
    "raise_for_status: names for other rows",
    lambda: kvcache.raise_for_status([0, 2], ["a"]),
    "request_ids has 1 names for 2 rows",
  ),
  refused(
    "a status that is not OK is not looked at but raised",
    lambda: kvcache.raise_for_status([0, int(Status.NO_BLOCKS)], ["a", "b"]),
    "refused b: NO_BLOCKS",
    raises=kvcache.BlockOverflowError,
  ),
]
