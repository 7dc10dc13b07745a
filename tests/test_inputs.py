"""What people pass: subclasses, other libraries' objects, parameters of any shape; one signature for all."""

import ast
import inspect
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import LAYOUTS, assert_same_bits, in_layout, name_of, normal
from test_layouts import SCRATCH, peak

import gn_fast
from gn_fast import _core, reference

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def problem(shape=(2, 6, 4, 5), dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "x": normal(rng, shape, dtype),
        "num_groups": 3,
        "weight": normal(rng, shape[1]),
        "bias": normal(rng, shape[1]),
        "residual": normal(rng, shape, dtype),
        "mask": rng.random((shape[0], 1, *shape[2:])) < 0.7,
    }


ARRAYS = ["dy", "x", "weight", "bias", "residual", "mask"]


def call(arguments):
    """The forward's result; with dy the gradient's."""
    if "dy" in arguments:
        return gn_fast.group_norm_backward(**arguments)
    return (gn_fast.group_norm(**arguments),)


# ---- subclasses of ndarray -------------------------------------------------------------------------------


class Wrapped(np.ndarray):
    def __array_wrap__(self, array, context, return_scalar):
        assert type(array) is np.ndarray
        assert context is None
        assert return_scalar is False
        return array.view(type(self))


class Broken(np.ndarray):
    def __array_wrap__(self, array, context, return_scalar):
        raise RuntimeError("broken")


@pytest.mark.filterwarnings("error")
def test_a_subclass_is_wrapped_as_numpy_2_does_it():
    arguments = problem()
    x = arguments["x"].view(Wrapped)
    y = gn_fast.group_norm(**arguments | {"x": x})
    assert type(y) is Wrapped
    assert_same_bits(np.asarray(y), gn_fast.group_norm(**arguments))
    dy = np.ones_like(arguments["x"])
    dx, dweight, dbias, dresidual = gn_fast.group_norm_backward(dy, **arguments | {"x": x})
    assert [type(a) for a in (dx, dweight, dbias, dresidual)] == [Wrapped, np.ndarray, np.ndarray, Wrapped]
    mapped = x.view(np.memmap)
    assert type(gn_fast.group_norm(mapped, 1)) is type(np.positive(mapped))


def test_out_is_not_written_by_a_call_whose_wrapping_fails():
    arguments = problem()
    x, dy = arguments["x"].view(Broken), np.ones_like(arguments["x"])
    with pytest.raises(RuntimeError, match="broken"):
        gn_fast.group_norm(**arguments | {"x": x})
    out = np.zeros(x.shape, x.dtype)
    with pytest.raises(RuntimeError, match="broken"):
        gn_fast.group_norm_backward(dy, **arguments | {"x": x}, out=out)
    assert not out.any()
    del arguments["residual"]  # nothing is wrapped then
    assert gn_fast.group_norm(**arguments | {"x": x}, out=out) is out
    assert out.any()
    dx, _, _ = gn_fast.group_norm_backward(dy, **arguments | {"x": x}, out=out)
    assert dx is out
    assert_same_bits(out, gn_fast.group_norm_backward(dy, **arguments)[0])


# ---- the shapes of weight and bias -----------------------------------------------------------------------


def forms(n, c, spatial):
    ones = (1,) * len(spatial)
    return [(), *{shape for short in ((c,), (1, c), (n, c)) for shape in (short, (*short, *ones))}]


@pytest.mark.parametrize(
    "shape",
    [(2, 6), (6, 6), (1, 6), (2, 6, 5), (6, 6, 3), (2, 3, 1, 1), (2, 6, 4, 5), (3, 6, 2, 3, 4),
     (2, 6, 40, 30), (1, 1), (3, 1), (1, 1, 5), (3, 1, 5), (3, 1, 5, 6)],
    ids=name_of,
)  # fmt: skip
@both_layouts
def test_weight_and_bias_of_each_shape_that_fits(shape, layout):
    """All mean the same as their values written out for each channel of each sample."""
    n, c, *spatial = shape
    ones = (1,) * len(spatial)
    rng = np.random.default_rng(0)
    for dtype, axis in ((np.float32, 1), (np.float64, -1), (np.float16, -1)):
        x, dy, residual = (in_layout(normal(rng, shape, dtype), layout) for _ in range(3))
        x, dy, residual = (np.moveaxis(a, 1, axis) for a in (x, dy, residual))
        options = {"axis": axis, "residual": residual, "activation": "silu"}
        for form in forms(n, c, spatial):
            for kind in (np.float32, np.float64, ml_dtypes.bfloat16):
                weight, bias = (np.asarray(normal(rng, form, kind)) for _ in range(2))
                groups = 1 if c == 1 else 3
                rows = [np.array(np.broadcast_to(p.reshape(p.shape[: p.ndim - len(ones)])
                                                 if p.ndim > 2 or p.shape == (c, *ones) else p, (n, c)))
                        for p in (weight, bias)]  # fmt: skip
                y = gn_fast.group_norm(x, groups, weight, bias, **options)
                assert_same_bits(y, gn_fast.group_norm(x, groups, *rows, **options), f"{form}")
                tolerance = {"rtol": 0, "atol": 2e-2 if dtype == np.float16 else 1e-5}
                expected = reference.group_norm(x, groups, weight, bias, **options)
                np.testing.assert_allclose(y, expected, **tolerance)

                dx, dweight, dbias, _ = gn_fast.group_norm_backward(dy, x, groups, weight, bias, **options)
                rowwise = gn_fast.group_norm_backward(dy, x, groups, *rows, **options)
                exact = reference.group_norm_backward(dy, x, groups, weight, bias, **options)
                assert_same_bits(dx, rowwise[0], f"{form}")
                for result, parameter, oracle in zip(
                    (dweight, dbias), (weight, bias), exact[1:3], strict=True
                ):
                    assert type(result) is np.ndarray
                    assert result.shape == oracle.shape == form
                    assert result.dtype == oracle.dtype == parameter.dtype
                    # The terms of a sum are of size 1, each right to 1e-6; the sum is rounded once.
                    a, b = result.astype(np.float64), oracle.astype(np.float64)
                    terms = x.size // max(parameter.size, 1)
                    rounding = float(ml_dtypes.finfo(kind).eps)
                    np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-6 * terms)


@pytest.mark.parametrize(
    "scalar", [2, 2.5, np.float32(2.5), np.float64(2.5), np.int16(2), np.array(2.5), True]
)
def test_a_scalar_is_a_weight_of_all_channels(scalar):
    x = problem()["x"]
    expected = np.asarray(scalar)
    expected = expected if expected.dtype.kind == "f" else expected.astype(np.float64)
    y = gn_fast.group_norm(x, 3, scalar, scalar)
    assert_same_bits(y, gn_fast.group_norm(x, 3, np.full(6, expected), np.full(6, expected)))
    _, dweight, dbias = gn_fast.group_norm_backward(np.ones_like(x), x, 3, scalar, scalar)
    for result, total in ((dweight, 0), (dbias, x.size)):
        assert type(result) is np.ndarray
        assert result.shape == ()
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, total, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 0), (2, 0, 3), (0, 0, 0)])
def test_gradients_of_parameters_of_empty_arrays_are_zeros(shape):
    x = np.zeros(shape, np.float32)
    for form in forms(*shape[:2], shape[2:]):
        parameter = np.ones(form, np.float32)
        results = gn_fast.group_norm_backward(x, x, 1, parameter, parameter)
        for result, oracle in zip(
            results, reference.group_norm_backward(x, x, 1, parameter, parameter), strict=True
        ):
            assert_same_bits(result, oracle)
            assert result.shape == oracle.shape


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    ("shape", "parameter"),
    [
        ((2, 6, 4, 5), (1,)), ((2, 6, 4, 5), (1, 1)), ((2, 6, 4, 5), (1, 1, 1, 1)), ((2, 6, 4, 5), (6, 1)),
        ((2, 6, 4, 5), (2, 6, 1)), ((2, 6, 4, 5), (1, 6, 1)), ((2, 6, 4, 5), (2, 1, 1, 6)),
        ((2, 6, 4, 5), (6, 1, 1, 1)), ((2, 6, 4, 5), (1, 2, 6, 1, 1)), ((2, 6, 4, 5), (2, 1)),
        ((2, 6, 4, 5), (3, 6)), ((2, 6, 4, 5), (2, 6, 4, 5)), ((2, 6, 4, 5), (2, 6, 1, 5)),
        ((2, 6), (6, 1)), ((2, 6), (2, 6, 1)), ((2, 6), (6, 2)), ((2, 6, 4), (6, 1, 1)),
        ((2, 6, 4), (2, 1, 6)),
    ],
    ids=name_of,
)  # fmt: skip
def test_a_weight_that_fits_in_no_way_is_refused(shape, parameter, axis):
    x = np.moveaxis(np.zeros(shape), 1, axis)
    for module in (gn_fast, reference):
        with pytest.raises(ValueError, match=r"^weight must"):
            module.group_norm(x, 1, np.ones(parameter), axis=axis)
        with pytest.raises(ValueError, match=r"^bias must"):
            module.group_norm_backward(x, x, 1, None, np.ones(parameter), axis=axis)


def test_the_error_names_the_shapes_that_fit():
    with pytest.raises(
        ValueError, match=r"scalar .*\(1, 6\), \(6,\) or \(2, 6\), .*\(2, 6, 1, 1\), not \(5,\)$"
    ):
        gn_fast.group_norm(np.zeros((2, 6, 3, 4)), 2, np.ones(5))
    with pytest.raises(ValueError, match=r"scalar .*\(1, 6\), \(6,\) or \(2, 6\), not \(5,\)$"):
        gn_fast.group_norm(np.zeros((2, 6)), 2, np.ones(5))


# ---- objects of other libraries --------------------------------------------------------------------------


class DLPack:
    """Has the protocol of DLPack and no other."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


@pytest.mark.parametrize("name", ARRAYS)
def test_what_speaks_dlpack_alone_is_taken(name):
    arguments = problem()
    if name == "dy":
        arguments["dy"] = 2 * arguments["x"]
    expected = call(arguments)
    arguments[name] = DLPack(arguments[name])
    for result, wanted in zip(call(arguments), expected, strict=True):
        assert type(result) is np.ndarray
        assert_same_bits(result, wanted)


def test_dlpack_is_taken_without_a_copy():
    x = np.zeros((4, 8, 100, 100), np.float32)
    out = np.empty_like(x)
    given = {"x": DLPack(x), "residual": DLPack(x), "out": out, "num_groups": 2, "num_threads": 1}
    assert peak(lambda: gn_fast.group_norm(**given)) <= 2 * SCRATCH
    given["dy"] = DLPack(x)
    del given["residual"]
    assert peak(lambda: gn_fast.group_norm_backward(**given)) <= 2 * SCRATCH


def refused(name, value, match):
    backward = problem() | {"dy": problem()["x"], name: value}
    for arguments in (backward, {key: backward[key] for key in backward if key != "dy"}):
        if name in arguments:
            out = np.zeros_like(problem()["x"])
            with pytest.raises(TypeError, match=rf"^{name} must .*{match}"):
                call({**arguments, "out": out})
            assert not out.any()


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("device", "called"), [((2, 0), "CUDA device 0"), ((10, 3), "ROCm device 3"), ((8, 0), "Metal")]
)
def test_what_lies_on_another_device_is_refused_and_the_device_named(name, device, called):
    refused(name, DLPack(problem()["x"], device), f"not on {called}")

    class Tensor(DLPack):
        def __array__(self, dtype=None, copy=None):
            raise TypeError("cannot convert")

    refused(name, Tensor(problem()["x"], device), f"not on {called}")


@pytest.mark.parametrize("name", ARRAYS)
def test_what_refuses_to_become_an_array_is_named(name):
    for error in (TypeError, ValueError, RuntimeError, BufferError, NotImplementedError):

        class Refuses:
            def __array__(self, dtype=None, copy=None):
                raise error("no way")  # noqa: B023

        refused(name, Refuses(), "no way")

        class Exports(DLPack):
            def __dlpack__(self, **options):
                raise error("no way")  # noqa: B023

        refused(name, Exports(None), "no way")


class Tensor:
    """Like one of torch that NumPy cannot have."""

    __module__ = "torch"

    def __init__(self, requires_grad):
        self.requires_grad = requires_grad
        self.dtype = "torch.float32" if requires_grad else "torch.bfloat16"

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize("name", ARRAYS)
def test_a_tensor_that_numpy_refuses_is_shown_the_way(name):
    refused(name, Tensor(True), rf"requires grad.*gn_fast\.torch.*{name}\.detach\(\)")
    refused(name, Tensor(False), rf"BFloat16.*gn_fast\.torch.*{name}\.float\(\)")


# ---- errors that teach -----------------------------------------------------------------------------------

X = problem((2, 6, 3, 5))["x"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": X[0], "num_groups": 1, "weight": np.ones(6)}, r"one sample of 6 channels, pass x\[None\]"),
        ({"x": X[0], "num_groups": 3, "bias": np.ones((6, 1))}, r"one sample of 6 channels, pass x\[None\]"),
        ({"x": X[0], "num_groups": 2}, r"one sample of 6 channels, pass x\[None\]"),
        ({"x": X[0, :, 0, 0]}, r"x\[None\]"),
        ({"x": X[0], "axis": 0}, r"x\[None\]"),
        ({"num_groups": -1}, "num_groups=6 is one channel to a group"),
        ({"num_groups": 0}, "num_groups=6 is one channel to a group"),
        (
            {"out": np.empty((2, 3, 5, 6), np.float32)},
            r"\(2, 6, 3, 5\), not \(2, 3, 5, 6\): it looks transposed",
        ),
        ({"residual": np.empty((2, 3, 5, 6))}, r"\(2, 6, 3, 5\), not \(2, 3, 5, 6\): it looks transposed"),
        ({"mask": np.ones((2, 3, 5, 1), bool)}, r"\(2, 1, 3, 5\), not \(2, 3, 5, 1\): it looks transposed"),
    ],
)
def test_the_error_says_what_to_do(arguments, match):
    arguments = {"x": X, "num_groups": 2} | arguments
    with pytest.raises(ValueError, match=match):
        gn_fast.group_norm(**arguments)
    with pytest.raises(ValueError, match=match):
        gn_fast.group_norm_backward(arguments["x"], **arguments)


def test_nothing_is_suggested_where_it_would_not_help():
    for arguments in (
        {"num_groups": 4},
        {"weight": np.ones(5)},
        {"weight": np.ones(2), "axis": -1, "num_groups": 5},
    ):
        with pytest.raises(ValueError, match=r"^(?!.*(None|transposed))"):
            gn_fast.group_norm(**{"x": X, "num_groups": 2} | arguments)


# ---- one signature ---------------------------------------------------------------------------------------

STUB = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
STUBS = [node for node in STUB.body if isinstance(node, ast.FunctionDef)]


def described(function):
    """Name, kind and default of each parameter."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, None if p.default is p.empty else repr(p.default)) for p in parameters]


def described_stub(node):
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults + a.kw_defaults
    kinds = ["POSITIONAL_OR_KEYWORD"] * len(positional) + ["KEYWORD_ONLY"] * len(a.kwonlyargs)
    return [
        (p.arg, kind, default and repr(ast.literal_eval(default)))
        for p, kind, default in zip([*positional, *a.kwonlyargs], kinds, defaults, strict=True)
    ]


@pytest.mark.parametrize("node", STUBS, ids=lambda node: f"{node.name}-{node.lineno}")
def test_the_stub_has_the_signature_of_the_function(node):
    """An overload may ask for what has a default."""
    ours = described(getattr(_core, node.name))
    stub = described_stub(node)
    assert [p[:2] for p in stub] == [p[:2] for p in ours]
    overloads = sum(other.name == node.name for other in STUBS)
    differ = [name for (name, _, a), (_, _, b) in zip(stub, ours, strict=True) if a != b]
    allowed = {"return_moments", "residual"} if overloads > 1 else set()
    assert set(differ) <= allowed
    assert all(default is None for name, _, default in stub if name in differ)


@pytest.mark.parametrize(
    "name", [name for name in reference.__all__ if inspect.isfunction(getattr(reference, name))]
)
def test_the_reference_has_the_signature_of_the_function(name):
    assert described(getattr(reference, name)) == described(getattr(gn_fast, name))


def test_all_compiled_functions_have_a_stub():
    compiled = {name for name in gn_fast.__all__ if not isinstance(getattr(_core, name, int), type)}
    assert {"group_norm", "num_threads"} <= compiled <= {node.name for node in STUBS}
