"""The gradient has the same bits for any threads, instruction set, strides and alignment, in place or not.

Of dweight and dbias this is so because the samples are added up in order in up to 64 fixed blocks.
"""

import itertools

import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    FAMILIES,
    LAYOUTS,
    LEVELS,
    assert_same_bits,
    in_layout,
    name_of,
    normal,
)
from test_bits import HOW, OPTIONS, SHAPES, at_odd_address, problem, strided
from test_gradient import assert_same_gradients, backward

import gn_fast
from gn_fast import Moments

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)

MORE_SHAPES = [
    ((130, 8, 17, 19), 4),  # more samples than blocks of them
    ((65, 12, 50), 3),
    ((200, 4, 7), 1),
    ((1, 2, 70001), 1),  # pieces of channels, shared by the threads
    ((1, 3, 140000), 3),
    ((3, 96, 2, 64), 8),
    *(((5, 480, s), 4) for s in (1, 2, 3, 7, 15, 16, 49)),  # short channels
    ((2, 700, 6, 5), 10),  # channels-last: more than one strip of at most 512
    ((3, 2, 111, 103), 2),  # channels-last: many positions in a row of lanes
    ((3, 1, 12000), 1),
]


def gradient_problem(shape, num_groups, dtype, layout, seed=0, options=OPTIONS):
    """Arguments with dy among them; dy lies as x does."""
    arguments = problem(shape, num_groups, dtype, layout, seed, options)
    return arguments | {"dy": in_layout(normal(np.random.default_rng(seed + 1), shape, dtype), layout)}


def gradients(arguments, **more):
    return gn_fast.group_norm_backward(**(arguments | more))


def alone(arguments, level=LEVELS[-1]):
    with gn_fast.num_threads(1), gn_fast.use_isa(level):
        return gradients(arguments)


def assert_same_everywhere(arguments, what, families=FAMILIES):
    for family in families:
        expected = alone(arguments, family[0])
        for level, threads in itertools.product(family, (1, 2, 3)):
            with gn_fast.use_isa(level), gn_fast.num_threads(threads):
                assert_same_gradients(gradients(arguments), expected, f"{what}: {level}, {threads} threads")
    return expected


# ---- threads and instruction sets ------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_threads_and_instruction_sets_change_nothing(three_processors, shape, num_groups, dtype, layout):
    for options in (["weight", "bias"], OPTIONS):
        arguments = gradient_problem(shape, num_groups, dtype, layout, options=options)
        assert_same_everywhere(arguments, str(options))


@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), MORE_SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=name_of)
def test_sums_over_many_samples_or_positions_do_not_depend_on_threads(
    three_processors, dtype, shape, num_groups, layout
):
    channels, each = {"weight": np.ones(shape[1]), "bias": np.ones(shape[1])}, np.ones(shape[:2])
    arguments = gradient_problem(shape, num_groups, dtype, layout, options=[])
    arguments["weight"] = normal(np.random.default_rng(2), shape[1], dtype)
    assert_same_everywhere(arguments, "one weight")
    # The float64 sums to their last bit: of a channel, and of a channel in each sample.
    for what in (channels, {"weight": each, "bias": each}, {"weight": each, "bias": channels["bias"]}):
        _, dweight, dbias, *_ = assert_same_everywhere(arguments | what, "float64 sums", [LEVELS[-1:]])
        assert dweight.dtype == dbias.dtype == np.float64


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(three_processors, activation, layout, dtype):
    arguments = gradient_problem((2, 6, 71, 43), 3, dtype, layout) | {"activation": activation}
    assert_same_everywhere(arguments, str(activation))


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("shape", "num_groups"), [((1, 3, 140000), 3), ((1, 96, 1200), 2)], ids=name_of)
def test_what_threads_keep_of_a_shared_sample(three_processors, shape, num_groups, activation, layout, dtype):
    options = ["weight", "bias", "residual"]
    arguments = gradient_problem(shape, num_groups, dtype, layout, options=options) | {"activation": activation}
    expected = alone(arguments)
    for threads in (2, 3):
        with gn_fast.num_threads(threads):
            for got, wanted in zip(gradients(arguments), expected, strict=True):
                assert_same_bits(got, wanted)
            x = arguments["x"].copy(order="K")
            for got, wanted in zip(gradients(arguments | {"x": x}, out=x), expected, strict=True):
                assert_same_bits(got, wanted)


@both_layouts
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((4, 2, 500, 530), 2),  # slabs larger than a core's cache, shared though there are enough of them
        ((1, 136, 181, 181), 17),  # channels-last: more than 2^22 values
        ((1, 132, 179, 181), 3),  # the same with larger groups
    ],
    ids=name_of,
)
def test_large_arrays_too(three_processors, shape, num_groups, layout):
    arguments = gradient_problem(shape, num_groups, np.float32, layout, options=["weight", "bias"])
    expected = alone(arguments)
    for threads in (2, 3):
        with gn_fast.num_threads(threads):
            assert_same_gradients(gradients(arguments), expected, f"{threads} threads")


@both_layouts
def test_special_values_are_the_same_on_every_instruction_set(three_processors, layout):
    rng = np.random.default_rng(0)
    for of_x, of_dy in ((1e-42, 1.0), (1e30, 1e-30), (1e38, 1e38), (1.0, 1e-42), (1.0, 1e38)):
        x = in_layout((of_x * rng.uniform(-3, 3, (3, 8, 67, 41))).astype(np.float32), layout)
        dy = in_layout((of_dy * rng.uniform(-3, 3, x.shape)).astype(np.float32), layout)
        x[0, 1, 3, 5] = np.nan
        dy[1, 7, 66, 40] = np.inf
        x[2, :2] = 7
        for eps, activation in ((0.0, None), (1e-5, None), (1e-5, "mish")):
            arguments = {"dy": dy, "x": x, "num_groups": 4, "eps": eps, "activation": activation}
            assert_same_everywhere(arguments | {"weight": np.ones(8), "residual": x}, f"{of_x} {of_dy} {eps}")


@pytest.mark.parametrize("channels", [5, 17, 600])
def test_of_two_nans_dx_keeps_none_where_nothing_counts(three_processors, channels):
    signs = itertools.product((1, np.nan, -np.nan), repeat=3)
    for (of_x, of_dy, of_weight), activation in itertools.product(signs, (None, "silu")):
        rng = np.random.default_rng(0)
        x, dy = rng.standard_normal((2, 2, channels)).astype(np.float32)
        weight = rng.standard_normal(channels).astype(np.float32)
        for array, value in ((x, of_x), (dy, of_dy), (weight, of_weight)):
            array[..., [0, -2, -1]] = value
        arguments = {"dy": dy, "x": x, "num_groups": 1, "weight": weight, "bias": weight}
        more = {"activation": activation, "mask": np.array([[True], [False]])}
        assert_same_everywhere(arguments | more, f"{of_x} {of_dy} {of_weight} {activation}")


@both_layouts
def test_the_same_call_twice_has_the_same_bits(three_processors, layout):
    arguments = gradient_problem((2, 12, 101, 103), 3, np.float32, layout)
    expected = gradients(arguments)
    for _ in range(10):
        assert_same_gradients(gradients(arguments), expected, "again")


# ---- the company a sample keeps --------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(three_processors, shape, num_groups, dtype, layout):
    shape = (5, *shape[1:])
    arguments = gradient_problem(shape, num_groups, dtype, layout)
    arguments["weight"] = normal(np.random.default_rng(9), shape[:2], dtype)
    together = gradients(arguments)
    for i in (0, 4):
        own = ("x", "dy", "weight", "bias", "residual", "mask")
        sample = {name: arguments[name][i : i + 1].copy(order="K") for name in own}
        assert_same_gradients(gradients(arguments | sample), [v[i : i + 1] for v in together], f"sample {i}")


# ---- statistics given, strides, alignment ----------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=name_of)
def test_statistics_of_the_forward_change_nothing(three_processors, shape, num_groups, dtype, layout):
    arguments = gradient_problem(shape, num_groups, dtype, layout)
    forward = {name: value for name, value in arguments.items() if name != "dy"}
    _, m = gn_fast.group_norm(**forward, return_moments=True)
    anyhow = Moments(m.count.astype(">i8"), m.mean[::-1][::-1], np.asfortranarray(m.m2))
    expected = gradients(arguments)
    for moments in (m, anyhow):
        assert_same_gradients(gradients(arguments, moments=moments), expected)


@every_dtype
@both_layouts
@pytest.mark.parametrize("how", HOW)
def test_strides_and_alignment_change_nothing(three_processors, dtype, layout, how):
    for shape, num_groups in (((2, 6, 5, 7), 3), ((2, 10, 43, 44), 2), ((1, 130, 20, 19), 1)):
        for options in (["weight"], OPTIONS):
            arguments = gradient_problem(shape, num_groups, dtype, layout, options=options)
            expected = gradients(arguments)
            for name in ("x", "dy", "residual"):
                if name in arguments:
                    moved = arguments | {name: strided(arguments[name], how)}
                    assert_same_gradients(gradients(moved), expected, f"{shape} {how} {name}")
            out = strided(np.zeros_like(arguments["x"]), how)
            results = gradients(arguments, out=out)
            assert results[0] is out
            assert_same_gradients(results, expected, f"{shape} {how} out")


@every_dtype
@both_layouts
def test_a_dy_that_is_broadcast_is_as_good_as_a_whole_one(dtype, layout):
    arguments = gradient_problem((2, 6, 41, 43), 3, dtype, layout)
    for shape in ((), (2, 6, 1, 1), (6, 1, 1), (1, 1, 41, 43), (2, 1, 1, 43)):
        dy = np.broadcast_to(
            normal(np.random.default_rng(3), shape, np.float64).astype(dtype), (2, 6, 41, 43)
        )
        expected = gradients(arguments, dy=dy.copy(order="C"))
        assert_same_gradients(gradients(arguments, dy=dy), expected, f"{shape}")
        assert_same_gradients(gradients(arguments, dy=in_layout(dy, layout)), expected, f"{shape} {layout}")


@every_dtype
@both_layouts
def test_the_order_of_dy_and_residual_and_out_in_memory_changes_nothing(three_processors, dtype, layout):
    for shape, num_groups in (*SHAPES, ((130, 8, 17, 3), 4)):
        arguments = gradient_problem(shape, num_groups, dtype, layout)
        expected = gradients(arguments)
        for other in LAYOUTS:
            for name in ("dy", "residual"):
                moved = {name: in_layout(arguments[name], other)}
                assert_same_gradients(gradients(arguments, **moved), expected, f"{shape} {name} {other}")
            out = in_layout(np.full(shape, np.nan, dtype), other)
            assert_same_gradients(gradients(arguments, out=out), expected, f"{shape} out {other}")


@every_dtype
@both_layouts
def test_parameters_may_lie_anyhow(dtype, layout):
    arguments = gradient_problem((3, 10, 9, 11), 5, dtype, layout)
    expected = gradients(arguments)
    weight, bias, mask = (arguments[name] for name in ("weight", "bias", "mask"))
    odd = at_odd_address(weight)
    odd[...] = weight
    for form in (np.repeat(weight, 3)[::3], weight[::-1].copy()[::-1], odd):
        assert_same_gradients(gradients(arguments, weight=form), expected, "weight")
    for form in (np.asfortranarray(bias), bias[::-1, ::-1].copy()[::-1, ::-1]):
        assert_same_gradients(gradients(arguments, bias=form), expected, "bias")
    for form in (np.asfortranarray(mask), np.repeat(mask, 2, -1)[..., ::2], mask.tolist()):
        assert_same_gradients(gradients(arguments, mask=form), expected, "mask")
    # Wider parameters of the same values: the same dx.
    for name in ("weight", "bias"):
        wide = gradients(arguments, **{name: arguments[name].astype(np.float64)})
        assert_same_bits(wide[0], expected[0], f"{name} in float64")


# ---- in place --------------------------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize("name", ["dy", "x", "residual"])
def test_in_place_changes_nothing(three_processors, name, dtype, layout):
    for shape, num_groups in (*SHAPES, ((130, 8, 17, 3), 4)):
        for options in (["weight", "bias"], OPTIONS):
            if name == "residual" and name not in options:
                continue
            arguments = gradient_problem(shape, num_groups, dtype, layout, options=options)
            expected = gradients(arguments)
            names = [key for key in ("dy", "x", "residual") if key in arguments]
            copies = {key: arguments[key].copy(order="K") for key in names}
            results = gradients(arguments, **copies, out=copies[name])
            assert results[0] is copies[name]
            assert_same_gradients(results, expected, f"{shape} in place of {name}")
            for other in names:
                if other != name:
                    assert_same_bits(copies[other], arguments[other], f"{shape}: {other} is not written")


@both_layouts
def test_in_place_and_strided(three_processors, layout):
    arguments = gradient_problem((2, 10, 43, 44), 2, np.float32, layout)
    expected = gradients(arguments)
    for how in HOW:
        for name in ("dy", "x"):
            there = strided(arguments[name], how)
            assert_same_gradients(gradients(arguments, **{name: there}, out=there), expected, f"{how} {name}")


@both_layouts
def test_three_at_once_in_one_array(three_processors, layout):
    one = gradient_problem((2, 12, 61, 43), 3, np.float32, layout)["x"]
    arguments = {"num_groups": 3, "activation": "silu", "weight": np.ones(12, np.float32)}
    expected = backward(one.copy(order="K"), arguments | {"x": one, "residual": one.copy(order="K")})
    assert_same_gradients(backward(one, arguments | {"x": one, "residual": one}, out=one), expected)
