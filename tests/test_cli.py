"""The command line: files larger than memory, results that appear whole or not at all, errors of one line.

Commands run in processes of their own, and where they should see a terminal, in one.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import ACTIVATIONS, DTYPES, EPS64, bound, linux
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_fast
from gn_fast import reference
from gn_fast.__main__ import main
from gn_fast.commands import norm

COMMANDS = ["info", "demo", "bench", "norm"]
MIB = 1 << 20

# In a process: as the command line, of pieces of a few values, each of which takes its time.
SLOW = """
import sys, time
from gn_fast.__main__ import main
from gn_fast.commands import norm

norm.PIECE = 1 << 12
at_once = norm.Work.group_norm
norm.Work.group_norm = lambda *arguments: time.sleep({seconds}) or at_once(*arguments)
sys.exit(main(sys.argv[1:]))
"""
WITHOUT_EXTRAS = """
import sys
sys.modules["rich"] = sys.modules["matplotlib"] = None
from gn_fast.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def process(*arguments, code=None, **options):
    start = ["-m", "gn_fast"] if code is None else ["-c", code]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, *start, *map(str, arguments)], **options)


def gn_fast_(*arguments, **options):
    """Exit code, output and errors of the command."""
    with process(*arguments, **options) as running:
        out, err = running.communicate(timeout=120)
    return running.returncode, out, err


def in_terminal(*arguments, code="", until=None, send=b""):
    """Exit code of the command in a terminal, and all that it shows; keys are sent once it shows a text."""
    import fcntl
    import struct
    import termios

    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = ["-c", code] if code else ["-m", "gn_fast"]
    enter = (
        "import os, sys; os.login_tty(0); "
        f"os.execv(sys.executable, [sys.executable, *{command!r}, *sys.argv[1:]])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {
        "TERM": "xterm"
    }
    with process(*arguments, code=enter, stdin=its, stdout=its, stderr=its, env=environment) as running:
        os.close(its)
        shown, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 1 << 16)
                except OSError:  # Linux's way to say that nobody has it open
                    break
                if not data:
                    break
                shown += data
            if until and until in shown:
                os.write(ours, send)
                until = None
        running.wait(timeout=60)
        os.close(ours)
    return running.returncode, shown.decode()


def normal(shape, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(dtype)


def saved(path, array):
    np.save(path, array)
    return path


def loaded(path, dtype=None):
    array = np.load(path)
    return array.view(dtype) if dtype is not None and array.dtype == np.dtype("V2") else array


@pytest.fixture
def features(tmp_path):
    return saved(tmp_path / "features.npy", normal((4, 6, 16, 20)))


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, ""), result
    (line,) = err.splitlines()
    for word in words:
        assert word in line


# ---- help, info, bench -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    code, out, err = gn_fast_(command, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"^example:\n  gn-fast {command}\b", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 110


def test_help_lists_the_commands():
    code, out, _ = gn_fast_("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["norm"], ["info", "--yes"]])
def test_arguments_that_are_none_are_one_line(arguments):
    refused(gn_fast_(*arguments))


def test_info_tells_the_configuration():
    code, out, err = gn_fast_("info")
    assert (code, err) == (0, "")
    for words in (f"gn_fast: {gn_fast.__version__}", f"numpy: {np.__version__}", "openmp: ", "torch: "):
        assert words in out


def test_info_as_json_is_what_show_config_returns_and_more():
    code, out, err = gn_fast_("info", "--json")
    assert (code, err) == (0, "")
    told, config = json.loads(out), gn_fast.show_config("dicts")
    assert config["isa"]["available"] == told["isa"]["available"]
    assert set(config) < set(told)
    assert told["installed"]["ml_dtypes"] == ml_dtypes.__version__


BENCH = ["bench", "--shape", "2,8,16,16", "--groups", "4", "--seconds", "0.1"]


def test_bench_is_a_table():
    code, out, err = gn_fast_(*BENCH)
    assert (code, err) == (0, "")
    header, row = out.splitlines()[2:4]
    assert header.split()[:5] == ["model", "shape", "groups", "gn_fast", "NumPy"]
    assert row.split()[:3] == ["given", "2x8x16x16", "4"]
    assert len(header) == len(row)


def test_bench_as_json_has_seconds():
    code, out, err = gn_fast_(*BENCH, "--json")
    assert (code, err) == (0, "")
    (result,) = json.loads(out)
    assert result["shape"] == [2, 8, 16, 16]
    assert result["failed"] == {}
    assert all(0 < seconds < 1 for seconds in result["seconds"].values())
    assert {"gn_fast", "NumPy"} <= set(result["seconds"])


def test_bench_without_a_shape_runs_those_of_models():
    code, out, err = gn_fast_("bench", "--seconds", "0.01", "--threads", "1", "--json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    assert len(results) > 5
    for result in results:
        assert {"gn_fast", "NumPy"} <= set(result["seconds"])


def test_bench_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are drawn by the extra cli")
    code, _, err = gn_fast_(*BENCH, "--plot", tmp_path / "speed.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    refused(gn_fast_(*BENCH, "--plot", tmp_path / "speed.nothing"), "--plot", "png")
    refused(gn_fast_(*BENCH, "--plot", tmp_path / "no" / "speed.png"), "--plot")


def test_bench_without_matplotlib_says_what_to_install():
    refused(gn_fast_(*BENCH, "--plot", "speed.png", code=WITHOUT_EXTRAS), "pip install 'gn_fast[cli]'")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "2,8"],
        ["--groups", "2"],
        ["--shape", "2,8", "--groups", "3"],
        ["--shape", "8", "--groups", "1"],
        ["--shape", "2,x", "--groups", "1"],
        ["--shape", "2,0", "--groups", "1"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--threads", "0"],
    ],
)
def test_bench_refuses_what_does_not_fit(arguments):
    refused(gn_fast_("bench", *arguments))


@pytest.mark.parametrize("arguments", [["info"], BENCH])
def test_a_reader_that_leaves_is_no_error(arguments):
    with process(*arguments) as running:
        running.stdout.close()
        assert (running.wait(timeout=60), running.stderr.read()) == (141, "")


@linux
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = gn_fast_("info", stdout=full)
    assert (code, err) == (1, "gn-fast: error: No space left on device\n")


# ---- norm: what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.int16), np.dtype(bool), np.dtype(">f4")], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_the_file_is_that_of_group_norm(tmp_path, dtype, axis, order):
    x = np.asarray(normal((5, 6, 7, 4), dtype), order=order)
    bfloat16 = ["--bfloat16"] if dtype == ml_dtypes.bfloat16 else []
    arguments = [saved(tmp_path / "x.npy", x), tmp_path / "y.npy", "--groups", 2, "--axis", axis, *bfloat16]
    assert main(["norm", *map(str, arguments)]) == 0
    np.save(tmp_path / "expected.npy", gn_fast.group_norm(x, 2, axis=axis))
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize("activation", [*ACTIVATIONS[1:], "swish", "leaky_relu:0.2"])
def test_all_options_are_those_of_group_norm(tmp_path, features, activation):
    x, residual = np.load(features), normal((4, 6, 16, 20), np.int8, seed=1)
    weights = {"weight": normal((4, 6, 1, 1), seed=2), "bias": normal(6, np.float64, seed=3)}
    np.savez(tmp_path / "w.npz", **weights)
    added = saved(tmp_path / "r.npy", np.asfortranarray(residual))
    code = main([
        "norm", str(features), str(tmp_path / "y.npy"), "--groups=3", f"--weights={tmp_path / 'w.npz'}",
        "--eps=0.01", f"--residual={added}", f"--activation={activation}", "--threads=1",
    ])  # fmt: skip
    assert code == 0
    name, _, slope = activation.partition(":")
    fused = (name, float(slope)) if slope else name
    y = gn_fast.group_norm(x, 3, **weights, eps=0.01, residual=residual, activation=fused)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y)


def test_it_says_nothing_in_a_pipe(tmp_path, features):
    assert gn_fast_("norm", features, tmp_path / "y.npy", "--groups", 2) == (0, "", "")


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (2, 0, 3), (0, 4), (2, 4)])
def test_arrays_of_few_values_and_none(tmp_path, shape):
    x = saved(tmp_path / "x.npy", np.ones(shape))
    np.savez(tmp_path / "w.npz", weight=np.ones(shape[:2]), bias=np.zeros(shape[1]))
    weights = ["--weights", tmp_path / "w.npz"]
    assert gn_fast_("norm", x, tmp_path / "y.npy", "--groups", 2, *weights) == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.zeros(shape))


@st.composite
def calls(draw):
    """An array, its groups and the channels' axis, parameters, a residual, and the values of a piece."""
    ndim = draw(st.integers(2, 4))
    axis = draw(st.integers(1, ndim - 1))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
    shape[axis] = groups * size
    dtype = draw(st.sampled_from([*DTYPES, np.dtype(np.int16), np.dtype(">f4")]))
    orders = [draw(st.sampled_from("CF")) for _ in range(2)]
    x, r = (np.asarray(normal(shape, dtype, seed), order=o) for seed, o in enumerate(orders))
    rows = draw(st.sampled_from([(), (1,), (shape[0],)]))
    parameters = {"weight": normal((*rows, groups * size), seed=2), "bias": normal(groups * size, seed=3)}
    residual = draw(st.sampled_from([None, r]))
    return x, groups, axis, parameters, residual, draw(st.integers(1, 40))


@settings(deadline=None, max_examples=200)
@given(call=calls())
def test_tiles_keep_the_bound_of_the_whole(call, tmp_path_factory):
    x, groups, axis, parameters, residual, values = call
    folder = tmp_path_factory.mktemp("tiles")
    np.savez(folder / "w.npz", **parameters)
    arguments = [
        saved(folder / "x.npy", x),
        folder / "y.npy",
        "--groups",
        groups,
        "--axis",
        axis,
        "--bfloat16",
    ]
    arguments += ["--weights", folder / "w.npz", "--activation", "relu"]
    if residual is not None:
        arguments += ["--residual", saved(folder / "r.npy", residual)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "_values", lambda *_: values)
        assert main(["norm", *map(str, arguments)]) == 0
    y = loaded(folder / "y.npy", ml_dtypes.bfloat16)

    options = {"axis": axis, "residual": residual, "activation": "relu"}
    expected = gn_fast.group_norm(x, groups, **parameters, **options)
    assert (y.dtype, y.flags.f_contiguous) == (expected.dtype, np.load(folder / "x.npy").flags.f_contiguous)
    held = x.size if np.load(folder / "x.npy").flags.fnc else x[0].size
    if held <= values:
        np.testing.assert_array_equal(y, expected)
        return
    # Docs: the bounds of float32, 16 bits and float64; a relu moves nothing further apart.
    exact = reference.group_norm(x.astype(np.float64), groups, **parameters, **options)
    m = reference.group_moments(x, groups, axis=axis)
    xhat = np.abs(np.moveaxis(reference.group_norm(x.astype(np.float64), groups, axis=axis), axis, -1))
    offset = np.repeat(np.maximum(1 / 16, np.abs(m.mean) * m.rstd()), x.shape[axis] // groups, axis=1)
    offset = offset.reshape(len(x), *(1,) * (x.ndim - 2), x.shape[axis])
    weight, bias = (np.abs(parameters[name].astype(np.float64)) for name in ("weight", "bias"))
    weight = weight.reshape(-1, *(1,) * (x.ndim - 2), x.shape[axis])
    added = 0 if residual is None else np.abs(np.moveaxis(residual, axis, -1).astype(np.float64))
    double = y.dtype == np.float64
    scale = np.moveaxis(weight * (xhat + (offset if double else 1 / 16)) + bias + added, -1, axis)
    allowed = 8 * EPS64 * scale if double else bound(exact, scale, y.dtype)  # half of 8 is the reference's
    assert np.all(np.abs(y.astype(np.float64) - exact) <= allowed)


def test_a_nan_spoils_its_own_group_in_tiles_too(tmp_path, monkeypatch):
    x = normal((2, 4, 30))
    x[0, 1, 7], x[1, 2, 3] = np.nan, np.inf
    monkeypatch.setattr(norm, "_values", lambda *_: 10)
    source = saved(tmp_path / "x.npy", x)
    assert main(["norm", str(source), str(tmp_path / "y.npy"), "--groups=2"]) == 0
    y = np.load(tmp_path / "y.npy")
    assert np.isnan(y[0, :2]).all()
    assert np.isnan(y[1, 2:]).all()
    assert np.isfinite(y[0, 2:]).all()
    assert np.isfinite(y[1, :2]).all()


# ---- norm: memory ----------------------------------------------------------------------------------------

# After a first run, which takes what Python, NumPy and OpenMP need: no more address space than was said, and
# the peak of what is resident as a share of it. (The peak that getrusage tells begins with the parent's.)
# Of the address space 2 MiB are taken away: the heaps of Python and malloc may grow by as much at any time.
LIMITED = """
import re, resource, sys
from gn_fast.__main__ import main

def memory(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

assert main(["norm", *sys.argv[2:4], "--groups=1", "--force"]) == 0
limit, before = int(sys.argv[1]), memory("VmHWM")
resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + limit - (2 << 20), resource.RLIM_INFINITY))
code = main(["norm", *sys.argv[4:], f"--memory={limit}"])
print((memory("VmHWM") - before) / limit)
sys.exit(code)
"""


@linux
@pytest.mark.parametrize(
    ("shape", "dtype", "groups", "axis", "order", "residual"),
    [
        ((64, 16, 128, 128), np.float32, 4, 1, "C", False),  # sample by sample
        ((1, 16, 1024, 1024), np.float32, 4, 1, "C", False),  # group by group
        ((1, 4, 2048, 2048), np.float32, 1, 1, "C", True),  # some of a channel
        ((2, 2048, 1024, 4), np.float64, 2, -1, "C", False),
        ((2, 2048, 4096, 4), np.int8, 2, -1, "C", False),  # as float64: eight times the file
        ((8, 8, 512, 512), np.float32, 4, 1, "F", False),
        ((4096, 4096), np.float32, 32, 1, "F", False),
    ],
)
def test_a_file_of_twice_the_memory(tmp_path, shape, dtype, groups, axis, order, residual):
    limit = 32 * MIB
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", dtype, shape, fortran_order=order == "F")
    flat = x.reshape(-1, order=order)
    random = np.random.default_rng(0).integers(0, 99, 1 << 16)
    for start in range(0, x.size, 1 << 16):
        flat[start : start + (1 << 16)] = random + start // MIB % 7
    assert path.stat().st_size >= 2 * limit
    options = ["--groups", groups, "--axis", axis, "--threads", 1]
    options += ["--residual", path] if residual else []
    small = [saved(tmp_path / "small.npy", np.ones((1, 2, 9), dtype)), tmp_path / "small_y.npy"]
    code, out, err = gn_fast_(limit, *small, path, tmp_path / "y.npy", *options, code=LIMITED)
    assert (code, err) == (0, "")
    assert 0 < float(out) <= 1
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    assert y.shape == shape
    expected = gn_fast.group_norm(x[:1], groups, axis=axis, residual=x[:1] if residual else None)
    np.testing.assert_allclose(y[:1], expected, rtol=0, atol=1e-4 if residual else 1e-5)


def test_memory_that_is_too_little_is_refused_with_what_is_enough(tmp_path):
    x = saved(tmp_path / "x.npy", np.ones((1, 4, 1 << 19), np.float32))
    result = gn_fast_("norm", x, tmp_path / "y.npy", "--groups", 2, "--threads", 1, "--memory", "64K")
    refused(result, "argument --memory", "65536 bytes")
    enough = re.search(r"give (\d+M) or more", result[2])[1]
    code, *_ = gn_fast_("norm", x, tmp_path / "y.npy", "--groups", 2, "--threads", 1, "--memory", enough)
    assert code == 0


# ---- norm: what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--groups=4"], ["--groups", "divide", "6", "4"]),
        (["--groups=0"], ["--groups"]),
        (["--groups=x"], ["--groups"]),
        ([f"--groups={10**30}"], ["--groups"]),
        (["--groups=2", "--axis=0"], ["--axis"]),
        (["--groups=2", "--axis=4"], ["--axis", "4"]),
        (["--groups=2", f"--axis={10**30}"], ["--axis"]),
        (["--groups=2", "--memory=0"], ["--memory"]),
        (["--groups=2", "--eps=nan"], ["--eps", "nan"]),
        (["--groups=2", "--eps=-1"], ["--eps", "-1"]),
        (["--groups=2", "--activation=softmax"], ["--activation", "softmax"]),
        (["--groups=2", "--activation=leaky_relu:x"], ["--activation", "x"]),
        (["--groups=2", "--activation=relu:2"], ["--activation", "relu"]),
        (["--groups=2", "--memory=lots"], ["--memory", "lots"]),
        (["--groups=2", "--threads=0"], ["--threads", "0"]),
        (["--groups=2", "--residual=missing.npy"], ["--residual", "missing.npy"]),
        (["--groups=2", "--residual=other.npy"], ["--residual", "shape"]),
        (["--groups=2", "--weights=missing.npz"], ["--weights", "missing.npz"]),
        (["--groups=2", "--weights=features.npy"], ["--weights", "savez"]),
        (["--groups=2", "--weights=names.npz"], ["--weights", "scale"]),
        (["--groups=2", "--weights=sizes.npz"], ["--weights", "(5,)"]),
        (["--groups=2", "--weights=cut.npz"], ["--weights", "savez"]),
        (["--groups=2", "--weights=damaged.npz"], ["--weights", "damaged"]),
    ],
)
def test_options_that_do_not_fit_write_nothing(tmp_path, features, options, words):
    saved(tmp_path / "other.npy", np.zeros((4, 6, 16, 21)))
    np.savez(tmp_path / "names.npz", scale=np.ones(6))
    np.savez(tmp_path / "sizes.npz", weight=np.ones(5))
    archive = (tmp_path / "sizes.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(archive[:100])
    (tmp_path / "damaged.npz").write_bytes(archive.replace(b"descr", b"DESCR"))
    before = sorted(tmp_path.iterdir())
    refused(gn_fast_("norm", features.name, "y.npy", *options, cwd=tmp_path), *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(8), "2 dimensions"),
        (np.zeros(()), "2 dimensions"),
        (np.zeros((2, 4), complex), "complex128"),
        (np.zeros((2, 4), np.longdouble), "longdouble"),
        (np.zeros((2, 4), [("a", "i4")]), "dtype"),
        (np.array([["a", 1], [None, 2]], object), "objects"),
        (np.zeros((2, 4), ml_dtypes.bfloat16), "--bfloat16"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, words):
    words = np.dtype(np.longdouble).name if words == "longdouble" else words
    path = saved(tmp_path / "x.npy", array)
    refused(gn_fast_("norm", path, tmp_path / "y.npy", "--groups", 1), "IN.npy", words)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [None, b"", b"PK\x03\x04 an archive", b"\x93NUMPY\x01\x00", "cut", "}", ":"]
)
def test_files_that_are_no_arrays(tmp_path, features, content):
    path = tmp_path / "x.npy"
    if isinstance(content, str):
        whole = features.read_bytes()
        path.write_bytes(whole[:-1] if content == "cut" else whole.replace(content.encode(), b"("))
    elif content is not None:
        path.write_bytes(content)
    refused(gn_fast_("norm", path, tmp_path / "y.npy", "--groups", 1), f"IN.npy: {path}")


def test_folders_and_pipes_are_no_files(tmp_path, features):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        refused(gn_fast_("norm", path, tmp_path / "y.npy", "--groups", 1), "IN.npy", "no regular file")
        refused(gn_fast_("norm", features, path, "--groups", 1, "--force"), "OUT.npy", "no regular file")
    refused(gn_fast_("norm", features, tmp_path / "no" / "y.npy", "--groups", 1), "OUT.npy", "no folder")
    refused(gn_fast_("norm", features, "/dev/null", "--groups", 1, "--force"), "OUT.npy", "no regular file")


# ---- norm: whole or not at all ---------------------------------------------------------------------------


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path, features):
    out = tmp_path / "y.npy"
    out.write_bytes(b"mine")
    refused(gn_fast_("norm", features, out, "--groups", 2), "OUT.npy", "--force")
    assert out.read_bytes() == b"mine"
    assert gn_fast_("norm", features, out, "--groups", 2, "--force") == (0, "", "")
    np.testing.assert_array_equal(np.load(out), gn_fast.group_norm(np.load(features), 2))
    assert sorted(tmp_path.iterdir()) == [features, out]


def test_a_file_that_comes_meanwhile_is_kept(tmp_path, features):
    code = SLOW.format(seconds=0.2).replace("norm.PIECE = 1 << 12", "")
    with process("norm", features, tmp_path / "y.npy", "--groups", 2, code=code) as running:
        wait_for_temporary(tmp_path, running)
        (tmp_path / "y.npy").write_bytes(b"mine")
        out, err = running.communicate(timeout=60)
    refused((running.returncode, out, err), "OUT.npy", "--force")
    assert (tmp_path / "y.npy").read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == [features, tmp_path / "y.npy"]


def test_a_file_may_be_normalized_into_itself(features):
    x = np.load(features)
    refused(gn_fast_("norm", features, features, "--groups", 2), "OUT.npy")
    assert gn_fast_("norm", features, features, "--groups", 2, "--force") == (0, "", "")
    np.testing.assert_array_equal(np.load(features), gn_fast.group_norm(x, 2))


def test_a_link_stays_a_link(tmp_path, features):
    (tmp_path / "folder").mkdir()
    (tmp_path / "y.npy").symlink_to(tmp_path / "folder" / "y.npy")
    assert gn_fast_("norm", features, tmp_path / "y.npy", "--groups", 2) == (0, "", "")
    assert (tmp_path / "y.npy").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["y.npy"]


def test_the_mode_of_the_file_is_that_of_any_other(tmp_path, features):
    assert gn_fast_("norm", features, tmp_path / "y.npy", "--groups", 2) == (0, "", "")
    assert (tmp_path / "y.npy").stat().st_mode == features.stat().st_mode


def wait_for_temporary(folder: Path, running):
    while not list(folder.glob(".gn-fast-*")):
        assert running.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, features, number, force):
    out = tmp_path / "y.npy"
    if force:
        out.write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    arguments = ["norm", features, out, "--groups", 2, *["--force"] * force]
    with process(*arguments, code=SLOW.format(seconds=60)) as running:
        wait_for_temporary(tmp_path, running)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (128 + number, "", "")
    assert sorted(tmp_path.iterdir()) == before
    assert not force or (tmp_path / "y.npy").read_bytes() == b"mine"


def test_a_second_ctrl_c_does_not_disturb_what_the_first_began(tmp_path, features):
    slow_removal = """
import pathlib, time
unlink = pathlib.Path.unlink
pathlib.Path.unlink = lambda *a, **k: (print("removing", flush=True), time.sleep(1), unlink(*a, **k))
"""
    code = slow_removal + SLOW.format(seconds=60)
    with process("norm", features, tmp_path / "y.npy", "--groups", 2, code=code) as running:
        wait_for_temporary(tmp_path, running)
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == "removing\n"
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")
    assert list(tmp_path.iterdir()) == [features]


def test_a_full_disk_leaves_nothing_behind(tmp_path, features):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
from gn_fast.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    code, out, err = gn_fast_("norm", features, tmp_path / "y.npy", "--groups", 2, code=code)
    assert (code, out, err) == (1, "", "gn-fast: error: File too large\n")
    assert list(tmp_path.iterdir()) == [features]


def test_a_file_that_becomes_shorter_is_an_error_and_no_crash(tmp_path, features):
    with process("norm", features, tmp_path / "y.npy", "--groups", 2, code=SLOW.format(seconds=1)) as running:
        wait_for_temporary(tmp_path, running)
        os.truncate(features, 10_000)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert "shorter" in line
    assert list(tmp_path.iterdir()) == [features]


# ---- in a terminal ---------------------------------------------------------------------------------------


def test_a_bar_in_a_terminal(tmp_path, features):
    pytest.importorskip("rich", reason="the bar is drawn by the extra cli")
    code, shown = in_terminal(
        "norm", features, tmp_path / "y.npy", "--groups", 2, code=SLOW.format(seconds=0.3)
    )
    assert code == 0
    assert "features.npy" in shown
    assert re.search(r"\d+%", shown)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), gn_fast.group_norm(np.load(features), 2))


def test_ctrl_c_in_a_terminal(tmp_path, features):
    pytest.importorskip("rich", reason="the bar is drawn by the extra cli")
    code, shown = in_terminal(
        "norm", features, tmp_path / "y.npy", "--groups", 2, code=SLOW.format(seconds=60),
        until=b"features.npy", send=b"\x03",
    )  # fmt: skip
    assert code == 130
    assert "Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
    assert list(tmp_path.iterdir()) == [features]


def test_no_bar_without_rich(tmp_path, features):
    code, shown = in_terminal("norm", features, tmp_path / "y.npy", "--groups", 2, code=WITHOUT_EXTRAS)
    assert (code, shown) == (0, "")


def test_tables_in_a_terminal():
    pytest.importorskip("rich", reason="tables in terminals are drawn by the extra cli")
    code, shown = in_terminal(*BENCH)
    assert code == 0
    assert "┃" in shown
    assert "\x1b[" in shown
    assert "2x8x16x16" in shown


def test_plain_tables_in_a_terminal_without_rich():
    code, shown = in_terminal(*BENCH, code=WITHOUT_EXTRAS)
    assert code == 0
    assert "\x1b[" not in shown
    assert "2x8x16x16" in shown
