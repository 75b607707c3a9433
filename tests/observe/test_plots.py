"""Pictures: drawn without a screen, and looked at by their pixels and labels."""

import matplotlib

matplotlib.use("agg")

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

import kvcache
from kvcache import observe
from kvcache.observe import Kind, LOOKS, plots
from kvcache.observe.history import FIELDS
from tests.observe.test_block_map import HYBRID, made_up


@pytest.fixture(autouse=True)
def close():
  yield
  plt.close("all")


def shares(image):
  """Share of each kind among the pixels of a map."""
  flat = np.asarray(image.get_array()).reshape(-1, 3)
  colors = {kind: bytes.fromhex(look.color[1:]) for kind, look in LOOKS.items()}
  num = {
    kind: (flat == list(color)).all(axis=1).sum() for kind, color in colors.items()
  }
  total = sum(num.values())
  return {kind: n / total for kind, n in num.items() if n}


@pytest.mark.parametrize("num_blocks", [40, 3000, 100_001])
def test_a_map_shows_the_shares(num_blocks):
  ctx = made_up(num_blocks, max_seqs=16, num_columns=64)
  axes = kvcache.plot_blocks(ctx).axes
  pool = observe.map_blocks(ctx).blocks
  (image,) = axes[0].images
  assert image.get_array().size < 3 * 10 * plots._MAX_CELLS
  for kind, share in shares(image).items():
    assert share == pytest.approx(pool.counts[kind] / (num_blocks - 1), abs=0.03), kind
  if num_blocks == 40:
    assert set(shares(image)) == set(pool.counts)
  assert f"{pool.counts[Kind.SHARED]} shared" in axes[0].get_title(loc="left")


def test_every_pool_and_the_rows_are_shown():
  figure = kvcache.plot_blocks(made_up(40, layers=HYBRID))
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  starts = ["blocks", "window 8", "states", "sequences"]
  assert [title.replace(",", ":").split(":")[0] for title in titles] == starts
  figure.canvas.draw()


def test_a_history_is_drawn():
  history = kvcache.make_history(8)
  with pytest.raises(ValueError, match="no samples"):
    kvcache.plot_history(history)
  samples = np.tile(np.arange(8, dtype=np.int32)[:, None], (1, len(FIELDS)))
  figure = kvcache.plot_history(
    history.replace(samples=samples, num_samples=np.int32(8))
  )
  assert [axis.get_ylabel() for axis in figure.axes] == [
    "blocks",
    "requests",
    "hits, %",
    "tokens a step",
  ]
  figure.canvas.draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
  with pytest.raises(ImportError, match=r"kvcache-jax\[plots\]"):
    kvcache.plot_blocks(made_up(40))


def test_colours_can_be_told_apart():
  """No two kinds are alike in hue and lightness, also to a reader who sees no red."""
  colors = [bytes.fromhex(look.color[1:]) for look in LOOKS.values()]
  assert len({look.ansi for look in LOOKS.values()}) == len(LOOKS)
  for i, one in enumerate(colors):
    for other in colors[:i]:
      seen = [np.dot([0.3, 0.7, 0.0], list(c)) for c in (one, other)]
      blue = abs(one[2] - other[2])
      assert abs(seen[0] - seen[1]) + blue > 30, (one.hex(), other.hex())


@pytest.mark.parametrize(
  ("backend", "num_open"),
  [("module://matplotlib_inline.backend_inline", 0), ("agg", 1)],
)
def test_a_notebook_shows_a_picture_once(monkeypatch, backend, num_open):
  monkeypatch.setattr(plt, "get_backend", lambda: backend)
  assert kvcache.plot_blocks(made_up(40)).axes
  assert len(plt.get_fignums()) == num_open


def test_tokens_are_counted_in_whole_numbers():
  figure = kvcache.plot_blocks(made_up(40, max_seqs=2, num_columns=5))
  ticks = figure.axes[-1].get_xticks()
  assert len(ticks) > 2 and (ticks == np.round(ticks)).all()
