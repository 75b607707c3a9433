"""Models of the Hugging Face Hub by name, with a Hub that is a folder."""

import fnmatch
from pathlib import Path
import shutil
import sys

import huggingface_hub
from huggingface_hub import errors
import pytest

from kvcache import models
from kvcache.command import cli
from kvcache.command.plan import make_plan
from kvcache.models import hub, LoadError
from tests.fixtures.places import GOLDENS

TINY = GOLDENS / "tiny_llama"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
  """The files of `tiny/llama`; `snapshot_download` copies what it is asked for."""
  source = Path(shutil.copytree(TINY, tmp_path / "repository"))
  (source / "pytorch_model.bin").write_bytes(b"not wanted")
  (source / "original.safetensors").write_bytes(b"not wanted")
  cache = tmp_path / "cache"

  def snapshot_download(repo_id, *, allow_patterns):
    assert repo_id == "tiny/llama"
    cache.mkdir(exist_ok=True)
    for file in source.iterdir():
      if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
        shutil.copy(file, cache)
    return str(cache)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  monkeypatch.chdir(tmp_path)
  return source


def downloaded(repository: Path) -> set[str]:
  return {file.name for file in (repository.parent / "cache").iterdir()}


def test_a_name_loads_like_its_folder(repository):
  loaded = models.load("tiny/llama")
  assert loaded.config == models.load(TINY).config
  assert loaded.source == "tiny/llama"
  assert not {"pytorch_model.bin", "original.safetensors"} & downloaded(repository)


def test_a_plan_downloads_no_weights(repository):
  assert make_plan("tiny/llama", 10**8).num_weights > 0
  assert downloaded(repository) == {"config.json"}


def test_a_folder_goes_first(repository, tmp_path):
  shutil.copytree(TINY, tmp_path / "tiny" / "llama")
  models.load("tiny/llama")
  assert not (tmp_path / "cache").exists()


def test_an_unsupported_family_is_found_before_its_weights(repository):
  config = repository / "config.json"
  config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
  with pytest.raises(LoadError, match="tiny/llama: model_type 'gpt2' is not"):
    models.load("tiny/llama")
  assert downloaded(repository) == {"config.json"}


def test_a_repository_without_a_config_is_refused(repository):
  (repository / "config.json").unlink()
  with pytest.raises(LoadError, match=r"has no config\.json"):
    models.load("tiny/llama")


def failing(error):
  def snapshot_download(repo_id, **kwargs):
    raise error

  return snapshot_download


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (errors.LocalEntryNotFoundError("offline\nfor long"), "Hub cannot be reached"),
    (errors.OfflineModeIsEnabled("offline"), "Hub cannot be reached"),
    (OSError("disk full\nreally"), "cannot be downloaded: disk full$"),
    (ValueError("bad name"), "cannot be downloaded: bad name"),
    ("RepositoryNotFoundError", "the Hub has no such model"),
    ("GatedRepoError", "is gated: accept its terms"),
  ],
)
def test_what_fails_is_said_in_one_line(monkeypatch, capsys, error, message):
  if isinstance(error, str):  # their constructors want an answer of the Hub
    kind = getattr(errors, error)
    error = kind.__new__(kind)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
  with pytest.raises(LoadError, match=message):
    models.load("tiny/llama")
  assert cli.main(["generate", "Hi", "--model", "tiny/llama", "--quiet"]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("kvcache: error: tiny/llama")
  assert err.count("\n") == 1


def test_without_the_package_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(LoadError, match=r"'huggingface_hub': pip install 'kvcache-jax\["):
    models.load("tiny/llama")


@pytest.mark.parametrize(
  "name", ["llama", "a/b/c", "/tmp/llama", "tiny/llama.gguf", "./a"]
)
def test_what_cannot_be_a_name_is_not_asked_for(monkeypatch, name):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(AssertionError()))
  assert not hub.is_hub_name(name)
  with pytest.raises(LoadError, match="does not exist"):
    models.load(name)
