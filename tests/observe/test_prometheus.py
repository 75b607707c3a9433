"""The text that Prometheus reads, parsed again."""

import re

import jax
import numpy as np
import pytest

import kvcache
from kvcache import observe
from tests.fixtures import small

SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? ([-0-9.e+]+)")


def parse(text):
  """Name -> (type, labels -> value); fails where the format is broken."""
  assert text.endswith("\n")
  found, name = {}, ""
  for line in text.splitlines():
    if line.startswith("# HELP "):
      name = line.split()[2]
      assert name not in found and line.split(maxsplit=3)[3].endswith(".")
    elif line.startswith("# TYPE "):
      assert line.split()[2] == name
      found[name] = (line.split()[3], {})
    else:
      sample, labels, value = SAMPLE.fullmatch(line).groups()
      assert sample == name
      found[name][1][labels] = float(value)
  return found


def test_every_number_is_there_with_its_type():
  ctx = small.start(small.empty(), list(range(9)), list(range(20, 27)))
  stats = jax.jit(kvcache.stats)(ctx)
  found = parse(observe.prometheus_text(stats))
  assert found["kvcache_blocks_in_use"] == ("gauge", {None: 5.0})
  assert found["kvcache_prompt_tokens_total"] == ("counter", {None: 16.0})
  for name, (kind, samples) in found.items():
    assert (kind == "counter") == name.endswith("_total") and samples
  # All but the windows, of which there are none.
  assert len(found) == 14 - 2 + 7


def test_windows_are_labelled_and_labels_escaped():
  stats = jax.jit(kvcache.stats)(small.empty())
  stats = stats.replace(num_window_free=np.array([3, 4]))
  text = observe.prometheus_text(stats, prefix="x", labels={"model": 'a"\\\nb'})
  label = r'model="a\"\\\nb"'
  found = parse(text)["x_window_blocks_free"]
  assert found == ("gauge", {f'{label},window="0"': 3.0, f'{label},window="1"': 4.0})


@pytest.mark.parametrize(
  "kwargs", [{"prefix": "1x"}, {"labels": {"a-b": ""}}, {"labels": {"window": ""}}]
)
def test_names_that_are_not_allowed(kwargs):
  stats = jax.jit(kvcache.stats)(small.empty())
  with pytest.raises(ValueError):
    observe.prometheus_text(stats, **kwargs)
