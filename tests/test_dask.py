"""`gn_fast.dask` is gn_fast's group norm in chunks: values, gradients, laziness, bits and errors.

Tolerances are those of test_fused.py and test_gradient.py: chunks keep the contract of a whole.
"""

import functools
import inspect
import warnings

import numpy as np
import pytest
from helpers import DTYPES, LAYOUTS, assert_same_bits, digest, fresh_python, in_layout, name_of, normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import BAD, C, H, N, W, X, label
from test_fused import assert_as_reference, calls, data
from test_gradient import assert_as_reference as assert_gradient_as_reference

import gn_fast
from gn_fast import Moments, reference

dask = pytest.importorskip("dask", reason="dask is not installed")
distributed = pytest.importorskip("distributed", reason="distributed is not installed")
xarray = pytest.importorskip("xarray", reason="xarray is not installed")

import dask.array as da  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402

import gn_fast.dask  # noqa: E402
from gn_fast.dask import group_norm, group_norm_backward  # noqa: E402

SHAPE, CHUNKS = (4, 8, 12, 10), (2, 8, 12, 10)
CUTS = {
    "samples": CHUNKS,
    "positions": (4, 8, 5, 3),
    "channels between groups": (4, 4, 12, 10),
    "groups": (4, 3, 12, 10),
    "all": (3, 3, 5, 7),
    "uneven": ((1, 3), (2, 6), (1, 4, 7), (10,)),
}
every_cut = pytest.mark.parametrize("cut", CUTS)


def problem(dtype=np.float32, layout="channels-first", shape=SHAPE, mean=3.0):
    rng = np.random.default_rng(0)
    x, dy, residual = (in_layout(normal(rng, shape, dtype, m), layout) for m in (mean, 0, 0))
    weight, bias = (normal(rng, (shape[1],), dtype, 1.0) for _ in range(2))
    return {"x": x, "num_groups": 4, "weight": weight, "bias": bias}, dy, residual


def in_chunks(arguments, chunks):
    """The same call of dask arrays: those of x's shape in these chunks."""
    return {
        name: da.from_array(value, chunks=chunks if value.ndim == len(chunks) else -1)
        if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }  # fmt: skip


def both_ways(arguments, dy, **more):
    """y, its moments and all gradients, lazy."""
    y, m = group_norm(**arguments, **more, return_moments=True)
    return y, m, *group_norm_backward(dy, **arguments, **more)


# ---- values ----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.data())
def test_every_combination_is_that_of_the_reference(arguments, drawn):
    def cut(size):
        bounds = drawn.draw(st.lists(st.integers(0, size), max_size=3), label="bounds")
        return tuple(map(int, np.diff([0, *sorted(bounds), size])))

    x = arguments["x"]
    dy = data(drawn.draw, x.shape, drawn.draw(st.sampled_from(DTYPES)))
    chunked = {"x": da.from_array(x, chunks=tuple(map(cut, x.shape)))}
    for name, value in arguments.items():
        if name != "x":
            lazy = isinstance(value, np.ndarray) and drawn.draw(st.booleans(), label=f"{name} is dask's")
            chunked[name] = da.from_array(value, chunks=tuple(map(cut, value.shape))) if lazy else value
    y = group_norm(**chunked)
    y2, m = group_norm(**chunked, return_moments=True)
    gradients = group_norm_backward(dy, **chunked)
    y, y2, m, gradients = dask.compute(y, y2, m, gradients, scheduler="sync")
    assert y.dtype == x.dtype
    assert_as_reference(y, arguments)
    assert_as_reference(y2, arguments)
    if "moments" not in arguments:
        expected = reference.group_moments(x, arguments["num_groups"], axis=arguments["axis"],
                                           mask=arguments.get("mask"))  # fmt: skip
        np.testing.assert_array_equal(m.count, expected.count)
    # With the moments of the whole, so that what merging rounded is not counted twice.
    assert_gradient_as_reference(gradients, dy, arguments | {"moments": m})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_cut
def test_values_gradients_and_chunks(cut, dtype, layout):
    arguments, dy, residual = problem(dtype, layout)
    arguments |= {"residual": residual, "activation": "silu"}
    chunked = in_chunks(arguments, CUTS[cut])
    y, m, *gradients = both_ways(chunked, dy)
    if cut not in ("groups", "all"):
        assert y.chunks == gradients[0].chunks == gradients[3].chunks == chunked["x"].chunks
    else:  # 3, 3, 2 channels in groups of 2
        assert y.chunks == (chunked["x"].chunks[0], (4, 2, 2), *chunked["x"].chunks[2:])
    for a in (y, *gradients):
        assert (type(a._meta), a._meta.dtype, a._meta.ndim) == (np.ndarray, a.dtype, a.ndim)
        assert a.dtype == dtype
        assert tuple(map(sum, a.chunks)) == a.shape
    y, m, gradients = dask.compute(y, m, gradients)
    assert type(m) is Moments
    assert_as_reference(y, arguments)
    assert_gradient_as_reference(gradients, dy, arguments | {"moments": m})


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_mean_far_from_zero_is_as_accurate_in_chunks(ratio):
    arguments, _, _ = problem(shape=(2, 8, 40, 30), mean=ratio)
    y = group_norm(**in_chunks(arguments, (1, 8, 7, 11)))
    assert_as_reference(y.compute(), arguments)


def test_whole_slabs_have_the_bits_of_a_call_without_dask():
    arguments, dy, residual = problem()
    arguments |= {"residual": residual, "activation": "gelu"}
    chunked = in_chunks(arguments, CUTS["samples"])
    y = group_norm(**chunked).compute()
    dx, _, _, dresidual = dask.compute(*group_norm_backward(dy, **chunked))
    expected = gn_fast.group_norm_backward(dy, **arguments)
    assert_same_bits(y, gn_fast.group_norm(**arguments))
    assert_same_bits(dx, expected[0])
    assert_same_bits(dresidual, expected[3])


@pytest.mark.parametrize("shape", [(4, 8), (0, 8, 3), (2, 8, 0), (2, 0, 3), (0, 8), (1, 2, 0, 43, 4), (2, 8, 1, 1, 1)])
def test_few_or_no_values(shape):
    x = np.ones(shape, np.float32)
    chunked = da.from_array(x, chunks=tuple(max(1, size // 2) for size in shape))
    y, m = group_norm(chunked, 2, return_moments=True)
    parameters = np.ones(shape[1]), np.float32(1)
    found = dask.compute(*group_norm_backward(x, chunked, 2, *parameters, residual=x))
    expected, expected_m = gn_fast.group_norm(x, 2, return_moments=True)
    assert_same_bits(y.compute(), expected)
    np.testing.assert_array_equal(dask.compute(m)[0].count, expected_m.count)
    for a, b in zip(found, gn_fast.group_norm_backward(x, x, 2, *parameters, residual=x), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [np.int16, np.bool_, ">f4"])
def test_dtypes_that_are_taken_as_others(dtype):
    x = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 7).astype(dtype)
    weight = np.arange(8)
    expected = gn_fast.group_norm(x, 4, weight)
    lazy = group_norm(da.from_array(x, chunks=CUTS["all"]), 4, da.from_array(weight, chunks=3))
    y = lazy.compute()
    assert lazy.dtype == y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    _, dweight, _ = group_norm_backward(x, da.from_array(x, chunks=CUTS["all"]), 4, weight)
    assert dweight.dtype == dweight.compute().dtype == np.float64


@pytest.mark.parametrize("shape", [(), (8,), (1, 8), (4, 8), (8, 1, 1), (4, 8, 1, 1)])
@pytest.mark.parametrize("lazy", [False, True])
@every_cut
def test_parameters_of_every_shape(cut, lazy, shape):
    arguments, dy, _ = problem(np.float64)
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((2, *shape))
    chunks = tuple(max(1, size // 2) for size in shape)
    given = [da.from_array(a, chunks=chunks) if lazy else a for a in (weight, bias)]
    y = group_norm(da.from_array(arguments["x"], chunks=CUTS[cut]), 4, *given)
    _, *found = group_norm_backward(dy, da.from_array(arguments["x"], chunks=CUTS[cut]), 4, *given)
    np.testing.assert_allclose(y, gn_fast.group_norm(arguments["x"], 4, weight, bias), rtol=0, atol=1e-13)
    expected = gn_fast.group_norm_backward(dy, arguments["x"], 4, weight, bias)[1:]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape == shape
        assert a.chunks == da.asarray(given[0]).chunks
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


# ---- graphs ----------------------------------------------------------------------------------------------


def test_nothing_is_computed_before_it_is_asked_for():
    def refuse(block):
        if block.size:
            raise AssertionError("computed")
        return block

    x = da.map_blocks(refuse, da.ones(SHAPE, chunks=CUTS["all"]), meta=np.empty((0,) * 4))
    parameter = da.map_blocks(refuse, da.ones(8), meta=np.empty(0))
    mask = da.map_blocks(refuse, da.ones((4, 1, 12, 10), bool), meta=np.empty((0,) * 4, bool))
    arguments = {"weight": parameter, "bias": parameter, "mask": mask, "residual": x, "activation": "mish"}
    y, m, *gradients = both_ways({"x": x, "num_groups": 4, **arguments}, x)
    lazily = group_norm(x, 4, moments=m), m.var, m.rstd(1e-3), m.merge(m).mean
    for lazy in (y, *gradients, *lazily):
        assert isinstance(lazy, da.Array)
        with pytest.raises(AssertionError, match="computed"):
            lazy.compute()


def test_moments_are_used_merged_and_computed():
    arguments, _, _ = problem(np.float64)
    x = arguments["x"]
    left, right = (da.from_array(half, chunks=(2, 8, 5, 3)) for half in (x[..., :6], x[..., 6:]))
    own = [group_norm(half, 4, return_moments=True)[1] for half in (left, right)]
    whole = own[0].merge(own[1])
    y = da.concatenate([group_norm(half, 4, moments=whole) for half in (left, right)], axis=-1)
    np.testing.assert_allclose(y, gn_fast.group_norm(x, 4), rtol=0, atol=1e-13)
    computed = dask.compute(whole)[0]
    expected = gn_fast.group_moments(x, 4)
    np.testing.assert_array_equal(computed.count, expected.count)
    np.testing.assert_allclose(computed.var, expected.var, rtol=1e-14)
    # NumPy's work as well, and come back as they are.
    again, m = group_norm(left, 4, moments=computed, return_moments=True)
    assert m is computed
    assert_same_bits(again.compute(), group_norm(left, 4, moments=whole).compute())


def tasks(*lazy):
    return len(set().union(*(a.__dask_graph__() for a in lazy)))


@pytest.mark.parametrize("cut", ["samples", "positions"])
def test_graphs_are_linear_in_the_chunks(cut):
    def size(chunks):
        shape = (chunks, 8, 16) if cut == "samples" else (1, 8, 16 * chunks)
        x = da.zeros(shape, chunks=(1, 8, 16))
        weight = np.ones(8, np.float32)
        return np.array([
            tasks(group_norm(x, 4, weight)),
            tasks(*group_norm_backward(x, x, 4, weight, weight, residual=x)),
        ])  # fmt: skip

    small, large = size(64), size(512)
    assert np.all(large <= 8 * small)
    assert np.all(large <= 512 * np.array([6, 16]))  # for each chunk


def test_same_calls_have_the_same_names():
    arguments, dy, residual = problem()
    chunked = in_chunks(arguments | {"residual": residual}, CUTS["all"])
    first, second = both_ways(chunked, dy), both_ways(chunked, dy)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, da.Array):
            assert a.name == b.name
    assert group_norm(**chunked).name != group_norm(**chunked, eps=1e-3).name


def test_chunks_keep_their_order_of_memory():
    def strides(block):
        return np.array(block.strides[1] == block.itemsize).reshape((1,) * block.ndim)

    for layout, dtype in [(layout, dtype) for layout in LAYOUTS for dtype in (np.float16, np.float32)]:
        arguments, dy, residual = problem(dtype, layout)
        del arguments["weight"], arguments["bias"]
        for chunks in CHUNKS, CUTS["positions"]:
            x, dy_, r = (
                da.from_array(a, chunks=chunks).map_blocks(in_layout, layout, dtype=dtype)
                for a in (arguments["x"], dy, residual)
            )
            y = group_norm(x, 4, residual=r)
            dx, _, _, dresidual = group_norm_backward(dy_, x, 4, residual=r)
            for a in (y, dx, dresidual):
                last = a.map_blocks(strides, dtype=bool, chunks=(1,) * 4).compute()
                assert np.all(last == (layout == "channels-last"))


def test_bits_do_not_depend_on_an_order_of_memory_that_is_lost_on_the_way_to_a_worker():
    arguments, dy, residual = problem(shape=(2, 8, 40, 30))
    arguments |= {"residual": residual, "activation": "silu"}
    for chunks in (1, 8, 40, 30), (2, 3, 13, 11):
        chunked = in_chunks(arguments, chunks)
        kept, moved = (
            both_ways(chunked | {"x": chunked["x"].map_blocks(in_layout, layout, dtype=np.float32)}, dy)
            for layout in LAYOUTS
        )
        assert digest_of(dask.compute(*kept)) == digest_of(dask.compute(*moved))


@pytest.mark.parametrize("threads", [None, 2])
def test_tasks_have_one_thread_or_as_many_as_asked(monkeypatch, threads):
    seen = []

    def spy(*args, num_threads, **more):
        if (args and isinstance(args[0], np.ndarray)) or "x" in more:
            seen.append(num_threads)
        return original(*args, num_threads=num_threads, **more)

    original = gn_fast.group_norm
    x = da.ones(SHAPE, chunks=CHUNKS)
    lazy = group_norm(x, 4), group_norm(x, 4, num_threads=threads)
    monkeypatch.setattr(gn_fast, "group_norm", spy)
    for y in lazy:
        y.compute()
    assert seen == [1, 1, threads, threads]


# ---- schedulers ------------------------------------------------------------------------------------------


def everything(dtype, layout, chunks):
    arguments, dy, residual = problem(dtype, layout, shape=(3, 8, 20, 14))
    mask = np.random.default_rng(2).random((3, 1, 20, 14)) < 0.8
    arguments |= {"residual": residual, "activation": "silu", "mask": mask}
    return both_ways(in_chunks(arguments, chunks), da.from_array(dy, chunks=chunks))


CASES = [
    (dtype, layout, chunks)
    for dtype in (np.float16, np.float32)
    for layout in LAYOUTS
    for chunks in ((1, 8, 20, 14), (2, 3, 7, 7))
]


def digest_of(computed):
    y, m, *gradients = computed
    return digest([y, m.count, m.mean, m.m2, *gradients])


@pytest.fixture(scope="module")
def digests():
    with dask.config.set(scheduler="synchronous"):
        return [digest_of(dask.compute(*everything(*case))) for case in CASES]


@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 7}], ids=name_of)
def test_threads_have_the_same_bits(digests, settings):
    with dask.config.set(scheduler="threads", **settings):
        assert [digest_of(dask.compute(*everything(*case))) for case in CASES] == digests


def test_processes_have_the_same_bits(digests):
    with dask.config.set(scheduler="processes", num_workers=2):
        assert [digest_of(dask.compute(*everything(*case))) for case in CASES[-2:]] == digests[-2:]


@pytest.mark.parametrize(("workers", "threads"), [(1, 2), (3, 1)])
def test_clusters_have_the_same_bits(digests, workers, threads, tmp_path):
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, processes=True, host="127.0.0.1",
            dashboard_address=None, local_directory=tmp_path, silence_logs=40,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        futures = [client.compute(everything(*case)) for case in CASES]
        assert [digest_of(client.gather(future)) for future in futures] == digests


# ---- xarray ----------------------------------------------------------------------------------------------


def test_xarray():
    arguments, _, _ = problem()
    x = xarray.DataArray(arguments["x"], dims=("sample", "channel", "row", "column"))
    cut = x.transpose("sample", "row", "column", "channel").chunk(sample=1, row=5, channel=8)
    dims = ["channel", "row", "column"]
    y = xarray.apply_ufunc(
        group_norm, cut, 4, arguments["weight"], arguments["bias"],
        input_core_dims=[dims, [], ["channel"], ["channel"]], output_core_dims=[dims], dask="allowed",
    )  # fmt: skip
    assert isinstance(y.data, da.Array)
    assert_as_reference(y.transpose(*x.dims).values, arguments)


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD, ids=label)
def test_bad_input_is_refused_before_anything_is_computed(name, value, error, was):
    x = da.from_array(X, chunks=(1, 3, 2, 5))
    arguments = {"x": x, "num_groups": 2}
    for call in (group_norm, functools.partial(group_norm_backward, x)):
        if name == "x" and (not isinstance(value, np.ndarray) or value.dtype == object):
            with pytest.raises(TypeError, match=r"^x must be a dask.array.Array, not "):
                call(**(arguments | {name: value}))
            continue
        with pytest.raises(error) as caught:
            call(**(arguments | {name: da.from_array(value) if name == "x" else value}))
        if name != "x":
            with pytest.raises(error) as expected:
                gn_fast.group_norm(**({"x": X, "num_groups": 2} | {name: value}))
            assert str(caught.value) == str(expected.value)
        assert was in str(caught.value)


def test_values_that_are_not_finite_do_not_warn():
    dy = np.zeros(SHAPE, np.float32)
    dy[0, 0, 0, 0], dy[1, 0, 0, 0] = np.inf, -np.inf
    x = da.from_array(problem()[0]["x"], chunks=CUTS["positions"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients = dask.compute(*group_norm_backward(dy, x, 4, bias=np.ones(8)), scheduler="sync")
    assert np.isnan(gradients[2]).tolist() == [True] + 7 * [False]


@pytest.mark.parametrize("name", ["weight", "residual", "mask"])
def test_a_dask_array_is_refused_like_numpys(name):
    x = da.from_array(X, chunks=(1, 3, 2, 5))
    for bad in (np.ones((N, C, H, W + 1), bool if name == "mask" else np.float32), np.ones(X.shape, complex)):
        with pytest.raises((TypeError, ValueError)) as expected:
            gn_fast.group_norm(X, 2, **{name: bad})
        with pytest.raises(type(expected.value)) as caught:
            group_norm(x, 2, **{name: da.from_array(bad, chunks=2)})
        assert str(caught.value) == str(expected.value)


def test_dy_of_another_shape():
    with pytest.raises(ValueError, match=r"^dy must have x's shape \(2, 6, 3, 5\), not \(2, 6, 3, 4\)"):
        group_norm_backward(da.ones((2, 6, 3, 4)), da.from_array(X), 2)


def test_chunks_of_unknown_sizes():
    x = da.from_array(X, chunks=(1, 6, 3, 5))
    unknown = x[da.from_array(np.array([True, True]), chunks=1)]
    for call in (
        lambda: group_norm(unknown, 2),
        lambda: group_norm(x, 2, residual=unknown),
        lambda: group_norm_backward(unknown, x, 2),
    ):
        with pytest.raises(ValueError, match=r"chunks of known sizes.*compute_chunk_sizes\(\)"):
            call()
    assert_same_bits(group_norm(unknown.compute_chunk_sizes(), 2).compute(), gn_fast.group_norm(X, 2))


def test_the_arguments_are_those_of_gn_fast():
    for ours, theirs in (
        (group_norm, gn_fast.group_norm),
        (group_norm_backward, gn_fast.group_norm_backward),
    ):
        expected = [p for p in inspect.signature(theirs).parameters.values() if p.name not in ("out", "sums")]
        found = list(inspect.signature(ours).parameters.values())
        assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in expected]
        assert {p.name for p, q in zip(found, expected, strict=True) if p.default != q.default} == {"num_threads"}


def test_without_dask_the_error_says_what_to_install():
    done = fresh_python("import sys; sys.modules['dask'] = None; import gn_fast; import gn_fast.dask")
    assert done.returncode == 1
    assert "ImportError: gn_fast.dask needs dask, which is not installed: pip install 'gn_fast[dask]'" in done.stderr
