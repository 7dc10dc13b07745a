# Which arrays take their memory from the pool (pool.h), and how much of it the pool may keep.

import sys

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF, PyObject, PyTypeObject

cdef extern from "pool.h" nogil:
    ctypedef struct PyDataMem_Handler:
        pass
    PyDataMem_Handler gn_pool_handler
    size_t gn_pool_limit
    void gn_pool_open(size_t limit)
    void gn_pool_clear()
    size_t gn_pool_kept()

cdef extern from "numpy/arrayobject.h":
    PyObject *PyDataMem_DefaultHandler
    object PyDataMem_GetHandler()
    object PyDataMem_SetHandler(object)
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, PyObject *descr, int subok)
    object PyArray_NewFromDescr(PyTypeObject *subtype, cnp.dtype descr, int ndim, const cnp.npy_intp *shape,
                                const cnp.npy_intp *strides, void *data, int flags, PyObject *like)

cdef enum:
    # Bytes.  With 64 KiB a call takes 4.1 us either way, with 128 KiB 7.1 for 7.7, with 512 KiB 28 for 39 (held) and
    # 26 for 36 (dropped at once): from 128 KiB on glibc may map a block anew, below it does not.
    WORTH_POOLING = 1 << 17
    DEFAULT_MB = 256  # the block of one output of 250 MiB, the largest of benchmarks/cases.py


def _pool_of_environment():
    mib = _integer_of_environment("GN_FAST_POOL_MB", 0)
    return min((DEFAULT_MB if mib is None else mib) << 20, sys.maxsize)


gn_pool_open(_pool_of_environment())
_pool_handler = PyCapsule_New(&gn_pool_handler, "mem_handler", NULL)


cdef object into_pool(Py_ssize_t bytes):
    """Let an array of so many bytes come from the pool if that is worth it; returns the handler to be set again, or
    None."""
    if bytes >= WORTH_POOLING and gn_pool_limit:
        before = PyDataMem_GetHandler()
        if <PyObject *> before == PyDataMem_DefaultHandler:  # any other is the caller's own choice
            PyDataMem_SetHandler(_pool_handler)
            return before
    return None


cdef cnp.ndarray fresh_like(cnp.ndarray prototype):
    """A new array of the prototype's shape and dtype, in the order of memory that a ufunc gives, with any contents."""
    before = into_pool(cnp.PyArray_NBYTES(prototype))
    try:
        if cnp.PyArray_IS_C_CONTIGUOUS(prototype) or cnp.PyArray_IS_F_CONTIGUOUS(prototype):
            return PyArray_NewLikeArray(prototype, cnp.NPY_KEEPORDER, NULL, 0)
        return empty_in_order_of(prototype)
    finally:
        if before is not None:
            PyDataMem_SetHandler(before)


cdef cnp.ndarray empty_in_order_of(cnp.ndarray prototype):
    cdef cnp.npy_intp strides[MAX_SPATIAL + 2]
    cdef int order[MAX_SPATIAL + 2]
    cdef int ndim = cnp.PyArray_NDIM(prototype), i
    cdef cnp.npy_intp stride = cnp.PyArray_ITEMSIZE(prototype)
    cdef cnp.dtype descr = (<object> prototype).dtype
    innermost_first(prototype, order)
    for i in range(ndim):
        strides[order[i]] = stride
        stride *= cnp.PyArray_DIM(prototype, order[i])
    Py_INCREF(descr)  # NumPy takes the reference
    return PyArray_NewFromDescr(<PyTypeObject *> cnp.ndarray, descr, ndim, cnp.PyArray_DIMS(prototype), strides, NULL, 0,
                                NULL)


cdef cnp.ndarray fresh_zeros(Py_ssize_t rows, Py_ssize_t columns):
    """A new array of float64. Without the pool the page faults of a gradient's sums can take longer than the
    gradient."""
    cdef cnp.npy_intp shape[2]
    shape[0] = rows
    shape[1] = columns
    before = into_pool(rows * columns * <Py_ssize_t> sizeof(double))
    try:
        return cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    finally:
        if before is not None:
            PyDataMem_SetHandler(before)


def clear_pool():
    """Give the memory that is kept for later results back to the system.

    When the last reference to a result of 128 KiB or more goes, its memory is kept for the results of later calls:
    at most 256 MiB in all, or what the environment variable ``GN_FAST_POOL_MB`` says when gn_fast is imported; 0
    keeps none. Arrays that are in use stay as they are.

    Examples
    --------
    >>> import gn_fast
    >>> gn_fast.clear_pool()
    >>> gn_fast.show_config("dicts")["pool"]["kept"]
    0
    """
    gn_pool_clear()
