"""One strict JAX for every test: CPU, no silent broadcasting, no silent promotion."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each of four warpgroups that wait, in the GPU interpreter, holds a thread of XLA's.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

import hypothesis
import jax
import pytest

ROOT = Path(__file__).parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)
# Compiled programs are kept between runs, so that the second run is fast.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples in every run, and no deadline: the first example compiles.
hypothesis.settings.register_profile(
  "house", derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("house")


# These take minutes each: begun first, so that no process is left alone with one.
LONGEST = (
  "test_walks.py",
  "test_group_walks.py",
  "test_memory.py",
  "test_serve.py",
  "test_hybrid.py",
  "test_groups.py",
)


def pytest_collection_modifyitems(items):
  """Puts the longest files first."""
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Drops a module's compiled programs when it ends.

  Each holds dozens of memory maps on CPU, and a process may have some 65,000.
  """
  yield
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
