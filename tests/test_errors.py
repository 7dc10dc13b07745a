"""Bad input: the exception, a message with the argument, what it was and should be; `out` untouched."""

import subprocess
import sys

import numpy as np
import pytest

import gn_fast
from gn_fast import Moments

N, C, H, W = 2, 6, 3, 5
X = np.random.default_rng(0).standard_normal((N, C, H, W)).astype(np.float32)
COMPLEX = np.ones(C, complex)
RAGGED = [[1.0, 2.0], [3.0]]
SENTINEL = np.float32(-12345)


def read_only():
    out = np.full_like(X, SENTINEL)
    out.flags.writeable = False
    return out


def overlapping_itself():
    return np.lib.stride_tricks.as_strided(
        np.full(C * H * W + 1, SENTINEL), X.shape, (4, H * W * 4, W * 4, 4)
    )


def interwoven():
    """No stride is 0 and none reaches less than the next, but places coincide: 2 * 3 = 3 * 2."""
    return np.lib.stride_tricks.as_strided(np.full(999, SENTINEL), X.shape, (4 * 91, 4 * 15, 4 * 2, 4 * 3))


# name of the argument, its value, the exception, what the message must say it was
BAD = [
    # x
    ("x", np.float32(1), ValueError, "()"),
    ("x", np.array(1.0), ValueError, "()"),
    ("x", 3, ValueError, "()"),
    ("x", np.ones(6, np.float32), ValueError, "(6,)"),
    ("x", [], ValueError, "(0,)"),
    ("x", X.astype(complex), TypeError, "complex128"),
    ("x", X.astype(object), TypeError, "object"),
    ("x", X.astype(np.longdouble), TypeError, np.dtype(np.longdouble).name),
    ("x", X.astype("U8"), TypeError, "U8"),
    ("x", X.astype("S8"), TypeError, "S8"),
    ("x", np.zeros(X.shape, "M8[s]"), TypeError, "datetime64"),
    ("x", np.zeros(X.shape, "m8[s]"), TypeError, "timedelta64"),
    ("x", np.zeros(X.shape, [("a", "f4")]), TypeError, "'a'"),
    ("x", None, TypeError, "object"),
    ("x", "abc", TypeError, "U3"),
    ("x", RAGGED, (TypeError, ValueError), "inhomogeneous"),
    ("x", np.ma.masked_array(X, X > 0), TypeError, "mask="),
    # num_groups
    ("num_groups", 4, ValueError, "4"),
    ("num_groups", 7, ValueError, "7"),
    ("num_groups", 12, ValueError, "12"),
    ("num_groups", 0, ValueError, "0"),
    ("num_groups", -1, ValueError, "-1"),
    ("num_groups", 2**70, ValueError, str(2**70)),
    ("num_groups", -(2**70), ValueError, str(-(2**70))),
    ("num_groups", np.uint64(2**64 - 1), ValueError, str(2**64 - 1)),
    ("num_groups", 2.0, TypeError, "2.0"),
    ("num_groups", np.float64(2), TypeError, "2.0"),
    ("num_groups", True, TypeError, "True"),
    ("num_groups", np.True_, TypeError, "True"),
    ("num_groups", "2", TypeError, "'2'"),
    ("num_groups", None, TypeError, "None"),
    ("num_groups", [2], TypeError, "[2]"),
    ("num_groups", np.array([2]), TypeError, "[2]"),
    ("num_groups", object, TypeError, "object"),
    # weight, bias
    *[
        (name, value, error, was)
        for name in ("weight", "bias")
        for value, error, was in [
            (np.ones(1, np.float32), ValueError, "(1,)"),
            (np.ones(C + 1), ValueError, "(7,)"),
            (np.ones((C, 1)), ValueError, "(6, 1)"),
            (np.ones((C, N)), ValueError, "(6, 2)"),
            (np.ones((N, C, 1)), ValueError, "(2, 6, 1)"),
            ([], ValueError, "(0,)"),
            (COMPLEX, TypeError, "complex128"),
            (np.ones(C, object), TypeError, "object"),
            (np.ones(C, np.longdouble), TypeError, np.dtype(np.longdouble).name),
            (["a"] * C, TypeError, "U1"),
            (RAGGED, (TypeError, ValueError), "inhomogeneous"),
            (np.ma.ones(C), TypeError, "masked"),
        ]
    ],
    # eps
    ("eps", -1e-5, ValueError, "-1e-05"),
    ("eps", -np.inf, ValueError, "-inf"),
    ("eps", np.nan, ValueError, "nan"),
    ("eps", np.float32("nan"), ValueError, "nan"),
    ("eps", "a", TypeError, "'a'"),
    ("eps", "1e-5", TypeError, "'1e-5'"),
    ("eps", None, TypeError, "None"),
    ("eps", 1j, TypeError, "1j"),
    ("eps", [1e-5], TypeError, "[1e-05]"),
    ("eps", np.ones(2), TypeError, "1."),
    ("eps", -(10**400), ValueError, ""),
    # axis
    ("axis", 0, ValueError, "0"),
    ("axis", -4, ValueError, "-4"),
    ("axis", 4, ValueError, "4"),
    ("axis", -5, ValueError, "-5"),
    ("axis", 2**70, ValueError, str(2**70)),
    ("axis", -(2**63), ValueError, str(-(2**63))),
    ("axis", "x", TypeError, "'x'"),
    ("axis", 1.0, TypeError, "1.0"),
    ("axis", None, TypeError, "None"),
    ("axis", (1,), TypeError, "(1,)"),
    ("axis", True, TypeError, "True"),
    # residual
    ("residual", np.ones((N, C, H, W + 1), np.float32), ValueError, "(2, 6, 3, 6)"),
    ("residual", np.ones((1, C, H, W), np.float32), ValueError, "(1, 6, 3, 5)"),
    ("residual", np.ones((C, H, W), np.float32), ValueError, "(6, 3, 5)"),
    ("residual", 1.0, ValueError, "()"),
    ("residual", X.astype(complex), TypeError, "complex128"),
    ("residual", X.astype(object), TypeError, "object"),
    ("residual", RAGGED, (TypeError, ValueError), "inhomogeneous"),
    ("residual", np.ma.masked_array(X, X > 0), TypeError, "masked"),
    # activation
    ("activation", "SiLU", ValueError, "'SiLU'"),
    ("activation", "", ValueError, "''"),
    ("activation", b"silu", ValueError, "b'silu'"),
    ("activation", 0, ValueError, "0"),
    ("activation", [], ValueError, "[]"),
    ("activation", np.tanh, ValueError, "tanh"),
    ("activation", True, ValueError, "True"),
    *[
        ("activation", value, error, repr(value))
        for value, error in [
            (("leaky_relu",), ValueError),
            (("leaky_relu", 0.1, 0.2), ValueError),
            ((0.1, "leaky_relu"), ValueError),
            (("silu", 0.1), ValueError),
            (("LeakyReLU", 0.1), ValueError),
            (["leaky_relu", 0.1], ValueError),
            ((), ValueError),
            ((np.ones(2), 0.1), ValueError),
            (("leaky_relu", np.nan), ValueError),
            (("leaky_relu", -np.inf), ValueError),
            (("leaky_relu", 10**400), ValueError),
            (("leaky_relu", 1e39), ValueError),  # beyond float32, which is computed in
            (("leaky_relu", True), TypeError),
            (("leaky_relu", np.False_), TypeError),
            (("leaky_relu", None), TypeError),
            (("leaky_relu", "0.1"), TypeError),
            (("leaky_relu", 0.1j), TypeError),
            (("leaky_relu", np.complex64(1)), TypeError),
            (("leaky_relu", [0.1]), TypeError),
            (("leaky_relu", np.ones(2)), TypeError),
        ]
    ],
    # mask
    ("mask", np.ones((N, 1, H, W), int), TypeError, "int64"),
    ("mask", np.ones((N, 1, H, W), np.uint8), TypeError, "uint8"),
    ("mask", np.ones((N, 1, H, W), np.float32), TypeError, "float32"),
    ("mask", 1, TypeError, "int64"),
    ("mask", "all", TypeError, "U3"),
    ("mask", np.ones((N, C, H, W), bool), ValueError, "(2, 6, 3, 5)"),
    ("mask", np.ones((C, H, W), bool), ValueError, "(6, 3, 5)"),
    ("mask", np.ones((N, 1, H, W + 1), bool), ValueError, "(2, 1, 3, 6)"),
    ("mask", np.ones((3, 1, H, W), bool), ValueError, "(3, 1, 3, 5)"),
    ("mask", np.ones((1, N, 1, H, W), bool), ValueError, "(1, 2, 1, 3, 5)"),
    ("mask", [[True], [True, False]], (TypeError, ValueError), "inhomogeneous"),
    ("mask", np.ma.masked_array(np.ones((N, 1, H, W), bool), True), TypeError, "masked"),
    # moments
    ("moments", (np.ones((N, 2)), np.ones((N, 2)), np.ones((N, 2))), TypeError, "tuple"),
    ("moments", np.ones((N, 2)), TypeError, "ndarray"),
    ("moments", True, TypeError, "bool"),
    ("moments", Moments(np.ones((N, 3), int), np.ones((N, 3)), np.ones((N, 3))), ValueError, "(2, 3)"),
    ("moments", Moments(np.ones((1, 2), int), np.ones((1, 2)), np.ones((1, 2))), ValueError, "(1, 2)"),
    # num_threads
    ("num_threads", 0, ValueError, "0"),
    ("num_threads", -1, ValueError, "-1"),
    ("num_threads", True, TypeError, "True"),
    ("num_threads", np.True_, TypeError, "True"),
    ("num_threads", "a", TypeError, "'a'"),
    ("num_threads", 1.0, TypeError, "1.0"),
    ("num_threads", [1], TypeError, "[1]"),
    ("num_threads", np.array([1, 2]), TypeError, "[1, 2]"),
    ("num_threads", np.array(1.0), TypeError, "1."),
    ("num_threads", -(2**70), ValueError, str(-(2**70))),
]

BAD_OUT = [
    ([[0.0]], TypeError, "list"),
    (0, TypeError, "int"),
    (True, TypeError, "bool"),
    ("out", TypeError, "str"),
    (np.ma.array(X.copy()), TypeError, "Masked"),
    (np.empty((N, C, H), np.float32), ValueError, "(2, 6, 3)"),
    (np.empty((N, C, W, H), np.float32), ValueError, "(2, 6, 5, 3)"),
    (np.empty((1, C, H, W), np.float32), ValueError, "(1, 6, 3, 5)"),
    (np.empty((1, N, C, H, W), np.float32), ValueError, "(1, 2, 6, 3, 5)"),
    (np.empty(X.shape, np.float64), TypeError, "float64"),
    (np.empty(X.shape, np.float16), TypeError, "float16"),
    (np.empty(X.shape, np.int32), TypeError, "int32"),
    (np.empty(X.shape, object), TypeError, "object"),
    (np.broadcast_to(np.float32(0), X.shape), ValueError, "read-only"),
    (read_only(), ValueError, "read-only"),
    (overlapping_itself(), ValueError, "overlap"),
    (interwoven(), ValueError, "overlap"),
]


def label(value):
    return value if isinstance(value, str) else f"{type(value).__name__}"


def assert_refused(call, name, error, was):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) in (TypeError, ValueError), f"{type(caught.value).__name__}: {message}"
    assert message.startswith(name + " "), message
    assert was in message, message


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD, ids=label)
def test_group_norm_refuses(name, value, error, was):
    out = np.full_like(X, SENTINEL)
    arguments = {"x": X, "num_groups": 2, "out": out} | {name: value}
    assert_refused(lambda: gn_fast.group_norm(**arguments), name, error, was)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "was"),
    [case for case in BAD if case[0] in ("x", "num_groups", "axis", "mask", "num_threads")],
    ids=label,
)
def test_group_moments_refuses(name, value, error, was):
    arguments = {"x": X, "num_groups": 2} | {name: value}
    assert_refused(lambda: gn_fast.group_moments(**arguments), name, error, was)


@pytest.mark.parametrize(("out", "error", "was"), BAD_OUT, ids=label)
def test_group_norm_refuses_out(out, error, was):
    before = np.array(out, copy=True)
    assert_refused(lambda: gn_fast.group_norm(X, 2, out=out), "out", error, was)
    np.testing.assert_array_equal(np.asarray(out), before)


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": np.ones(5)},
        {"bias": COMPLEX},
        {"mask": np.ones(3)},
        {"moments": 1},
        {"num_threads": 0},
        {"residual": np.ones(3)},
        {"activation": "x"},
        {"eps": -1},
        {"num_groups": 4},
        {"axis": 0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_in_place_nothing_is_written_by_a_call_that_raises(bad):
    x = X.copy()
    with pytest.raises((TypeError, ValueError)):
        gn_fast.group_norm(**({"x": x, "num_groups": 2, "out": x} | bad))
    np.testing.assert_array_equal(x, X)


def test_an_integer_input_wants_a_float64_out():
    x = np.arange(24).reshape(2, 4, 3)
    assert_refused(lambda: gn_fast.group_norm(x, 2, out=np.zeros(x.shape, int)), "out", TypeError, "int64")
    out = np.zeros(x.shape)
    assert gn_fast.group_norm(x, 2, out=out) is out


def test_the_message_lists_the_activations():
    names = r"None, 'relu'.*'silu', 'swish', 'gelu', 'gelu_tanh', 'mish'.*'tanh' or \('leaky_relu', slope\)"
    with pytest.raises(ValueError, match=names):
        gn_fast.group_norm(X, 2, activation="x")
    with pytest.raises(ValueError, match="slope finite in float32"):
        gn_fast.group_norm(X, 2, activation=("leaky_relu", 1e39))
    gn_fast.group_norm(X.astype(np.float64), 2, activation=("leaky_relu", 1e39))


def test_the_message_says_what_should_have_been():
    with pytest.raises(ValueError, match=r"\(6,\) or \(2, 6\)"):
        gn_fast.group_norm(X, 2, np.ones(5))
    with pytest.raises(ValueError, match=r"\(2, 6, 3, 5\)"):
        gn_fast.group_norm(X, 2, residual=np.ones(5))
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 5\)"):
        gn_fast.group_norm(X, 2, mask=np.ones(4, bool))
    with pytest.raises(TypeError, match="float32"):
        gn_fast.group_norm(X, 2, out=np.empty(X.shape))


@pytest.mark.parametrize("name", ["weight", "bias", "eps", "axis", "residual", "mask", "moments", "x"])
def test_arguments_by_keyword_are_spelled_right(name):
    with pytest.raises(TypeError, match=name + "_"):
        gn_fast.group_norm(**{"x": X, "num_groups": 2, name + "_": 1})


@pytest.mark.parametrize(
    "legal",
    [
        {"num_groups": np.int64(2)},
        {"num_groups": np.uint8(2)},
        {"num_groups": np.array(2)},
        {"axis": np.int8(1)},
        {"axis": -3},
        {"eps": 0},
        {"eps": np.float32(1e-5)},
        {"eps": np.float64(1e-5)},
        {"eps": np.array(1e-5)},
        {"num_threads": np.int64(1)},
        {"num_threads": 2**70},
        {"weight": [1] * C},
        {"weight": (1.0,) * C},
        {"mask": True},
        {"mask": [[[[True]]]]},
        {"activation": None},
    ],
    ids=str,
)
def test_group_norm_takes(legal):
    arguments = {"x": X, "num_groups": 2} | legal
    y = gn_fast.group_norm(**arguments)
    expected = gn_fast.reference.group_norm(**arguments)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


def test_eps_may_be_infinite():
    y = gn_fast.group_norm(X, 2, None, np.arange(6.0), np.inf)
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(6.0)[:, None, None], X.shape))


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 4, 3, 0), (2, 0), (2, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("axis", [1, -1])
def test_empty_input_gives_empty_output_and_moments_of_zero(shape, axis):
    x = np.zeros(shape, np.float32)
    x = np.moveaxis(x, 1, axis)
    c = shape[1]
    mask = np.ones(np.moveaxis(np.zeros((shape[0], 1, *shape[2:])), 1, axis).shape, bool)
    y, m = gn_fast.group_norm(
        x, 2, np.ones(c), np.ones((shape[0], c)), axis=axis, mask=mask, residual=x, activation="silu",
        out=np.empty_like(x), return_moments=True,
    )  # fmt: skip
    assert y.shape == x.shape
    for array in (m.count, m.mean, m.m2):
        np.testing.assert_array_equal(array, np.zeros((shape[0], 2)))


def test_no_memory_is_a_memory_error():
    x = np.broadcast_to(np.float32(1), (1, 2, 2**59))
    with pytest.raises(MemoryError):
        gn_fast.group_norm(x, 1)


@pytest.mark.parametrize("bad", ["x86_64_v9", "", None, 3])
def test_use_isa_lists_the_levels(bad):
    with pytest.raises(ValueError, match=gn_fast.isa_levels()[0]), gn_fast.use_isa(bad):
        pass


@pytest.mark.parametrize(
    "bad", [0, -1, True, np.True_, np.False_, np.array(True), np.array([1, 2]), "a", 1.5]
)
def test_thread_settings_refuse(bad):
    error = ValueError if type(bad) is int else TypeError
    with pytest.raises(error, match=r"^n must"):
        gn_fast.set_num_threads(bad)
    with pytest.raises(error, match=r"^n must"), gn_fast.num_threads(bad):
        pass


def run_with(variable, value):
    code = "import gn_fast; print(gn_fast.get_num_threads())"
    environment = {"PATH": "", variable: value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_an_unknown_isa_in_the_environment_is_an_import_error():
    result = run_with("GN_FAST_ISA", "x86_64_v9")
    assert result.returncode != 0
    assert "ImportError: GN_FAST_ISA must be one of" in result.stderr
    assert "x86_64_v9" in result.stderr
    assert all(level in result.stderr for level in gn_fast.isa_levels())


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_a_bad_thread_count_in_the_environment_warns_and_is_ignored(value):
    result = run_with("GN_FAST_NUM_THREADS", value)
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning: GN_FAST_NUM_THREADS" in result.stderr
    assert repr(value) in result.stderr
    assert int(result.stdout) >= 1
