"""Wrong uses, each with its clear error or defined outcome; see docs/wrong_uses.md."""

import jax
import numpy as np
import pytest

import kvcache
from scripts import wrong_uses
from tests.hostile.table import busy, crowded, drained

USES = wrong_uses.every_use()


@pytest.fixture(scope="module")
def bits():
  """The contexts that wrong uses are tried on, as they were before all of them."""
  contexts = [busy(), crowded(), drained()]
  return [(ctx, jax.tree.map(np.array, ctx)) for ctx in contexts]


def same(left, right):
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.area}: {use.name}")
def test_wrong_use(use, bits):
  if use.raises is not None:
    with pytest.raises(use.raises, match=use.message) as raised:
      use.do()
    assert len(str(raised.value)) < 2000
  else:
    got = use.do()
    if isinstance(got, tuple) and isinstance(got[0], kvcache.Context):
      after, got = got
      kvcache.check_invariants(after)
      unchanged = any(same(before, after) for before, _ in bits)
      assert use.changes or unchanged, "a refused call changed something"
    assert got == use.gives
  for ctx, before in bits:
    assert same(ctx, before)


def test_the_table_is_long_and_names_are_unique():
  names = [(use.area, use.name) for use in USES]
  assert len(names) >= 60 and len(set(names)) == len(names)
  for use in USES:
    assert use.raises is None or use.message, use.name


def test_the_documentation_has_the_table():
  current = wrong_uses.PATH.read_text("utf-8") == wrong_uses.text()
  assert current, "run `python -m scripts.wrong_uses`"
