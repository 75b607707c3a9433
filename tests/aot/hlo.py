"""Reads the optimised HLO of a compiled program: what it copies, what it scans.

XLA has inserted every copy it needs by then. What is left to find are instructions
outside of fusions whose result is a whole array: each writes all of it, unless it is
plumbing that moves nothing (`_PLUMBING`) or an update in place (`_UPDATES`).
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_PLUMBING = {
  "bitcast",
  "call",
  "conditional",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "tuple",
  "while",
}
_UPDATES = {"scatter", "dynamic-update-slice"}
_MOVES = {
  "bitcast",
  "concatenate",
  "constant",
  "convert",
  "copy",
  "dynamic-slice",
  "parameter",
  "reshape",
  "slice",
  "transpose",
  "tuple",
}
_SCANS = {"reduce", "reduce-window", "sort", "scan", "map", "convolution", "dot"}
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>\S+) = (?P<rest>.+)$")
_ARRAY = re.compile(r"[a-z]+[0-9a-z]*\[(?P<dims>[0-9,]*)\]")
_CALLEES = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ALIAS = re.compile(r"\{(?P<output>[0-9]*)\}: \((?P<argument>[0-9]+), \{\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """One instruction.

  Attributes:
    name: Unique in its computation.
    opcode: Such as `"fusion"`.
    sizes: Elements of each array of the result, tuples flattened.
    operands: Names, in the same computation.
    callees: Computations it runs, by role (`calls`, `body`, `condition` ...).
    op_name: Where it comes from: the JAX primitives and named scopes around it.
    aliases: For each result of a custom call that is an operand's buffer, its index.
    computation: The computation it stands in.
    is_root: Whether it is the result of that.
  """

  name: str
  opcode: str
  sizes: tuple[int, ...]
  operands: tuple[str, ...]
  callees: dict[str, str]
  op_name: str
  aliases: dict[int, int]
  computation: str
  is_root: bool

  @property
  def num_elements(self) -> int:
    """Elements of its largest array."""
    return max(self.sizes, default=0)

  def __str__(self) -> str:
    """Returns what a failed test shows."""
    return f"{self.opcode} {self.name} {list(self.sizes)} of {self.op_name!r}"


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: The instructions of each computation, in order.
    entry: Name of the computation that is the program.
    aliases: For each output that is an argument's buffer, the argument's index.
  """

  computations: dict[str, tuple[Instruction, ...]] = dataclasses.field(repr=False)
  entry: str
  aliases: dict[int, int] = dataclasses.field(repr=False)

  @functools.cached_property
  def _by_name(self) -> dict[tuple[str, str], Instruction]:
    return {
      (i.computation, i.name): i for body in self.computations.values() for i in body
    }

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """The instructions whose results it reads."""
    found = (
      self._by_name.get((instruction.computation, name))
      for name in instruction.operands
    )
    return [operand for operand in found if operand is not None]

  def root(self, computation: str) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in self.computations[computation] if i.is_root)

  def walk(
    self, computation: str | None = None, *, into_fusions: bool = False
  ) -> Iterator[Instruction]:
    """All instructions that a computation runs, those of its loops and calls included.

    Args:
      computation: The entry if omitted.
      into_fusions: Whether to list what is computed inside of fusions, too.
    """
    seen, todo = set(), [computation or self.entry]
    while todo:
      name = todo.pop()
      if name in seen:
        continue
      seen.add(name)
      for instruction in self.computations[name]:
        yield instruction
        is_scalar = instruction.opcode not in ("call", "while", "conditional", "fusion")
        if is_scalar or (instruction.opcode == "fusion" and not into_fusions):
          continue
        todo.extend(instruction.callees.values())

  def whiles(self, computation: str | None = None) -> list[Instruction]:
    """The loops of a computation, without those inside of loops."""
    body = self.computations[computation or self.entry]
    return [i for i in body if i.opcode == "while"]

  def count(self, opcode: str, computation: str | None = None) -> int:
    """How many instructions of a kind there are, also in fusions and loops."""
    walk = self.walk(computation, into_fusions=True)
    return sum(i.opcode == opcode for i in walk)

  def is_in_place(self, instruction: Instruction, min_elements: int = 0) -> bool:
    """Whether it only updates those arrays of its operands that are its results.

    Args:
      instruction: Any.
      min_elements: Smaller results do not count.
    """
    if instruction.opcode == "custom-call":
      large = {i for i, n in enumerate(instruction.sizes) if n >= min_elements}
      return large <= instruction.aliases.keys()
    if instruction.opcode != "fusion":
      return self._is_update(instruction)
    root = self.root(instruction.callees["calls"])
    parts = self.operands(root) if root.opcode == "tuple" else [root]
    return all(self._is_update(i) for i in parts if i.num_elements >= min_elements)

  def _is_update(self, part: Instruction) -> bool:
    while part.opcode == "bitcast":
      (part,) = self.operands(part)
    return part.opcode in _UPDATES and self._is_given(self.operands(part)[0])

  def _is_given(self, target: Instruction) -> bool:
    """Whether an updated array comes into a fusion and is not computed in it."""
    while target.opcode == "bitcast":
      (target,) = self.operands(target)
    return target.opcode == "parameter" or target.computation not in self._fused

  @functools.cached_property
  def _fused(self) -> set[str]:
    return {i.callees["calls"] for i in self._by_name.values() if i.opcode == "fusion"}

  def rewrites(
    self, min_elements: int, computation: str | None = None
  ) -> list[Instruction]:
    """Instructions that write every element of an array of at least `min_elements`."""
    return [
      i
      for i in self.walk(computation)
      if i.num_elements >= min_elements
      and i.opcode not in _PLUMBING
      and not self.is_in_place(i, min_elements)
    ]

  def reads(
    self, min_elements: int, computation: str | None = None
  ) -> list[Instruction]:
    """Instructions outside of fusions, once per array of `min_elements` they are given.

    Some read little of it, such as gathers.
    """
    return [
      i
      for i in self.walk(computation)
      if i.opcode not in _PLUMBING
      for o in self.operands(i)
      if o.num_elements >= min_elements
    ]

  def moves(self, computation: str | None = None) -> list[Instruction]:
    """Instructions that compute nothing: their results are their operands' elements.

    Of those that a GPU runs beside others (`fusion-start`), what is returned is the
    result: the root of what they call.
    """
    found = []
    for i in self.walk(computation):
      if i.opcode in ("fusion", "fusion-start", "async-start"):
        body = self.computations[i.callees["calls"]]
        if all(part.opcode in _MOVES or part.num_elements <= 1 for part in body):
          found.append(self.root(i.callees["calls"]))
      elif i.opcode in _MOVES - _PLUMBING - {"constant"}:
        found.append(i)
    return found

  def scans(
    self, min_elements: int, computation: str | None = None
  ) -> list[Instruction]:
    """Instructions that read every element of an array of at least `min_elements`."""
    return [
      i
      for i in self.walk(computation, into_fusions=True)
      if i.opcode in _SCANS
      and any(o.num_elements >= min_elements for o in self.operands(i))
    ]


def read(text: str) -> Module:
  """Parses `compiled.as_text()`."""
  header, _, _ = text.partition("\n")
  computations: dict[str, list[Instruction]] = {}
  entry = current = ""
  for line in text.splitlines():
    if assignment := _ASSIGNMENT.match(line):
      computations[current].append(_instruction(assignment, current))
    elif start := _HEADER.match(line):
      current = start["name"]
      computations[current] = []
      entry = current if start["entry"] else entry
  return Module(
    {name: tuple(body) for name, body in computations.items()}, entry, _aliases(header)
  )


def _aliases(text: str, key: str = "input_output_alias={") -> dict[int, int]:
  if key not in text:
    return {}
  table = text[text.index(key) + len(key) - 1 :]
  table = table[: _closing(table) + 1]
  found = (m.group("output", "argument") for m in _ALIAS.finditer(table))
  return {int(output or 0): int(argument) for output, argument in found}


def _instruction(line: re.Match[str], computation: str) -> Instruction:
  rest = line["rest"]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest)
  operands, attributes = rest[: end - 1], rest[end:]
  callees = dict(_CALLEES.findall(attributes))
  if branches := _BRANCHES.search(attributes):
    names = branches[1].replace("%", "").split(", ")
    callees |= {f"branch {i}": name for i, name in enumerate(names)}
  op_name = _OP_NAME.search(attributes)
  return Instruction(
    name=line["name"],
    opcode=opcode,
    sizes=tuple(
      math.prod(int(n) for n in m["dims"].split(",") if n)
      for m in _ARRAY.finditer(shape)
    ),
    operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
    callees=callees,
    op_name=op_name[1] if op_name else "",
    aliases=_aliases(attributes, "output_to_operand_aliasing={"),
    computation=computation,
    is_root=bool(line["root"]),
  )


def _closing(text: str) -> int:
  """Index of the bracket that closes the one that `text` starts with."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter in "({") - (letter in ")}")
    if depth == 0:
      return index
  raise ValueError(f"brackets never close: {text[:80]}")
