"""Wrong uses of the verbs: what cannot be right, and what cannot be served."""

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import InvariantError, Status
from tests import small
from tests.hostile.table import (
  area,
  busy,
  crowded,
  drained,
  hybrid,
  metadata,
  named,
  WrongUse,
  zeros,
)

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
TOKENS, LENGTHS = zeros(2, 15), jnp.ones(2, jnp.int32)


def admit(ctx, *lengths, text=(), **kwargs):
  """`admit` of two prompts whose lengths are lies."""
  tokens = zeros(2, small.WIDTH).at[:, : len(text)].set(small.ints(text)[None])
  ctx, admission = small.admit(ctx, tokens, small.ints(lengths), **kwargs)
  return ctx, admission.status.tolist()


def extend(ctx, lens, *, num_tokens=small.NUM_TOKENS):
  ctx, status = small.extend(ctx, small.rows(lens), num_tokens=num_tokens)
  return ctx, status.tolist()


def extend_in_order(num_tokens):
  def run(ctx):
    order = zeros(4)  # row 0 four times
    lens = small.rows({0: 1, 1: 2})
    # Rows 1 and 2 need a block each, and are not named.
    lens = jnp.minimum(lens, 1) if num_tokens is None else lens
    ctx, status = small.extend(ctx, lens, num_tokens=num_tokens, order=order)
    return ctx, status.tolist()

  return run


def fork(ctx, *src):
  ctx, seq_ids, status = small.fork(ctx, small.ints(src))
  assert (np.asarray(seq_ids) == -1).all()
  return ctx, status.tolist()


def rewind(ctx, counts):
  ctx, status = small.rewind(ctx, small.rows(counts))
  return ctx, status.tolist()


def evict(ctx, count):
  ctx, num = small.evict(ctx, jnp.int32(count))
  return ctx, int(num)


def use_what_was_donated():
  ctx = jax.jit(lambda ctx: jax.tree.map(jnp.copy, ctx))(busy())
  jax.jit(kvcache.publish, donate_argnums=0)(ctx)
  kvcache.publish(ctx)


def step_without_room(ctx):
  """Asks for five tokens in a row that has room for one, without `extend`."""
  lens = small.rows({1: 5})
  view = kvcache.step_metadata(ctx, lens, num_tokens=small.NUM_TOKENS)
  return ctx, view.query_lens.tolist()


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
  state = kvcache.export_sequences(other(), [0], max_len=8)
  return kvcache.import_sequences(into(), state)


def export(ctx, *rows, max_len=8):
  state = kvcache.export_sequences(ctx, small.ints(rows), max_len=max_len)
  return ctx, (state.is_valid.tolist(), state.lengths.tolist())


def import_nothing(ctx):
  state = kvcache.export_sequences(ctx, small.ints([2, 9]), max_len=8)
  ctx, seq_ids, status = kvcache.import_sequences(ctx, state)
  assert seq_ids.tolist() == [-1, -1]
  return ctx, status.tolist()


def finish_twice(ctx):
  once = small.finish(ctx, small.mask(0))
  return small.publish(ctx), same(once, small.finish(once, small.mask(0)))


def same(left, right):
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


def write(k=(16, 1, 2), v=(16, 1, 2), layer=0):
  v = None if v is None else jnp.zeros(v)
  return kvcache.write_kv(busy(), layer, jnp.zeros(k), v, metadata())


def attend(q=(16, 1, 2), **kwargs):
  return kvcache.attend(busy(), 0, jnp.zeros(q), metadata(), **kwargs)


def hybrid_view(**kwargs):
  return kvcache.step_metadata(hybrid(), zeros(2), num_tokens=4, **kwargs)


def write_state(shape):
  return kvcache.write_state(hybrid(), 0, {"sum": jnp.zeros(shape)}, hybrid_view())


row = area("Verbs, refused when traced")
TRACED: list[WrongUse] = [
  row(
    "admit: one prompt, not a list of prompts",
    lambda: kvcache.admit(busy(), TOKENS[0], LENGTHS),
    raises=ValueError,
    message=r"tokens must have 2 dimensions, got shape \(15,\)",
  ),
  row(
    "admit: lists of unequal lengths",
    lambda: kvcache.admit(busy(), [[1, 2, 3], [4]], [3, 1]),
    raises=ValueError,
    message="tokens must be an array: setting an array element with a sequence",
  ),
  row(
    "admit: embeddings instead of tokens",
    lambda: kvcache.admit(busy(), TOKENS / 2, LENGTHS),
    raises=ValueError,
    message=r"tokens must be integers, got float32\[2, 15\]",
  ),
  row(
    "admit: a length too few",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS[:1]),
    raises=ValueError,
    message=r"lengths must have shape \(2,\), got \(1,\)",
  ),
  row(
    "admit: a length beyond int32",
    lambda: kvcache.admit(busy(), TOKENS, [1, 2**32 + 1]),
    raises=ValueError,
    message="lengths must fit into int32, got 4294967297",
  ),
  row(
    "admit: tokens beyond int32, in int64",
    lambda: kvcache.admit(busy(), np.full((2, 15), 2**40), LENGTHS),
    raises=ValueError,
    message="tokens must fit into int32, got 1099511627776",
  ),
  row(
    "admit: three namespaces for two prompts",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS, namespace=[1, 2, 3]),
    raises=ValueError,
    message=r"namespace must have shape \(\) or \(2,\), got \(3,\)",
  ),
  row(
    "admit: half a block as budget",
    lambda: kvcache.admit(busy(), TOKENS, LENGTHS, block_budget=0.5),
    raises=ValueError,
    message=r"block_budget must be integers, got float32\[\]",
  ),
  row(
    "find: a mask instead of tokens",
    lambda: kvcache.find(busy(), TOKENS > 0, LENGTHS),
    raises=ValueError,
    message=r"tokens must be integers, got bool\[2, 15\]",
  ),
  row(
    "extend: counts for three of four rows",
    lambda: kvcache.extend(busy(), zeros(3)),
    raises=ValueError,
    message=r"query_lens must have shape \(4,\), got \(3,\)",
  ),
  row(
    "extend: an order of half numbers",
    lambda: kvcache.extend(busy(), zeros(4), order=jnp.ones(4) / 2),
    raises=ValueError,
    message=r"order must be integers, got float32\[4\]",
  ),
  row(
    "step_metadata: no logits at all",
    lambda: kvcache.step_metadata(busy(), zeros(4), num_tokens=8, num_logits=0),
    raises=ValueError,
    message="num_logits must be 1 in a decode step and at least 1 else, got 0",
  ),
  row(
    "step_metadata: drafts in the decode shape",
    lambda: kvcache.step_metadata(busy(), zeros(4), num_logits=2),
    raises=ValueError,
    message="num_logits must be 1 in a decode step",
  ),
  row(
    "step_metadata: more drafts than states are kept for",
    lambda: hybrid_view(num_logits=2),
    raises=ValueError,
    message=r"num_logits must be at most 1 \+ max_drafts = 1 with recurrent layers",
  ),
  row(
    "write_kv: keys of two heads for one",
    lambda: write(k=(16, 2, 2)),
    raises=ValueError,
    message=r"k must have shape \(16, 1, 2\), got \(16, 2, 2\)",
  ),
  row(
    "write_kv: no values",
    lambda: write(v=None),
    raises=ValueError,
    message=r"v must have shape \(16, 1, 2\), got None",
  ),
  row(
    "write_kv: a layer that does not exist",
    lambda: write(layer=2),
    raises=ValueError,
    message="layer must be the index of one of 2 attention layers, got 2",
  ),
  row(
    "write_kv: a negative layer",
    lambda: write(layer=-1),
    raises=ValueError,
    message="layer must be the index of one of 2 attention layers, got -1",
  ),
  row(
    "attend: queries of another step",
    lambda: attend(q=(4, 1, 2)),
    raises=ValueError,
    message=r"q must be \[16, H, D\], got \(4, 1, 2\)",
  ),
  row(
    "attend: an implementation nobody has written",
    lambda: attend(implementation="cuda"),
    raises=NotImplementedError,
    message="implementation 'cuda' is not one of",
  ),
  row(
    "attend: a wider window than the layer keeps",
    lambda: kvcache.attend(
      hybrid(), 1, jnp.zeros((4, 1, 2)), hybrid_view(), sliding_window=7
    ),
    raises=ValueError,
    message="sliding_window=7 is wider than what the layer keeps, 6 tokens",
  ),
  row(
    "read_state: no layer is recurrent",
    lambda: kvcache.read_state(busy(), 0, metadata()),
    raises=ValueError,
    message="the context has no recurrent layer; name it in config.layers",
  ),
  row(
    "write_state: a state of another shape",
    lambda: write_state((2, 4)),
    raises=ValueError,
    message=r"state must have shapes .*\(2, 3\).*, got .*\(2, 4\)",
  ),
  row(
    "commit: tokens of another step",
    lambda: kvcache.commit(busy(), zeros(4), metadata()),
    raises=ValueError,
    message=r"tokens must have shape \(16,\), got \(4,\)",
  ),
  row(
    "commit: part of a step is taken back where states are kept",
    lambda: kvcache.commit(hybrid(), zeros(4), hybrid_view(), accepted=zeros(2)),
    raises=ValueError,
    message="accepted needs a draft step",
  ),
  row(
    "fork: a row, not a list of rows",
    lambda: kvcache.fork(busy(), 0),
    raises=ValueError,
    message=r"src must have 1 dimensions, got shape \(\)",
  ),
  row(
    "rewind: one number for all rows",
    lambda: kvcache.rewind(busy(), 1),
    raises=ValueError,
    message=r"num_tokens must have shape \(4,\), got \(\)",
  ),
  row(
    "finish: row ids instead of a mask",
    lambda: kvcache.finish(busy(), zeros(4)),
    raises=ValueError,
    message=r"mask must be bool\[4\], got int32\[4\]",
  ),
  row(
    "evict: half a block",
    lambda: kvcache.evict(busy(), 0.5),
    raises=ValueError,
    message=r"count must be integers, got float32\[\]",
  ),
  row(
    "evict_snapshots: no layer is recurrent",
    lambda: kvcache.evict_snapshots(busy(), 1),
    raises=ValueError,
    message="the context has no recurrent layer",
  ),
  row(
    "evict_window_blocks: no layer has a window",
    lambda: kvcache.evict_window_blocks(busy(), [1]),
    raises=ValueError,
    message=r"counts must have shape \(0,\), got \(1,\)",
  ),
  row(
    "export_sequences: sequences of no token",
    lambda: export(busy(), 0, max_len=0),
    raises=ValueError,
    message="max_len must be at least 1, got 0",
  ),
  row(
    "import_sequences: sequences of other layers",
    lambda: import_from(busy, hybrid),
    raises=ValueError,
    message="the sequences come from layers that keep other things",
  ),
  row(
    "events: contexts of different sizes",
    lambda: kvcache.events(busy(), hybrid()),
    raises=ValueError,
    message="different configurations",
  ),
  row(
    "any verb: a context that was donated",
    use_what_was_donated,
    raises=RuntimeError,
    message="Array has been deleted",
  ),
  row(
    "commit: the metadata of one step, again and again",
    commit_twice,
    raises=InvariantError,
    message="rows have blocks for their tokens",
    note="found by `check_invariants` and `checked`",
  ),
  row(
    "a context changed by hand: a block is free and held",
    free_what_is_held,
    raises=InvariantError,
    message="free",
    note="found by `check_invariants` and `checked`",
  ),
  row(
    "extend, step_metadata: a number of tokens that is traced",
    lambda: jax.jit(lambda n: kvcache.extend(busy(), zeros(4), num_tokens=n))(3),
    raises=ValueError,
    message="num_tokens must be static, because shapes depend on it",
  ),
  row(
    "raise_for_status: names for other rows",
    lambda: kvcache.raise_for_status([0, 2], ["a"]),
    raises=ValueError,
    message="request_ids has 1 names for 2 rows",
  ),
  row(
    "a status that is not OK is not looked at but raised",
    lambda: kvcache.raise_for_status([0, int(Status.NO_BLOCKS)], ["a", "b"]),
    raises=kvcache.BlockOverflowError,
    message="refused b: NO_BLOCKS",
  ),
]

row = area("Verbs, refused at run time")
REFUSED: list[WrongUse] = [
  row(
    "admit: lengths of 0 and below",
    lambda: admit(busy(), 0, -1),
    gives=named(Status.EMPTY, Status.EMPTY),
  ),
  row(
    "admit: the smallest and the largest length there is",
    lambda: admit(busy(), INT_MIN, INT_MAX),
    gives=named(Status.EMPTY, Status.TOO_LONG),
  ),
  row(
    "admit: longer than the array, longer than a row",
    lambda: admit(busy(), small.WIDTH + 1, 17),
    gives=named(Status.INVALID, Status.TOO_LONG),
  ),
  row(
    "admit: every row is taken",
    lambda: admit(crowded(), 1, 1),
    gives=named(Status.NO_ROW, Status.NO_ROW),
  ),
  row(
    "admit: a budget of no block, a negative budget",
    lambda: (
      busy(),
      [
        admit(busy(), 1, 1, text=[99], block_budget=budget)[1]
        for budget in (0, INT_MIN)
      ],
    ),
    gives=[named(Status.NO_BLOCKS, Status.NO_BLOCKS)] * 2,
  ),
  row(
    "admit: tokens that no vocabulary has",
    lambda: admit(busy(), 2, 2, text=[-1, INT_MAX]),
    gives=named(Status.OK, Status.OK),
    changes=True,
    note="tokens are compared, never looked up: any int32 is one",
  ),
  row(
    "extend: a row that holds no sequence",
    lambda: extend(busy(), {2: 1}),
    gives=named(Status.OK, Status.OK, Status.INACTIVE, Status.OK),
  ),
  row(
    "extend: negative counts",
    lambda: extend(busy(), {0: -1, 1: INT_MIN}),
    gives=named(Status.INVALID, Status.INVALID, Status.OK, Status.OK),
  ),
  row(
    "extend: more than a row can hold, far more",
    lambda: extend(busy(), {0: 11, 1: INT_MAX}),
    gives=named(Status.TOO_LONG, Status.TOO_LONG, Status.OK, Status.OK),
  ),
  row(
    "extend: more than the step's tokens",
    lambda: extend(busy(), {0: 10, 1: 13}),
    gives=named(Status.OK, Status.OVER_BUDGET, Status.OK, Status.OK),
    changes=True,
  ),
  row(
    "extend: two tokens in the decode shape",
    lambda: extend(busy(), {0: 2}, num_tokens=None),
    gives=named(Status.OVER_BUDGET, Status.OK, Status.OK, Status.OK),
  ),
  row(
    "extend: not a block is free",
    lambda: extend(drained(), {2: 12}),
    gives=named(Status.OK, Status.OK, Status.NO_BLOCKS, Status.OK),
  ),
  row(
    "extend: an order that names row 0 only",
    lambda: extend_in_order(small.NUM_TOKENS)(busy()),
    gives=named(Status.OK, Status.OVER_BUDGET, Status.OK, Status.OK),
    changes=True,
    note="a row that the order does not name gets nothing",
  ),
  row(
    "step_metadata: tokens for which nobody made room",
    lambda: step_without_room(busy()),
    gives=[0, 1, 0, 0],
    note="rows get what their blocks have room for",
  ),
  row(
    "fork: rows that hold no sequence, rows that are none",
    lambda: fork(busy(), 2, -1, 4, INT_MAX),
    gives=named(*[Status.INACTIVE] * 4),
  ),
  row(
    "fork: every row is taken",
    lambda: fork(crowded(), 0, 1),
    gives=named(Status.NO_ROW, Status.NO_ROW),
  ),
  row(
    "rewind: more than is stored, less than nothing",
    lambda: rewind(busy(), {0: 7, 1: -1}),
    gives=named(Status.INVALID, Status.INVALID, Status.OK, Status.OK),
  ),
  row(
    "rewind: a row that holds no sequence",
    lambda: rewind(busy(), {3: 1}),
    gives=named(Status.OK, Status.OK, Status.OK, Status.INACTIVE),
  ),
  row(
    "finish: rows that hold no sequence",
    lambda: (small.finish(busy(), small.mask(2, 3)), None),
    note="nothing happens",
  ),
  row(
    "finish: the same row twice",
    lambda: finish_twice(busy()),
    gives=True,
    note="the second time nothing happens",
  ),
  row(
    "evict: a negative number of blocks",
    lambda: evict(busy(), -1),
    gives=0,
  ),
  row(
    "evict: the smallest number there is",
    lambda: evict(busy(), INT_MIN),
    gives=0,
  ),
  row(
    "evict: more than is cached",
    lambda: evict(busy(), INT_MAX),
    gives=0,
    note="what rows hold stays",
  ),
  row(
    "export_sequences: rows that hold no sequence, sequences that are too long",
    lambda: export(busy(), 3, -1, 0, max_len=5),
    gives=([False, False, False], [0, 0, 0]),
    note="marked as not valid, and empty",
  ),
  row(
    "import_sequences: what no export made valid",
    lambda: import_nothing(busy()),
    gives=named(Status.INVALID, Status.INVALID),
  ),
]

USES = [*TRACED, *REFUSED]
