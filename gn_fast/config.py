"""What gn_fast found on this machine and chose: `show_config`.

How it is chosen lives in src/isa.pxi, src/threads.pxi and src/pool.pxi.
"""

from typing import Any, Literal, overload

import numpy as np

from . import __version__, _core

ABSENT = {"openmp": "none: built without OpenMP, on one thread"}


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Tell the instruction set, the threads, the cache sizes and the kept memory.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print them, or return them, as `numpy.show_config` does.

    Returns
    -------
    dict of dict or None
        With ``mode="dicts"``: ``versions``; ``isa`` (``used``, ``available``); ``threads`` (``used`` by
        the next large call, ``openmp``, its version as ``yyyymm`` or None if gn_fast was built without
        it, and the ``processors`` that affinity and quota allow); ``caches`` (bytes);
        ``pool`` (bytes: the ``limit`` of the memory that is ``kept`` for results, see `clear_pool`).

    Raises
    ------
    ValueError
        If `mode` is another.

    Examples
    --------
    >>> import gn_fast
    >>> sorted(gn_fast.show_config("dicts"))
    ['caches', 'isa', 'pool', 'threads', 'versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', not {mode!r}")
    config = {"versions": {"gn_fast": __version__, "numpy": np.__version__}, **_core._config()}
    if mode == "dicts":
        return config
    print_config(config)
    return None


def print_config(config: dict[str, dict[str, Any]]) -> None:
    """Print sections and their entries."""
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            if value is None:
                value = ABSENT.get(name, "none")
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
