"""The notebooks run from top to bottom, and print what is committed."""

import shutil

import nbformat
import pytest

from tests.fixtures.places import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = (
  "01_life_of_a_block",
  "02_a_decode_loop_in_one_jit",
  "03_prefix_caching",
  "04_fork_branch_and_time_travel",
  "05_hybrid_mamba",
  "06_ten_thousand_requests",
  "07_your_own_model",
  "08_kernels_and_roofline",
)
SLOW = {"06_ten_thousand_requests"}
THOROUGH = {"04_fork_branch_and_time_travel", "05_hybrid_mamba"}
"""Three loops are compiled in each, for a minute: everyday tests do the others."""
MAX_BYTES = 400_000

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
  return nbformat.read(path, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
  return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook):
  """What each cell prints, and the text of what it shows, by the cell's id."""
  return {
    cell.id: [
      output.text if output.output_type == "stream" else output.data["text/plain"]
      for output in cell.outputs
    ]
    for cell in code_cells(notebook)
  }


def test_all_of_them_are_there():
  assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@each
def test_outputs_are_committed(path):
  notebook = read(path)
  nbformat.validate(notebook)
  counts = [cell.execution_count for cell in code_cells(notebook)]
  assert counts == list(range(1, len(counts) + 1))
  found = outputs(notebook)
  assert not [one for one in found if one.output_type == "error"]
  assert not [one for one in found if one.get("name") == "stderr"]
  assert any("image/png" in one.get("data", {}) for one in found)
  assert path.stat().st_size < MAX_BYTES


@each
def test_it_asks_a_question_and_ends_with_an_assertion(path):
  first, *_, last = read(path).cells
  assert first.source.startswith("# ") and "?**" in first.source
  assert last.cell_type == "code" and "\nassert " in "\n" + last.source


@each
def test_nothing_of_the_machine_is_in_it(path):
  notebook = read(path)
  assert notebook.metadata.kernelspec.name == "python3"
  # `jupyter execute` notes when a cell ran.
  assert not [c.id for c in notebook.cells if set(c.metadata) - {"execution"}]
  text = path.read_text("utf-8")
  assert not [place for place in ("/home/", "/Users/", str(ROOT)) if place in text]


@pytest.fixture
def kernel_environment(monkeypatch):
  """Of the kernels: this interpreter, and this tree."""
  monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
  monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(path, folder):
  """A copy of a notebook, executed in an empty folder."""
  from nbclient import NotebookClient

  shutil.copy(path, folder)
  notebook = read(folder / path.name)
  NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  ).execute()
  return notebook


def marks(name):
  if name in SLOW:
    return [pytest.mark.slow]
  return [pytest.mark.thorough] if name in THOROUGH else []


@pytest.mark.parametrize(
  "path",
  [pytest.param(path, marks=marks(path.stem), id=path.stem) for path in NOTEBOOKS],
)
# Of the machinery between the kernel and the test, not of the notebook.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:jupyter_core")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:zmq")
def test_it_runs_from_top_to_bottom(path, tmp_path, kernel_environment):
  notebook = run(path, tmp_path)
  assert printed(notebook) == printed(read(path))
  assert not [one for one in outputs(notebook) if one.get("name") == "stderr"]
