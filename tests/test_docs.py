"""The documentation is complete, and every example in it runs.

pytest itself runs those of README.md, of docs/ and of the interpreted modules; here are the compiled ones.
"""

import ast
import doctest
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import test_faults

import gn_fast
from gn_fast import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = [name for name in gn_fast.__all__ if name != "reference"]
CLASSES = {name: getattr(gn_fast, name) for name in ("GradientSums", "GroupNorm", "Moments")}
FUNCTIONS = [name for name in PUBLIC if name not in CLASSES]
NOTHING_RETURNED = {"clear_pool", "set_num_threads", "num_threads", "use_isa"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def run(test):
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def sections(doc):
    """The numpydoc sections of a docstring."""
    section = re.compile(r"^(\w+)\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", re.MULTILINE | re.DOTALL)
    return dict(section.findall(inspect.cleandoc(doc)))


# ---- docstrings ------------------------------------------------------------------------------------------


def test_what_is_public_is_listed():
    found = {name for name, value in vars(gn_fast).items()
             if not name.startswith("_") and not isinstance(value, types.ModuleType)}  # fmt: skip
    assert found | {"reference"} == set(gn_fast.__all__)
    assert sorted(gn_fast.__all__) == gn_fast.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name):
    tests = doctest.DocTestFinder().find(getattr(gn_fast, name), name, globs=dict(CLASSES))
    assert any(test.examples for test in tests), "no example"
    for test in tests:
        run(test)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_have_their_sections(name):
    public = getattr(gn_fast, name)
    has = sections(public.__doc__)
    parameters = inspect.signature(public).parameters
    if parameters:
        documented = re.findall(r"^(\S.*?)(?: :|$)", has["Parameters"], re.MULTILINE)
        assert [one.lstrip("*") for names in documented for one in names.split(", ")] == list(parameters)
        assert "Raises" in has
    if name in FUNCTIONS and name not in NOTHING_RETURNED:
        assert "Returns" in has


@pytest.mark.parametrize(
    "name", ["group_norm", "group_norm_backward", "group_moments", "group_gradient_sums", "Moments.merge"]
)
def test_formulas_have_their_source(name):
    public = gn_fast.Moments.merge if "." in name else getattr(gn_fast, name)
    assert re.search(r"arXiv:\d{4}\.\d{5}|\(19\d\d\)", sections(public.__doc__)["Notes"])


@pytest.mark.parametrize("name", sorted(set(reference.__all__) & set(FUNCTIONS)))
def test_the_reference_has_the_same_arguments(name):
    def arguments(module):
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert arguments(gn_fast) == arguments(reference)


# ---- pages -----------------------------------------------------------------------------------------------


def blocks(page):
    """Language and content of the fenced blocks."""
    return re.findall(r"^```(\S*).*?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pages
def test_every_block_of_python_is_an_example(page):
    for language, content in blocks(page):
        assert language, f"a block without a language: {content}"
        if language in ("python", "py", "pycon"):
            assert language == "pycon", f"not run, as it has no prompts: {content}"
            assert content.startswith(">>> ")


def commands(page):
    """The lines of gn-fast in a page's blocks."""
    lines = "".join(content for language, content in blocks(page) if language == "sh").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("gn-fast ")]


def test_commands_of_the_command_line_run(tmp_path):
    x = np.random.default_rng(0).random((4, 64, 20, 12), dtype=np.float32)
    for name in ("features", "skip", "volume"):
        np.save(tmp_path / f"{name}.npy", x if name != "volume" else x[:2])
    np.savez(tmp_path / "weights.npz", weight=x[0, :, 0, 0], bias=x[0, :, 0, 1])
    shown = commands(ROOT / "docs/command-line.md")
    assert {command for command, *_ in shown} == {"info", "demo", "bench", "norm"}
    for command in shown:
        if "--plot" in command and importlib.util.find_spec("matplotlib") is None:
            command = command[: command.index("--plot")]
        if command[0] == "bench":
            command = [*command, "--seconds=0.1", "--threads=1"]
        run = [sys.executable, "-m", "gn_fast", *command]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def anchors(page):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_to_headings_do_too(page):
    for target, anchor in re.findall(r"\]\((?!https:)([^)#]*)#([^)]+)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


@pages
def test_files_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|gn_fast|tests|docs|benchmarks|\.ci)/[^`<>*]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_page_of_the_api_has_all_that_is_public():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\.\. auto\w+:: (?:gn_fast\.)?(\w+)$", page, re.MULTILINE))
    listed = set(re.findall(r"^   (\w+)$", page, re.MULTILINE))
    assert described == set(gn_fast.__all__)
    assert listed == set(PUBLIC)


@pytest.mark.parametrize(("module", "file"), [("torch", "torch/__init__.py"), ("dask", "dask.py")])
def test_the_page_of_the_api_has_the_extras_too(module, file):
    # Read, not imported: the extra may not be installed.
    source = (ROOT / "gn_fast" / file).read_text(encoding="utf-8")
    public = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", source, re.MULTILINE | re.DOTALL)[1])
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    described = re.findall(rf"^\.\. auto\w+:: gn_fast\.{module}\.(\w+)$", page, re.MULTILINE)
    assert sorted(described) == sorted(public)


def test_every_page_has_its_place():
    places = [content for language, content in blocks(ROOT / "docs/index.md") if language == "{toctree}"]
    listed = re.findall(r"^[\w-]+$", "".join(places), re.MULTILINE)
    assert sorted(["index", *listed]) == sorted(page.stem for page in (ROOT / "docs").glob("*.md"))


def test_the_page_of_faults_is_that_of_the_tests():
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    assert page == test_faults.page(), "python tests/test_faults.py writes it"
