"""Stats as Prometheus reads them (text exposition format 0.0.4)."""

from collections.abc import Iterable, Mapping
import re
from typing import Any

import numpy as np

from kvcache.observe.measures import Stats

_GAUGES = {
  "num_sequences": ("sequences", "Live rows."),
  "num_tokens": ("tokens", "Tokens stored by live rows, shared ones for each row."),
  "num_free": ("blocks_free", "Free blocks."),
  "num_evictable": ("blocks_evictable", "Cached blocks that no row holds."),
  "num_in_use": ("blocks_in_use", "Blocks that some row holds."),
  "num_shared": ("blocks_shared", "Blocks that more than one row holds."),
  "num_references": ("block_references", "Table entries that name a block."),
  "num_cached": ("blocks_cached", "Blocks in the prefix index, held or not."),
  "num_reserved": (
    "tokens_reserved",
    "Token positions in held blocks without a token.",
  ),
  "num_snapshots": ("snapshots", "Recurrent states kept beside blocks."),
  "num_free_states": ("states_free", "Free rows of the state pool."),
  "num_window_free": ("window_blocks_free", "Free blocks of a sliding window's pool."),
  "num_window_evictable": (
    "window_blocks_evictable",
    "Cached blocks of a sliding window's pool that no row holds.",
  ),
  "hit_rate": ("prefix_hit_ratio", "Share of all prompt tokens that were cached."),
}
_COUNTERS = {
  "num_admitted": ("admitted", "Prompts that got a row."),
  "prompt_tokens": ("prompt_tokens", "Tokens of admitted prompts."),
  "hit_tokens": ("hit_tokens", "Prompt tokens found in the prefix index."),
  "num_complete": ("complete_hits", "Prompts whose hit was as long as it can be."),
  "num_cut": ("cut_hits", "Prompts whose hit ended at a block that was not cached."),
  "num_evicted": ("evicted_blocks", "Blocks evicted."),
  "lost_tokens": ("lost_tokens", "Cached prompt tokens that had to be computed again."),
}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def prometheus_text(
  stats: Stats, *, prefix: str = "kvcache", labels: Mapping[str, object] | None = None
) -> str:
  """Formats stats for a `/metrics` page. Counters start anew after `reset`.

  Args:
    stats: Of `kvcache.stats`, or `Slice.stats`.
    prefix: Begins every name.
    labels: Put on every sample.

  Raises:
    ValueError: These are no stats of one context, or the prefix or a label has a name
      that Prometheus does not allow.
  """
  if not isinstance(stats, Stats) or np.ndim(stats.num_sequences):
    raise ValueError("stats must be the Stats of one context, from kvcache.stats")
  if not _NAME.fullmatch(prefix):
    raise ValueError(f"prefix={prefix!r} is not a metric name")
  told = {label: str(value) for label, value in (labels or {}).items()}
  for label in told:
    if not _LABEL.fullmatch(label) or label.startswith("__") or label == "window":
      raise ValueError(f"label {label!r} is not allowed")
  lines: list[str] = []
  for field, (name, text) in _GAUGES.items():
    samples = _samples(getattr(stats, field), told)
    lines += _metric(f"{prefix}_{name}", "gauge", text, samples)
  for field, (name, text) in _COUNTERS.items():
    samples = _samples(getattr(stats.counters, field), told)
    lines += _metric(f"{prefix}_{name}_total", "counter", text, samples)
  return "\n".join(lines) + "\n"


def _samples(value: Any, labels: dict[str, str]) -> list[tuple[dict[str, str], Any]]:
  """One sample, or one for each window."""
  array = np.asarray(value)
  if not array.ndim:
    return [(labels, array.item())]
  return [(labels | {"window": str(i)}, v) for i, v in enumerate(array.tolist())]


def _metric(
  name: str, kind: str, text: str, samples: Iterable[tuple[dict[str, str], Any]]
) -> list[str]:
  lines = [f"{name}{_braces(labels)} {value!r}" for labels, value in samples]
  if not lines:
    return []
  return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines]


def _braces(labels: Mapping[str, str]) -> str:
  if not labels:
    return ""
  told = (f'{name}="{_escape(value)}"' for name, value in labels.items())
  return "{" + ",".join(told) + "}"


def _escape(value: str) -> str:
  return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
