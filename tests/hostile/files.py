"""Wrong files: checkpoints, models and command lines, each refused in one line."""

import functools
import json
from pathlib import Path
import shutil
import tempfile

import numpy as np

import kvcache
from kvcache import CheckpointError, models
from kvcache.models import LoadError
from tests.fixtures import toy_model as toy
from tests.fixtures.model_runs import admit, context_for, feed
from tests.fixtures.places import GOLDENS
from tests.hostile.table import area, WrongUse

TINY = GOLDENS / "tiny_llama"
SIZES = toy.config(num_blocks=4, block_size=4, max_seqs=2, max_seq_len=8)


def with_folder(do):
  """Runs it with a folder of its own."""

  @functools.wraps(do)
  def run():
    with tempfile.TemporaryDirectory() as folder:
      return do(Path(folder))

  return run


# --- Checkpoints ----------------------------------------------------------------------


def requests(prompts=((1, 2), (3,)), **kwargs):
  return kvcache.make_requests(prompts, max_new_tokens=2, **kwargs)


def restore(change=None, *, sizes=SIZES, prompts=((1, 2), (3,)), **kwargs):
  """Saves, lets something happen to the folder, restores."""

  @with_folder
  def run(folder):
    kvcache.save_checkpoint(folder, kvcache.init(SIZES), requests())
    if change is not None:
      change(folder)
    ctx, other = kvcache.init(sizes), requests(prompts, **kwargs)
    kvcache.restore_checkpoint(folder, ctx, other)

  return run


def lose_part(folder):
  for path in (folder / "0").rglob("*"):
    if path.name in ("metadata", "_METADATA") and path.parent.name == "sizes":
      path.write_text("{")


@with_folder
def restore_nothing(folder):
  kvcache.restore_checkpoint(folder / "nowhere", kvcache.init(SIZES), requests())


@with_folder
def save_onto_a_file(folder):
  (folder / "file").write_text("mine")
  kvcache.save_checkpoint(folder / "file", kvcache.init(SIZES), requests())


# --- Models ---------------------------------------------------------------------------


def load(change, name="model.gguf"):
  """Loads what `change` made of a folder."""

  @with_folder
  def run(folder):
    change(folder / name)
    models.load(folder / name)

  return run


def copy_of_tiny(**changes):
  def make(path):
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))

  return make


def spoiled(name, keep):
  def make(path):
    shutil.copytree(TINY, path)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(len(data) * keep)])

  return make


def written(data: bytes):
  return lambda path: path.write_bytes(data)


def out_of_vocabulary():
  loaded = models.load(TINY)
  size, logits = loaded.config.vocab_size, []
  for text in ([5, size + 3, -7], [5, size - 1, size - 7]):
    ctx, row, _ = admit(context_for(loaded.config), [5, 5, 5])
    logits.append(feed(kvcache.nn.as_function(loaded.model), ctx, row, text)[0])
  return bool(np.array_equal(*logits))


# --- The command line -----------------------------------------------------------------


def command(*argv: str):
  """What the command line writes to stderr; it must end with 2."""

  def run():
    import contextlib
    import io

    from kvcache.command import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = cli.main(list(argv))
    assert code == 2 and not out.getvalue() and err.getvalue().count("\n") == 1
    return err.getvalue().removeprefix("kvcache: error: ").strip()

  return run


row, refused = area("Files and command line")

USES: list[WrongUse] = [
  refused(
    "checkpoint: another configuration",
    restore(sizes=toy.config(num_blocks=5, block_size=4, max_seqs=2, max_seq_len=8)),
    "was saved with another configuration: num_blocks: 4, not 5",
    CheckpointError,
  ),
  refused(
    "checkpoint: other prompts",
    restore(prompts=((1, 9), (3,))),
    "was saved with other prompts",
    CheckpointError,
  ),
  refused(
    "checkpoint: other namespaces",
    restore(namespace=[0, 1]),
    "was saved with other namespace",
    CheckpointError,
  ),
  refused(
    "checkpoint: other stop tokens",
    restore(stop_tokens=[5]),
    "was saved with other stop_tokens",
    CheckpointError,
  ),
  refused(
    "checkpoint: a part is damaged",
    restore(lose_part),
    "checkpoint 0 cannot be read",
    CheckpointError,
  ),
  refused(
    "checkpoint: a folder that does not exist",
    restore_nothing,
    "nowhere holds no complete checkpoint",
    CheckpointError,
  ),
  refused(
    "checkpoint: a file where the folder should be",
    save_onto_a_file,
    "file is no folder",
    CheckpointError,
  ),
  refused(
    "model: a path that does not exist",
    load(lambda path: None),
    "model.gguf does not exist",
    LoadError,
  ),
  refused("model: an empty file", load(written(b"")), "too short", LoadError),
  refused(
    "model: another kind of file",
    load(written(b"not a model" * 9)),
    "not a GGUF file",
    LoadError,
  ),
  refused(
    "model: GGUF of a version to come",
    load(written(b"GGUF" + (99).to_bytes(4, "little") + bytes(64))),
    "GGUF version 99",
    LoadError,
  ),
  refused(
    "model: GGUF whose header promises more than the file holds",
    load(written(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 15 + b"\x7f")),
    "truncated",
    LoadError,
  ),
  refused(
    "model: a folder without a configuration",
    load(lambda path: path.mkdir(), "folder"),
    "has no config.json",
    LoadError,
  ),
  refused(
    "model: a configuration that is no JSON",
    load(spoiled("config.json", 0.5), "folder"),
    "not valid JSON",
    LoadError,
  ),
  refused(
    "model: truncated weights",
    load(spoiled("model.safetensors", 0.7), "folder"),
    "damaged or truncated",
    LoadError,
  ),
  refused(
    "model: an architecture nobody has written",
    load(copy_of_tiny(model_type="rnn", architectures=["Rnn"]), "folder"),
    "rnn",
    LoadError,
  ),
  refused(
    "model: more layers than weights",
    load(copy_of_tiny(num_hidden_layers=9), "folder"),
    "misses tensors",
    LoadError,
  ),
  row(
    "model: tokens out of the vocabulary",
    out_of_vocabulary,
    gives=True,
    note="too large ones count as the last one, negative ones from the end",
  ),
  row(
    "command line: a negative temperature",
    command("generate", "a", "--temperature", "-1"),
    gives="options: temperature must be at least 0 and finite, got -1.0",
  ),
  row(
    "command line: a model that does not exist",
    command("generate", "\u65e5\u672c\u8a9e \U0001f680", "--model", "nowhere"),
    gives="nowhere does not exist",
    note="the prompt may be any text",
  ),
  row(
    "command line: a pool of one block",
    command("generate", "a", "--num-blocks", "1"),
    gives="num_blocks must be at least 2 (block 0 is reserved), got 1",
  ),
]
