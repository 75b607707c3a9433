"""The map of the blocks, counted again by brute force; what is drawn from it as text.

Contexts are made up of random tables that obey the invariants, so nothing compiles.
"""

import dataclasses
from html.parser import HTMLParser
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcache
from kvcache import AttentionLayer, CacheConfig, observe, RecurrentLayer
from kvcache.observe import block_map, Kind, terminal
from kvcache.observe.terminal import Style
from tests.fixtures import small

ATTENTION = AttentionLayer(num_kv_heads=1, head_dim=1)
HYBRID = (
  ATTENTION,
  dataclasses.replace(ATTENTION, sliding_window=8),
  RecurrentLayer(state={"x": (1,)}),
)


def made_up(num_blocks, *, max_seqs=6, num_columns=8, layers=(ATTENTION,), seed=0):
  """A context whose rows share what they begin with, with cached and free blocks."""
  rng = np.random.default_rng(seed)
  config = CacheConfig(
    layers=layers,
    num_blocks=num_blocks,
    block_size=4,
    max_seqs=max_seqs,
    max_seq_len=4 * num_columns,
  )
  ctx = kvcache.init(config)
  ids = rng.permutation(np.arange(1, num_blocks, dtype=np.int32))
  num_held = min(num_blocks // 2, max_seqs * num_columns)
  common, own = ids[: num_columns // 2], list(ids[num_columns // 2 : num_held])
  cached, free = np.split(ids[num_held:], [(num_blocks - num_held) // 3])
  tables = np.zeros((max_seqs, num_columns), np.int32)
  lens = np.zeros(max_seqs, np.int32)
  for row in range(max_seqs - 1):  # the last one is inactive
    shared = common[: rng.integers(len(common) + 1)]
    mine = [own.pop() for _ in range(min(len(own), num_columns - len(shared)))]
    blocks = [*shared, *mine[: rng.integers(1, len(mine) + 1)]] if mine else shared
    tables[row, : len(blocks)] = blocks
    is_partial = len(blocks) > len(shared)  # never a shared block
    lens[row] = 4 * len(blocks) - is_partial * rng.integers(4)
  refs = np.bincount(tables.ravel(), minlength=num_blocks)
  refs[0] = 0
  unused = [b for b in ids[:num_held] if not refs[b]]
  free = np.array([*free, *unused], np.int32)
  way_of = np.zeros(num_blocks, np.int32)
  way_of[[*cached, *(b for b in common if refs[b] > 1)]] = 1
  table = ctx.sequences.replace(
    block_tables=tables,
    num_blocks=(tables > 0).sum(axis=1).astype(np.int32),
    seq_lens=lens,
    is_active=lens > 0,
  )
  index = ctx.prefix.replace(
    way_of=way_of, block_tokens=rng.integers(0, 9, (num_blocks, 4)).astype(np.int32)
  )
  pool = ctx.pool.replace(
    free_list=np.pad(free, (0, num_blocks - free.size)),
    num_free=np.int32(free.size),
    ref_counts=refs.astype(np.int32),
  )
  return ctx.replace(pool=pool, sequences=table, prefix=index)


def kind_of(ctx, block):
  """What a block is, told from the definitions and nothing else."""
  tables, table = np.asarray(ctx.sequences.block_tables), ctx.sequences
  holders = [
    (row, column)
    for row in range(tables.shape[0])
    for column in range(int(table.num_blocks[row]))
    if tables[row, column] == block
  ]
  if holders:
    return (Kind.SHARED if len(holders) > 1 else Kind.EXCLUSIVE), holders
  if ctx.prefix.way_of[block]:
    return Kind.CACHED, []
  is_free = block in np.asarray(ctx.pool.free_list)[: int(ctx.pool.num_free)]
  return (Kind.FREE if is_free else Kind.LOST), []


@pytest.mark.parametrize("seed", range(4))
def test_every_block_is_what_a_count_says(seed):
  ctx = made_up(40, seed=seed)
  pool = observe.map_blocks(ctx).blocks
  want = [kind_of(ctx, block) for block in range(1, 40)]
  assert [Kind(kind) for kind in pool.kinds[1:]] == [kind for kind, _ in want]
  assert [pool.holders(block) for block in range(1, 40)] == [rows for _, rows in want]
  for kind, num in pool.counts.items():
    assert num == sum(kind is other for other, _ in want)
  assert sum(pool.counts.values()) == 39
  assert len(set(pool.counts)) == 4


def test_a_leak_is_shown():
  ctx = made_up(40)
  leaking = ctx.replace(pool=ctx.pool.replace(num_free=ctx.pool.num_free - 1))
  assert observe.map_blocks(leaking).blocks.counts[Kind.LOST] == 1
  assert "1 lost" in repr(leaking) and "1 lost" in leaking._repr_html_()


def test_stats_count_the_same():
  ctx = jax.tree.map(jnp.asarray, made_up(40))
  counts, now = observe.map_blocks(ctx).blocks.counts, kvcache.stats(ctx)
  assert counts[Kind.SHARED] == now.num_shared
  assert counts[Kind.SHARED] + counts[Kind.EXCLUSIVE] == now.num_in_use
  assert counts[Kind.FREE] == now.num_free


def test_tokens_lie_where_rows_say():
  ctx = made_up(40)
  found = observe.map_blocks(ctx)
  for row in found.rows:
    blocks = found.row_blocks(row)
    flat = [token for block in blocks for token in found.tokens(block)]
    assert flat == found.row_tokens(row).tolist()
    assert [found.depth(block) for block in blocks] == list(range(len(blocks)))


@pytest.mark.parametrize(("num", "num_bins"), [(7, 10), (10, 10), (11, 10), (1000, 7)])
def test_bins_count_every_block_once(num, num_bins):
  kinds = np.random.default_rng(0).integers(1, len(Kind), num).astype(np.int8)
  bins = block_map.count_bins(kinds, num_bins)
  assert len(bins) <= num_bins and (bins.sum(axis=1)[:-1] == bins[0].sum()).all()
  np.testing.assert_array_equal(bins.sum(axis=0), np.bincount(kinds, minlength=7))
  width = bins[0].sum()
  np.testing.assert_array_equal(
    bins[-1].nonzero()[0], np.unique(kinds[-(num % width or width) :])
  )


# --- What cannot be read --------------------------------------------------------------


def test_what_is_not_there_is_said():
  ctx = small.empty()
  shapes = jax.eval_shape(lambda: ctx)
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), ctx)
  gone = jax.tree.map(jnp.copy, ctx)
  jax.tree.map(lambda x: x.delete(), gone)
  seen = []
  jax.eval_shape(lambda ctx: seen.append((repr(ctx), ctx._repr_html_())), ctx)
  texts = {
    why: (repr(x), x._repr_html_())
    for why, x in [
      ("shapes only", shapes),
      ("a batch of (2,)", batch),
      ("donated", gone),
    ]
  }
  texts["traced"] = seen[0]
  for why, (text, html) in texts.items():
    assert text == f"Context({text[8:].split(';')[0]}; {why})", text
    assert html == f'<pre style="white-space:pre-wrap">{text}</pre>'
    assert "11 blocks" in text
  for ctx, why in [(gone, "donated"), (batch, "batch")]:
    with pytest.raises(ValueError, match=why):
      observe.map_blocks(ctx)
  assert "free_list=(12,)" in repr(jax.tree.map(jnp.shape, small.empty()))


def test_a_context_prints_in_a_line():
  text = repr(made_up(400, layers=HYBRID))
  assert len(text) < 400 and "\n" not in text
  assert "399 blocks of 4 tokens" in text and "window 8" in text and "states" in text
  config = CacheConfig(layers=(ATTENTION,) * 30 + (HYBRID[2],), num_blocks=4)
  assert len(repr(config)) < 700 and " * 30 + (Recurrent" in repr(config)
  assert repr(config) != repr(dataclasses.replace(config, layers=config.layers[1:]))
  assert len(str(jax.tree.structure(kvcache.init(config)))) < 2000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
@pytest.mark.skipif(not importlib.util.find_spec("treescope"), reason="no treescope")
def test_treescope_prints_the_parts():
  import treescope

  text = treescope.render_to_text(small.empty())
  assert "BlockPool(" in text and "PrefixIndex(" in text and len(text) < 6000


# --- HTML -----------------------------------------------------------------------------


class Reader(HTMLParser):
  """Collects hover texts; fails where tags do not close."""

  def __init__(self, text):
    super().__init__()
    self.open, self.hovers, self.text = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    assert tag not in ("script", "img", "link", "iframe")
    self.open.append(tag)
    self.hovers += [value for name, value in attrs if name == "title"]
    assert not {name for name, _ in attrs} & {"src", "href", "onclick"}

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_hovering_tells_a_block():
  ctx = made_up(40)
  hovers = Reader(ctx._repr_html_()).hovers
  found = observe.map_blocks(ctx)
  blocks = {int(h.split()[1][:-1]): h for h in hovers if h.startswith("block ")}
  assert sorted(blocks) == list(range(1, 40))
  for block, hover in blocks.items():
    kind, holders = kind_of(ctx, block)
    lines = hover.split("\n")
    assert lines[0] == f"block {block}: {kind.name.lower()}"
    for row, column in holders[:4]:
      assert f"row {row} column {column}" in lines[1]
    if tokens := found.tokens(block):
      assert f"tokens {' '.join(map(str, tokens))}" in lines
    assert (found.prefix_hash(block) is not None) == ("hash" in hover)


def test_every_row_has_a_label_and_its_blocks():
  ctx = made_up(400, layers=HYBRID)
  html = ctx._repr_html_()
  text = "".join(Reader(html).text)
  lines = html.split(">sequences")[1].split("<b>")[1:]
  found = observe.map_blocks(ctx)
  for row, line in zip(found.rows, lines, strict=True):
    assert f"row {row} · {found.seq_len(row)} tokens" in text
    assert line.count("block ") == len(found.row_blocks(row))
  # Pools count different things, so the legend has no sums.
  assert text.endswith("sharedexclusivecachedfree")


def test_texts_are_escaped():
  evil = "<script>alert('\"&')</script>"
  html = observe.render_html(made_up(40), decode=lambda tokens: evil)
  assert "<script" not in html
  assert any("<script>alert(" in hover for hover in Reader(html).hovers)


@pytest.mark.parametrize("layers", [(ATTENTION,), HYBRID])
def test_a_hundred_thousand_blocks_stay_small(layers):
  ctx = made_up(100_001, max_seqs=64, num_columns=512, layers=layers)
  html = ctx._repr_html_()
  assert len(html) < 200_000
  reader = Reader(html)
  counts = observe.map_blocks(ctx).blocks.counts
  assert "free; 209 blocks to a cell" in "".join(reader.text)
  # The bins tell every block.
  binned = [h for h in reader.hovers if h[0].isdigit()]
  for kind in (Kind.SHARED, Kind.CACHED):
    name = kind.name.lower()
    told = [p.split() for h in binned for p in h.split(": ")[1].split(", ")]
    if layers == (ATTENTION,):
      assert sum(int(num) for num, what in told if what == name) == counts[kind]
  if layers == HYBRID:
    text = "".join(reader.text)
    assert "window 8" in text and "states" in text


# --- Terminal -------------------------------------------------------------------------


def test_terminal_shows_blocks_and_rows():
  ctx = small.finish(
    small.start(small.empty(), list(range(9)), list(range(20, 27))), small.mask(0)
  )
  ctx = small.start(ctx, list(range(6)))
  ctx, _, _ = small.fork(ctx, small.ints([0, -1]))
  assert small.tables(ctx)[:3] == [[1, 3], [4, 5], [1, 6]]
  assert terminal.block_chart(observe.map_blocks(ctx), style=Style()).split("\n") == [
    "blocks: 1 shared, 4 exclusive, 1 cached, 5 free",
    "  @+####.....",
    "  row 0          6 tokens  @#",
    "  row 1          7 tokens  ##",
    "  row 2          6 tokens  @#",
    "  @@ shared   ## exclusive   ++ cached   .. free",
  ]


def test_terminal_bins_many_blocks():
  found = observe.map_blocks(made_up(5000))
  chart = terminal.block_chart(found, style=Style(unicode=True, color=True), height=3)
  lines = chart.split("\n")
  assert "24 to a glyph" in lines[0] and len(lines) <= 1 + 3 + 6 + 1
  assert "\x1b[38;5;178m▒" in chart


# --- Differences ----------------------------------------------------------------------


def test_a_difference_tells_rows_blocks_and_index():
  before = small.start(small.empty(), list(range(9)), list(range(20, 27)))
  kept = observe.map_blocks(before)
  after = small.finish(small.append(before, {1: [27, 28]}), small.mask(0))
  found = kvcache.diff(kept, after)
  assert found == kvcache.diff(before, after)
  assert (found.finished, found.grown) == ({0: 9}, {1: (7, 9)})
  assert (found.admitted, found.shrunk) == ({}, {})
  assert found.moved == {
    ("blocks", Kind.EXCLUSIVE, Kind.CACHED): [1, 2],
    ("blocks", Kind.EXCLUSIVE, Kind.FREE): [3],
    ("blocks", Kind.FREE, Kind.EXCLUSIVE): [6],
  }
  assert found.stored == [1, 2, 4, 5][: len(found.stored)] and not found.removed
  assert "  finished: row 0 (9 tokens)\n" in repr(found)
  assert "  blocks: exclusive to cached: 2 (1-2)\n" in repr(found)
  Reader(found._repr_html_())


def test_a_row_with_another_sequence_ended_and_began():
  first = small.start(small.empty(), list(range(9)))
  second = small.start(small.finish(first, small.mask(0)), list(range(30, 36)))
  found = kvcache.diff(first, second)
  assert (found.finished, found.admitted) == ({0: 9}, {0: 6})
  evicted, _ = small.evict(second, 1)
  assert kvcache.diff(second, evicted).removed == [2]
  assert kvcache.diff(first, first).is_empty
  assert "nothing changed" in repr(kvcache.diff(first, first))


def test_differences_need_one_configuration():
  with pytest.raises(ValueError, match="different configurations"):
    kvcache.diff(small.empty(), made_up(40))
