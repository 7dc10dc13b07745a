"""The same bits: for any thread count, batch, stride, alignment, and in place or not; and for any instruction
set with fused multiply-add. x86-64-v2, which has none, has bits of its own.

Channels-first and channels-last share the bound of test_accuracy.py only, not the bits.
"""

import functools
import itertools
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    FAMILIES,
    LAYOUTS,
    LEVELS,
    assert_same_bits,
    assert_same_moments,
    digest,
    fresh_python,
    in_layout,
    name_of,
    normal,
)

import gn_fast

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)

# (shape, num_groups). Threads are used from 32768 values on; a chunk of work is 65536 values.
SHAPES = [
    ((2, 6, 5, 7), 3),  # too little for threads
    ((3, 8, 1), 2),
    ((4, 33000), 11),  # no positions at all, every channel its own weight
    ((3, 64, 7, 7), 8),  # short runs
    ((2, 12, 41, 71), 4),  # slabs for everyone
    ((1, 5, 211, 213), 1),  # one slab, shared by its chunks
    ((2, 1026, 67), 2),  # groups wider than a tile of channels
]
OPTIONS = ["weight", "bias", "residual", "mask", "activation"]


def problem(shape, num_groups, dtype, layout, seed=0, options=OPTIONS):
    rng = np.random.default_rng(seed)
    n, c, *spatial = shape
    x = in_layout(normal(rng, shape, dtype, mean=3.0), layout)
    every = {
        "weight": normal(rng, (c,), dtype),
        "bias": normal(rng, (n, c), dtype),
        "residual": in_layout(normal(rng, shape, dtype), layout),
        "mask": rng.random((n, 1, *spatial)) < 0.8,
        "activation": "gelu",
    }
    return {"x": x, "num_groups": num_groups} | {name: every[name] for name in options}


def both_results(arguments, **more):
    """y and the moments, the moments also by their own function."""
    y, m = gn_fast.group_norm(**arguments, return_moments=True, **more)
    only = {name: arguments[name] for name in ("x", "num_groups", "mask", "axis") if name in arguments}
    assert_same_moments(gn_fast.group_moments(**only), m, "group_moments")
    return y, m


def alone(arguments, level=LEVELS[-1]):
    with gn_fast.num_threads(1), gn_fast.use_isa(level):
        return both_results(arguments)


def assert_same(result, expected, what):
    assert_same_bits(result[0], expected[0], f"{what}: y")
    assert_same_moments(result[1], expected[1], f"{what}: moments")


# ---- threads and instruction sets ------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_threads_and_instruction_sets_change_nothing(three_processors, shape, num_groups, dtype, layout):
    for options in ([], OPTIONS):
        arguments = problem(shape, num_groups, dtype, layout, options=options)
        for family in FAMILIES:
            expected = alone(arguments, family[0])
            for level, threads in itertools.product(family, (1, 2, 3)):
                with gn_fast.use_isa(level), gn_fast.num_threads(threads):
                    assert_same(both_results(arguments), expected, f"{level}, {threads} threads, {options}")


@both_layouts
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((4, 2, 620, 650), 2),  # slabs larger than a core's cache, shared though there are enough of them
        ((1, 136, 181, 181), 17),  # channels-last: more than 2^22 values
        ((1, 2, 1500, 1500), 1),
    ],
    ids=name_of,
)
def test_large_arrays_too(three_processors, shape, num_groups, layout):
    arguments = problem(shape, num_groups, np.float32, layout, options=["weight", "bias"])
    expected = alone(arguments)
    for threads in (2, 3):
        with gn_fast.num_threads(threads):
            assert_same(both_results(arguments), expected, f"{threads} threads")


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_activations_are_the_same_on_every_instruction_set(activation, dtype):
    edge = [0.0, 1e-30, 1e-7, 0.5, 1, 2, 3, 5, 11, 14, 38, 87, 88, 104, 700, 745, 1e4, 1e30, np.inf]
    z = np.concatenate([np.linspace(-120, 120, 50_001), edge, np.negative(edge), [np.nan]]).astype(dtype)
    given = gn_fast.Moments([[1]], [[0.0]], [[1.0]])
    for family in FAMILIES:
        results = []
        for level in family:
            with gn_fast.use_isa(level):
                results.append(
                    gn_fast.group_norm(z.reshape(1, 1, -1), 1, eps=0, moments=given, activation=activation)
                )
        for result in results[1:]:
            assert_same_bits(result, results[0], activation)


@both_layouts
def test_special_values_are_the_same_on_every_instruction_set(three_processors, layout):
    rng = np.random.default_rng(0)
    for scale in (1e-42, 1e-30, 1e30, 1e38):
        x = in_layout((scale * rng.uniform(-3, 3, (3, 8, 67, 41))).astype(np.float32), layout)
        x[0, 1, 3, 5] = np.nan
        x[1, 7, 66, 40] = np.inf
        x[2, :2] = 7
        for eps in (0.0, 1e-5):
            arguments = {"x": x, "num_groups": 4, "eps": eps}
            for family in FAMILIES:
                with gn_fast.num_threads(1), gn_fast.use_isa(family[0]):
                    expected = gn_fast.group_norm(**arguments, return_moments=True)
                for level in family:
                    with gn_fast.use_isa(level):
                        result = gn_fast.group_norm(**arguments, return_moments=True)
                    assert_same(result, expected, f"{level}, x ~ {scale}, eps={eps}")


# ---- the company a sample keeps --------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(three_processors, shape, num_groups, dtype, layout):
    shape = (5, *shape[1:])
    arguments = problem(shape, num_groups, dtype, layout)
    y, m = both_results(arguments)
    for i in (0, 3, 4):
        sample = dict(arguments)
        for name in ("x", "bias", "residual", "mask"):
            sample[name] = arguments[name][i : i + 1].copy(order="K")
        y_alone, m_alone = both_results(sample)
        assert_same_bits(y_alone, y[i : i + 1], f"sample {i}")
        for field in ("count", "mean", "m2"):
            assert_same_bits(getattr(m_alone, field), getattr(m, field)[i : i + 1], f"sample {i} {field}")


@both_layouts
def test_a_group_alone_has_the_bits_it_has_among_others(layout):
    rng = np.random.default_rng(0)
    for size, groups in ((3, 4), (64, 3), (8, 12)):
        x = in_layout(normal(rng, (2, size * groups, 9, 31)), layout)
        m = gn_fast.group_moments(x, groups)
        for g in range(groups):
            one = gn_fast.group_moments(in_layout(x[:, g * size : (g + 1) * size], layout), 1)
            # The other groups change how many positions are folded into a row when a tile has few channels,
            # so in channels-last the bound is shared but not the bits.
            if layout == "channels-first":
                assert_same_bits(one.m2, np.ascontiguousarray(m.m2[:, g : g + 1]), f"group {g}")
            np.testing.assert_allclose(one.m2[:, 0], m.m2[:, g], rtol=4 * np.finfo(np.float32).eps)


# ---- strides and alignment -------------------------------------------------------------------------------


def strided(x, how):
    """The values of x in other memory, the channels still on the same side of the positions."""
    n, c, h, w = x.shape
    channels_last = abs(x.strides[1]) < abs(x.strides[3])
    padded = np.zeros((n + 2, c + 3, h + 1, 2 * w), x.dtype)
    padded = in_layout(padded, "channels-last" if channels_last else "channels-first")
    view = {
        "channel slice": lambda: padded[:n, 1 : c + 1, :h, :w],
        "batch slice": lambda: padded[1 : n + 1, :c, :h, :w],
        "spatial steps": lambda: padded[:n, :c, :h, ::2],
        "spatial crop": lambda: padded[:n, :c, 1 : h + 1, 3 : w + 3],
        "backward batch": lambda: padded[n - 1 :: -1, :c, :h, :w],
        "backward channels": lambda: padded[:n, c - 1 :: -1, :h, :w],
        "backward rows": lambda: padded[:n, :c, h - 1 :: -1, :w],
        "backward positions": lambda: padded[:n, :c, h - 1 :: -1, w - 1 :: -1],
        "odd address": lambda: at_odd_address(x),
        "one element off": lambda: at_odd_address(x, x.itemsize),
    }[how]()
    view[...] = x
    return view


def at_odd_address(x, offset=1):
    order = np.argsort([-s for s in x.strides], kind="stable")
    buffer = np.zeros(x.nbytes + offset, np.uint8)
    flat = buffer[offset:].view(x.dtype).reshape([x.shape[d] for d in order])
    return flat.transpose(np.argsort(order))


HOW = ["channel slice", "batch slice", "spatial steps", "spatial crop", "backward batch", "backward channels",
       "backward rows", "backward positions", "odd address", "one element off"]  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("how", HOW)
def test_strides_and_alignment_change_nothing(three_processors, dtype, layout, how):
    for shape, num_groups in (((2, 6, 5, 7), 3), ((2, 10, 43, 44), 2), ((1, 130, 20, 19), 1)):
        arguments = problem(shape, num_groups, dtype, layout)
        expected = both_results(arguments)
        for names in (["x"], ["residual"], ["x", "residual"]):
            moved = arguments | {name: strided(arguments[name], how) for name in names}
            assert_same(both_results(moved), expected, f"{shape} {how} {names}")
        out = strided(np.zeros_like(arguments["x"]), how)
        assert_same(both_results(arguments, out=out), expected, f"{shape} {how} out")


@every_dtype
def test_zero_strides_change_nothing(dtype):
    rng = np.random.default_rng(0)
    one = normal(rng, (1, 6, 41, 43), dtype, mean=2)
    for shape in ((5, 6, 41, 43), (5, 6, 41, 43)):
        for layout in LAYOUTS:
            x = np.broadcast_to(in_layout(one, layout), shape)
            assert x.strides[0] == 0
            expected = both_results({"x": in_layout(x, layout), "num_groups": 2})
            assert_same(both_results({"x": x, "num_groups": 2}), expected, f"{layout} batch")
    for shape in ((2, 6, 1, 1), (2, 1, 41, 43), (2, 6, 1, 43), (2, 6, 41, 1), (1, 1, 1, 1)):
        x = np.broadcast_to(normal(rng, shape, dtype), (2, 6, 41, 43))
        expected = both_results({"x": x.copy(order="C"), "num_groups": 3})
        assert_same(both_results({"x": x, "num_groups": 3}), expected, f"{shape}")


@every_dtype
@both_layouts
def test_parameters_may_lie_anyhow(dtype, layout):
    arguments = problem((3, 10, 9, 11), 5, dtype, layout)
    expected = both_results(arguments)
    weight, bias, mask = (arguments[name] for name in ("weight", "bias", "mask"))
    every = {
        "weight": [np.repeat(weight, 3)[::3], weight[::-1].copy()[::-1], at_odd_address(weight),
                   weight.tolist(),
                   np.broadcast_to(weight, (3, 10)), np.tile(weight, (3, 1)), weight.astype(np.float64)],
        "bias": [np.asfortranarray(bias), bias[::-1, ::-1].copy()[::-1, ::-1], bias.astype(np.float64)],
        "mask": [np.asfortranarray(mask), np.broadcast_to(mask, (3, 1, 9, 11)), mask.tolist()],
    }  # fmt: skip
    every["weight"][2][...] = weight
    for name, forms in every.items():
        for i, form in enumerate(forms):
            assert_same(both_results(arguments | {name: form}), expected, f"{name} {i}")


# ---- the output ------------------------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_where_the_output_goes_changes_nothing(three_processors, shape, num_groups, dtype, layout):
    arguments = problem(shape, num_groups, dtype, layout)
    expected = both_results(arguments)
    for other in LAYOUTS:
        out = in_layout(np.full(shape, np.nan, dtype), other)
        y, m = gn_fast.group_norm(**arguments, out=out, return_moments=True)
        assert y is out
        assert_same((y, m), expected, f"out {other}")


@every_dtype
@both_layouts
@pytest.mark.parametrize("name", ["x", "residual"])
def test_in_place_changes_nothing(three_processors, name, dtype, layout):
    for shape, num_groups in SHAPES:
        arguments = problem(shape, num_groups, dtype, layout)
        expected = both_results(arguments)
        copies = {key: arguments[key].copy(order="K") for key in ("x", "residual")}
        y = gn_fast.group_norm(**(arguments | copies), out=copies[name])
        assert y is copies[name]
        assert_same_bits(y, expected[0], f"{shape} in place of {name}")
        other = "residual" if name == "x" else "x"
        assert_same_bits(copies[other], arguments[other], f"{shape}: {other} is not written")


@both_layouts
def test_the_same_call_twice_has_the_same_bits(three_processors, layout):
    arguments = problem((2, 12, 101, 103), 3, np.float32, layout)
    expected = both_results(arguments)
    for _ in range(20):
        assert_same(both_results(arguments), expected, "again")


# ---- caches ----------------------------------------------------------------------------------------------


def streamed_results():
    """Digests of calls whose outputs begin anywhere in a line, apart from the inputs or in place of them."""
    shapes = [((2, 6, 45, 47), 3), ((3, 8, 2048), 2), ((2, 40, 7, 7), 4), ((5, 96), 3), ((3, 2, 513), 1),
              ((9, 5, 20), 5), ((5, 513), 1)]  # fmt: skip
    found = []

    for dtype, layout, (shape, num_groups) in itertools.product(DTYPES, LAYOUTS, shapes):
        given = problem(shape, num_groups, dtype, layout)
        x, _, weight = (given.pop(name) for name in ("x", "num_groups", "weight"))
        for options in ({}, {"activation": "silu"}, {"residual": given["residual"]}, given):
            for offset in range(0, 64, max(16, x.itemsize)):
                apart, in_place = at_odd_address(x, offset), at_odd_address(x, offset)
                in_place[...] = x
                what = f"{dtype} {layout} {shape} {[*options]} {offset}"
                same = {"num_groups": num_groups, "weight": weight, **options}
                forward = functools.partial(gn_fast.group_norm, **same)
                backward = functools.partial(gn_fast.group_norm_backward, **same)
                found.append(f"{what} y: {digest(forward(x, out=apart))}")
                found.append(f"{what} y = x: {digest(forward(in_place, out=in_place))}")
                dy, dx = apart.copy(order="K"), at_odd_address(x, offset)
                found.append(f"{what} dx: {digest(backward(dy, x, out=dx))}")
                found.append(f"{what} dx = dy: {digest(backward(dy, x, out=dy))}")
    return found


def test_cache_sizes_change_nothing():
    """With caches of 4 KiB every output is streamed, and what comes next is asked for."""
    child = f"""
    import importlib.util, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    package = importlib.util.find_spec("gn_fast").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("gn_fast.machine", package + "/machine.py")
    machine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(machine)
    machine.cache_bytes = lambda level: 1 << 12
    sys.modules["gn_fast.machine"] = machine
    import gn_fast, test_bits
    assert gn_fast.show_config("dicts")["caches"] == {{"level 2": 1 << 12, "last level": 1 << 12}}
    print(*test_bits.streamed_results(), sep="\\n")
    """
    result = fresh_python(textwrap.dedent(child))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == streamed_results()
