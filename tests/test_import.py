"""Importing gn_fast: from a copied folder, from sources that are not built, with bad variables."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fresh_python

import gn_fast

FOLDER = Path(gn_fast.__file__).parent
COMPILED = ("*.so", "*.pyd")


def copy_to(root, *without):
    shutil.copytree(FOLDER, root / "gn_fast", ignore=shutil.ignore_patterns("__pycache__", *without))
    libraries = FOLDER.with_name("gn_fast.libs")  # a wheel's
    if libraries.exists():
        shutil.copytree(libraries, root / "gn_fast.libs")
    return root


def python(root, code):
    """What the code does in a fresh interpreter that finds gn_fast in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


# ---- folders ---------------------------------------------------------------------------------------------


def test_the_version_is_one_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", gn_fast.__version__)
    assert gn_fast.show_config("dicts")["versions"]["gn_fast"] == gn_fast.__version__


def test_a_copied_folder_tells_its_own_version(tmp_path):
    init = copy_to(tmp_path) / "gn_fast/__init__.py"
    init.write_text(init.read_text().replace(f'"{gn_fast.__version__}"', '"99.0.1"'))
    result = python(tmp_path, "import gn_fast; print(gn_fast.__version__); gn_fast.show_config()")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("99.0.1\nversions:\n  gn_fast: 99.0.1\n")


def fails_to_import(root):
    # An editable install would find what the folder lacks.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    result = python(root, f"{alone}; import gn_fast")
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("missing", ["_core", "_kernel_"])
def test_sources_that_are_not_built_say_what_to_do(tmp_path, missing):
    error = fails_to_import(copy_to(tmp_path, *(missing + suffix for suffix in COMPILED)))
    assert re.match(rf"ImportError: gn_fast\.{missing}\w* is not built for this Python", error)
    tag = sys.implementation.cache_tag
    for told in (tag, str(tmp_path / "gn_fast"), "pip install -e .", "another folder"):
        assert told in error


def test_another_missing_module_is_named_as_it_is(tmp_path):
    copy_to(tmp_path)
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text("raise ModuleNotFoundError(name='numpy._parts')")
    assert fails_to_import(tmp_path).startswith("ModuleNotFoundError")


# ---- the environment -------------------------------------------------------------------------------------

IMPORTS = ["import gn_fast", "from gn_fast import group_norm", "importlib.import_module('gn_fast')"]


@pytest.mark.parametrize("variable", ["GN_FAST_NUM_THREADS", "GN_FAST_POOL_MB"])
@pytest.mark.parametrize("line", IMPORTS)
def test_a_bad_variable_is_reported_where_gn_fast_is_imported(tmp_path, variable, line):
    script = tmp_path / "script.py"
    script.write_text(f"import importlib\n\n{line}\n")
    result = fresh_python(f"import runpy; runpy.run_path({str(script)!r})", **{variable: "-1"})
    first, second = result.stderr.splitlines()
    assert first.startswith(f"{script}:3: RuntimeWarning: {variable} must be an integer of at least ")
    assert second.strip() == line


def test_a_bad_variable_is_reported_where_it_is_read_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""import os, gn_fast
os.environ["GN_FAST_NUM_THREADS"] = "none"
def reset():
    gn_fast.set_num_threads(None)
reset()
""")
    result = fresh_python(f"import runpy; runpy.run_path({str(script)!r})")
    assert result.stderr.startswith(f"{script}:4: RuntimeWarning: GN_FAST_NUM_THREADS must be an integer ")


def test_a_bad_variable_is_an_error_where_warnings_are():
    code = "import warnings; warnings.simplefilter('error'); import gn_fast"
    result = fresh_python(code, GN_FAST_NUM_THREADS="0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("RuntimeWarning: GN_FAST_NUM_THREADS must be ")
