"""The mutants that no test need notice still exist; the runner makes what it says."""

import ast

import pytest

from scripts import mutate


@pytest.mark.parametrize("module", mutate.TESTS)
def test_a_mutant_differs_in_what_it_names(module):
  every = mutate.mutants(module)
  assert len(every) > 25
  plain = ast.unparse(ast.parse(mutate.path_of(module).read_text("utf-8")))
  for mutant in every[:: len(every) // 5]:
    assert ast.unparse(mutate.mutated(mutant)) != plain
    assert mutant.before != mutant.after


def test_equivalent_mutants_are_mutants():
  known = mutate.known_equivalents()
  keys = {mutant.key for module in mutate.TESTS for mutant in mutate.mutants(module)}
  assert not set(known) - keys
  assert all(known.values())


@pytest.mark.parametrize(
  ("source", "mutants"),
  [
    ("a < b", ["a <= b"]),
    ("~a & b", ["~a | b", "a & b"]),
    ("jnp.where(c, x, y)", ["jnp.where(c, y, x)"]),
    ("s.replace(a=x, b=y)", ["s.replace(b=y)", "s.replace(a=x)"]),
    ("jnp.max(x)", ["jnp.min(x)"]),
    ("x[3]", ["x[4]"]),
    ("f(flag=True)", ["f(flag=False)"]),
    ("raise ValueError(f'{a + b}')", []),
  ],
)
def test_mistakes_are_small(source, mutants):
  tree = ast.parse(source)
  made = []
  for _, old in mutate.places(tree):
    for new in mutate.replacements(old):
      again = ast.parse(source)
      twin = next(
        node
        for node in ast.walk(again)
        if type(node) is type(old) and ast.dump(node) == ast.dump(old)
      )
      made.append(ast.unparse(mutate._Replace(twin, new).visit(again)))
  assert made == mutants
