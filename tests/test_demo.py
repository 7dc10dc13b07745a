"""The demo is a promise too: it runs on a real array, and says in one line what it cannot read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gn_fast", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def saved(folder: Path, array: np.ndarray) -> Path:
    path = folder / "input.npy"
    np.save(path, array)
    return path


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    x = np.random.default_rng(0).random((4, 6, 40, 40), dtype=np.float32)
    result = demo("--input", saved(tmp_path_factory.mktemp("demo"), x), "--groups", 2)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def numbers(text, row):
    (line,) = (line for line in text.splitlines() if line.startswith(row))
    return [float(word) for word in line.split()[-4:]]


def test_shows_the_statistics_before_and_after(shown):
    assert "float32" in shown
    assert "(4,6,40,40)" in shown
    mean, std, lowest, highest = numbers(shown, "x ")
    assert (mean, std) == (pytest.approx(0.5, abs=0.01), pytest.approx(12**-0.5, abs=0.01))
    assert 0 <= lowest < 0.001
    assert 0.999 < highest <= 1
    mean, std, *_ = numbers(shown, "gn_fast.group_norm(x)")
    assert (mean, std) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-3))


def test_shows_what_forgetting_the_root_does(shown):
    _, std, *_ = numbers(shown, "without the root")
    assert std == pytest.approx(12**0.5, abs=0.05)


def test_times_ours_and_numpy_and_shows_their_differences(shown):
    for row in ("gn_fast, out= reused", "gn_fast, fresh result", "plain NumPy"):
        (line,) = (line for line in shown.splitlines() if line.startswith(row))
        assert " ms " in line
        assert float(line.split()[-1]) < 1e-5


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, ">f4"])
def test_takes_other_real_dtypes(tmp_path, dtype):
    x = (np.random.default_rng(1).random((2, 4, 50)) * 3).astype(dtype)
    result = demo("--input", saved(tmp_path, x))
    assert (result.returncode, result.stderr) == (0, "")


def test_a_nan_in_the_file_is_no_error(tmp_path):
    x = np.ones((2, 4, 5))
    x[0, 0, 0], x[1, 3, 2] = np.nan, np.inf
    result = demo("--input", saved(tmp_path, x))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(8), "at least 2 dimensions"),
        (np.zeros((2, 4, 0)), "empty"),
        (np.zeros((2, 4), dtype=complex), "complex128"),
        (np.array([["a", 1], [None, 2]], dtype=object), "Object arrays"),
    ],
)
def test_refuses_an_unfit_array(tmp_path, array, words):
    path = saved(tmp_path, array)
    refuses("--input", words, demo("--input", path))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 an archive", b"\x93NUMPY\x01\x00"])
def test_refuses_what_is_not_an_npy_file(tmp_path, content):
    path = tmp_path / "input.npy"
    if content is not None:
        path.write_bytes(content)
    refuses("--input", str(path), demo("--input", path))


def test_refuses_a_damaged_header(tmp_path):
    path = saved(tmp_path, np.zeros((2, 4, 100)))
    path.write_bytes(path.read_bytes().replace(b"}", b"("))
    refuses("--input", str(path), demo("--input", path))


def test_refuses_a_truncated_file_and_a_folder(tmp_path):
    path = saved(tmp_path, np.zeros((2, 4, 100)))
    path.write_bytes(path.read_bytes()[:-8])
    refuses("--input", str(path), demo("--input", path))
    refuses("--input", str(tmp_path), demo("--input", tmp_path))


@pytest.mark.parametrize("groups", ["5", "0", "-1", "x", ""])
def test_refuses_groups_that_do_not_divide_the_channels(tmp_path, groups):
    path = saved(tmp_path, np.zeros((2, 4, 3)))
    refuses("--groups", groups, demo("--input", path, f"--groups={groups}"))


def refuses(argument, words, result):
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"argument {argument}" in line
    assert words in line
