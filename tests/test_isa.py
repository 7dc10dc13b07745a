"""Instruction sets: which there are, which one computes, and that only that one is loaded.

That all give the same bits is the promise of test_bits.py.
"""

import numpy as np
import pytest
from helpers import fresh_python

import gn_fast

LEVELS = gn_fast.isa_levels()
KNOWN = ("x86_64_v2", "x86_64_v3", "x86_64_v4", "baseline")

on_x86_64 = pytest.mark.skipif(not LEVELS[0].startswith("x86_64"), reason="x86-64 only")


def used():
    return gn_fast.show_config("dicts")["isa"]["used"]


def test_levels_are_weakest_first():
    assert LEVELS
    assert list(LEVELS) == [level for level in KNOWN if level in LEVELS]
    assert gn_fast.isa_levels() == LEVELS


@on_x86_64
def test_levels_are_those_of_the_machine():
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        pytest.skip("the system does not list the flags")
    needs = {"x86_64_v2": "sse4_2", "x86_64_v3": "avx2", "x86_64_v4": "avx512vl"}
    assert [level for level in KNOWN[:3] if needs[level] in flags] == list(LEVELS)


# ---- in a program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_used_inside_its_block(level):
    before = used()
    with gn_fast.use_isa(level):
        assert used() == level
        gn_fast.group_norm(np.ones((1, 2, 3)), 1)
    assert used() == before


def test_blocks_nest_and_end_with_an_error():
    before = used()
    with gn_fast.use_isa(LEVELS[0]):
        with gn_fast.use_isa(LEVELS[-1]):
            assert used() == LEVELS[-1]
        assert used() == LEVELS[0]
        with pytest.raises(ZeroDivisionError), gn_fast.use_isa(LEVELS[-1]):
            raise ZeroDivisionError
        assert used() == LEVELS[0]
    assert used() == before


@pytest.mark.parametrize("level", ["x86_64_v9", "", "avx2", "X86_64_V2", "../evil", None, 3, b"x86_64_v2"])
def test_a_level_that_is_none(level):
    before = used()
    with pytest.raises(ValueError, match=f"^level must be one of {', '.join(LEVELS)}, not ") as error:
        gn_fast.use_isa(level).__enter__()
    assert str(error.value).endswith(repr(level))
    assert used() == before


# ---- in the environment ----------------------------------------------------------------------------------

SHOW = """
import sys, gn_fast
print(gn_fast.show_config("dicts")["isa"]["used"], *(name for name in sys.modules if "._kernel" in name))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_only_the_chosen_kernel_is_loaded(level):
    result = fresh_python(SHOW, GN_FAST_ISA=level)
    assert result.stdout.split() == [level, f"gn_fast._kernel_{level}"], result.stderr


@pytest.mark.parametrize("environment", [{}, {"GN_FAST_ISA": ""}], ids=["unset", "empty"])
def test_the_best_by_default(environment):
    result = fresh_python(SHOW, **environment)
    assert result.stdout.split() == [LEVELS[-1], f"gn_fast._kernel_{LEVELS[-1]}"], result.stderr


UNSUPPORTED = [level for level in KNOWN if level not in LEVELS]


@pytest.mark.parametrize("level", ["x86_64_v9", "avx2", "X86_64_V2", "0", *UNSUPPORTED])
def test_a_bad_variable_is_an_import_error_that_lists_the_levels(level):
    result = fresh_python("import gn_fast", GN_FAST_ISA=level)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: GN_FAST_ISA must be ")
    for word in (*LEVELS, repr(level)):
        assert word in last


# ---- what it says of itself ------------------------------------------------------------------------------


def test_config_as_dicts():
    config = gn_fast.show_config("dicts")
    assert list(config) == ["versions", "isa", "threads", "caches", "pool"]
    assert config["versions"]["numpy"] == np.__version__
    assert config["isa"] == {"used": used(), "available": list(LEVELS)}
    threads = config["threads"]
    assert threads["used"] == gn_fast.get_num_threads() <= threads["processors"]
    assert threads["openmp"] is None or threads["openmp"] >= 200805  # version 3.0
    assert all(size > 0 for size in config["caches"].values())
    assert 0 <= config["pool"]["kept"] <= config["pool"]["limit"]


def test_config_as_text(capsys):
    assert gn_fast.show_config() is None
    text = capsys.readouterr().out
    for section, entries in gn_fast.show_config("dicts").items():
        assert f"{section}:\n" in text
        for name, value in entries.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            assert f"  {name}: {shown if value is not None else 'none'}" in text


@pytest.mark.parametrize("mode", ["stderr", "", None, "dict"])
def test_config_in_no_mode(mode):
    with pytest.raises(ValueError, match=r"^mode must be 'stdout' or 'dicts', not ") as error:
        gn_fast.show_config(mode)
    assert str(error.value).endswith(repr(mode))
