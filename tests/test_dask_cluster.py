"""A cluster of several processes: a volume of three times its memory, and a worker that dies on the way."""

import functools
import itertools
import os
import signal

import numpy as np
import pytest
from helpers import EPS32, assert_same_bits

dask = pytest.importorskip("dask", reason="dask is not installed")
distributed = pytest.importorskip("distributed", reason="distributed is not installed")
zarr = pytest.importorskip("zarr", minversion="3", reason="zarr is not installed")

import dask.array as da  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402

import gn_fast  # noqa: E402
from gn_fast.dask import group_norm, group_norm_backward  # noqa: E402

WORKERS, LIMIT = 2, 384 << 20  # bytes of each: a worker needs some 150 MiB before it holds any data
CHUNKS = (1, 8, 16, 128, 128)  # 8 MiB
SHAPE = (1, 8, 288, 512, 512)
GROUPS = 4


@pytest.fixture
def client(tmp_path):
    with (
        dask.config.set({"distributed.nanny.environ": {"GN_FAST_POOL_MB": "0", "MALLOC_ARENA_MAX": "1"}}),
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, host="127.0.0.1", memory_limit=LIMIT,
            dashboard_address=None, local_directory=tmp_path / "workers", silence_logs=40,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        yield client


def places(shape, chunks):
    starts = itertools.product(*(range(0, size, step) for size, step in zip(shape, chunks, strict=True)))
    return [tuple(slice(a, a + step) for a, step in zip(start, chunks, strict=True)) for start in starts]


def stored(path, seed):
    """An array in a file, of another mean in each chunk."""
    array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="f4", compressors=None)
    for i, place in enumerate(places(SHAPE, CHUNKS)):
        array[place] = i % 7 + np.random.default_rng([seed, i]).random(CHUNKS, dtype=np.float32)
    return array


def empty(path):
    return zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="f4", compressors=None)


def merged(parts):
    return functools.reduce(lambda a, b: a.merge(b), parts)


def test_a_volume_of_three_times_the_workers_memory(client, tmp_path):
    assert np.prod(SHAPE) * 4 >= 3 * WORKERS * LIMIT
    files = stored(tmp_path / "x", 0), stored(tmp_path / "dy", 1)
    x, dy = map(da.from_zarr, files)
    weight, bias = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
    arguments = {"num_groups": GROUPS, "weight": weight, "bias": bias, "activation": "relu"}
    y_file, dx_file = empty(tmp_path / "y"), empty(tmp_path / "dx")

    y, moments = group_norm(x, **arguments, return_moments=True)
    _, moments = dask.compute(y.store(y_file, compute=False, lock=False), moments)
    dx, dweight, dbias = group_norm_backward(dy, x, **arguments)
    _, dweight, dbias = dask.compute(dx.store(dx_file, compute=False, lock=False), dweight, dbias)

    # The same chunk by chunk without dask.
    each = places(SHAPE, CHUNKS)
    own = merged(gn_fast.group_moments(files[0][place], GROUPS) for place in each)
    arguments["moments"] = own
    sums = merged(gn_fast.group_gradient_sums(files[1][p], files[0][p], **arguments) for p in each)
    np.testing.assert_array_equal(moments.count, own.count)
    np.testing.assert_allclose(moments.mean, own.mean, rtol=1e-12)
    for found, expected in ((dweight, sums.dweight[0]), (dbias, sums.dbias[0])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    for place in each[:: len(each) // 12]:
        a, b = files[0][place], files[1][place]
        expected = gn_fast.group_norm(a, **arguments)
        np.testing.assert_allclose(y_file[place], expected, rtol=0, atol=16 * EPS32)
        expected, *_ = gn_fast.group_norm_backward(b, a, **arguments, sums=sums)
        np.testing.assert_allclose(dx_file[place], expected, rtol=0, atol=16 * EPS32 * np.abs(expected).max())


def killed_once(block, path, block_id):
    """The block; the first task that makes the last but one ends its process, as if memory were short."""
    if block_id == (1, 0, 8, 0) and not path.exists():
        path.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.parametrize(
    "dies_making", ["x", "dy"]
)  # while moments are found, or once they are, and x is held
def test_a_worker_that_is_killed_loses_nothing(client, tmp_path, dies_making):
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 8, 50, 40), dtype=np.float32)
    lazy = {name: da.from_array(a, chunks=(1, 8, 5, 40)) for name, a in (("x", x), ("dy", dy))}

    def results():
        y = group_norm(lazy["x"], GROUPS)
        return y, *group_norm_backward(**lazy, num_groups=GROUPS, weight=np.ones(8, np.float32))[:2]

    expected = dask.compute(*results(), scheduler="sync")
    killed = tmp_path / "killed"
    lazy[dies_making] = lazy[dies_making].map_blocks(killed_once, path=killed, dtype=np.float32)
    workers = set(client.run(os.getpid).values())
    found = [future.result(timeout=240) for future in client.compute(results())]
    assert int(killed.read_text()) in workers
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
