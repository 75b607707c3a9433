"""Pictures of a context and of a run, with matplotlib (the `plots` extra)."""

from typing import Any, TYPE_CHECKING

import numpy as np

from kvcache.context import Context
from kvcache.observe import block_map
from kvcache.observe.block_map import BlockMap, PoolMap
from kvcache.observe.history import History
from kvcache.observe.palette import Kind, LOOKS

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_MAX_CELLS = 4096  # blocks drawn one by one in one pool; more are binned
_PARTS = 8  # of a binned cell, which shows shares
_MAX_LINED = 1024  # cells with lines between them
_NULL_COLOR = "#ffffff"


def plot_blocks(ctx: Context | BlockMap, *, figure: "Figure | None" = None) -> "Figure":
  """Draws every pool as a map of its blocks, and the live rows below.

  A pool of more than 4096 blocks is binned: each cell stands for several blocks, and is
  split into the shares of their kinds.

  Args:
    ctx: A context or the map of one.
    figure: Where to draw; a new one if omitted.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: The context cannot be read on the host.
  """
  found = block_map.as_block_map(ctx)
  grids = [_grid(pool) for pool in found.pools]
  heights = [max(0.35, 0.13 * grid.shape[0]) for grid, _ in grids]
  num_rows = len(found.rows)
  if num_rows:
    heights.append(min(4.0, max(0.4, 0.2 * num_rows)))
  if figure is None:
    size = (9.6, 0.6 + sum(heights) + 0.55 * len(heights))
    figure = _new_figure(size)
  axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
  for axis, pool, (grid, width) in zip(axes, found.pools, grids, strict=False):
    _show(axis, grid)
    if grid.size <= _MAX_LINED:
      _draw_lines(axis, grid.shape)
    scale = "" if width == 1 else f" ({width} blocks to a cell)"
    axis.set_title(f"{pool.name}: {pool.summary}{scale}", loc="left", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
  if num_rows:
    _plot_rows(axes[-1], found)
  figure.legend(
    handles=_legend(found),
    ncols=len(LOOKS),
    loc="outside lower left",
    frameon=False,
    fontsize=9,
  )
  return figure


def plot_history(history: History, *, figure: "Figure | None" = None) -> "Figure":
  """Draws how the memory was used over the steps of a run.

  Four pictures below each other: blocks, requests, the hit rate, and tokens a step with
  preemptions marked.

  Args:
    history: As `kvcache.serve` returns it, or `Slice.history`.
    figure: Where to draw; a new one if omitted.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: It is no history, or one without samples.
  """
  if not isinstance(history, History):
    raise ValueError(f"history must be a History, got {type(history).__name__}")
  series = history.series()
  step = series["step"]
  if not step.size:
    raise ValueError("history has no samples")
  if figure is None:
    figure = _new_figure((9.6, 7.2))
  blocks, requests, rate, tokens = figure.subplots(
    4, 1, sharex=True, height_ratios=[3, 2, 1.3, 1.6]
  )
  shared, exclusive = LOOKS[Kind.SHARED].color, LOOKS[Kind.EXCLUSIVE].color
  cached, free = LOOKS[Kind.CACHED].color, LOOKS[Kind.FREE].color
  blocks.stackplot(
    step,
    series["in_use"],
    series["cached"],
    series["free"],
    colors=[exclusive, cached, free],
    labels=["held", "cached", "free"],
    step="post",
    linewidth=0,
  )
  blocks.step(
    step,
    series["references"],
    where="post",
    color=shared,
    linewidth=1.4,
    label="without sharing",
  )
  requests.step(step, series["running"], where="post", color=shared, label="running")
  requests.step(
    step,
    series["waiting"],
    where="post",
    color=LOOKS[Kind.LOST].color,
    linestyle="--",
    label="waiting",
  )
  rate.plot(step, 100 * series["hit_rate"], color=cached, label="hit rate so far")
  rate.set_ylim(-4, 104)
  tokens.step(step, series["tokens_per_step"], where="pre", color=shared)
  preempted = series["new_preemptions"] > 0
  if preempted.any():
    tokens.plot(
      step[preempted],
      series["tokens_per_step"][preempted],
      "v",
      color=LOOKS[Kind.LOST].color,
      label="preemption",
    )
  for axis, label in (
    (blocks, "blocks"),
    (requests, "requests"),
    (rate, "hits, %"),
    (tokens, "tokens a step"),
  ):
    axis.set_ylabel(label, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
  for axis in (blocks, requests, tokens):
    axis.set_ylim(bottom=0)
  tokens.set_xlabel("model steps", fontsize=9)
  return figure


def _new_figure(size: tuple[float, float]) -> "Figure":
  try:
    import matplotlib.pyplot as plt
  except ImportError as error:
    raise ImportError(
      "pictures need matplotlib: pip install 'kvcache-jax[plots]'"
    ) from error
  figure = plt.figure(figsize=size, layout="constrained")
  if "inline" in plt.get_backend():
    # A notebook shows what a cell returns, and once more every figure that is open.
    plt.close(figure)
  return figure


def _grid(pool: PoolMap) -> tuple[np.ndarray, int]:
  """Kinds as a grid of cells that are split into parts, and the blocks in a cell."""
  kinds = pool.kinds[1:]
  width = block_map.bin_width(kinds.size, _MAX_CELLS)
  cells, parts = kinds[:, None], 1
  if width > 1:
    counts = block_map.count_bins(kinds, _MAX_CELLS)
    cells, parts = _shares(counts), _PARTS
  columns = max(1, min(64, len(cells)))
  if len(cells) > 1024:
    columns = 128
  lines = -(-len(cells) // columns)
  grid = np.full((lines * columns, parts), Kind.NULL, np.int8)
  grid[: len(cells)] = cells
  return grid.reshape(lines, columns * parts), width


def _shares(counts: np.ndarray) -> np.ndarray:
  """`[E, len(Kind)]` counts -> `[E, _PARTS]` kinds, in proportion."""
  ends = np.cumsum(counts, axis=1)
  middles = (np.arange(_PARTS) + 0.5) / _PARTS * ends[:, -1:]
  return np.sum(middles[:, :, None] >= ends[:, None], axis=2).astype(np.int8)


def _colors() -> np.ndarray:
  """`[len(Kind), 3]` uint8."""
  colors = [_NULL_COLOR, *(LOOKS[kind].color for kind in sorted(LOOKS))]
  return np.array([tuple(bytes.fromhex(color[1:])) for color in colors], np.uint8)


def _show(axis: "Axes", grid: np.ndarray, **kwargs: Any) -> None:
  axis.imshow(_colors()[grid], aspect="auto", interpolation="nearest", **kwargs)
  axis.spines[:].set_visible(False)


def _draw_lines(axis: "Axes", shape: tuple[int, ...]) -> None:
  for line in range(1, shape[0]):
    axis.axhline(line - 0.5, color=_NULL_COLOR, linewidth=1.5)
  for column in range(1, shape[1]):
    axis.axvline(column - 0.5, color=_NULL_COLOR, linewidth=1)


def _plot_rows(axis: "Axes", found: BlockMap) -> None:
  rows, size = found.rows, found.config.block_size
  most = max(max(len(found.row_blocks(row)) for row in rows), 1)
  grid = np.full((len(rows), most), Kind.NULL, np.int8)
  for line, row in enumerate(rows):
    blocks = found.row_blocks(row)
    grid[line, : len(blocks)] = found.blocks.kinds[blocks]
  _show(axis, grid, extent=(0, most * size, len(rows) - 0.5, -0.5))
  if len(rows) <= 64:
    for line, row in enumerate(rows):
      axis.plot([found.seq_len(row)] * 2, [line - 0.4, line + 0.4], color="black", lw=1)
      axis.axhline(line + 0.5, color=_NULL_COLOR, linewidth=1.5)
  if most <= 128:
    for column in range(1, most):
      axis.axvline(column * size, color=_NULL_COLOR, linewidth=0.6)
  if len(rows) <= 32:
    axis.set_yticks(range(len(rows)), [f"row {row}" for row in rows], fontsize=8)
  axis.locator_params(axis="x", integer=True)
  axis.tick_params(length=0, labelsize=8)
  axis.set_title("sequences, by token; a line where each ends", loc="left", fontsize=9)


def _legend(found: BlockMap) -> list[Any]:
  from matplotlib.patches import Patch

  present = {kind for pool in found.pools for kind in pool.counts}
  return [
    Patch(color=look.color, label=look.name)
    for kind, look in LOOKS.items()
    if kind in present
  ]
