"""Memory plans: that they are true of the arrays, and of what a loader would make."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

import kvcache
from kvcache.command import cli
from kvcache.command.plan import make_plan, parse_bytes
from kvcache.models import load, load_config, LoadError, PRESETS
from kvcache.models.huggingface import read_config
from tests.fixtures.places import GOLDENS

FOLDERS = (
  "tiny_llama",
  "tiny_qwen2",
  "tiny_qwen3",
  "tiny_mistral",
  "tiny_gemma2",
  "tiny_deepseek2",
  "tiny_deepseek2_lite",
  "tiny_granite_hybrid",
)
PUBLISHED = {  # billions, as their authors say
  "smollm2-135m": 0.135,
  "llama-3-8b": 8.03,
  "llama-3.1-8b": 8.03,
  "llama-3.1-70b": 70.6,
  "llama-3.2-1b": 1.24,
  "llama-3.2-3b": 3.21,
  "mistral-7b": 7.24,
  "qwen2.5-7b": 7.62,
  "qwen3-8b": 8.19,
  "gemma-2-2b": 2.61,
  "gemma-2-9b": 9.24,
  "deepseek-v2-lite": 15.7,
}


def array_bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_weights_their_authors_count(name):
  plan = make_plan(name, 400 * 10**9)
  assert plan.num_weights / 1e9 == pytest.approx(PUBLISHED[name], rel=5e-3)


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("llama-3-8b", {}),
    ("llama-3-8b", {"kv_dtype": "int8", "block_size": 64}),
    ("mistral-7b", {}),  # nothing but windows
    ("gemma-2-9b", {"max_seq_len": 4096}),  # windows beside full layers
    ("deepseek-v2-lite", {}),  # latent
    (str(GOLDENS / "tiny_granite_hybrid"), {}),  # recurrent states
  ],
)
def test_a_plan_is_true_of_the_arrays(name, sizes):
  memory = 80 * 10**9 if name in PRESETS else 10**8
  plan = make_plan(name, memory, **sizes)
  ctx = jax.eval_shape(functools.partial(kvcache.init, plan.config))
  stores = array_bytes((ctx.kv, ctx.states))
  assert stores == plan.config.num_bytes
  assert array_bytes(ctx) - stores == plan.bookkeeping_bytes
  used = plan.weight_bytes + array_bytes(ctx) + plan.reserved_bytes
  assert used + plan.unused_bytes == memory
  per_block = plan.config.bytes_per_block or plan.config.bytes_per_window_block(4096)
  assert 0 <= plan.unused_bytes < 0.03 * memory + per_block


def test_the_numbers_of_llama():
  plan = make_plan("llama-3-8b", 80 * 10**9)
  assert plan.bytes_per_token == 32 * 2 * 8 * 128 * 2
  assert plan.weight_bytes == 2 * plan.num_weights
  config = plan.config
  assert plan.num_tokens == (config.num_blocks - 1) * 16
  assert plan.num_sequences(1024) == config.max_seqs == 64  # rows are the limit
  assert plan.num_sequences(8192) == (config.num_blocks - 1) // 512 < 64  # blocks are
  assert plan.num_sequences(8193) == 0
  quantised = make_plan("llama-3-8b", 80 * 10**9, kv_dtype="int8")
  assert quantised.bytes_per_token == 32 * 2 * 8 * (128 + 4)
  assert quantised.weight_bytes == plan.weight_bytes


def test_windows_limit_sequences_no_more_than_their_length():
  plan = make_plan("gemma-2-9b", 80 * 10**9)
  config = plan.config
  assert plan.num_sequences(4096) == (config.num_blocks - 1) // 256
  (window,) = config.windows
  assert config.window_pool_size(window) - 1 >= plan.num_sequences(4096) * 256
  windows_only = make_plan("mistral-7b", 80 * 10**9, max_seqs=1000)
  assert windows_only.num_sequences(32768) == windows_only.num_sequences(8192) > 64


@pytest.mark.parametrize("name", FOLDERS)
def test_a_config_alone_says_what_the_weights_say(name, tmp_path):
  shutil.copy(GOLDENS / name / "config.json", tmp_path)
  assert read_config(tmp_path) == read_config(GOLDENS / name)
  loaded = load(GOLDENS / name)
  wanted = load_config(GOLDENS / name)
  assert wanted.cache_layers() == loaded.config.cache_layers()
  plan = make_plan(str(tmp_path), 10**8, weights_dtype=jnp.float32)
  assert plan.weight_bytes == array_bytes(loaded.model)


def test_a_bias_in_the_settings_is_a_bias_in_the_shape(tmp_path):
  settings = json.loads((GOLDENS / "tiny_llama" / "config.json").read_text())
  settings |= {"attention_bias": True}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  config = read_config(tmp_path)
  assert config.attention_bias and config.attention_out_bias


@pytest.mark.parametrize(
  ("text", "num_bytes"),
  [
    ("80GB", 80 * 10**9),
    ("80gb", 80 * 10**9),
    ("64 GiB", 64 * 2**30),
    ("1.5e9", 1_500_000_000),
    ("512M", 512 * 10**6),
    ("100B", 100),
  ],
)
def test_sizes_are_read_with_their_units(text, num_bytes):
  assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
  "text", ["", "GB", "8XB", "-8GB", "0", "1.2.3GB", "1e999", "inf"]
)
def test_other_sizes_are_refused(text):
  with pytest.raises(ValueError, match="memory must be a number of bytes"):
    parse_bytes(text)


@pytest.mark.parametrize(
  ("name", "memory", "options", "message"),
  [
    ("llama-3.1-70b", 80e9, {}, "weights take 131.4 GiB of 74.51 GiB"),
    ("llama-3-8b", 80e9, {"reserve": 1.0}, "reserve"),
    ("llama-3-8b", 17.9e9, {"block_size": 2048}, "cannot hold the null block"),
    ("llama-3-8b", 80e9, {"max_seqs": 0}, "max_seqs"),
    ("llama-9", 80e9, {}, "llama-9 does not exist; presets are deepseek-v2-lite, gem"),
  ],
)
def test_what_cannot_be_planned_is_said(name, memory, options, message):
  with pytest.raises(ValueError, match=message):
    make_plan(name, int(memory), **options)


def test_a_folder_of_a_presets_name_goes_first(tmp_path, monkeypatch):
  shutil.copytree(GOLDENS / "tiny_llama", tmp_path / "llama-3-8b")
  monkeypatch.chdir(tmp_path)
  assert make_plan("llama-3-8b", 10**9).num_weights < 10**6


def run(capsys, *argv):
  code = cli.main(["plan", *argv])
  out, err = capsys.readouterr()
  return code, out, err


def test_the_command_prints_the_plan(capsys):
  code, out, err = run(
    capsys, "--model", "gemma-2-2b", "--memory", "24GB", "--max-seqs", "4"
  )
  assert (code, err) == (0, "")
  plan = make_plan("gemma-2-2b", 24 * 10**9, max_seqs=4)
  assert out == plan.render() + "\n"
  assert f"{plan.config.num_blocks:,}  of 16 tokens" in out
  assert "blocks of window 4096" in out and "recurrent" not in out


def test_the_command_prints_json(capsys):
  folder = str(GOLDENS / "tiny_granite_hybrid")
  code, out, _ = run(
    capsys, "--model", folder, "--memory", "90MB", "--kv-dtype", "int8", "--json"
  )
  plan = make_plan(folder, 90 * 10**6, kv_dtype="int8")
  assert code == 0 and json.loads(out) == plan.to_dict()
  assert json.loads(out)["states"]["num_states"] == 1 + 64 + 64
  assert "recurrent states" in plan.render()


def test_a_gguf_file_is_planned_from_its_header(demo_file):
  plan = make_plan(str(demo_file), 10**9)
  assert plan.config.layers == PRESETS["smollm2-135m"].cache_layers()
  assert plan.num_weights == make_plan("smollm2-135m", 10**9).num_weights


@pytest.fixture
def demo_file():
  try:
    return kvcache.models.demo_path()
  except LoadError:
    pytest.skip("the demo model is not installed")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (("--model", "llama-3-8b"), "--memory"),
    (("--model", "llama-3-8b", "--memory", "many"), "memory must be"),
    (("--model", "llama-3-8b", "--memory", "1GB"), "weights take 14.96 GiB"),
  ],
)
def test_mistakes_are_one_line(capsys, argv, message):
  code, out, err = run(capsys, *argv)
  assert (code, out) == (2, "")
  assert message in err and err.count("\n") == 1
