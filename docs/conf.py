"""The manual's build: pip install '.[docs]' && sphinx-build -W --keep-going -b html docs build/manual"""

from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes

import gn_fast

DOCS = Path(__file__).parent

project, author = "gn_fast", "gn_fast developers"
copyright = author
release = gn_fast.__version__
extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_static"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, with GitHub's names of them
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the types stand in the docstrings
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_title = f"gn_fast {release}"
html_use_index = html_domain_indices = False  # the API is one page
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_math_renderer = "mathml"
linkcheck_anchors_ignore_for_url = [r"https://github\.com/"]  # made by scripts there


def reachable(manual):
    """Whether the inventory of another manual can be read: without a network its names stay plain text."""
    try:
        return urlopen(f"{manual}objects.inv", timeout=5).status == 200
    except (URLError, TimeoutError):
        return False


MANUALS = {"python": "https://docs.python.org/3/", "numpy": "https://numpy.org/doc/stable/"}
intersphinx_mapping = {name: (url, None) for name, url in MANUALS.items() if reachable(url)}

# ---- links to the repository's files ---------------------------------------------------------------------

REPOSITORY = "https://github.com/gn-fast/gn_fast/blob/main/"
PAGES = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/results/speed.md": "speed",
}


def resolve_files(app, document):
    """A relative link to a file that is no page leads to the page that includes it, or to the repository."""
    page = app.env.docname
    for link in [*document.findall(addnodes.pending_xref), *document.findall(addnodes.download_reference)]:
        if link.get("reftype") != "myst" or link.get("reftarget") in app.env.found_docs:
            continue
        suffix = ".md" if link["refdomain"] == "doc" else ""
        path = (DOCS / page).parent / (link["reftarget"] + suffix)
        if not path.is_file():
            continue
        name = path.resolve().relative_to(DOCS.parent).as_posix()
        uri = app.builder.get_relative_uri(page, PAGES[name]) if name in PAGES else REPOSITORY + name
        link.replace_self(nodes.reference("", "", *link.children, internal=name in PAGES, refuri=uri))


# ---- blocks and formulas ---------------------------------------------------------------------------------


def strip_blocks(app, document):
    """Blocks of examples end with the empty line that doctest needs: it is not shown."""
    for block in document.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip()
        block[:] = [nodes.Text(block.rawsource)]


def visitor(tag, display):
    """Writes LaTeX as MathML, which browsers show without a script or a network; lines part at a \\qquad."""

    def visit(self, node):
        text = node.astext().replace("'", "\\text{\N{PRIME}}")  # latex2mathml's primes are raised twice
        parts = " ".join(convert(part, display=display) for part in text.split(r"\qquad"))
        self.body.append(f"{self.starttag(node, tag, '', CLASS=f'math {display}')}{parts}</{tag}>")
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", visitor("span", "inline"), visitor("div", "block"))
    app.connect("doctree-read", resolve_files)
    app.connect("doctree-read", strip_blocks)
