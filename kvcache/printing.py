"""How values print: in a line, with the numbers that a reader can take in."""

from collections.abc import Hashable, Mapping
import dataclasses
import enum
from typing import Any, ClassVar

import flax.struct
import jax
from jax import Array
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

_MAX_SHOWN = 16
"""Elements of an array that are shown one by one."""


class Node(flax.struct.PyTreeNode):
  """A dataclass of arrays that is a pytree, and prints long arrays as their type.

  Attributes:
    codes: Field -> the enum whose codes it has, so that it prints their names.
  """

  codes: ClassVar[Mapping[str, type[enum.IntEnum]]] = {}

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(repr=False, **kwargs)

  def __repr__(self) -> str:
    values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
    fields = (f"{name}={show(value, self.codes.get(name))}" for name, value in values)
    return f"{type(self).__name__}({', '.join(fields)})"


def count(num: int, thing: str) -> str:
  """Returns `"1 block"`, `"1,024 blocks"`."""
  return f"{num:,} {thing}{'s' * (num != 1)}"


def show(value: object, codes: type[enum.IntEnum] | None = None) -> str:
  """Returns a value as a field of a node shows it: `7`, `[1, 2]`, `int32[64, 256]`.

  Args:
    value: Whatever a field may hold.
    codes: The enum whose members a value of at most one dimension names.
  """
  if isinstance(value, tuple) and type(value) is tuple:
    return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
  if isinstance(value, dict):
    return f"{{{', '.join(f'{key!r}: {show(x)}' for key, x in value.items())}}}"
  if isinstance(value, jax.ShapeDtypeStruct):
    return _type_of(value)
  if not isinstance(value, Array | np.ndarray | np.generic):
    return repr(value)
  if (reason := obstacle([value])) is not None:
    return f"{_type_of(value)} ({reason})"
  if value.size > _MAX_SHOWN or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    num_true = f" ({np.sum(value)} true)" if value.dtype == bool else ""
    return _type_of(value) + num_true
  if codes is not None:
    names = [codes(code).name for code in np.ravel(value)]
    return f"[{', '.join(names)}]" if value.ndim else names[0]
  return repr(np.asarray(value).tolist())


def show_set(description: Any, **implied: Any) -> str:
  """Returns a dataclass of static facts, without fields that have their defaults.

  Args:
    description: The dataclass.
    **implied: Field -> what its default came to.
  """
  shown: list[str] = []
  for field in dataclasses.fields(description):
    value = getattr(description, field.name)
    default = implied.get(field.name, field.default)
    if default is dataclasses.MISSING or value != default:
      shown.append(f"{field.name}={show_fact(value)}")
  return f"{type(description).__name__}({', '.join(shown)})"


def show_runs(values: tuple[Hashable, ...]) -> str:
  """Returns a tuple as what repeats in it: `((a,) * 5 + (b,)) * 4 + (a,)`."""
  kinds = list(dict.fromkeys(values))
  texts = list(map(repr, kinds))
  return " + ".join(_runs([kinds.index(value) for value in values], texts)) or "()"


def _runs(numbers: list[int], texts: list[str]) -> list[str]:
  """Tuples whose sum names `texts` in the order of `numbers`."""
  parts: list[str] = []
  alone: list[str] = []

  def close() -> None:
    if alone:
      parts.append(f"({', '.join(alone)}{',' * (len(alone) == 1)})")
      alone.clear()

  while numbers:
    periods = range(1, len(numbers) // 2 + 1)
    repeats, period = max(
      ((num, n) for n in periods if (num := _repeats(numbers, n)) > 1),
      key=lambda run: run[0] * run[1],
      default=(1, 1),
    )
    if repeats == 1:
      alone.append(texts[numbers[0]])
      numbers = numbers[1:]
      continue
    close()
    pattern = _runs(numbers[:period], texts)
    text = " + ".join(pattern)
    parts.append(f"({text}) * {repeats}" if pattern[1:] else f"{text} * {repeats}")
    numbers = numbers[repeats * period :]
  close()
  return parts


def _repeats(numbers: list[int], period: int) -> int:
  """How often the first `period` numbers stand at the front, one after another."""
  num = 1
  while numbers[num * period : (num + 1) * period] == numbers[:period]:
    num += 1
  return num


def show_fact(value: object) -> str:
  """Returns a field of a dataclass of static facts as `show_set` shows it."""
  if isinstance(value, tuple):
    return show_runs(value)
  return repr(value.name) if isinstance(value, np.dtype) else repr(value)


def obstacle(leaves: list[Any]) -> str | None:
  """Why arrays cannot be read on the host, in a word or two; None if they can."""
  if any(isinstance(leaf, Tracer) for leaf in leaves):
    return "traced"
  arrays = [leaf for leaf in leaves if isinstance(leaf, Array)]
  if any(array.is_deleted() for array in arrays):
    return "donated"
  if not all(x.is_fully_addressable or x.is_fully_replicated for x in arrays):
    return "on other hosts"
  return None


def _type_of(array: Any) -> str:
  return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
