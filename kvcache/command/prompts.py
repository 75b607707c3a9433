"""Prompts for the command line: from arguments and from files of JSON lines.

A line is a string, or an object with `prompt` and any of the other `KEYS`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any

from kvcache.serving.sampling import SamplingParams

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "seed")
KEYS = ("prompt", "system", "max_new_tokens", *SAMPLING_KEYS)


class PromptError(ValueError):
  """A prompt cannot be used; the message is one line and says where it stands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """One request in words.

  Attributes:
    text: What the user says.
    where: Where it was found, for messages: `"prompt 2"` or `"prompts.jsonl line 3"`.
    system: The system prompt of a chat, or None.
    max_new_tokens: Output tokens wanted.
    sampling: How they are chosen.
  """

  text: str
  where: str
  system: str | None
  max_new_tokens: int
  sampling: SamplingParams


def make_prompt(
  entry: str | Mapping[str, Any], *, where: str, defaults: Mapping[str, Any]
) -> Prompt:
  """Makes a prompt of a string or of an object with `KEYS`.

  Args:
    entry: What an argument or a line says.
    where: Where it was found.
    defaults: Values of all `KEYS` but `prompt`, for what the entry does not say.

  Raises:
    PromptError: The entry has an unknown key, a wrong type or a value out of range, or
      its text is empty.
  """
  if isinstance(entry, str):
    entry = {"prompt": entry}
  if not isinstance(entry, Mapping):
    raise PromptError(f"{where}: expected a string or an object, got {_shown(entry)}")
  if unknown := sorted(entry.keys() - set(KEYS)):
    known = ", ".join(KEYS)
    raise PromptError(f"{where}: unknown key {_shown(unknown[0])}; known are {known}")
  if "prompt" not in entry:
    raise PromptError(f'{where}: the object has no "prompt"')
  values = {**defaults, **entry}
  text, system, wanted = values["prompt"], values["system"], values["max_new_tokens"]
  for key, value in (("prompt", text), ("system", system or "")):
    if not isinstance(value, str):
      raise PromptError(f"{where}: {key} must be a string, got {_shown(value)}")
    if not _is_unicode(value):
      raise PromptError(f"{where}: {key} is not valid Unicode")
  if not text.strip():
    raise PromptError(f"{where} is empty")
  if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
    raise PromptError(
      f"{where}: max_new_tokens must be a positive integer, got {_shown(wanted)}"
    )
  try:
    sampling = SamplingParams(**{key: values[key] for key in SAMPLING_KEYS})
  except ValueError as error:
    raise PromptError(f"{where}: {error}") from error
  return Prompt(
    text=text, where=where, system=system, max_new_tokens=wanted, sampling=sampling
  )


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields the JSON value of each line that is not blank, with where it stands.

  Raises:
    PromptError: The file cannot be read, or a line is not JSON.
  """
  try:
    # The codec drops the byte order mark that some editors write.
    text = pathlib.Path(path).read_text("utf-8-sig")
  except OSError as error:
    raise PromptError(f"cannot read {path}: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise PromptError(f"{path} is not UTF-8: {error.reason}") from error
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path} line {number}"
    try:
      yield where, json.loads(line)
    except json.JSONDecodeError as error:
      raise PromptError(f"{where} is not JSON: {error.msg}") from error
    except RecursionError as error:
      raise PromptError(f"{where} is nested too deeply") from error


def _is_unicode(text: str) -> bool:
  """Whether there are no lone surrogates, from an argument's bytes or a JSON escape."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def _shown(value: object) -> str:
  text = ascii(value)
  return text if len(text) <= 40 else text[:37] + "..."
