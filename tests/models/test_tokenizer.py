"""Text to ids and back: against Hugging Face's tokenizer, streamed, and in chats."""

import json

import pytest

from kvcache.models import demo_path, errors, LoadError, TextStream, Tokenizer
from kvcache.models.gguf import read_gguf
from tests.fixtures.places import GOLDENS

GOLDEN = json.loads((GOLDENS / "smollm2_tokenizer.json").read_text("utf-8"))
TEXTS = [case["text"] for case in GOLDEN["texts"]]


@pytest.fixture(scope="module")
def metadata() -> dict:
  return dict(read_gguf(demo_path()).metadata)


@pytest.fixture(scope="module")
def tokenizer(metadata) -> Tokenizer:
  return Tokenizer.from_gguf(metadata, source="demo")


def tiny(**changes) -> Tokenizer:
  """Letters a to e, three merges, and special tokens."""
  tokens = ["a", "b", "c", "d", "e", "ab", "abc", "Ġ", "1", "<s>", "<|x|>", "<user>"]
  settings = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": tokens,
    "merges": ["a b", "ab c"],
    "token_type": [1] * 9 + [3, 3, 4],
    "bos_token_id": 9,
    "eos_token_id": 10,
  }
  settings |= changes
  metadata = {
    f"tokenizer.ggml.{key}": value
    for key, value in settings.items()
    if value is not None
  }
  return Tokenizer.from_gguf(metadata, source="tiny")


def test_texts_become_the_ids_of_hugging_face(tokenizer):
  for case in GOLDEN["texts"]:
    assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
  assert any(chr(0x1F600) in text for text in TEXTS)


def test_ids_become_the_text_again(tokenizer):
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_special_tokens_are_skipped_on_request(tokenizer):
  ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
  assert tokenizer.decode(ids) == "user\nhi"
  assert tokenizer.token_id("<|im_end|>") == 2
  assert tokenizer.token_id("no such token") is None
  assert tokenizer.vocab_size == 49152


def test_merges_are_applied_in_their_order():
  assert tiny().encode("abcab") == [6, 5]
  tokens = ["a", "b", "c", "d", "e", "ab", "bc", "Ġ", "1", "<s>", "<|x|>", "<user>"]
  assert tiny(merges=["b c", "a b"], tokens=tokens).encode("abc") == [0, 6]


def test_special_tokens_are_whole_and_the_first_one_is_added_on_request():
  assert tiny().encode("ab<|x|>c<user>") == [5, 10, 2, 11]
  assert tiny(add_bos_token=True).encode("ab") == [9, 5]
  assert tiny(add_bos_token=True).encode("ab", add_special=False) == [5]
  assert tiny().decode([5, 10, 11]) == "ab<user>"  # user-defined tokens are text
  assert tiny().special_tokens == {"bos_token": "<s>", "eos_token": "<|x|>"}


def test_a_word_that_is_a_token_may_skip_the_merges():
  tokens = ["a", "b", "c", "d", "bc", "ab", "abc", "Ġ", "1", "<s>", "<|x|>", "<user>"]
  kwargs = {"merges": ["b c"], "tokens": tokens, "add_bos_token": False}
  assert tiny(**kwargs).encode("abc") == [0, 4]
  assert tiny(**kwargs, pre="llama-bpe").encode("abc") == [6]


def test_numbers_are_cut_as_the_vocabulary_was_trained():
  digits = [str(digit) for digit in range(10)]
  settings = {
    "tokens": [*digits, "12", "123", "34", "Ġ", "Ġ1"],
    "merges": ["1 2", "12 3", "3 4", "Ġ 1"],
    "token_type": None,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  cuts = {
    "gpt-2": [11, 4],  # the merges alone decide
    "llama-bpe": [11, 4],  # up to three digits
    "qwen2": [1, 2, 3, 4],  # one digit each
    "smollm": [1, 2, 3, 4],
  }
  for pre, expected in cuts.items():
    assert tiny(pre=pre, **settings).encode("1234") == expected, pre
  assert tiny(pre="gpt-2", **settings).encode(" 1") == [14]
  assert tiny(pre="smollm", **settings).encode(" 1") == [13, 1]


def test_vocabularies_of_other_kinds_are_refused():
  with pytest.raises(LoadError, match="tiny: tokenizer 'llama' is not supported"):
    tiny(model="llama")
  with pytest.raises(LoadError, match="tiny: pre-tokenizer 'xyz' is not supported"):
    tiny(pre="xyz")
  with pytest.raises(LoadError, match="pre-tokenizer 'default'"):
    tiny(pre=None)
  with pytest.raises(LoadError, match="tiny has a damaged vocabulary"):
    tiny(merges=["a z"])
  with pytest.raises(LoadError, match="tiny has no vocabulary"):
    tiny(tokens=None)


def test_a_folder_gives_the_same_tokenizer(tokenizer, tmp_path):
  tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
  settings = {
    "chat_template": tokenizer.chat_template,
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "lstrip": False},
    "model_max_length": 8192,
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  loaded = Tokenizer.from_folder(tmp_path)
  for case in GOLDEN["texts"]:
    assert loaded.encode(case["text"]) == case["ids"]
  assert loaded.chat_template == tokenizer.chat_template
  assert loaded.special_tokens == {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
  }
  settings["chat_template"] = [
    {"name": "tools", "template": "t"},
    {"name": "default", "template": "d"},
  ]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert Tokenizer.from_folder(tmp_path).chat_template == "d"
  (tmp_path / "chat_template.jinja").write_text("file")
  assert Tokenizer.from_folder(tmp_path).chat_template == "file"


def test_a_broken_folder_is_named(tmp_path):
  with pytest.raises(LoadError, match=r"has no tokenizer\.json"):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(LoadError, match=r"tokenizer\.json cannot be read"):
    Tokenizer.from_folder(tmp_path)


# --- Streams ------------------------------------------------------------------------


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
  return [*(stream.push(token) for token in ids), stream.flush()]


def test_a_stream_joins_to_the_decoded_text(tokenizer):
  for text in TEXTS:
    ids = tokenizer.encode(text)
    for skip in (True, False):
      expected = tokenizer.decode(ids, skip_special=skip)
      stream = tokenizer.stream(skip_special=skip)
      assert "".join(pieces(stream, ids)) == expected


def test_a_stream_never_shows_half_a_character(tokenizer):
  ids = tokenizer.encode("日本語 😀!")
  shown = pieces(tokenizer.stream(), ids)
  assert len(ids) > 6 and shown.count("") > 2
  assert not any("\ufffd" in piece for piece in shown)
  assert shown[-1] == ""


def test_a_stream_that_ends_inside_a_character_says_so(tokenizer):
  ids = tokenizer.encode("a😀")[:-1]
  stream = tokenizer.stream()
  assert "".join(pieces(stream, ids)).startswith("a\ufffd")
  assert stream.flush() == ""
  assert "".join(pieces(stream, tokenizer.encode("next"))) == "next"


def test_a_stream_shows_each_word_at_once(tokenizer):
  ids = tokenizer.encode("The cat sat")
  assert pieces(tokenizer.stream(), ids) == ["The", " cat", " sat", ""]


# --- Chats --------------------------------------------------------------------------


def test_chats_render_as_transformers_renders_them(tokenizer):
  for chat in GOLDEN["chats"].values():
    messages = chat["messages"]
    assert tokenizer.apply_chat(messages) == chat["prompt"]
    closed = tokenizer.apply_chat(messages, add_generation_prompt=False)
    assert closed == chat["closed"]
    assert tokenizer.encode_chat(messages) == chat["ids"]


def chat(template: str | None, messages=(), **variables) -> str:
  tokenizer = tiny()
  tokenizer.chat_template = template
  return tokenizer.apply_chat(list(messages), **variables)


def test_templates_see_messages_special_tokens_and_variables():
  template = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {%- if m.role == 'skip' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    "{{ tools | tojson }}{{ eos_token if add_generation_prompt }}"
  )
  messages = [{"role": "user", "content": "hi"}, {"role": "skip", "content": "no"}]
  out = chat(template, messages, tools=[{"a": "<é>"}])
  assert out == '<s>hi[{"a": "<é>"}]<|x|>'
  assert chat("{{ strftime_now('%Y') }}").isdigit()


def test_templates_run_in_a_sandbox():
  with pytest.raises(ValueError, match="chat template failed"):
    chat("{{ messages.__class__.__base__.__subclasses__() }}")
  with pytest.raises(ValueError, match="chat template failed"):
    chat("{{ messages.append(1) }}")


def test_templates_may_refuse_and_may_be_wrong():
  with pytest.raises(
    ValueError, match="the chat template failed: roles must alternate"
  ):
    chat("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(ValueError, match="chat template failed"):
    chat("{% if %}")
  with pytest.raises(ValueError, match="no chat template"):
    chat(None)


def test_a_missing_dependency_names_its_extra(monkeypatch):
  def no_module(name):
    raise ImportError(name)

  monkeypatch.setattr(errors.importlib, "import_module", no_module)
  with pytest.raises(
    LoadError, match=r"'tokenizers': pip install 'kvcache-jax\[models"
  ):
    tiny()
  # What a tokenizer.json holds is needed by nothing else.
  with pytest.raises(LoadError, match="'tokenizers'"):
    Tokenizer.from_folder(".")
