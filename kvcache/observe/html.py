"""A context as HTML: what a notebook shows.

One `<div>` with its own style: no scripts and nothing from elsewhere, readable on light
and on dark ground. Pools of more than `_MAX_CELLS` blocks are binned, so that a map
stays small however many blocks there are.
"""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from kvcache.context import Context
from kvcache.observe import block_map, text
from kvcache.observe.block_map import BlockMap, PoolMap
from kvcache.observe.palette import Kind, LOOKS
from kvcache.printing import count

Decode = Callable[[list[int]], str]

_MAX_CELLS = 480  # of one pool
_MAX_ROWS = 32
_MAX_ROW_CELLS = 320  # of all rows together
_MAX_TOKENS = 16  # in one hover text
_MAX_HOLDERS = 4
_MAX_TEXT = 80

_STYLE = "".join(
  [
    ".kvc{font:12px/1.5 system-ui,sans-serif;max-width:960px;margin:4px 0}",
    ".kvc .t{font-weight:600;margin:10px 0 3px}",
    ".kvc .t span{font-weight:400;opacity:.75}",
    ".kvc .g{display:flex;flex-wrap:wrap;gap:2px}",
    ".kvc i{display:block;width:13px;height:13px;border-radius:2px;",
    "background:rgba(128,136,144,.28)}",
    ".kvc .p i{width:10px;height:18px;border-radius:1px}",
    ".kvc i:hover{outline:2px solid currentColor}",
    ".kvc .r{display:grid;grid-template-columns:max-content 1fr;gap:2px 10px}",
    ".kvc .r b{font-weight:400;font-variant-numeric:tabular-nums}",
    ".kvc .r .g{align-content:center}",
    ".kvc .l{display:flex;flex-wrap:wrap;gap:2px 14px;margin-top:8px}",
    ".kvc .l span{display:flex;gap:5px;align-items:center}",
    *(
      f".kvc i.k{kind:d}{{background:{look.color}}}"
      for kind, look in LOOKS.items()
      if kind is not Kind.FREE
    ),
  ]
)


def show_context(ctx: Context) -> str:
  """What `Context._repr_html_` returns; never raises for what cannot be read."""
  if block_map.obstacle(ctx) is not None:
    told = escape(text.describe(ctx))
    return f'<pre style="white-space:pre-wrap">{told}</pre>'
  return render_html(ctx)


def render_html(ctx: Context | BlockMap, *, decode: Decode | None = None) -> str:
  """Draws every pool and the live rows of a context.

  Hovering over a block shows its id, holders, depth, hash and tokens.

  Args:
    ctx: A context or the map of one.
    decode: Token ids to text, such as a tokenizer's, for what hovering shows.

  Returns:
    A self-contained `<div>`.

  Raises:
    ValueError: The context cannot be read on the host.
  """
  found = block_map.as_block_map(ctx)
  body = [f"<div>{escape(text.sizes(found.config))}</div>"]
  body += [_pool(found, pool, decode) for pool in found.pools]
  body.append(_rows(found, decode))
  body.append(_legend(found))
  return (
    f'<div class="kvc" role="img" aria-label="{escape(_summary(found))}">'
    f"<style>{_STYLE}</style>{''.join(body)}</div>"
  )


def _summary(found: BlockMap) -> str:
  pools = (f"{pool.name}: {pool.summary}" for pool in found.pools)
  return f"Memory of {len(found.rows)} sequences. {'; '.join(pools)}"


def _pool(found: BlockMap, pool: PoolMap, decode: Decode | None) -> str:
  kinds = pool.kinds[1:]  # without the null block
  width = block_map.bin_width(kinds.size, _MAX_CELLS)
  scale = "" if width == 1 else f"; {width} blocks to a cell"
  title = _title(pool.name, f"{pool.summary}{scale}")
  if width == 1:
    cells = [
      _cell(int(kind), _block_hover(found, pool, block, decode))
      for block, kind in enumerate(kinds, start=1)
    ]
    return f'{title}<div class="g">{"".join(cells)}</div>'
  cells = []
  for i, bins in enumerate(block_map.count_bins(kinds, _MAX_CELLS)):
    first = 1 + i * width
    last = first + int(bins.sum()) - 1
    cells.append(_mixed_cell(bins, f"{first}-{last}: {_bin_text(bins)}"))
  return f'{title}<div class="g p">{"".join(cells)}</div>'


def _rows(found: BlockMap, decode: Decode | None) -> str:
  if not found.rows:
    return ""
  shown = found.rows[:_MAX_ROWS]
  most = max(len(found.row_blocks(row)) for row in shown)
  num_cells = max(8, _MAX_ROW_CELLS // len(shown))
  width = block_map.bin_width(most, num_cells)
  scale = "" if width == 1 else f"{width} blocks to a cell"
  lines = []
  for row in shown:
    blocks = found.row_blocks(row)
    kinds = found.blocks.kinds[blocks]
    cells = []
    for column in range(0, len(blocks), width):
      ids = blocks[column : column + width]
      if width == 1:
        hover = _block_hover(found, found.blocks, int(ids[0]), decode)
        cells.append(_cell(int(kinds[column]), hover))
        continue
      bins = np.bincount(kinds[column : column + width], minlength=len(Kind))
      hover = f"columns {column}-{column + len(ids) - 1}: {_bin_text(bins)}"
      cells.append(_mixed_cell(bins, hover))
    label = f"row {row} &middot; {count(found.seq_len(row), 'token')}"
    lines.append(f'<b>{label}</b><div class="g">{"".join(cells)}</div>')
  more = len(found.rows) - len(shown)
  lines.append(f"<b>and {more} more</b>" if more else "")
  return f'{_title("sequences", scale)}<div class="r">{"".join(lines)}</div>'


def _title(name: str, more: str) -> str:
  """Not a heading, which would stand in a notebook's table of contents."""
  return f'<div class="t">{name} <span>{escape(more)}</span></div>'


def _legend(found: BlockMap) -> str:
  present = {kind for pool in found.pools for kind in pool.counts}
  items = (
    f"<span>{_cell(int(kind))}{look.name}</span>"
    for kind, look in LOOKS.items()
    if kind in present
  )
  return f'<div class="l">{"".join(items)}</div>'


def _cell(kind: int, hover: str = "") -> str:
  style = "" if kind == Kind.FREE else f" class=k{kind}"
  title = f' title="{escape(hover)}"' if hover else ""
  return f"<i{style}{title}></i>"


def _mixed_cell(bins: np.ndarray, hover: str) -> str:
  """A cell that is split like its blocks, from the bottom up."""
  present = [kind for kind in LOOKS if bins[kind]]
  if len(present) == 1:
    return _cell(int(present[0]), hover)
  stops, at = [], 0
  for kind in present:
    at += int(bins[kind])
    color = "transparent" if kind is Kind.FREE else LOOKS[kind].color
    end = "" if kind is present[-1] else f" {round(100 * at / int(bins.sum()))}%"
    stops.append(f"{color} 0{end}")
  return (
    f'<i style="background-image:linear-gradient(0deg,{",".join(stops)})"'
    f' title="{escape(hover)}"></i>'
  )


def _bin_text(bins: Sequence[int] | np.ndarray) -> str:
  return ", ".join(f"{bins[k]} {look.name}" for k, look in LOOKS.items() if bins[k])


def _block_hover(
  found: BlockMap, pool: PoolMap, block: int, decode: Decode | None
) -> str:
  """What is known of one block, a fact a line."""
  is_state = pool.name == "states"
  kind = Kind(int(pool.kinds[block]))
  lines = [f"{'state' if is_state else 'block'} {block}: {LOOKS[kind].name}"]
  holders = pool.holders(block)
  if holders:
    told = ", ".join(
      f"row {row}" if is_state else f"row {row} column {column}"
      for row, column in holders[:_MAX_HOLDERS]
    )
    more = len(holders) - _MAX_HOLDERS
    refs = int(pool.ref_counts[block])
    lines.append(
      f"{count(refs, 'reference')}: {told}" + (f" and {more} more" * (more > 0))
    )
  if pool is not found.blocks:
    owner = int(pool.owners[block])
    lines += [f"of block {owner}"] if owner else []
    return "\n".join(lines)
  depth, word = found.depth(block), found.prefix_hash(block)
  lines += [] if depth is None else [f"depth {depth}"]
  lines += [] if word is None else [f"hash {word}"]
  tokens = found.tokens(block)
  if tokens:
    told = " ".join(map(str, tokens[:_MAX_TOKENS]))
    lines.append(f"tokens {told}" + " ..." * (len(tokens) > _MAX_TOKENS))
  if tokens and decode is not None:
    lines.append(repr(decode(tokens)[:_MAX_TEXT]))
  return "\n".join(lines)
