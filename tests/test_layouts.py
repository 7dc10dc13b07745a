"""Any layout in, the same layout out; `out` of any layout; overlaps behave as copies; nothing grows."""

import itertools
import tracemalloc

import numpy as np
import pytest
from helpers import DTYPES, LAYOUTS, assert_same_bits, assert_within_bound, in_layout, name_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_fast
from gn_fast import Moments

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


# ---- the memory order of the result ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("i2"), np.dtype(">f4")], ids=name_of)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=name_of)
def test_the_result_has_the_memory_order_of_the_input(dtype, order):
    rng = np.random.default_rng(0)
    memory = (10 * rng.standard_normal([(2, 6, 3, 5)[d] for d in order])).astype(dtype)
    x = memory.transpose(np.argsort(order))
    assert x.shape == (2, 6, 3, 5)
    y = gn_fast.group_norm(x, 3)
    assert y.strides == (x + y.dtype.type(0)).strides
    native = x.astype(x.dtype.newbyteorder("=")) if dtype.kind != "i" else x.astype(np.float64)
    if y.dtype != np.float64:
        assert_within_bound(y, native, 3)
    else:
        np.testing.assert_allclose(y, gn_fast.reference.group_norm(native, 3), rtol=0, atol=1e-13)


def test_the_result_of_views_has_the_order_of_a_ufunc():
    x = np.zeros((4, 6, 8, 10), np.float32)
    views = [
        x[::2], x[:, ::2], x[..., ::3], x[::-1], x[..., ::-1], x[:, :, 1:4, 2:9], x[:1], x[:, :, :1],
        x[..., :1],
        np.asfortranarray(x), x.swapaxes(2, 3), np.broadcast_to(x[:1], x.shape),
        np.broadcast_to(x[..., :1], x.shape),
        np.moveaxis(np.zeros((4, 8, 10, 6), np.float32), -1, 1),
    ]  # fmt: skip
    for i, view in enumerate(views):
        assert gn_fast.group_norm(view, 3).strides == np.positive(view).strides, i


@st.composite
def views(draw):
    """Transposed, sliced, reversed, of one element along some axes and broadcast along others."""
    ndim = draw(st.integers(2, 5))
    memory = np.arange(np.prod(sizes := draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))))
    x = memory.astype(np.float32).reshape(sizes).transpose(draw(st.permutations(range(ndim))))
    ways = st.sampled_from([slice(None), slice(None, None, -1), slice(1), slice(None, None, 2)])
    x = x[tuple(draw(st.lists(ways, min_size=ndim, max_size=ndim)))]
    return np.broadcast_to(x, [size if size > 1 else draw(st.sampled_from([1, 3])) for size in x.shape])


def order_of(a):
    """Its strides along the axes that have any."""
    return [stride for stride, size in zip(a.strides, a.shape, strict=True) if size > 1]


KINDS = ["f4", ">f4", "f8", "f2", "i2", "?", "unaligned"]


@given(x=views(), axis=st.integers(1, 4), kind=st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_every_result_has_the_memory_order_of_a_ufunc(x, axis, kind):
    """Axes along which x is broadcast or has one element do not decide."""
    axis = 1 + axis % (x.ndim - 1)
    if kind == "unaligned":  # the same strides, one byte further
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = np.zeros(high - low + 1, np.uint8)[1:]
        offset = x.__array_interface__["data"][0] - low
        x = np.ndarray(x.shape, "f4", memory, offset, x.strides)
    elif kind != "f4":
        core = x[tuple(slice(None if stride else 1) for stride in x.strides)]
        x = np.broadcast_to(core.astype(kind), x.shape)
    expected = np.positive(x) if x.dtype.kind == "f" else x + 0.0
    y = gn_fast.group_norm(x, 1, axis=axis)
    dy = np.ones(x.shape, np.float32)
    dx, _, _, dresidual = gn_fast.group_norm_backward(dy, x, 1, axis=axis, residual=x)
    reference = gn_fast.reference.group_norm(x, 1, axis=axis)
    for result in (y, dx, dresidual, reference):
        assert order_of(result) == order_of(expected), (x.shape, x.strides, result.strides, expected.strides)
        assert result.flags.owndata
        assert result.flags.writeable
    if kind == "f4":
        assert y.strides == expected.strides
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(y, reference, rtol=0, atol=2e-2 if y.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("axis", [1, -1])
def test_a_broadcast_input_is_walked_as_its_copy_is(place, axis):
    """So it has the bits of that copy, in which the axis lies where it does in the shape."""
    for dtype in DTYPES:
        x = normal(np.random.default_rng(0), [1 if d == place else 6 for d in range(4)], dtype)
        x = np.broadcast_to(x, (6,) * 4)
        copy = np.ascontiguousarray(x)
        assert_same_bits(gn_fast.group_norm(x, 3, axis=axis), gn_fast.group_norm(copy, 3, axis=axis))
        # A copy of what overlaps out is of what is there, not of all that is seen.
        memory = normal(np.random.default_rng(0), x.shape, dtype)
        part = memory[tuple(slice(1 if d == place else None) for d in range(4))]
        copy = np.broadcast_to(part.copy(), x.shape)
        expected = gn_fast.group_norm(np.ascontiguousarray(copy), 3, axis=axis)
        gn_fast.group_norm(np.broadcast_to(part, x.shape), 3, axis=axis, out=memory)
        assert_same_bits(memory, expected)


def test_what_is_broadcast_is_not_copied_as_a_whole():
    """Neither integers, which are converted, nor what overlaps out."""
    memory = np.zeros((64, 8, 20, 20))
    one = np.zeros(memory.shape[1:], np.int16)
    for x in (np.broadcast_to(one, memory.shape), np.broadcast_to(memory[:1], memory.shape)):
        used = peak(lambda: gn_fast.group_norm(x, 2, out=memory, num_threads=1))  # noqa: B023
        assert used <= one.size * 8 + 2 * SCRATCH, used
    x = np.zeros((64, 8, 20, 20), np.float32)
    mask = x.view(np.bool_)[0, :1, :, :20]
    used = peak(lambda: gn_fast.group_norm(x, 2, out=x, mask=mask, num_threads=1))
    assert used <= 2 * SCRATCH, used


# ---- any axis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 6), (2, 6, 5), (2, 6, 3, 5), (2, 6, 3, 2, 5), (2, 6, 2, 3, 2, 3)], ids=name_of
)
def test_the_channels_may_be_at_any_axis_but_the_first(shape):
    """The same memory, seen with the channels elsewhere, gives the same bits."""
    rng = np.random.default_rng(0)
    ndim = len(shape)
    weight, bias = normal(rng, (2, 6)), normal(rng, (2, 6))
    for layout in LAYOUTS:
        x, residual = (in_layout(normal(rng, shape), layout) for _ in range(2))
        mask = rng.random((2, 1, *shape[2:])) < 0.7
        y = gn_fast.group_norm(x, 3, weight[0], bias, residual=residual, mask=mask, activation="relu")
        m = gn_fast.group_moments(x, 3, mask=mask)
        for axis in [*range(1, ndim), *range(1 - ndim, 0)]:
            there = [np.moveaxis(a, 1, axis) for a in (x, residual, mask)]
            options = {"residual": there[1], "mask": there[2], "activation": "relu", "axis": axis}
            result = gn_fast.group_norm(there[0], 3, weight[0], bias, **options)
            assert_same_bits(result, np.moveaxis(y, 1, axis), f"axis {axis}")
            assert_same_bits(gn_fast.group_moments(there[0], 3, mask=there[2], axis=axis).m2, m.m2)


# ---- strides: the same values as from a copy -------------------------------------------------------------


def test_views_of_every_kind_are_within_the_bound():
    rng = np.random.default_rng(0)
    x = normal(rng, (4, 12, 9, 10), mean=30)
    views = {
        "steps": x[::2, ::2, ::3, ::4],
        "backward": x[::-1, ::-1, ::-1, ::-1],
        "cropped": x[1:, 3:9, 2:7, 1:8],
        "swapped": x.swapaxes(2, 3),
        "channels and rows swapped": x.swapaxes(1, 2)[:, :8],
        "fortran": np.asfortranarray(x),
        "broadcast samples": np.broadcast_to(x[:1], (3, 12, 9, 10)),
        "broadcast channels": np.broadcast_to(x[:, :1], x.shape),
        "broadcast rows": np.broadcast_to(x[:, :, :1], x.shape),
        "broadcast columns": np.broadcast_to(x[..., :1], x.shape),
        "diagonal": np.lib.stride_tricks.as_strided(x, (4, 12, 9), (x.strides[0], x.strides[1], 44)),
        "windows": np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3)),
        "one sample, odd stride": x[3:, :, ::2],
    }
    for name, view in views.items():
        for groups in (1, 2, view.shape[1]):
            assert_within_bound(gn_fast.group_norm(view, groups), view, groups, what=name)


# ---- out -------------------------------------------------------------------------------------------------


def outs(shape, dtype):
    n, c, h, w = shape
    yield "C", np.empty(shape, dtype)
    yield "F", np.empty(shape, dtype, "F")
    yield "channels-last", in_layout(np.empty(shape, dtype), "channels-last")
    yield "part", np.zeros((n + 1, c + 2, h + 3, w + 4), dtype)[1:, 1:-1, 1:-2, 2:-2]
    yield "steps", np.zeros((n, c, 2 * h, 3 * w), dtype)[:, :, ::2, ::3]
    yield "backward", np.zeros(shape, dtype)[::-1, ::-1, ::-1, ::-1]
    yield "rows outside", np.moveaxis(np.zeros((h, n, c, w), dtype), 0, 2)
    yield (
        "odd address",
        np.zeros(np.prod(shape) * dtype.itemsize + 1, np.uint8)[1:].view(dtype).reshape(shape),
    )
    yield (
        "interwoven",
        np.lib.stride_tricks.as_strided(
            np.zeros(4 * n * c * h * w, dtype),
            shape,
            [dtype.itemsize * s for s in (c * h * w * 2, h * w * 2, w * 2, 2)],
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@both_layouts
def test_out_of_any_layout_is_filled_and_returned(dtype, layout):
    shape = (2, 6, 5, 7)
    x = in_layout(normal(np.random.default_rng(0), shape, dtype), layout)
    expected = gn_fast.group_norm(x, 3, activation="silu")
    for name, out in outs(shape, dtype):
        assert gn_fast.group_norm(x, 3, activation="silu", out=out) is out
        assert_same_bits(out, expected, name)


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_out_in_another_byte_order_is_filled(dtype):
    x = normal(np.random.default_rng(0), (2, 6, 5), np.dtype(dtype).newbyteorder("="))
    out = np.zeros(x.shape, dtype)
    assert gn_fast.group_norm(x, 3, out=out) is out
    np.testing.assert_array_equal(out, gn_fast.group_norm(x, 3))


def test_what_lies_around_out_is_not_written():
    guard = np.full((4, 10, 9, 11), 7, np.float32)
    for make in (lambda a: a, lambda a: np.moveaxis(a, 1, -1).copy().transpose(0, 3, 1, 2)):
        for dims in (
            (slice(1, 3), slice(2, 8), slice(1, 8), slice(2, 9)),
            (slice(1, 3), slice(0, 10, 2), slice(8, 1, -1)),
        ):
            memory = make(guard.copy())
            out = memory[dims]
            x = normal(np.random.default_rng(0), out.shape)
            gn_fast.group_norm(x, 1, out=out)
            assert not (out == 7).all()
            out[...] = 7
            np.testing.assert_array_equal(memory, guard)


# ---- overlaps --------------------------------------------------------------------------------------------


def overlapping_pairs(dtype):
    """Two views of shape (2, 4, 6, 6) of the same memory, with every kind of partial overlap."""
    shape, size = (2, 4, 6, 6), 288
    for shift in (1, 2, 7, 36, 100, 144, 287):
        memory = np.zeros(2 * size, dtype)
        yield f"shifted by {shift}", memory[:size].reshape(shape), memory[shift : shift + size].reshape(shape)
        yield (
            f"shifted by -{shift}",
            memory[shift : shift + size].reshape(shape),
            memory[:size].reshape(shape),
        )
    for name, view in {
        "transposed": lambda a: a.swapaxes(2, 3),
        "backward": lambda a: a[..., ::-1],
        "backward samples": lambda a: a[::-1],
        "backward channels": lambda a: a[:, ::-1],
        "upside down": lambda a: a[:, :, ::-1],
        "another order": lambda a: a.reshape(2, 6, 6, 4).transpose(0, 3, 1, 2),
    }.items():
        memory = np.zeros(shape, dtype)
        yield name, memory, view(memory)
        memory = np.zeros(shape, dtype)
        yield f"{name}, the other way", view(memory), memory
    memory = np.zeros((2, 4, 6, 12), dtype)
    yield "interleaved", memory[..., ::2], memory[..., 1::2]
    yield "half", memory[..., :6], memory[..., 3:9]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["x", "residual"])
@both_layouts
def test_out_that_overlaps_an_input_behaves_as_if_it_were_copied(dtype, name, layout):
    rng = np.random.default_rng(0)
    for what, view, out in overlapping_pairs(dtype):
        arguments = {"x": normal(rng, view.shape, dtype), "residual": normal(rng, view.shape, dtype)}
        arguments = {key: in_layout(value, layout) for key, value in arguments.items()}
        axes = abs(view.strides[1]) < abs(view.strides[3])
        if name == "x" and (layout == "channels-last") != axes:
            continue  # another layout of x, other bits
        expected = gn_fast.group_norm(num_groups=2, **arguments)
        view[...] = arguments[name]
        arguments[name] = view
        result = gn_fast.group_norm(num_groups=2, out=out, **arguments)
        assert result is out
        np.testing.assert_array_equal(out, expected, what)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("where", [0, 5, 60, -1, -6])
def test_out_that_overlaps_a_parameter_behaves_as_if_it_were_copied(name, where):
    rng = np.random.default_rng(0)
    for shape in ((6,), (2, 6)):
        x, values = normal(rng, (2, 6, 5)), normal(rng, shape)
        expected = gn_fast.group_norm(x, 3, **{name: values})
        memory = np.zeros(100, np.float32)
        out = memory[20:80].reshape(2, 6, 5)
        start = 20 + (where if where >= 0 else 60 + where - values.size + 1)
        parameter = memory[start : start + values.size].reshape(shape)
        parameter[...] = values
        gn_fast.group_norm(x, 3, **{name: parameter}, out=out)
        assert_same_bits(out.copy(), expected, f"{shape}")


@both_layouts
def test_out_that_overlaps_the_mask_behaves_as_if_it_were_copied(layout):
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (2, 6, 5, 4)), layout)
    values = rng.random((2, 1, 5, 4)) < 0.6
    expected = gn_fast.group_norm(x, 3, mask=values)
    for start in (0, 3, 400, 900):
        memory = np.zeros(1000, np.uint8)
        out = memory[:960].view(np.float32).reshape(x.shape)
        mask = memory[start : start + 40].view(bool).reshape(values.shape)
        mask[...] = values
        gn_fast.group_norm(x, 3, mask=mask, out=out)
        assert_same_bits(out.copy(), expected, f"mask at byte {start}")


@both_layouts
@pytest.mark.parametrize("field", ["mean", "m2", "count"])
def test_out_that_overlaps_the_moments_behaves_as_if_they_were_copied(layout, field):
    rng = np.random.default_rng(0)
    x = in_layout(rng.standard_normal((3, 6, 5)), layout)
    m = gn_fast.group_moments(x, 2)
    expected = gn_fast.group_norm(x, 2, moments=m)
    for start in (0, 30, 84):
        memory = np.zeros(90)
        out = memory.reshape(3, 6, 5)
        fields = {name: getattr(m, name) for name in ("count", "mean", "m2")}
        fields[field] = memory[start : start + 6].view(fields[field].dtype).reshape(3, 2)
        fields[field][...] = getattr(m, field)
        gn_fast.group_norm(x, 2, moments=Moments(**fields), out=out)
        assert_same_bits(out.copy(), expected, f"at {start}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@both_layouts
def test_out_may_be_x_itself(dtype, layout):
    for shape in ((2, 6, 3), (2, 6, 61, 47), (1, 4, 300, 301)):
        x = in_layout(normal(np.random.default_rng(0), shape, dtype), layout)
        expected, memory = gn_fast.group_norm(x, 2, activation="mish"), x.ctypes.data
        y = gn_fast.group_norm(x, 2, activation="mish", out=x)
        assert y is x
        assert x.ctypes.data == memory
        assert_same_bits(x, expected)
        again = gn_fast.group_norm(expected, 2)
        y = gn_fast.group_norm(expected, 2, out=expected[...])  # another object, the same place
        assert_same_bits(y, again)
        assert_same_bits(expected, again)


def test_x_and_residual_may_be_the_same_array_and_out_too():
    for layout in LAYOUTS:
        for dtype in DTYPES:
            x = in_layout(normal(np.random.default_rng(0), (2, 6, 43, 17), dtype), layout)
            expected = gn_fast.group_norm(x, 2, residual=x.copy(order="K"))
            assert_same_bits(gn_fast.group_norm(x, 2, residual=x), expected)
            assert_same_bits(gn_fast.group_norm(x, 2, residual=x, out=x), expected, f"{layout} {dtype}")


# ---- memory ----------------------------------------------------------------------------------------------


SCRATCH = 3 << 15  # bytes: a thread's tiles are fewer


def peak(call):
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@both_layouts
@pytest.mark.parametrize("threads", [1, 3])
def test_with_out_nothing_is_allocated_that_grows_with_the_data(three_processors, dtype, layout, threads):
    """Moments of at most 256 chunks, 4 float64 for each of 4 groups: 32 KiB; as much for Python's objects;
    and each thread's tiles."""
    rng = np.random.default_rng(0)
    for shape in ((2, 8, 300, 300), (8, 8, 300, 300), (1, 8, 800, 800), (100, 8, 50, 50), (60, 20000)):
        fixed = (1 + threads) * SCRATCH + 2 * 8 * shape[1]  # the parameters in float64
        x = in_layout(rng.standard_normal(shape, np.float32).astype(dtype), layout)
        out, (weight, bias) = np.empty_like(x), normal(rng, (2, shape[1]))
        mask = np.ones((shape[0], 1, *shape[2:]), bool)
        parameters = {"weight": weight, "bias": bias, "num_threads": threads}
        plain = peak(lambda: gn_fast.group_norm(x, 4, out=out, **parameters))  # noqa: B023
        assert plain <= fixed, f"{shape}: {plain}"
        all_options = {"residual": x, "activation": "silu", "mask": mask, "num_threads": threads}
        fused = peak(lambda: gn_fast.group_norm(x, 4, weight, bias, out=out, **all_options))  # noqa: B023
        assert fused <= fixed, f"{shape} fused: {fused}"
        in_place = peak(lambda: gn_fast.group_norm(x, 4, out=x, num_threads=threads))  # noqa: B023
        assert in_place <= fixed, f"{shape} in place: {in_place}"
        alone = peak(lambda: gn_fast.group_moments(x, 4, num_threads=threads))  # noqa: B023
        assert alone <= fixed, f"{shape} moments: {alone}"


def test_a_view_is_gathered_not_copied():
    x = np.zeros((2, 8, 600, 600), np.float32)
    fixed = (1 + gn_fast.get_num_threads()) * SCRATCH
    out = np.empty((2, 8, 300, 300), np.float32)
    for view in (
        x[:, :, ::2, ::2],
        x[:, :, :300, 100:400],
        x[:, ::-1, ::-2, ::-2],
        x.swapaxes(2, 3)[:, :, :300, :300],
    ):
        used = peak(lambda: gn_fast.group_norm(view, 4, out=out))  # noqa: B023
        assert used <= fixed, used
