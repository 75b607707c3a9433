"""The house rules that no linter knows: where imports point, and how big a room is."""

import ast
from graphlib import CycleError, TopologicalSorter
import inspect
from pathlib import Path
import re
import sys

import pytest

import kvcache

ROOT = Path(__file__).parents[1]
PACKAGES = ("kvcache", "pallas_kernels")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "scripts")
MAX_LINES = 600
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}

# The five parts of a Context. They never import each other.
PARTS = {"blocks", "sequences", "prefix", "kv", "states"}
# Floors of kvcache, the ground floor first. A module imports from its own floor or from
# floors below, never from above. `kvcache` is the front door, kvcache/__init__.py.
FLOORS = (
  {"printing", "config", "errors", "loops", "ragged", "ring", "hashing", "arguments"},
  PARTS,
  {"state_rows", "windows"},
  {"metadata"},
  {"publishing", "releasing"},
  {"context"},
  {"sharding", "scrubbing"},
  {"attention_plans"},
  {"lifecycle", "stepping"},
  {"attention", "recurrent", "checks", "observe", "requests", "sampling"},
  {"handoff", "terminal"},
  {"scheduler", "rows_of_others", "speculation", "draft_model"},
  {"serve", "search"},
  {"checkpoint"},
  {"generation"},
  {"kvcache"},
  {"nn"},
  {"models"},
  {"plan", "prompts", "report"},
  {"cli"},
  {"__main__"},
)


def python_files(*folders: str) -> list[Path]:
  return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in python_files(*PACKAGES)}


def imports(module: str, path: Path, source: str) -> set[str]:
  """All modules that `source` names in an import, wherever in the file it stands."""
  package = module if path.name == "__init__.py" else module.rpartition(".")[0]
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base]).strip(".")
      names = {f"{base}.{alias.name}" for alias in node.names}
      found |= names & MODULES.keys() | ({base} if names - MODULES.keys() else set())
  return found - {module}


IMPORTS = {m: imports(m, p, p.read_text("utf-8")) for m, p in MODULES.items()}


def room(module: str) -> str:
  """`kvcache.models.gguf` -> `models`; `kvcache` -> `kvcache`."""
  return module.split(".")[:2][-1]


def floor(module: str) -> int:
  """Counted from 0. Modules without a floor are in the cellar; one test names them."""
  return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), -1)


def ours(module: str, package: str) -> bool:
  return module == package or module.startswith(package + ".")


def test_every_module_of_kvcache_has_a_floor():
  rooms = {room(module) for module in MODULES if ours(module, "kvcache")}
  homeless = sorted(rooms - set().union(*FLOORS))
  assert not homeless, f"give {homeless} a place in FLOORS"


def test_imports_never_point_up():
  upward = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if ours(module, "kvcache") and ours(target, "kvcache")
    if floor(target) > floor(module)
  ]
  assert not upward


def test_parts_never_import_each_other():
  crossing = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if ours(module, "kvcache") and ours(target, "kvcache")
    if {room(module), room(target)} <= PARTS and room(module) != room(target)
  ]
  assert not crossing


def test_imports_have_no_circles():
  graph = {m: targets & MODULES.keys() for m, targets in IMPORTS.items()}
  try:
    TopologicalSorter(graph).prepare()
  except CycleError as error:
    pytest.fail(f"circular import: {' <- '.join(error.args[1])}")


def test_kernels_import_jax_and_nothing_of_ours():
  allowed = {"pallas_kernels", "jax", "jaxlib", "numpy", *sys.stdlib_module_names}
  strangers = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if ours(module, "pallas_kernels") and target.split(".")[0] not in allowed
  ]
  assert not strangers


def test_only_attention_recurrent_and_attention_plans_import_kernels():
  importers = {
    room(module)
    for module, targets in IMPORTS.items()
    if ours(module, "kvcache") and any(ours(t, "pallas_kernels") for t in targets)
  }
  assert importers <= {"attention", "attention_plans", "recurrent"}


def test_packages_do_not_import_tests_or_benchmarks():
  outside = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if target.split(".")[0] in {"tests", "benchmarks", "scripts", "pytest"}
  ]
  assert not outside


@pytest.mark.parametrize(
  ("source", "found"),
  [
    ("import kvcache.blocks", {"kvcache.blocks"}),
    ("from kvcache import blocks, init", {"kvcache.blocks", "kvcache"}),
    ("from .blocks import allocate", {"kvcache.blocks"}),
    ("def f():\n  from . import config", {"kvcache.config"}),
    ("from jax import numpy as jnp", {"jax"}),
  ],
)
def test_imports_are_seen(monkeypatch, source, found):
  monkeypatch.setitem(MODULES, "kvcache.blocks", ROOT / "kvcache/blocks.py")
  monkeypatch.setitem(MODULES, "kvcache.config", ROOT / "kvcache/config.py")
  assert imports("kvcache.context", ROOT / "kvcache/context.py", source) == found


def test_files_can_be_read_in_one_sitting():
  lengths = {p: len(p.read_text("utf-8").splitlines()) for p in python_files(*FOLDERS)}
  assert not {str(p): n for p, n in lengths.items() if n > MAX_LINES}


def test_files_are_named_after_a_noun():
  assert not [str(p) for p in python_files(*FOLDERS) if p.name in FORBIDDEN_NAMES]


def docstrings(source: str) -> list[str]:
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
  return [doc for node in nodes if (doc := ast.get_docstring(node))]


def letters(shapes: str) -> set[str]:
  """Dimensions in the code of a docstring: `[S, 3 N, Dv]` has S, N and Dv."""
  code = " ".join(re.findall(r"`([^`]*)`", shapes))
  inside = " ".join(re.findall(r"\[([^\[\]]*)\]", code))
  return set(re.findall(r"(?<![\w.'\"])[A-Z][a-z]?(?![\w.'\"])", inside))


GLOSSARY = set(re.findall(r"(?<!\S)([A-Z][a-z]?)  (?=[a-z])", kvcache.__doc__ or ""))


def test_the_glossary_is_read():
  assert set("SPTQANLKHD") <= GLOSSARY and "Dv" in GLOSSARY
  assert letters("`[S, 3 N]` and `k [T, K, Dv]`, not [X] or `f(y[0])`") == {
    *("S", "N", "T", "K", "Dv")
  }


def test_shapes_use_the_letters_of_the_glossary():
  """Or letters that some docstring of the file introduces: `X`, alone in backticks."""
  strangers = []
  for path in MODULES.values():
    docs = docstrings(path.read_text("utf-8"))
    own = set(re.findall(r"`([A-Z][a-z]?)(?: = [^`]*)?`", " ".join(docs)))
    used = set().union(*map(letters, docs))
    strangers += [f"{path}: {letter}" for letter in sorted(used - GLOSSARY - own)]
  assert not strangers


def test_public_names_exist_once_and_are_documented():
  assert len(kvcache.__all__) == len(set(kvcache.__all__))
  undocumented = []
  for name in kvcache.__all__:
    value = getattr(kvcache, name)
    if not (inspect.isclass(value) or inspect.ismodule(value) or callable(value)):
      continue  # a constant; its comment documents it
    doc = value.__doc__ or ""
    if not doc.strip() or doc.startswith(f"{name}("):  # what dataclass writes itself
      undocumented.append(name)
  assert not undocumented
