"""How Sphinx builds the site: `make docs`. Nothing here needs a network."""

import os
from pathlib import Path
import re
import shutil
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from sphinx.util.inspect import signature as sphinx_signature  # noqa: E402
from sphinx.util.inspect import stringify_signature  # noqa: E402

import kvcache  # noqa: E402

project = "kvcache"
author = "the kvcache authors"
project_copyright = "the kvcache authors, Apache-2.0"
release = version = kvcache.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"kvcache {release}"
html_static_path = ["_static"]

# A word in backticks is code, in docstrings as in Markdown.
default_role = "code"
add_module_names = False
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "replace"}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_attr_annotations = False  # signatures have the types
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs
suppress_warnings = ["misc.highlighting_failure"]

# Notebooks live beside the package; Sphinx wants its sources in one folder.
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
if NOTEBOOKS:
  (HERE / "notebooks").mkdir()
for notebook in NOTEBOOKS:
  shutil.copy(notebook, HERE / "notebooks")


def add_notebooks(app, name: str, source: list[str]) -> None:
  """Lists the notebooks on the first page, if there are any."""
  if name == "index" and NOTEBOOKS:
    source[0] += (
      "\n```{toctree}\n:caption: Notebooks\n:maxdepth: 1\n:glob:\n\nnotebooks/*\n```\n"
    )


# What `ArrayLike` and `DTypeLike` stand for is longer than what it says.
ALIASES = (
  (re.compile(r"[^\s:,(]*Array \| [^=,)]*complex"), "ArrayLike"),
  (re.compile(r"<class 'jax.numpy.(\w+)'>"), r"jnp.\1"),
  (re.compile(r"(?<=: )str \| type\[[^=,)]*SupportsDType"), "DTypeLike"),
)


def shorten(app, what, name, obj, options, signature, returns):
  """Writes the aliases in signatures that were resolved, and says what modules take."""
  if what == "class" and signature and signature.startswith("(*args"):
    told = sphinx_signature(obj.__init__, bound_method=True)
    signature = stringify_signature(told, unqualified_typehints=True)
  for pattern, alias in ALIASES:
    signature = pattern.sub(alias, signature or "")
  return signature or None, returns


def setup(app) -> None:
  """Called by Sphinx."""
  app.connect("source-read", add_notebooks)
  app.connect("autodoc-process-signature", shorten)
