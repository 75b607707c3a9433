"""The house rules that no linter knows: where imports point, and how big a room is."""

import ast
import collections
from graphlib import CycleError, TopologicalSorter
import inspect
from pathlib import Path, PurePosixPath
import re
import subprocess
import sys

import pytest

import kvcache
from tests.fixtures.places import ROOT

PACKAGES = ("kvcache", "pallas_kernels")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "scripts")
MAX_LINES = 600
MAX_ENTRIES = 20
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}

# The five parts that hold the state of a Context. They never import each other.
STATEFUL = {
  f"kvcache.parts.{x}" for x in ("blocks", "sequences", "prefix", "kv", "states")
}
# Floors of kvcache, the ground floor first: its wings, and the files beside them. What
# stands on a floor imports from floors below, never from above, nor from its
# neighbours. `kvcache` is the front door, kvcache/__init__.py.
FLOORS = (
  {"printing"},
  {"config", "errors"},
  {"parts"},
  {"context"},
  {"verbs"},
  {"nn", "observe"},
  {"serving", "models"},
  {"kvcache"},
  {"command"},
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


def wing(module: str) -> str:
  """`kvcache.models.gguf` -> `models`; `kvcache` -> `kvcache`."""
  return module.split(".")[:2][-1]


def floor(module: str) -> int:
  """Counted from 0. Modules without a floor are in the cellar; one test names them."""
  return next((i for i, wings in enumerate(FLOORS) if wing(module) in wings), -1)


def ours(module: str, package: str) -> bool:
  return module == package or module.startswith(package + ".")


def test_every_module_of_kvcache_has_a_floor():
  wings = {wing(module) for module in MODULES if ours(module, "kvcache")}
  homeless = sorted(wings - set().union(*FLOORS))
  assert not homeless, f"give {homeless} a place in FLOORS"


def test_imports_point_down_or_stay_in_the_wing():
  astray = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if ours(module, "kvcache") and ours(target, "kvcache")
    if wing(target) != wing(module) and floor(target) >= floor(module)
  ]
  assert not astray


def test_parts_never_import_each_other():
  crossing = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in targets
    if {module, target} <= STATEFUL
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
    module
    for module, targets in IMPORTS.items()
    if ours(module, "kvcache") and any(ours(t, "pallas_kernels") for t in targets)
  }
  doors = ("attention", "attention_plans", "recurrent")
  assert importers <= {f"kvcache.verbs.{door}" for door in doors}


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
    ("import kvcache.parts.blocks", {"kvcache.parts.blocks"}),
    ("from kvcache import config, init", {"kvcache.config", "kvcache"}),
    ("from kvcache.parts import blocks", {"kvcache.parts.blocks"}),
    ("from .errors import Status", {"kvcache.errors"}),
    ("def f():\n  from . import config", {"kvcache.config"}),
    ("from jax import numpy as jnp", {"jax"}),
  ],
)
def test_imports_are_seen(source, found):
  assert imports("kvcache.context", ROOT / "kvcache/context.py", source) == found


def test_files_can_be_read_in_one_sitting():
  lengths = {p: len(p.read_text("utf-8").splitlines()) for p in python_files(*FOLDERS)}
  assert not {str(p): n for p, n in lengths.items() if n > MAX_LINES}


def test_folders_can_be_seen_at_a_glance():
  """What git keeps, so that caches and environments do not count."""
  kept = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
  entries = collections.defaultdict(set)
  for path in map(PurePosixPath, kept):
    for entry in (path, *path.parents[:-1]):
      entries[entry.parent].add(entry.name)
  numbers = {str(folder): len(names) for folder, names in entries.items()}
  assert not {folder: num for folder, num in numbers.items() if num > MAX_ENTRIES}


def test_wings_say_what_lives_there():
  """In the first sentence of their docstrings."""
  for path in (ROOT / "kvcache").glob("*/__init__.py"):
    first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
    assert first.endswith("."), path


def test_tests_have_the_wings_of_the_code():
  wings = {path.parent.name for path in (ROOT / "kvcache").glob("*/__init__.py")}
  wings.add("pallas_kernels")
  assert not [wing for wing in wings if not (ROOT / "tests" / wing).is_dir()]


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
