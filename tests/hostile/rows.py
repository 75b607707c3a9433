"""Wrong uses of the verbs: what cannot be served is refused row by row."""

import jax
import jax.numpy as jnp
import numpy as np

import kvcache
from kvcache import Status
from tests.fixtures import small
from tests.hostile.table import (
  area,
  busy,
  crowded,
  drained,
  named,
  WrongUse,
  zeros,
)

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


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


def step_without_room(ctx):
  """Asks for five tokens in a row that has room for one, without `extend`."""
  lens = small.rows({1: 5})
  view = kvcache.step_metadata(ctx, lens, num_tokens=small.NUM_TOKENS)
  return ctx, view.query_lens.tolist()


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


row, _ = area("Verbs, refused at run time")
USES: list[WrongUse] = [
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
