"""Tests of prompts in files: what a line may say, and what the examples do say."""

import pytest

from kvcache.command.prompts import make_prompt, PromptError, read_lines
from kvcache.serving.sampling import SamplingParams
from tests.fixtures.places import ROOT

DEFAULTS = {
  "system": None,
  "max_new_tokens": 9,
  "temperature": 0.0,
  "top_k": 0,
  "top_p": 1.0,
  "min_p": 0.0,
  "seed": 0,
}


def test_a_prompt_overrides_the_defaults():
  entry = {"prompt": "p", "max_new_tokens": 2, "temperature": 1, "top_k": 4, "seed": 5}
  prompt = make_prompt(entry, where="here", defaults=DEFAULTS)
  assert (prompt.text, prompt.max_new_tokens) == ("p", 2)
  assert prompt.sampling == SamplingParams(temperature=1, top_k=4, seed=5)
  assert make_prompt("p", where="here", defaults=DEFAULTS).max_new_tokens == 9


def test_bytes_that_are_no_text_are_refused():
  with pytest.raises(PromptError, match="prompt 1: prompt is not valid Unicode"):
    make_prompt("a\udcff", where="prompt 1", defaults=DEFAULTS)


def test_a_byte_order_mark_is_no_error(tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_bytes(
    b'\xef\xbb\xbf"a"\r\n"b\xe2\x80\xa8c"'
  )  # and a line separator inside
  assert [entry for _, entry in read_lines(file)] == ["a", "b\u2028c"]


def test_demo_prompts_share_a_long_system_prompt():
  prompts = [
    make_prompt(entry, where=where, defaults=DEFAULTS)
    for where, entry in read_lines(ROOT / "examples/prompts/demo.jsonl")
  ]
  systems = [prompt.system for prompt in prompts]
  shared = max((system for system in systems if system), key=systems.count)
  assert len(prompts) >= 16
  assert systems.count(shared) >= 12
  assert len(shared.split()) >= 150  # and no fewer tokens
  assert len({prompt.text for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/prompts").glob("*.jsonl")))
def test_example_prompts_are_valid(path):
  for where, entry in read_lines(path):
    make_prompt(entry, where=where, defaults=DEFAULTS)
