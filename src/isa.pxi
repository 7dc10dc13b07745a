# Which instruction set's kernel does the work: the best that the processor has, or the one that is asked for.

import contextlib
import os
import threading

from cpython.pycapsule cimport PyCapsule_GetPointer

cdef extern from "threads.h" nogil:
    int gn_x86_64_level()
    void *gn_load(void **word)
    void gn_store(void **word, void *value)

# Read once by each call, as another thread may set another; what it points to never changes.
cdef void *kernel_in_use = NULL
_isa = None
_isa_lock = threading.Lock()  # so that they name the same one


def isa_levels():
    """The instruction sets that this machine and this build both have, weakest first.

    Returns
    -------
    tuple of str
        On x86-64 some of ``x86_64_v2``, ``x86_64_v3`` and ``x86_64_v4`` (the levels of the x86-64 psABI),
        elsewhere ``baseline``. All with fused multiply-add (v3, v4, ARM64) give the same bits.

    Examples
    --------
    >>> import gn_fast
    >>> len(gn_fast.isa_levels()) >= 1
    True
    """
    level = gn_x86_64_level()
    return tuple(f"x86_64_v{v}" for v in range(2, level + 1)) if level else ("baseline",)


def _set_isa(level):
    global _isa
    module = __import__(f"gn_fast._kernel_{level}", fromlist=["KERNEL"])
    with _isa_lock:
        gn_store(&kernel_in_use, PyCapsule_GetPointer(module.KERNEL, "gn_fast.kernel"))
        _isa = level


def _isa_of_environment():
    levels = isa_levels()
    if not levels:
        raise ImportError("gn_fast needs an x86-64-v2 processor (SSE4.2) or better")
    level = os.environ.get("GN_FAST_ISA") or levels[-1]
    if level not in levels:
        raise ImportError(f"GN_FAST_ISA must be one of {', '.join(levels)}, which this machine supports, not {level!r}")
    return level


_set_isa(_isa_of_environment())


@contextlib.contextmanager
def use_isa(level):
    """Compute with another instruction set inside a ``with`` block, in the whole process: for tests and benchmarks.

    A call that runs in another thread meanwhile may use either. Blocks of several threads that overlap without one
    being inside the other may leave another level than there was.

    Parameters
    ----------
    level : str
        One of :func:`isa_levels`.

    Raises
    ------
    ValueError
        If `level` is not one of them.

    Examples
    --------
    >>> import gn_fast
    >>> with gn_fast.use_isa(gn_fast.isa_levels()[0]):
    ...     gn_fast.show_config("dicts")["isa"]["used"] == gn_fast.isa_levels()[0]
    True
    """
    if level not in isa_levels():
        raise ValueError(f"level must be one of {', '.join(isa_levels())}, not {level!r}")
    before = _isa
    _set_isa(level)
    try:
        yield
    finally:
        _set_isa(before)
