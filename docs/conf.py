"""The manual, after pip install -e '.[docs,torch,dask]': sphinx-build -W --keep-going -b html docs docs/_build

External links are checked by `-b linkcheck`. LINK_INVENTORIES=1 in the environment links to the manuals of Python,
NumPy and PyTorch, whose inventories are then fetched.
"""

import os

import gn_fast

project = "gn_fast"
author = copyright = "gn_fast developers"
version = release = gn_fast.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gn_fast {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
numpydoc_show_class_members = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

if os.environ.get("LINK_INVENTORIES"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
