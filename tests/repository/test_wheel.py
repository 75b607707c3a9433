"""What is published works alone: built, installed into an empty environment, used."""

from pathlib import Path
import subprocess
import sys
import venv
import zipfile

import pytest

import kvcache
from tests.fixtures.places import ROOT

pytestmark = pytest.mark.wheel

USE = """
import kvcache, pallas_kernels
layer = kvcache.AttentionLayer(num_kv_heads=1, head_dim=4)
config = kvcache.CacheConfig(layers=(layer,), num_blocks=5, max_seqs=2, max_seq_len=64)
kvcache.check_invariants(kvcache.init(config))
print(kvcache.__version__, kvcache.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
  done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """The wheel, built from the source distribution as a packager would."""
  folder = tmp_path_factory.mktemp("dist")
  run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
  (path,) = folder.glob("*.whl")
  return path


def test_wheel_holds_the_packages_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  info = f"kvcache_jax-{kvcache.__version__}.dist-info"
  assert {name.split("/")[0] for name in names} == {"kvcache", "pallas_kernels", info}
  assert {"kvcache/py.typed", "pallas_kernels/py.typed"} <= set(names)
  assert "pallas_kernels/paged_attention/tuned.json" in names
  assert f"{info}/licenses/LICENSE" in names
  sources = {
    path.relative_to(ROOT).as_posix()
    for package in ("kvcache", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
  }
  assert sources == {name for name in names if name.endswith(".py")}


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
  venv.create(tmp_path / "env", with_pip=True)
  python = tmp_path / "env" / "bin" / "python"
  run(python, "-m", "pip", "install", "--no-input", wheel, cwd=tmp_path)
  version, file = run(python, "-I", "-c", USE, cwd=tmp_path).split()
  assert version == kvcache.__version__
  assert Path(file).is_relative_to(tmp_path)
