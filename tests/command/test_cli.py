"""Tests of the command line: what it prints, what it refuses, how it ends."""

import inspect
import json
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest

from kvcache import AttentionLayer
from kvcache.command import cli
from kvcache.errors import InvariantError, Status
from kvcache.models import LoadError
from kvcache.serving.generation import Completion, generate, Slice
from kvcache.serving.sampling import SamplingParams
from tests.fixtures.places import ROOT


class Letters:
  """A tokenizer with one token per byte."""

  def encode(self, text):
    return list(text.encode())

  def encode_chat(self, messages):
    return self.encode("|".join(f"{m['role']}:{m['content']}" for m in messages))

  def decode(self, tokens):
    return bytes(tokens).decode()


class Server:
  """Stands in for `generate`: answers each prompt with its own letters in capitals."""

  def __init__(self):
    self.call = None
    self.finish_reason = "length"
    self.forgets = ()

  def __call__(self, *args, **kwargs):
    self.call = inspect.signature(generate).bind(*args, **kwargs).arguments
    prompts, wanted = self.call["prompts"], self.call["max_new_tokens"]
    completions = [
      Completion(
        request_id=i,
        prompt_tokens=prompt,
        tokens=list(bytes(prompt).upper())[:count],
        finish_reason="refused" if i in self.forgets else self.finish_reason,
        status=Status.OK,
        num_cached=len(prompt) // 2,
        num_preemptions=i,
        logprobs=None,
      )
      for i, (prompt, count) in enumerate(zip(prompts, wanted, strict=True))
    ]
    half = len(prompts) // 2
    for step, finished in ((1, completions[:half]), (2, completions[half:])):
      stats = types.SimpleNamespace(num_in_use=3 * step, num_evictable=step)
      self.call["on_slice"](
        Slice(
          num_steps=step * 10,
          num_requests=len(prompts),
          num_finished=len(prompts) if step == 2 else half,
          num_tokens=step * 20,
          num_drafts=0,
          num_accepted=0,
          seconds=step * 2.0,
          stats=stats,
          finished=finished,
          running={},
        )
      )
    return self.call["ctx"], completions


@pytest.fixture
def server(monkeypatch):
  """The command line without a model and without a loop."""
  config = types.SimpleNamespace(
    max_position=400,
    dtype=jnp.float32,
    cache_layers=lambda: (AttentionLayer(num_kv_heads=1, head_dim=2),),
  )
  loaded = types.SimpleNamespace(
    model=None, config=config, tokenizer=Letters(), stop_tokens=(0,), source="fake"
  )

  def load(path, dtype):
    server.dtypes.append(dtype)
    return loaded

  monkeypatch.setattr("kvcache.models.load", load)
  monkeypatch.setattr("kvcache.nn.as_function", lambda model: model)
  monkeypatch.setattr(cli, "check_invariants", lambda ctx: None)
  server = Server()
  server.loaded, server.dtypes = loaded, []
  monkeypatch.setattr(cli, "generate", server)
  return server


def run(capsys, *argv):
  code = cli.main([str(arg) for arg in argv])
  out, err = capsys.readouterr()
  return code, out, err


def refusal(capsys, *argv):
  """Runs a command that must fail, and returns its one line."""
  code, out, err = run(capsys, *argv)
  assert code == 2
  assert out == ""
  assert err.startswith("kvcache: error: ")
  assert err.count("\n") == 1
  return err.removeprefix("kvcache: error: ").strip()


# --- generate -------------------------------------------------------------------------


def test_generate_prints_texts_then_a_summary(capsys, server):
  code, out, err = run(capsys, "generate", "one", "two two", "--max-new-tokens", 3)
  assert (code, err) == (0, "")
  first, second, summary = out.split("\n\n")
  assert first.splitlines() == [
    "[1] one",
    "ONE",
    "(3 tokens, length; 1 of 3 prompt tokens from the cache)",
  ]
  assert second.splitlines()[:2] == ["[2] two two", "TWO"]
  assert summary.splitlines() == [
    "2 prompts, 40 tokens in 4.0 s: 10.0 tokens/s after the first 2.0 s, which compile",
    "prefix hit rate: 40.0% (4 of 10 prompt tokens)",
    "blocks: at most 6 of 4 in use; 1 preemptions",
    "invariants: all hold",
  ]


def test_quiet_prints_only_the_texts(capsys, server):
  code, out, err = run(capsys, "generate", "one", "two", "--quiet")
  assert (code, out, err) == (0, "ONE\nTWO\n", "")


def test_options_reach_the_loop(capsys, server):
  run(
    capsys,
    *("generate", "a", "b", "--max-new-tokens", 5, "--temperature", 0.5, "--top-k", 3),
    *("--top-p", 0.9, "--min-p", 0.1, "--seed", 2**32 - 1, "--max-seqs", 2),
    *("--num-blocks", 9, "--block-size", 4, "--token-budget", 7),
    *("--kv-dtype", "int8", "--weights-dtype", "bfloat16"),
  )
  call, config = server.call, server.call["ctx"].config
  assert call["prompts"] == [[97], [98]]
  assert call["max_new_tokens"] == [5, 5]
  shared = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
  assert call["sampling_params"] == [
    SamplingParams(**shared, seed=2**32 - 1),
    SamplingParams(**shared, seed=0),
  ]
  assert (config.num_blocks, config.block_size, config.max_seqs) == (9, 4, 2)
  assert call["scheduler"].token_budget == 7
  assert config.attention_layers[0].kv_dtype == jnp.int8
  assert call["stop_tokens"] == (0,)
  assert server.dtypes == ["bfloat16"]
  run(capsys, "generate", "a", "--ignore-eos")
  assert call is not server.call
  assert server.call["stop_tokens"] == ()


def test_the_default_pool_holds_what_runs_together(capsys, server):
  run(capsys, "generate", *["x" * 20] * 3, "--max-new-tokens", 12, "--max-seqs", 2)
  config = server.call["ctx"].config
  assert config.max_seq_len == 32
  assert config.num_blocks == 1 + 2 * 2 + 2  # null, two sequences, one spare for each


def test_chat_and_system_prompts_use_the_template(capsys, server, tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text('"plain"\n{"prompt": "hi", "system": "be kind"}\n')
  run(capsys, "generate", "--prompts-file", file)
  letters = Letters()
  assert [letters.decode(prompt) for prompt in server.call["prompts"]] == [
    "plain",
    "system:be kind|user:hi",
  ]
  run(capsys, "generate", "hi", "--chat")
  assert letters.decode(server.call["prompts"][0]) == "user:hi"
  run(capsys, "generate", "hi", "--system", "be brief")
  assert letters.decode(server.call["prompts"][0]) == "system:be brief|user:hi"


def test_json_has_one_object_per_request_in_order(capsys, server, tmp_path):
  out = tmp_path / "out.jsonl"
  code, _, _ = run(capsys, "generate", "näh", "b", "--json", out)
  assert code == 0
  first, second = map(json.loads, out.read_text("utf-8").splitlines())
  assert first == {
    "prompt": "näh",
    "prompt_tokens": [110, 195, 164, 104],
    "tokens": [78, 195, 164, 72],
    "text": "NäH",
    "finish_reason": "length",
    "num_cached": 2,
  }
  assert second["prompt"] == "b"


def test_a_lost_request_and_a_broken_invariant_fail(capsys, server, monkeypatch):
  server.forgets = (1,)
  code, _, err = run(capsys, "generate", "a", "b", "c")
  assert (code, err) == (1, "kvcache: not answered: prompt 2\n")
  server.forgets = ()

  def check(ctx):
    raise InvariantError("broken invariants: everything")

  monkeypatch.setattr(cli, "check_invariants", check)
  code, out, err = run(capsys, "generate", "a")
  assert code == 1
  assert "invariants: broken invariants: everything" in out
  assert "everything" in err


def test_picture_is_drawn_on_request(capsys, server):
  _, out, _ = run(capsys, "generate", "a")
  assert "step 20" not in out
  _, out, _ = run(capsys, "generate", "a", "--picture")
  assert "step 20" in out
  assert "\x1b" not in out


# --- What is refused ------------------------------------------------------------------


def test_no_prompts(capsys, server, tmp_path):
  assert "no prompts" in refusal(capsys, "generate")
  empty = tmp_path / "empty.jsonl"
  empty.write_text("\n  \n")
  assert "no prompts" in refusal(capsys, "generate", "--prompts-file", empty)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prompts(capsys, server, text):
  assert refusal(capsys, "generate", "a", text) == "prompt 2 is empty"


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("{", "is not JSON: Expecting property name enclosed in double quotes"),
    ("[1]", "expected a string or an object, got [1]"),
    ("{}", 'the object has no "prompt"'),
    ('{"prompt": 3}', "prompt must be a string, got 3"),
    ('{"prompt": "a", "system": 3}', "system must be a string, got 3"),
    ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; known are prompt"),
    ('{"prompt": "a", "temperature": -1}', "temperature must be at least 0"),
    ('{"prompt": "a", "temperature": NaN}', "temperature must be at least 0"),
    ('{"prompt": "a", "temperature": "1"}', "temperature must be a number, got '1'"),
    ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be a positive"),
    ('{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens must be a positive"),
    ('{"prompt": "a", "seed": 4294967296}', "seed must be 0 to 4294967295"),
    ('"\\ud800"', "prompt is not valid Unicode"),
    ('""', "is empty"),
    ("[" * 100_000, "is nested too deeply"),
  ],
)
def test_bad_lines_are_named(capsys, server, tmp_path, line, complaint):
  file = tmp_path / "prompts.jsonl"
  file.write_text(f'"fine"\n\n{line}\n')
  told = refusal(capsys, "generate", "--prompts-file", file)
  assert told.startswith(f"{file} line 3")
  assert complaint in told


def test_files_that_cannot_be_read(capsys, server, tmp_path):
  missing = tmp_path / "missing.jsonl"
  told = refusal(capsys, "generate", "--prompts-file", missing)
  assert told == f"cannot read {missing}: No such file or directory"
  assert "cannot read" in refusal(capsys, "generate", "--prompts-file", tmp_path)
  binary = tmp_path / "binary.jsonl"
  binary.write_bytes(b'"\xff"')
  assert "is not UTF-8" in refusal(capsys, "generate", "--prompts-file", binary)


@pytest.mark.parametrize(
  ("argv", "complaint"),
  [
    (["--temperature", "-1"], "options: temperature must be at least 0"),
    (["--temperature", "nan"], "options: temperature must be at least 0"),
    (["--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
    (["--top-k", "-1"], "options: top_k must be 0 to"),
    (["--top-p", "0"], "options: top_p must be above 0"),
    (["--min-p", "2"], "options: min_p must be 0 to 1"),
    (["--seed", "-1"], "options: seed must be 0 to"),
    (["--max-new-tokens", "0"], "options: max_new_tokens must be a positive integer"),
    (["--max-seqs", "0"], "max_seqs must be a positive int, got 0"),
    (["--block-size", "0"], "block_size must be a positive int, got 0"),
    (["--block-size", "-16"], "block_size must be a positive int, got -16"),
    (["--num-blocks", "1"], "num_blocks must be at least 2"),
    (["--num-blocks", "-5"], "num_blocks must be a positive int"),
    (["--num-blocks", str(2**40)], "num_blocks"),
    (["--token-budget", "0"], "token_budget must be a positive int, got 0"),
    (["--token-budget", "1"], "token_budget must be at least the sequences"),
    (["--num-blocks", str(2**27 - 1)], "but this machine has"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
  ],
)
def test_impossible_settings(capsys, server, monkeypatch, argv, complaint):
  monkeypatch.setattr(cli.os, "sysconf", lambda name: 2**15)  # a machine with 1 GiB
  assert complaint in refusal(capsys, "generate", "ab", "b", *argv)
  assert server.call is None


def test_settings_are_checked_before_the_model_is_loaded(capsys):
  # There is no stand-in here: the loader would complain about the path.
  told = refusal(capsys, "generate", "a", "--model", "nowhere", "--block-size", 0)
  assert "block_size" in told


def test_prompts_too_long_for_pool_or_model(capsys, server):
  told = refusal(capsys, "generate", "a", "b" * 40, "--num-blocks", 3)
  assert told == (
    "prompt 2 has 40 tokens, more than the 32 of the pool; raise --num-blocks"
  )
  told = refusal(capsys, "generate", "b" * 401)
  assert told == "prompt 1 has 401 tokens, more than the 400 of the model's context"
  code, _, _ = run(capsys, "generate", "b" * 32, "--num-blocks", 3)
  assert code == 0


def test_models_that_cannot_be_loaded(capsys, server, monkeypatch, tmp_path):
  def fail(error):
    def load(path, dtype):
      raise error

    monkeypatch.setattr("kvcache.models.load", load)

  fail(LoadError("x.gguf is truncated"))
  assert refusal(capsys, "generate", "a", "--model", "x.gguf") == "x.gguf is truncated"
  fail(OverflowError("a\nb"))
  told = refusal(capsys, "generate", "a", "--model", "x.gguf")
  assert told == "cannot load x.gguf: OverflowError('a\\nb')"
  server.loaded.tokenizer = None
  monkeypatch.setattr("kvcache.models.load", lambda path, dtype: server.loaded)
  assert refusal(capsys, "generate", "a") == "fake has no tokenizer"


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a model" * 10])
def test_real_loader_refuses_in_one_line(capsys, tmp_path, content):
  file = tmp_path / "model.gguf"
  if content is not None:
    file.write_bytes(content)
  assert str(file) in refusal(capsys, "generate", "a", "--model", file)


def test_templates_that_refuse(capsys, server, monkeypatch):
  def encode_chat(self, messages):
    raise ValueError("this model has no chat template")

  monkeypatch.setattr(Letters, "encode_chat", encode_chat)
  told = refusal(capsys, "generate", "a", "--chat")
  assert told == "prompt 1: this model has no chat template"


def test_output_that_cannot_be_written_is_found_before_the_work(
  capsys, server, tmp_path
):
  for path in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
    told = refusal(capsys, "generate", "a", "--json", path)
    assert told == f"cannot write {path}"
  assert server.call is None


@pytest.mark.parametrize("argv", [[], ["dance"]])
def test_a_command_is_needed(capsys, argv):
  assert "COMMAND" in refusal(capsys, *argv) or "dance" in refusal(capsys, *argv)


# --- demo -----------------------------------------------------------------------------


def test_demo_serves_its_prompts_in_a_small_pool(capsys, server):
  server.loaded.config.max_position = 8192
  code, out, err = run(capsys, "demo", "--num-blocks", 200)
  assert (code, err) == (0, "")
  prompts = server.call["prompts"]
  assert len(prompts) >= 16
  assert "step 20" in out
  assert "prefix hit rate" in out
  assert "invariants: all hold" in out
  assert server.call["ctx"].config.max_seqs < len(prompts)


# --- The process ----------------------------------------------------------------------


def test_help_does_not_load_the_loaders():
  code = (
    "import sys, kvcache.command.cli\n"
    "try: kvcache.command.cli.main(['generate', '--help'])\n"
    "except SystemExit as end: assert end.code == 0\n"
    "assert not {'kvcache.models', 'gguf', 'tokenizers'} & sys.modules.keys()\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "--prompts-file" in done.stdout


def test_importing_the_library_imports_jax_flax_chex_and_nothing_else():
  """Pallas, say, or a plotting library would be felt in every start of a process."""
  code = (
    "import sys, jax, flax, chex, numpy\n"
    "before = set(sys.modules)\n"
    "import kvcache.command.cli\n"
    "print(*(sys.modules.keys() - before))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  packages = {name.partition(".")[0] for name in done.stdout.split()}
  assert packages - sys.stdlib_module_names == {"kvcache", "pallas_kernels"}


def test_interrupt_ends_at_once_with_one_line():
  # Loading never ends and cannot be interrupted, like a long compilation.
  code = (
    "import signal, sys, threading, kvcache.command.cli\n"
    # A shell starts background jobs with this signal ignored.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "def load(path, dtype):\n"
    "  print('loading', flush=True)\n"
    "  threading.Event().wait()\n"
    "kvcache.command.cli._load = load\n"
    "sys.exit(kvcache.command.cli.main(['generate', 'hi']))\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  try:
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert (process.returncode, out, err) == (130, "", "kvcache: interrupted\n")


def test_a_reader_that_stops_early_is_no_bug():
  code = (
    "import sys, kvcache.command.cli\n"
    "def run(options):\n"
    "  while True: print('text', flush=True)\n"
    "kvcache.command.cli._generate = run\n"
    "sys.exit(kvcache.command.cli.main(['generate', 'hi']))\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  assert process.stdout is not None
  assert process.stderr is not None
  assert process.stdout.readline() == "text\n"
  process.stdout.close()
  assert process.stderr.read() == ""
  assert process.wait(timeout=60) == 1
  process.stderr.close()


@pytest.mark.slow
def test_the_real_demo():
  done = subprocess.run(
    [sys.executable, "-m", "kvcache", "demo", "--max-new-tokens", "8"],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "invariants: all hold" in done.stdout
  assert "208 of" in done.stdout  # the shared system prompt was found
