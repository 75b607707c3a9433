"""One strict JAX for every test: CPU, no silent broadcasting, no silent promotion."""

import os
from pathlib import Path

from tests.fixtures.places import ROOT

# For this process and for all that tests start. Compilation is what tests cost: LLVM
# may leave out what makes programs fast. XLA's own passes, whose results tests read,
# stay as they are. `make aot` wants programs as they are served, and sets no flags.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
# Compiled programs are kept between runs, so that the second run is fast.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each of four warpgroups that wait, in the GPU interpreter, holds a thread of XLA's.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)

# The same examples in every run, and no deadline: the first example compiles.
hypothesis.settings.register_profile(
  "house", derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("house")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
  """One process more than there are cores: some wait for others that they started."""
  del config
  return (os.cpu_count() or 1) + 1


# These take minutes each: begun first, so that no process is left alone with one.
LONGEST = (
  "test_sharding.py",
  "test_distributed.py",
  "test_group_walks.py",
  "test_walks.py",
  "test_groups.py",
  "test_notebooks.py",
  "test_mosaic_sm90.py",
  "test_memory.py",
  "test_serve.py",
  "test_hybrid.py",
  "test_sections.py",
  "test_draft_model.py",
  "test_speculation.py",
  "test_triton.py",
  "test_doctests.py",
  "test_hostile.py",
  "test_search.py",
  "test_handoff.py",
  "test_gpu_measure.py",
  "test_burst.py",
)


def pytest_collection_modifyitems(items):
  """Puts the longest files first."""
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


MAX_MAPS = 15_000
"""Of the memory maps of a process, of which the kernel allows some 65,000."""


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Drops compiled programs before they are too many: each holds dozens of maps."""
  yield
  maps = Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > MAX_MAPS:
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
  """Compiles for a GPU without one; only `make aot` has what that needs."""
  from tests.aot.deviceless import Compiler

  # A program from the cache would not be assembled, and say nothing.
  was_on = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield Compiler(tmp_path_factory.mktemp("aot"))
  jax.config.update("jax_enable_compilation_cache", was_on)
