"""Breaks the library on purpose, one small change at a time; the tests must notice.

`make mutate ARGS="--sample 40 --seed 1"`, or for all mutants of a module
`make mutate ARGS="--modules blocks --sample 0"`. A mutant that no test notices
survives: it needs a test, or an entry in mutate_equivalent.toml that says why nothing
changes.

A runner of its own, because what costs here is starting JAX and compiling. Tools that
start a process per mutant (cosmic-ray) import JAX every time; mutmut forks a process in
which JAX already runs its threads, which do not survive it. Here the parent only
imports; each mutant is a fork of it that starts JAX, replaces one module by its changed
syntax tree, runs the module's own tests first and ends at the first failure. Programs
are compiled without optimisation, and those that a mutant leaves alone come from a
cache, which the first, unchanged run fills.
"""

import argparse
import ast
import collections
from collections.abc import Iterator, Sequence
import copy
import dataclasses
import importlib.abc
import importlib.util
import os
from pathlib import Path
import random
import signal
import sys
import time
import tomllib
import traceback
import warnings

# What every child needs, imported once. Nothing of ours: it may be the mutant.
import chex  # noqa: F401
import flax.nnx  # noqa: F401
import jax
import numpy  # noqa: F401
import pytest

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_name("mutate_equivalent.toml")
CACHE = ROOT / ".cache" / "mutate"
WALK = "tests/walks/test_walks.py::test_walks_agree_with_the_oracle"
VERBS = ("tests/test_context.py", "tests/verbs/test_lifecycle.py")
# The tests of each module, the quickest first.
TESTS: dict[str, tuple[str, ...]] = {
  "blocks": (
    "tests/parts/test_blocks.py",
    *VERBS,
    f"{WALK}[tiny]",
    "tests/verbs/test_scrubbing.py",  # what a pool handed out
  ),
  "sequences": ("tests/parts/test_sequences.py", *VERBS, f"{WALK}[tiny]"),
  "prefix": ("tests/parts/test_prefix.py", *VERBS, f"{WALK}[tiny]", f"{WALK}[cramped]"),
  "context": (
    *VERBS,
    "tests/observe/test_observe.py",
    "tests/verbs/test_arguments.py",
    "tests/test_config.py",
    "tests/hostile/test_hostile.py",
    "tests/serving/test_groups.py",
    "tests/serving/test_hybrid.py",
  ),
  "scheduler": (
    "tests/serving/test_scheduler.py",
    "tests/observe/test_history.py",
    "tests/serving/test_serve.py",
    "tests/serving/test_groups.py",
    "tests/serving/test_hybrid.py",
  ),
}

_COMPARISONS = {
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
}
_OPERATORS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Add,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
  ast.BitXor: ast.BitAnd,
  ast.LShift: ast.RShift,
  ast.RShift: ast.LShift,
}
_NAMES = {
  "min": "max",
  "max": "min",
  "minimum": "maximum",
  "maximum": "minimum",
  "any": "all",
  "all": "any",
  "add": "set",
  "argmin": "argmax",
  "argmax": "argmin",
  "cummax": "cummin",
  "cumsum": "cumprod",
  "zeros_like": "ones_like",
  "ones_like": "zeros_like",
}


Key = tuple[str, str, str, str, int]


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One change of one module.

  Attributes:
    module: Name of its file, wherever below `kvcache` it stands.
    index: Its place among the module's mutants.
    line: Where it is.
    function: What it is in.
    before: Source of what is changed.
    after: Source that stands there instead.
    nth: How many of the same mutants come before it in the function.
  """

  module: str
  index: int
  line: int
  function: str
  before: str
  after: str
  nth: int

  @property
  def key(self) -> Key:
    """What names it in the list of equivalent ones, wherever the line has moved."""
    return self.module, self.function, self.before, self.after, self.nth

  def __str__(self) -> str:
    return (
      f"{self.module}.py:{self.line} {self.function}: {self.before} -> {self.after}"
    )


def replacements(node: ast.AST) -> Iterator[ast.AST]:
  """The nodes that may stand in the place of one, each a small mistake."""
  if isinstance(node, ast.Compare):
    for i, op in enumerate(node.ops):
      if type(op) in _COMPARISONS:
        new = copy.deepcopy(node)
        new.ops[i] = _COMPARISONS[type(op)]()
        yield new
  elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
    new = copy.deepcopy(node)
    new.op = _OPERATORS[type(node.op)]()
    yield new
  elif isinstance(node, ast.BoolOp):
    new = copy.deepcopy(node)
    new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield new
  elif isinstance(node, ast.UnaryOp):
    yield copy.deepcopy(node.operand)
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield ast.Constant(not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, int):
    yield ast.Constant(node.value + 1)
  elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
    new = copy.deepcopy(node)
    new.attr = _NAMES[node.attr]
    yield new
  elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
    if node.func.attr == "where" and len(node.args) == 3:
      new = copy.deepcopy(node)
      new.args[1:] = new.args[:0:-1]
      yield new
    if node.func.attr == "replace":  # a field that is not updated
      for i in range(len(node.keywords)):
        new = copy.deepcopy(node)
        del new.keywords[i]
        yield new


def places(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
  """All nodes that run, with the name of the function they are in."""
  if isinstance(node, ast.Raise | ast.JoinedStr):
    return  # the wording of messages
  yield function, node
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    function = f"{function}.{node.name}".lstrip(".")
  skipped = {"annotation", "returns", "decorator_list", "bases"}
  if isinstance(node, ast.ClassDef):
    skipped.add("keywords")
  for field, value in ast.iter_fields(node):
    if field not in skipped:
      for child in value if isinstance(value, list) else [value]:
        if isinstance(child, ast.AST):
          yield from places(child, function)


class _Replace(ast.NodeTransformer):
  def __init__(self, old: ast.AST, new: ast.AST):
    self.old, self.new = old, new

  def visit(self, node: ast.AST) -> ast.AST:
    return self.new if node is self.old else self.generic_visit(node)


def path_of(module: str) -> Path:
  (path,) = (ROOT / "kvcache").rglob(f"{module}.py")
  return path


def variants(module: str) -> Iterator[tuple[Mutant, ast.Module, ast.AST, ast.AST]]:
  """Every mutant of a module, and how to make it."""
  tree = ast.parse(path_of(module).read_text("utf-8"))
  index, seen = 0, collections.Counter()
  for function, node in places(tree):
    for new in replacements(node):
      before, after = ast.unparse(node), ast.unparse(new)
      line = getattr(node, "lineno", 0)
      nth = seen[function, before, after]
      mutant = Mutant(module, index, line, function, before, after, nth)
      yield mutant, tree, node, new
      seen[function, before, after] += 1
      index += 1


def mutants(module: str) -> list[Mutant]:
  return [mutant for mutant, *_ in variants(module)]


def mutated(mutant: Mutant) -> ast.Module:
  """The syntax tree of the changed module."""
  _, tree, old, new = next(v for v in variants(mutant.module) if v[0] == mutant)
  return ast.fix_missing_locations(_Replace(old, new).visit(tree))


# --- In the child ---------------------------------------------------------------------


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Lets one module be imported from a syntax tree."""

  def __init__(self, module: str, tree: ast.Module):
    self.path = path_of(module)
    self.name = ".".join(self.path.relative_to(ROOT).with_suffix("").parts)
    self.code = compile(tree, str(self.path), "exec")

  def find_spec(self, fullname, path, target=None):
    if fullname != self.name:
      return None
    return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

  def exec_module(self, module):
    exec(self.code, vars(module))


class _Plugin:
  """Keeps the order of the test files, and the cache as it is."""

  def __init__(self, tests: Sequence[str], *, may_store: bool):
    self.files = [test.partition("::")[0] for test in tests]
    self.may_store = may_store

  @pytest.hookimpl(trylast=True)
  def pytest_collection_modifyitems(self, items):
    # JAX was imported by the parent, so it has not read what tests/conftest.py says.
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    least = 0.02 if self.may_store else 1e9
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    items.sort(key=lambda item: self.files.index(str(item.path.relative_to(ROOT))))


def run_tests(mutant: Mutant | None, tests: Sequence[str], log: Path) -> int:
  """Runs in a fork: the exit status of pytest, 0 if no test noticed."""
  with log.open("w") as out:
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
  jax.config.update("jax_platforms", "cpu")
  sys.path.insert(0, str(ROOT))
  os.chdir(ROOT)
  if mutant is not None:
    sys.meta_path.insert(0, _Importer(mutant.module, mutated(mutant)))
  options = ["-x", "-q", "-p", "no:xdist", "-m", "not slow"]
  plugin = _Plugin(tests, may_store=mutant is None)
  return int(pytest.main([*options, *tests], plugins=[plugin]))


# --- In the parent --------------------------------------------------------------------


@dataclasses.dataclass
class Job:
  mutant: Mutant | None
  log: Path
  started: float
  limit: float


def begin(mutant: Mutant | None, module: str, limit: float) -> tuple[int, Job]:
  tests = [t for t in TESTS[module] if (ROOT / t.partition("::")[0]).exists()]
  name = "unchanged" if mutant is None else str(mutant.index)
  log = CACHE / f"{module}_{name}.log"
  with warnings.catch_warnings():  # JAX warns of forks; it has not started yet
    warnings.simplefilter("ignore")
    pid = os.fork()
  if not pid:
    os.setsid()
    status = 70
    try:
      status = run_tests(mutant, tests, log)
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return pid, Job(mutant, log, time.monotonic(), limit)


def wait(jobs: dict[int, Job]) -> tuple[Job, str, float]:
  """Waits for one of the jobs: `(job, outcome, seconds)`."""
  while True:
    for pid, job in list(jobs.items()):
      seconds = time.monotonic() - job.started
      done, status = os.waitpid(pid, os.WNOHANG)
      if done:
        del jobs[pid]
        passed = os.waitstatus_to_exitcode(status) == 0
        return job, "survived" if passed else "killed", seconds
      if seconds > job.limit:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del jobs[pid]
        return job, "timeout", seconds
    time.sleep(0.2)


def known_equivalents() -> dict[Key, str]:
  if not EQUIVALENT.exists():
    return {}
  entries = tomllib.loads(EQUIVALENT.read_text("utf-8"))["mutant"]
  names = ("module", "function", "before", "after")
  return {(*(e[n] for n in names), e.get("nth", 0)): e["reason"] for e in entries}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
  parser.add_argument("--sample", type=int, default=30, help="per module; 0 for all")
  parser.add_argument("--seed", type=int, default=0, help="which ones are drawn")
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--only", type=int, nargs="+", help="indices in one module")
  parser.add_argument("--least", type=float, default=90.0, help="percent wanted")
  args = parser.parse_args()
  CACHE.mkdir(parents=True, exist_ok=True)

  equivalent = known_equivalents()
  limits, chosen = {}, []
  for module in args.modules:
    jobs = dict([begin(None, module, 3600.0)])
    job, outcome, seconds = wait(jobs)
    if outcome != "survived":
      print(f"{module}: the unchanged module fails its tests, see {job.log}")
      return 1
    limits[module] = 60.0 + 5.0 * seconds
    every = mutants(module)
    drawn = [m for m in every if m.key not in equivalent]
    if args.only is not None:
      drawn = [m for m in drawn if m.index in args.only]
    elif args.sample:
      num = min(args.sample, len(drawn))
      drawn = random.Random(args.seed).sample(drawn, num)
    print(f"{module}: {len(drawn)} of {len(every)} mutants, {seconds:.0f} s unchanged")
    chosen += sorted(drawn, key=lambda m: m.index)

  score = {module: [0, 0] for module in args.modules}
  survivors, waiting, jobs = [], chosen[::-1], {}
  while waiting or jobs:
    while waiting and len(jobs) < args.jobs:
      mutant = waiting.pop()
      pid, job = begin(mutant, mutant.module, limits[mutant.module])
      jobs[pid] = job
    job, outcome, seconds = wait(jobs)
    mutant = job.mutant
    score[mutant.module][0] += outcome != "survived"
    score[mutant.module][1] += 1
    print(f"{outcome:8} {seconds:4.0f} s  [{mutant.index}] {mutant}", flush=True)
    if outcome == "survived":
      survivors.append(mutant)
    else:
      job.log.unlink(missing_ok=True)

  print()
  for mutant in survivors:
    print(f"survived: [{mutant.index}] {mutant}")
  for module, (killed, num) in score.items():
    print(
      f"{module:10} {killed:4} of {num:4} noticed, {100 * killed / max(num, 1):.1f} %"
    )
  killed, num = (sum(pair[i] for pair in score.values()) for i in (0, 1))
  percent = 100 * killed / max(num, 1)
  print(f"{'all':10} {killed:4} of {num:4} noticed, {percent:.1f} %")
  return int(percent < args.least)


if __name__ == "__main__":
  sys.exit(main())
