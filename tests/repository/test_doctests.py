"""Documentation that is code runs: docstrings, the README and the pages of the site."""

import dataclasses
import doctest
import importlib
import pkgutil
import re
import traceback

import jax
import pytest

import kvcache
from kvcache.models.huggingface import load_huggingface
import pallas_kernels
from tests.fixtures.places import GOLDENS, ROOT

PAGES = ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- not run -->\s*\n)?^```python\n(.*?)^```$", re.M | re.S)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.fixture(autouse=True)
def _as_users_have_it():
  """The documentation is not written for the strict JAX of the other tests."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def examples() -> dict[str, doctest.DocTest]:
  """Every docstring with examples, by its full name."""
  names = [
    info.name
    for package in (kvcache, pallas_kernels)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith("__main__")
  ]
  finder = doctest.DocTestFinder(exclude_empty=True)
  found = {}
  for name in ("kvcache", "pallas_kernels", *names):
    for test in finder.find(importlib.import_module(name), extraglobs={}):
      if test.examples:
        found[test.name] = test
  return dict(sorted(found.items()))


EXAMPLES = examples()


@pytest.fixture(scope="module")
def front_door() -> dict:
  """What the examples of `kvcache` itself leave behind: the others go on from there."""
  names: dict = {}
  assert failures(EXAMPLES["kvcache"], names) == ""
  return names


def failures(test: doctest.DocTest, names: dict) -> str:
  test.globs = names
  said: list[str] = []
  runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
  runner.run(test, out=said.append, clear_globs=False)
  return "".join(said)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "kvcache"])
def test_docstrings_show_what_happens(name, front_door):
  assert failures(EXAMPLES[name], dict(front_door)) == ""


def test_the_verbs_that_matter_have_examples():
  shown = {name.rpartition(".")[2] for name in EXAMPLES}
  verbs = "init admit extend step_metadata fork rewind finish evict publish serve"
  others = "CacheConfig from_memory make_requests stats events SamplingParams"
  assert {*verbs.split(), *others.split()} <= shown


class Letters:
  """A tokenizer with one token per byte, as far as a small vocabulary reaches."""

  def encode(self, text):
    return [byte % 64 for byte in text.encode()]

  def decode(self, tokens):
    return " ".join(map(str, tokens))


def load_little():
  """Stands in for the demo model: two layers instead of thirty."""
  loaded = load_huggingface(GOLDENS / "tiny_llama")
  return dataclasses.replace(loaded, tokenizer=Letters())


@pytest.mark.parametrize("page", PAGES)
def test_pages_run_from_top_to_bottom(page, monkeypatch, capsys):
  monkeypatch.setattr("kvcache.models.load", load_little)
  text = (ROOT / page).read_text("utf-8")
  names: dict = {"__name__": page}
  for skipped, code in BLOCK.findall(text):
    if skipped:
      compile(code, page, "exec")
      continue
    line = text[: text.index(code)].count("\n")
    try:
      exec(compile("\n" * line + code, page, "exec"), names)
    except Exception:
      pytest.fail(traceback.format_exc())
  capsys.readouterr()


def test_skipped_blocks_are_few():
  blocks = [
    block for page in PAGES for block in BLOCK.findall((ROOT / page).read_text())
  ]
  assert sum(not skipped for skipped, _ in blocks) >= 10
  assert sum(bool(skipped) for skipped, _ in blocks) <= 4


def test_every_public_name_is_in_the_reference():
  pages = {path.name: path.read_text() for path in (ROOT / "docs/api").glob("*.rst")}

  def listed(page: str) -> set[str]:
    return set(
      re.findall(r"^\.\. (?:auto)?\w+:: (?:[\w.]+\.)?(\w+)$", pages[page], re.M)
    )

  for page, public in (
    ("kvcache.rst", kvcache.__all__),
    ("nn.rst", importlib.import_module("kvcache.nn").__all__),
    ("models.rst", importlib.import_module("kvcache.models").__all__),
  ):
    assert not set(public) - listed(page), f"docs/api/{page} misses names"
