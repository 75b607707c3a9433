"""Looking at a Context: numbers, pictures, differences, and how a run went.

All are pure reads. Pictures are made from one map of the blocks, on the host: what is
free, cached, held by one row or shared (`map_blocks`).
"""

from kvcache.context import register_view as _register_view
from kvcache.observe.block_map import BlockMap, map_blocks, PoolMap
from kvcache.observe.difference import diff, Difference
from kvcache.observe.history import History, make_history, record
from kvcache.observe.html import render_html
from kvcache.observe.html import show_context as _show_context
from kvcache.observe.measures import Events, events, Stats, stats
from kvcache.observe.palette import Kind, LOOKS
from kvcache.observe.plots import plot_blocks, plot_history
from kvcache.observe.prometheus import prometheus_text
from kvcache.observe.text import describe as _describe

_register_view("text", _describe)
_register_view("html", _show_context)

__all__ = [
  "LOOKS",
  "BlockMap",
  "Difference",
  "Events",
  "History",
  "Kind",
  "PoolMap",
  "Stats",
  "diff",
  "events",
  "make_history",
  "map_blocks",
  "plot_blocks",
  "plot_history",
  "prometheus_text",
  "record",
  "render_html",
  "stats",
]
