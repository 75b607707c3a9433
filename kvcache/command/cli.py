"""The command line: `python -m kvcache generate`, `demo` and `plan`.

What is wrong with the input is said in one line on stderr, with exit code 2. Code 1
means that the program itself failed: a broken invariant, or a request that got lost.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import io
import json
import os
import pathlib
import sys
import threading
from typing import Any, NoReturn, TYPE_CHECKING

import jax

from kvcache.command.prompts import (
  make_prompt,
  Prompt,
  PromptError,
  read_lines,
  SAMPLING_KEYS,
)
from kvcache.command.report import Report
from kvcache.config import AttentionLayer, CacheConfig
from kvcache.context import init
from kvcache.errors import InvariantError
from kvcache.observe.terminal import is_terminal, ProgressLine
from kvcache.serving.generation import Completion, generate
from kvcache.serving.scheduler import SchedulerConfig
from kvcache.verbs.checks import check_invariants

if TYPE_CHECKING:  # `--help` and mistakes in the arguments do not wait for the loaders
  from kvcache.models import Loaded

_OK, _FAILED, _MISUSED, _INTERRUPTED = 0, 1, 2, 130
_WEIGHTS_DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
_DEFAULT_POOL_BYTES = 2 * 2**30
_PROMPTS_FOLDERS = (
  pathlib.Path(__file__).parents[1] / "examples",  # installed
  pathlib.Path(__file__).parents[2] / "examples" / "prompts",  # in the repository
)


class CommandError(Exception):
  """What was asked for cannot be done; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command and returns its exit code; `--help` exits by itself.

  Args:
    argv: Arguments without the program's name, those of the process if omitted.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a model may write what it cannot
      stream.reconfigure(errors="replace")
  try:
    options = _parser().parse_args(argv)
  except CommandError as error:
    return _complain(error)
  codes: list[int] = []
  # A thread of its own, because a compilation of half a minute cannot be interrupted
  # from within: here Ctrl-C always finds somebody listening.
  worker = threading.Thread(target=lambda: codes.append(_run(options)), daemon=True)
  try:
    worker.start()
    worker.join()
  except KeyboardInterrupt:
    _say_interrupted()
    os._exit(_INTERRUPTED)  # without waiting for the compiler
  return codes[0] if codes else _FAILED  # none after a bug, whose traceback was shown


def _run(options: argparse.Namespace) -> int:
  try:
    return options.run(options)
  except CommandError as error:
    return _complain(error)
  except KeyboardInterrupt:
    _say_interrupted()
    return _INTERRUPTED
  except BrokenPipeError:
    # The reader, such as `head`, has seen enough. Nothing may be flushed into the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _FAILED


def _complain(error: Exception) -> int:
  line = " ".join(str(error).split())
  print(f"kvcache: error: {line}", file=sys.stderr)
  return _MISUSED


def _say_interrupted() -> None:
  # On a terminal the line holds progress, or the echo of the keys.
  start = "\r\x1b[K" if is_terminal(sys.stderr) else ""
  print(f"{start}kvcache: interrupted", file=sys.stderr, flush=True)


# --- Arguments ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="kvcache", description="Serve prompts from a paged cache that lives in JAX."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  text = commands.add_parser("generate", help="continue prompts or answer them")
  text.add_argument("prompts", nargs="*", metavar="PROMPT")
  text.add_argument(
    "--prompts-file",
    action="append",
    default=[],
    metavar="FILE",
    help='one JSON string or object a line, such as {"prompt": "Hi", "temperature": 1};'
    " may be given again",
  )
  text.add_argument("--chat", action="store_true", help="use the chat template")
  text.add_argument("--system", metavar="TEXT", help="system prompt; means --chat")
  text.add_argument(
    "--ignore-eos", action="store_true", help="go on after a stop token"
  )
  text.add_argument("--json", metavar="OUT", help="write JSON lines to a file")
  text.add_argument("--quiet", action="store_true", help="print only the texts")
  text.add_argument(
    "--picture", action="store_true", help="draw the blocks in use over time"
  )
  _add_shared(text)
  text.set_defaults(run=_generate)

  demo = commands.add_parser(
    "demo", help="serve prompts that share a system prompt, and show the pool"
  )
  _add_shared(demo)
  demo.set_defaults(
    run=_demo,
    prompts=[],
    chat=True,
    system=None,
    ignore_eos=False,
    json=None,
    quiet=False,
    picture=True,
    # Small enough that requests wait for each other and cached blocks are evicted.
    max_seqs=8,
    num_blocks=44,
    token_budget=128,
    max_new_tokens=40,
  )
  _add_plan(commands)
  return parser


def _add_plan(commands: Any) -> None:
  plan = commands.add_parser(
    "plan", help="say how many blocks, rows and tokens fit beside a model's weights"
  )
  plan.add_argument(
    "--model",
    required=True,
    metavar="NAME",
    help="llama-3-8b or another preset, a .gguf file, a Hugging Face folder, or"
    " OWNER/NAME on the Hub; no weights are read",
  )
  plan.add_argument("--memory", required=True, metavar="SIZE", help="80GB, 64GiB")
  plan.add_argument(
    "--weights-dtype",
    choices=_WEIGHTS_DTYPES,
    default="bfloat16",
    help="element type of the weights, as loaded; bfloat16 if omitted",
  )
  plan.add_argument(
    "--kv-dtype",
    choices=_KV_DTYPES,
    help="element type of keys and values; the weights' if omitted",
  )
  plan.add_argument(
    "--reserve",
    type=float,
    default=0.1,
    metavar="X",
    help="share of the memory for activations and the runtime",
  )
  for name, default, text in (
    ("--block-size", 16, "tokens in a block"),
    ("--max-seqs", 64, "sequences that run at a time"),
    ("--max-seq-len", None, "longest sequence; the model's context if omitted"),
  ):
    plan.add_argument(name, type=int, default=default, metavar="N", help=text)
  plan.add_argument("--json", action="store_true", help="print JSON")
  plan.set_defaults(run=_plan)


def _add_shared(parser: argparse.ArgumentParser) -> None:
  def add(name: str, kind: type, default: Any, text: str) -> None:
    metavar = {int: "N", float: "X"}[kind]
    parser.add_argument(name, type=kind, default=default, metavar=metavar, help=text)

  parser.add_argument(
    "--model",
    metavar="PATH",
    help="a .gguf file, a Hugging Face folder, or OWNER/NAME on the Hub; SmolLM2 if"
    " omitted",
  )
  add("--max-new-tokens", int, 128, "tokens to generate for each prompt")
  add("--temperature", float, 0.0, "0 is greedy")
  add("--top-k", int, 0, "sample from the N likeliest tokens; 0 is off")
  add("--top-p", float, 1.0, "sample from the likeliest tokens with this mass")
  add("--min-p", float, 0.0, "drop tokens below this share of the likeliest")
  add("--seed", int, 0, "seed of the first prompt; the next one has the next seed")
  add("--max-seqs", int, 16, "sequences that run at a time")
  add("--num-blocks", int, None, "blocks in the pool, the reserved one included")
  add("--block-size", int, 16, "tokens in a block")
  parser.add_argument(
    "--weights-dtype",
    choices=_WEIGHTS_DTYPES,
    default="float32",
    help="element type of the weights; float32 if omitted, which CPUs want",
  )
  parser.add_argument(
    "--kv-dtype",
    choices=_KV_DTYPES,
    help="element type of keys and values; the weights' if omitted",
  )
  add("--token-budget", int, 256, "tokens computed in a step with prompts")


# --- Commands -------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
  from kvcache.command.plan import make_plan, parse_bytes

  try:
    plan = make_plan(
      options.model,
      parse_bytes(options.memory),
      weights_dtype=options.weights_dtype,
      kv_dtype=options.kv_dtype,
      reserve=options.reserve,
      block_size=options.block_size,
      max_seqs=options.max_seqs,
      max_seq_len=options.max_seq_len,
    )
  except ValueError as error:
    raise CommandError(error) from error
  print(json.dumps(plan.to_dict(), indent=2) if options.json else plan.render())
  return _OK


def _demo(options: argparse.Namespace) -> int:
  files = (folder / "demo.jsonl" for folder in _PROMPTS_FOLDERS)
  path = next((file for file in files if file.is_file()), None)
  if path is None:
    raise CommandError("the prompts of the demo (examples/prompts) are not installed")
  options.prompts_file = [str(path)]
  return _generate(options)


def _generate(options: argparse.Namespace) -> int:
  prompts = _read_prompts(options)
  _check_sizes(options, num_prompts=len(prompts))
  _check_output(options.json)
  progress = ProgressLine(sys.stderr, enabled=not options.quiet)
  try:
    progress.show("loading the model")
    loaded = _load(options.model, options.weights_dtype)
    encoded = [_encode(loaded, prompt, options) for prompt in prompts]
    config = _configure(options, loaded, prompts, encoded)
    _cache_programs()
    progress.show("compiling")
    return _serve(options, loaded, prompts, encoded, config, progress)
  finally:
    progress.clear()


def _cache_programs() -> None:
  """Keeps compiled programs for the next run, unless the user has chosen a place."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "kvcache"))


def _serve(
  options: argparse.Namespace,
  loaded: "Loaded",
  prompts: list[Prompt],
  encoded: list[list[int]],
  config: CacheConfig,
  progress: ProgressLine,
) -> int:
  """Serves prompts that are known to fit, and reports."""
  from kvcache import nn

  assert loaded.tokenizer is not None
  decode = loaded.tokenizer.decode
  report = Report(
    prompts,
    decode,
    num_blocks=config.num_blocks - 1,
    progress=progress,
    quiet=options.quiet,
    keeps_map=options.picture,
  )
  ctx, completions = generate(
    nn.as_function(loaded.model),
    init(config),
    encoded,
    max_new_tokens=[prompt.max_new_tokens for prompt in prompts],
    sampling_params=[prompt.sampling for prompt in prompts],
    stop_tokens=() if options.ignore_eos else loaded.stop_tokens,
    scheduler=SchedulerConfig(token_budget=options.token_budget),
    slice_steps=4 if options.picture else 16,  # a picture wants many samples
    on_slice=report.add,
  )
  progress.clear()
  broken = None
  try:
    check_invariants(ctx)
  except InvariantError as error:
    broken = str(error)
  if options.picture:
    print(report.picture() + "\n")
  if not options.quiet:
    print(report.summary(completions))
    print(f"invariants: {broken or 'all hold'}", flush=True)
  if options.json:
    _write_json(options.json, prompts, completions, decode)
  lost = _lost(prompts, completions)
  for problem in filter(None, (broken, lost)):
    print(f"kvcache: {problem}", file=sys.stderr)
  return _FAILED if broken or lost else _OK


# --- Steps of a command ---------------------------------------------------------------


def _read_prompts(options: argparse.Namespace) -> list[Prompt]:
  defaults = {key: getattr(options, key) for key in SAMPLING_KEYS}
  defaults |= {"system": options.system, "max_new_tokens": options.max_new_tokens}
  try:
    # Checked by a prompt of their own, so that the message names no other.
    make_prompt("options", where="options", defaults=defaults)
    entries = [(f"prompt {i}", text) for i, text in enumerate(options.prompts, start=1)]
    for path in options.prompts_file:
      entries += read_lines(path)
    prompts = []
    for where, entry in entries:
      prompts.append(make_prompt(entry, where=where, defaults=defaults))
      defaults["seed"] = (defaults["seed"] + 1) % 2**32
  except PromptError as error:
    raise CommandError(error) from error
  if not prompts:
    raise CommandError("no prompts: give some as arguments or with --prompts-file")
  return prompts


def _check_sizes(options: argparse.Namespace, *, num_prompts: int) -> None:
  """Finds out before the model is loaded whether the sizes make sense."""
  try:
    CacheConfig(
      layers=(AttentionLayer(num_kv_heads=1, head_dim=1),),
      num_blocks=2 if options.num_blocks is None else options.num_blocks,
      block_size=options.block_size,
      max_seqs=options.max_seqs,
    )
    SchedulerConfig(token_budget=options.token_budget)
  except ValueError as error:
    raise CommandError(error) from error
  at_once = min(options.max_seqs, num_prompts)
  if options.token_budget < at_once:
    raise CommandError(
      f"token_budget must be at least the sequences that run at a time ({at_once}),"
      f" got {options.token_budget}"
    )


def _check_output(path: str | None) -> None:
  """Finds out before the work whether the result could be written."""
  if path is None:
    return
  folder = pathlib.Path(path).absolute().parent
  if pathlib.Path(path).is_dir() or not os.access(folder, os.W_OK):
    raise CommandError(f"cannot write {path}")


def _load(path: str | None, dtype: str) -> "Loaded":
  from kvcache import models

  try:
    loaded = models.load(path, dtype=dtype)
  except models.LoadError as error:
    raise CommandError(error) from error
  except Exception as error:  # a damaged file can fail anywhere
    raise CommandError(f"cannot load {path or 'the demo model'}: {error!r}") from error
  if loaded.tokenizer is None:
    raise CommandError(f"{loaded.source} has no tokenizer")
  return loaded


def _encode(loaded: "Loaded", prompt: Prompt, options: argparse.Namespace) -> list[int]:
  """Returns the token ids of a prompt, in the chat format if that was asked for."""
  assert loaded.tokenizer is not None
  if not options.chat and prompt.system is None:
    tokens = loaded.tokenizer.encode(prompt.text)
  else:
    messages = [{"role": "user", "content": prompt.text}]
    if prompt.system is not None:
      messages.insert(0, {"role": "system", "content": prompt.system})
    try:
      tokens = loaded.tokenizer.encode_chat(messages)
    except ValueError as error:
      raise CommandError(f"{prompt.where}: {error}") from error
  if not tokens:
    raise CommandError(f"{prompt.where} is empty for the model's tokenizer")
  return tokens


def _configure(
  options: argparse.Namespace,
  loaded: "Loaded",
  prompts: list[Prompt],
  encoded: list[list[int]],
) -> CacheConfig:
  """Returns the configuration of a cache that can serve every prompt."""
  wanted = [
    len(tokens) + prompt.max_new_tokens
    for tokens, prompt in zip(encoded, prompts, strict=True)
  ]
  context_len = loaded.config.max_position
  config = CacheConfig(
    layers=loaded.config.cache_layers(),
    num_blocks=options.num_blocks or 2,
    block_size=options.block_size,
    max_seqs=min(options.max_seqs, len(prompts)),
    max_seq_len=min(max(wanted), context_len),
    dtype=options.kv_dtype or loaded.config.dtype,
  )
  if options.num_blocks is None:
    config = dataclasses.replace(config, num_blocks=_default_blocks(config, wanted))
  limit = min(config.max_tokens_per_seq, context_len)
  for prompt, tokens in zip(prompts, encoded, strict=True):
    if len(tokens) > limit:
      is_model = limit == context_len
      reason = "the model's context" if is_model else "the pool; raise --num-blocks"
      raise CommandError(
        f"{prompt.where} has {len(tokens)} tokens, more than the {limit} of {reason}"
      )
  _check_memory(config)
  return config


def _default_blocks(config: CacheConfig, wanted: list[int]) -> int:
  """Returns blocks for the longest requests that may run at a time, within reason."""
  needs = sorted(
    -(-min(tokens, config.max_seq_len) // config.block_size) for tokens in wanted
  )
  enough = 1 + sum(needs[-config.max_seqs :]) + config.max_seqs
  affordable = _DEFAULT_POOL_BYTES // max(config.bytes_per_block, 1)
  return max(1 + needs[-1], min(enough, affordable))


def _check_memory(config: CacheConfig) -> None:
  """Refuses a pool that the host cannot hold: the system would kill the process."""
  if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
    return
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if config.num_bytes > memory:
    raise CommandError(
      f"{config.num_blocks} blocks take {config.num_bytes / 2**30:.1f} GiB,"
      f" but this machine has {memory / 2**30:.1f} GiB"
    )


def _lost(prompts: list[Prompt], completions: list[Completion]) -> str | None:
  """Names the requests that were not answered."""
  answered = {
    completion.request_id: completion.finish_reason
    for completion in completions
    if completion.tokens and completion.finish_reason in ("stop", "length", "capacity")
  }
  missing = [i for i in range(len(prompts)) if i not in answered]
  if not missing:
    return None
  return f"not answered: {', '.join(prompts[i].where for i in missing)}"


def _write_json(
  path: str,
  prompts: list[Prompt],
  completions: list[Completion],
  decode: Callable[[list[int]], str],
) -> None:
  try:
    with open(path, "w", encoding="utf-8") as file:
      for prompt, completion in zip(prompts, completions, strict=True):
        entry = {
          "prompt": prompt.text,
          "prompt_tokens": completion.prompt_tokens,
          "tokens": completion.tokens,
          "text": decode(completion.tokens),
          "finish_reason": completion.finish_reason,
          "num_cached": completion.num_cached,
        }
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
  except OSError as error:
    raise CommandError(f"cannot write {path}: {error.strerror}") from error
