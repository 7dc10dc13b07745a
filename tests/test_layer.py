"""`GroupNorm` is the functions with their parameters kept: gradients, state, copies; a network trained."""

import copy
import inspect
import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    activation_of_pytorch,
    assert_same_bits,
    fresh_python,
    in_layout,
    name_of,
    normal,
)

import gn_fast
from gn_fast import GroupNorm

SHAPE = (3, 8, 7, 6)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def filled(*arguments, **options):
    """A layer whose parameters are not what it begins with."""
    layer = GroupNorm(*arguments, **options)
    rng = np.random.default_rng(1)
    for value in (layer.weight, layer.bias):
        if value is not None:
            value[...] = rng.standard_normal(value.shape)
    return layer


def arrays(dtype=np.float32, shape=SHAPE):
    """x, dy and residual."""
    return normal(np.random.default_rng(0), (3, *shape), dtype)


# ---- what it begins with, and how it is called -------------------------------------------------------------


def test_the_arguments_are_pytorchs_and_then_ours():
    parameters = list(inspect.signature(GroupNorm).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        ("num_groups", inspect.Parameter.empty), ("num_channels", inspect.Parameter.empty), ("eps", 1e-5),
        ("weight", True), ("bias", True), ("axis", 1), ("activation", None), ("dtype", "float32"),
    ]  # fmt: skip
    assert [p.kind is p.KEYWORD_ONLY for p in parameters] == [False] * 3 + [True] * 5


@every_dtype
def test_it_begins_with_ones_and_zeros(dtype):
    for name in (dtype, dtype.name, dtype.type):
        layer = GroupNorm(2, 8, dtype=name)
        assert_same_bits(layer.weight, np.ones(8, dtype))
        assert_same_bits(layer.bias, np.zeros(8, dtype))
        assert set(layer.grads) == {"weight", "bias"}
        for gradient in layer.grads.values():
            assert_same_bits(gradient, np.zeros(8, dtype))


def test_bfloat16_needs_no_import_by_the_caller():
    done = fresh_python("import gn_fast; print(gn_fast.GroupNorm(2, 4, dtype='bfloat16').weight.dtype)")
    assert done.stdout == "bfloat16\n", done.stderr


def test_bfloat16_without_ml_dtypes_says_what_to_install():
    hidden = "import sys; sys.modules['ml_dtypes'] = None; import gn_fast; "
    done = fresh_python(f"{hidden}gn_fast.GroupNorm(2, 4, dtype='bfloat16')")
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "pip install 'gn_fast[bfloat16]'" in done.stderr


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
@both_layouts
@every_dtype
def test_calls_and_gradients_are_those_of_the_functions(dtype, layout, weight, bias):
    layer = filled(4, 8, 1e-3, weight=weight, bias=bias, activation="silu", dtype=dtype)
    x, dy, residual = (in_layout(a, layout) for a in arrays(dtype))
    mask = np.random.default_rng(2).random((3, 1, 7, 6)) < 0.7
    parameters = {"weight": layer.weight, "bias": layer.bias, "eps": 1e-3, "activation": "silu"}
    for options in ({}, {"residual": residual}, {"mask": mask}, {"residual": residual, "mask": mask}):
        layer.zero_grad()
        y = layer(x, **options)
        assert_same_bits(y, gn_fast.group_norm(x, 4, **parameters, **options))
        assert y.strides == x.strides
        found = layer.backward(dy)
        dx, dweight, dbias, *dresidual = gn_fast.group_norm_backward(dy, x, 4, **parameters, **options)
        if dresidual:
            found, found_dresidual = found
            assert_same_bits(found_dresidual, dresidual[0])
        assert_same_bits(found, dx)
        for name, gradient in (("weight", dweight), ("bias", dbias)):
            assert (name in layer.grads) == (gradient is not None)
            if gradient is not None:
                assert_same_bits(layer.grads[name], gradient + gradient.dtype.type(0))  # -0 becomes 0


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@every_dtype
def test_results_have_the_dtype_of_x_and_gradients_that_of_the_parameters(dtype, x_dtype):
    layer = GroupNorm(2, 8, dtype=dtype)
    x, dy, residual = arrays(x_dtype)
    assert layer(x, residual=residual).dtype == x_dtype
    assert [d.dtype for d in layer.backward(dy)] == [x_dtype, x_dtype]
    assert {g.dtype for g in layer.grads.values()} == {dtype}


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
def test_the_channels_may_be_at_any_axis(axis):
    x, dy, _ = arrays()
    first, moved = filled(4, 8), filled(4, 8, axis=axis)
    expected = first(x), first.backward(dy)
    x, dy = np.moveaxis(x, 1, axis), np.moveaxis(dy, 1, axis)
    assert_same_bits(np.moveaxis(moved(x), axis, 1), expected[0])
    assert_same_bits(np.moveaxis(moved.backward(dy), axis, 1), expected[1])
    assert_same_bits(moved.grads["weight"], first.grads["weight"])


def test_gradients_are_added_up_until_they_are_zeroed():
    layer = filled(4, 8)
    x, dy, _ = arrays()
    layer(x)
    layer.backward(dy)
    once = copy.deepcopy(layer.grads)
    held = layer.grads["weight"]
    layer.backward(dy)
    for name, gradient in once.items():
        assert_same_bits(layer.grads[name], 2 * gradient)
    layer.zero_grad()
    assert layer.grads["weight"] is held
    assert not any(gradient.any() for gradient in layer.grads.values())


def test_array_likes_and_integers():
    layer = GroupNorm(1, 2)
    y = layer([[[1, 2, 3], [4, 5, 6]]])
    assert y.dtype == np.float64
    assert layer.backward(np.ones(y.shape)).shape == y.shape


# ---- out, and what it does to the gradient -----------------------------------------------------------------


@every_dtype
def test_the_result_may_be_written_anywhere_and_backward_says_what_it_lost(dtype):
    layer = filled(4, 8, activation="gelu", dtype=dtype)
    x, dy, residual = arrays(dtype)
    y = layer(x, residual=residual)
    expected = layer.backward(dy)
    apart = np.empty_like(x)
    assert layer(x, residual=residual, out=apart) is apart
    assert_same_bits(apart, y)
    for found, gradient in zip(layer.backward(dy), expected, strict=True):
        assert_same_bits(found, gradient)
    grads = copy.deepcopy(layer.grads)
    for name in ("x", "residual"):
        given = {"x": x.copy(), "residual": residual.copy()}
        assert layer(**given, out=given[name]) is given[name]
        assert_same_bits(given[name], y)
        lost = rf"^backward needs the last call's {name}, where it wrote its out$"
        with pytest.raises(RuntimeError, match=lost):
            layer.backward(dy)
    both = x.copy()
    layer(both, residual=both, out=both)
    with pytest.raises(RuntimeError, match="last call's x and residual, "):
        layer.backward(dy)
    for name, gradient in grads.items():
        assert_same_bits(layer.grads[name], gradient)
    layer(x, residual=residual)
    layer.backward(dy)


def test_overlap_in_part_is_overlap_and_a_neighbour_is_not():
    layer = filled(4, 8)
    x, dy, _ = arrays()
    memory = np.zeros(x.size + 5, np.float32)
    view, out = memory[: x.size].reshape(SHAPE), memory[5:].reshape(SHAPE)
    view[...] = x
    layer(view, out=out)
    with pytest.raises(RuntimeError, match="last call's x, "):
        layer.backward(dy)
    interleaved = np.zeros((*SHAPE, 2), np.float32)
    interleaved[..., 0] = x
    layer(interleaved[..., 0], out=interleaved[..., 1])
    assert_same_bits(layer.backward(dy), gn_fast.group_norm_backward(dy, x, 4, layer.weight, layer.bias)[0])


def test_memory_behind_dlpack_is_seen_too():
    layer = filled(4, 8)
    x, dy, _ = arrays()

    class Alone:
        shape = x.shape

        def __dlpack__(self, **options):
            return x.__dlpack__(**options)

        def __dlpack_device__(self):
            return x.__dlpack_device__()

    y = layer(Alone())
    layer.backward(dy)
    assert_same_bits(layer(Alone(), out=x), y)
    with pytest.raises(RuntimeError, match="last call's x, "):
        layer.backward(dy)


# ---- errors ------------------------------------------------------------------------------------------------


def test_backward_before_a_call_is_refused():
    with pytest.raises(RuntimeError, match=r"^backward needs a call of the layer before it"):
        GroupNorm(2, 4).backward(np.ones((1, 4)))


@pytest.mark.parametrize(
    ("name", "value", "error", "was"),
    [
        ("num_groups", 3, ValueError, "3"),
        ("num_groups", 0, ValueError, "0"),
        ("num_groups", 2.0, TypeError, "2.0"),
        ("num_groups", True, TypeError, "True"),
        ("num_channels", 0, ValueError, "0"),
        ("num_channels", -8, ValueError, "-8"),
        ("num_channels", 8.0, TypeError, "8.0"),
        ("num_channels", True, TypeError, "True"),
        ("num_channels", np.array([8]), TypeError, "array"),
        ("eps", -1e-5, ValueError, "-1e-05"),
        ("eps", np.nan, ValueError, "nan"),
        ("eps", "1e-5", TypeError, "'1e-5'"),
        ("weight", np.ones(8), TypeError, "array"),
        ("weight", None, TypeError, "None"),
        ("bias", 0, TypeError, "0"),
        ("axis", 0, ValueError, "0"),
        ("axis", 64, ValueError, "64"),
        ("axis", -64, ValueError, "-64"),
        ("axis", 2**70, ValueError, str(2**70)),
        ("axis", 1.0, TypeError, "1.0"),
        ("activation", "rleu", ValueError, "'rleu'"),
        ("activation", ("leaky_relu", 1j), TypeError, "1j"),
        ("activation", ["leaky_relu", 0.1], ValueError, "['leaky_relu', 0.1]"),
        ("dtype", None, TypeError, "None"),
        ("dtype", "float23", TypeError, "'float23'"),
        ("dtype", int, TypeError, "int"),
        ("dtype", np.complex64, TypeError, "complex64"),
        ("dtype", np.longdouble, TypeError, "longdouble"),
        ("dtype", ml_dtypes.float8_e4m3, TypeError, "float8_e4m3"),
    ],
    ids=name_of,
)
def test_bad_arguments_are_named(name, value, error, was):
    with pytest.raises(error) as raised:
        GroupNorm(**({"num_groups": 2, "num_channels": 8} | {name: value}))
    assert str(raised.value).startswith(f"{name} ")
    assert was in str(raised.value)


@pytest.mark.parametrize("parameters", [True, False], ids=["parameters", "none"])
@pytest.mark.parametrize(
    ("name", "value", "error", "was"),
    [
        ("x", np.ones((3, 12, 7, 6), np.float32), ValueError, "(3, 12, 7, 6)"),
        ("x", np.ones((3, 7, 6, 8), np.float32), ValueError, "(3, 7, 6, 8)"),
        ("x", [[1.0] * 4], ValueError, "(1, 4)"),
        ("x", np.ones(8, np.float32), ValueError, "(8,)"),
        ("x", [[1.0, 2.0], [3.0]], (TypeError, ValueError), "inhomogeneous"),
        ("x", np.ones(SHAPE, complex), TypeError, "complex128"),
        ("residual", np.ones((3, 8, 7), np.float32), ValueError, "(3, 8, 7)"),
        ("mask", np.ones((3, 8, 7, 6), bool), ValueError, "(3, 8, 7, 6)"),
        ("mask", np.ones((3, 1, 7, 6)), TypeError, "float64"),
        ("out", np.ones(SHAPE), TypeError, "float64"),
    ],
    ids=name_of,
)
def test_bad_calls_are_named_and_change_nothing(name, value, error, was, parameters):
    layer = filled(4, 8, weight=parameters, bias=parameters)
    x, dy, _ = arrays()
    layer(x)
    out = np.full(SHAPE, -1, np.float32)
    with pytest.raises(error) as raised:
        layer(**({"x": x, "out": out} | {name: value}))
    assert str(raised.value).startswith(f"{name} ")
    assert was in str(raised.value)
    assert (out == -1).all()
    expected = gn_fast.group_norm_backward(dy, x, 4, layer.weight, layer.bias)[0]
    assert_same_bits(layer.backward(dy), expected)


def test_a_bad_dy_changes_no_gradient():
    layer = filled(4, 8)
    x, _, _ = arrays()
    layer(x)
    with pytest.raises(ValueError, match=r"^dy .*\(3, 8, 7\)"):
        layer.backward(np.ones((3, 8, 7)))
    assert not any(gradient.any() for gradient in layer.grads.values())


# ---- state -------------------------------------------------------------------------------------------------


@every_dtype
def test_a_state_goes_to_a_file_and_comes_back(dtype, tmp_path):
    layer, other = filled(4, 8, dtype=dtype), GroupNorm(4, 8, dtype=dtype)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert not any(np.shares_memory(state[name], getattr(layer, name)) for name in state)
    # np.load knows no bfloat16: every value of it is one of float32.
    np.savez(tmp_path / "state.npz", **{k: v.astype(np.result_type(v, np.float32)) for k, v in state.items()})
    held = other.weight
    with np.load(tmp_path / "state.npz") as file:
        keys = other.load_state_dict(file)
    assert keys == ([], [])
    assert keys.missing_keys == keys.unexpected_keys == []
    assert other.weight is held
    for name, value in state.items():
        assert_same_bits(getattr(other, name), value)


def test_a_state_has_the_parameters_that_there_are():
    assert list(GroupNorm(2, 8, bias=False).state_dict()) == ["weight"]
    assert list(GroupNorm(2, 8, weight=False).state_dict()) == ["bias"]
    assert GroupNorm(2, 8, weight=False, bias=False).state_dict() == {}


GOOD, SHORT, MATRIX = np.full(8, 2.0), np.full(4, 2.0), np.full((1, 8), 2.0)
STATES = {
    "missing": {"weight": GOOD},
    "all missing": {},
    "unexpected": {"weight": GOOD, "bias": GOOD, "running_mean": GOOD, "norm.weight": GOOD},
    "size": {"weight": SHORT, "bias": GOOD},
    "sizes": {"weight": MATRIX, "bias": SHORT},
    "scalar": {"weight": np.float64(2.0), "bias": GOOD},
    "everything": {"bias": SHORT, "gamma": GOOD},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_state_that_does_not_fit_is_told_as_pytorch_tells_it(strict, state):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = {name: torch.tensor(value) for name, value in state.items()}
    expected = error = None
    try:
        expected = torch.nn.GroupNorm(4, 8).load_state_dict(theirs, strict)
    except RuntimeError as raised:
        sizes = [tuple(v.shape) for v in theirs.values()] + [(8,)]
        error = str(raised)
        for size in sizes:
            error = error.replace(f"torch.Size({list(size)})", str(size))
    for given in (state, theirs):
        layer = GroupNorm(4, 8)
        if error is None:
            assert layer.load_state_dict(given, strict) == expected
            for name in ("weight", "bias"):
                assert (getattr(layer, name) == state.get(name, getattr(GroupNorm(4, 8), name))).all()
            continue
        with pytest.raises(RuntimeError) as raised:
            layer.load_state_dict(given, strict)
        assert str(raised.value) == error
        assert (layer.weight == 1).all()
        assert (layer.bias == 0).all()


NO_NUMBERS = [np.ones(8, complex), np.array(["1"] * 8), None, [[1.0, 2.0], [3.0]]]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=name_of)
def test_values_that_are_no_numbers_are_refused_and_nothing_loaded(value):
    layer = GroupNorm(4, 8)
    what = r'^Error\(s\) in loading state_dict for GroupNorm:\n\tWhile copying the parameter named "bias", '
    with pytest.raises(RuntimeError, match=what):
        layer.load_state_dict({"weight": GOOD, "bias": value})
    assert (layer.weight == 1).all()


def test_a_state_is_a_mapping():
    with pytest.raises(TypeError, match=r"^state must be a mapping of names to arrays, not list$"):
        GroupNorm(4, 8).load_state_dict([GOOD, GOOD])


# ---- copies ------------------------------------------------------------------------------------------------

COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "first protocol": lambda layer: pickle.loads(pickle.dumps(layer, 2)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@every_dtype
def test_a_copy_has_parameters_and_gradients_of_its_own_but_no_call(dtype, copied):
    layer = filled(4, 8, 1e-3, axis=-3, activation=("leaky_relu", 0.2), dtype=dtype)
    x, dy, _ = arrays(dtype)
    y = layer(x)
    dx = layer.backward(dy)
    other = copied(layer)
    assert repr(other) == repr(layer)
    for name, gradient in layer.grads.items():
        assert_same_bits(other.grads[name], gradient)
        assert not np.shares_memory(other.grads[name], gradient)
        assert not np.shares_memory(getattr(other, name), getattr(layer, name))
    with pytest.raises(RuntimeError, match="needs a call"):
        other.backward(dy)
    assert_same_bits(other(x), y)
    assert_same_bits(other.backward(dy), dx)


def test_what_is_pickled_is_small():
    layer = GroupNorm(4, 8)
    layer(np.zeros((64, 8, 100), np.float32))
    assert len(pickle.dumps(layer)) < 2000


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((2, 4), {}, "GroupNorm(2, 4)"),
        ((np.int64(2), np.int32(4), np.float64(1e-6)), {"axis": np.int8(-1)},
         "GroupNorm(2, 4, eps=1e-06, axis=-1)"),
        ((2, 4), {"weight": False, "bias": np.False_}, "GroupNorm(2, 4, weight=False, bias=False)"),
        ((2, 4), {"activation": np.str_("silu")}, "GroupNorm(2, 4, activation='silu')"),
        ((2, 4), {"activation": ("leaky_relu", np.float32(0.25))},
         "GroupNorm(2, 4, activation=('leaky_relu', 0.25))"),
        ((2, 4, 0), {"dtype": ml_dtypes.bfloat16}, "GroupNorm(2, 4, eps=0.0, dtype='bfloat16')"),
        ((2, 4), {"dtype": ">f8"}, "GroupNorm(2, 4, dtype='float64')"),
    ],
    ids=name_of,
)  # fmt: skip
def test_the_repr_rebuilds_it(arguments, options, text):
    layer = GroupNorm(*arguments, **options)
    assert repr(layer) == text
    again = eval(text, {"GroupNorm": GroupNorm})
    assert repr(again) == text
    assert again.dtype == layer.dtype  # in the machine's order of bytes
    for name in ("weight", "bias"):
        assert type(getattr(again, name)) is type(getattr(layer, name))
    x = arrays(shape=(2, 4, 4))[0]
    assert_same_bits(again(x), layer(x))


def test_a_subclass_is_named_as_it_is():
    class Norm(GroupNorm):
        pass

    assert repr(Norm(2, 4)) == "Norm(2, 4)"
    with pytest.raises(RuntimeError, match=r"state_dict for Norm:"):
        Norm(2, 4).load_state_dict({})


# ---- a network trained -------------------------------------------------------------------------------------

STEPS, RATE = 60, 0.3
CLASSES, INPUTS, CHANNELS, POSITIONS, SAMPLES = 4, 6, 16, 20, 24


def task(dtype):
    """Signals, the classes that they are of, and the weights of two convolutions and of a linear layer."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, SAMPLES)
    x = rng.standard_normal((CLASSES, INPUTS, 1))[labels] + rng.standard_normal((SAMPLES, INPUTS, POSITIONS))
    shapes = (CHANNELS, INPUTS), (CHANNELS, CHANNELS), (CLASSES, CHANNELS)
    weights = [rng.standard_normal(shape) / np.sqrt(shape[1]) for shape in shapes]
    return x.astype(dtype), labels, [w.astype(dtype) for w in weights]


def trained_in_numpy(dtype, activation):
    """The losses of a residual network of 1x1 convolutions, with each gradient written out."""
    x, labels, (w1, w2, w3) = task(dtype)
    norms = [GroupNorm(4, CHANNELS, activation=activation, dtype=dtype) for _ in range(2)]
    wanted = np.eye(CLASSES, dtype=dtype)[labels]
    losses = []
    for _ in range(STEPS):
        h1 = norms[0](w1 @ x)
        h2 = norms[1](w2 @ h1, residual=h1)
        pooled = h2.mean(2)
        logits = pooled @ w3.T
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        assert np.abs(logits).max() < 16
        losses.append(-np.log(scores[np.arange(SAMPLES), labels]).mean())

        dlogits = (scores - wanted) / SAMPLES
        dh2 = np.broadcast_to((dlogits @ w3 / POSITIONS)[:, :, None], h2.shape)
        da2, dskip = norms[1].backward(dh2)
        da1 = norms[0].backward(w2.T @ da2 + dskip)
        gradients = [np.einsum("nol,nil->oi", da1, x), np.einsum("nol,nil->oi", da2, h1), dlogits.T @ pooled]
        for w, gradient in zip((w1, w2, w3), gradients, strict=True):
            w -= RATE * gradient
        for norm in norms:
            norm.weight -= RATE * norm.grads["weight"]
            norm.bias -= RATE * norm.grads["bias"]
            norm.zero_grad()
    return np.array(losses), [norm.state_dict() for norm in norms]


def trained_in_pytorch(dtype, activation):
    """The same, with PyTorch's layer and gradients."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    act = activation_of_pytorch(activation)
    x, labels, weights = task(dtype)
    x, labels = torch.from_numpy(x), torch.from_numpy(labels)
    w1, w2, w3 = weights = [torch.from_numpy(w).requires_grad_() for w in weights]
    norms = [torch.nn.GroupNorm(4, CHANNELS, dtype=x.dtype) for _ in range(2)]
    parameters = [*weights, *(p for norm in norms for p in norm.parameters())]
    losses = []
    for _ in range(STEPS):
        h1 = act(norms[0](w1 @ x))
        h2 = act(norms[1](w2 @ h1) + h1)
        loss = torch.nn.functional.cross_entropy(h2.mean(2) @ w3.T, labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
    return np.array(losses), [norm.state_dict() for norm in norms]


@pytest.fixture
def one_thread_of_pytorch():
    """Its threads wait for each other at each small operation: half a minute in all on a busy machine."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Without kinks: at one, a rounding would change a gradient by more than rounding does.
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "mish"], ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_a_network_learns_as_it_does_in_pytorch(one_thread_of_pytorch, dtype, activation):
    """Each curve, ours and PyTorch's, is that of float64 to the accuracy of its dtype.

    A loss is a mean of differences of two logits, which are below 16 here: a rounding of each is up to 4 eps.
    Each step rounds a parameter of the norms, which are below 2, by up to half an eps, and its gradient less.
    """
    eps = np.finfo(dtype).eps
    exact, exact_states = trained_in_pytorch(np.float64, activation)
    assert exact[-1] < exact[0] / 10
    for train in (trained_in_numpy, trained_in_pytorch):
        losses, states = train(dtype, activation)
        np.testing.assert_allclose(losses, exact, rtol=0, atol=8 * eps)
        for state, exact_state in zip(states, exact_states, strict=True):
            for name, value in exact_state.items():
                assert value.abs().max() < 2
                np.testing.assert_allclose(state[name], value, rtol=0, atol=STEPS * eps)


def test_pytorchs_layer_and_ours_exchange_their_states():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer, theirs = filled(4, 8), torch.nn.GroupNorm(4, 8)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    assert list(theirs.state_dict()) == list(layer.state_dict())
    again = GroupNorm(4, 8)
    again.load_state_dict(theirs.state_dict())
    for name, value in layer.state_dict().items():
        assert_same_bits(getattr(again, name), value)
