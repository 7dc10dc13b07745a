"""Tensors of another library as arrays, by DLPack's exchange of descriptions: https://dmlc.github.io/dlpack (1.2 on)."""

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef struct DLTensor:
    char *data
    int32_t device_type, device_id
    int32_t ndim
    uint8_t code, bits  # of the dtype
    uint16_t lanes
    int64_t *shape
    int64_t *strides  # in elements
    uint64_t byte_offset


cdef struct DLPackExchangeAPI:
    uint32_t major, minor
    void *older
    void *allocate
    void *export_object
    void *import_object
    int (*describe)(void *object, DLTensor *out) except -1
    void *stream


cdef enum:
    CPU = 1
    FLOAT = 2
    BFLOAT = 4


@cython.final
@cython.auto_pickle(False)
cdef class _Tensors:
    """What makes arrays of one class of tensors, PyTorch's.

    `Tensor.numpy` takes four times as long, for bfloat16 six, and leaves a storage that cannot be resized.
    """
    cdef DLPackExchangeAPI *api
    cdef cnp.dtype bfloat16

    def __cinit__(self, tensors, cnp.dtype bfloat16):
        self.api = <DLPackExchangeAPI *> PyCapsule_GetPointer(tensors.__dlpack_c_exchange_api__, "dlpack_exchange_api")
        if self.api.major != 1 or self.api.describe == NULL:
            raise ImportError(f"{tensors} speaks DLPack {self.api.major}.{self.api.minor}, not 1")
        self.bfloat16 = bfloat16

    def array(self, tensor):
        """The tensor's memory."""
        cdef cnp.npy_intp strides[MAX_SPATIAL + 2]
        cdef cnp.npy_intp size = 1
        cdef cnp.dtype dtype
        cdef DLTensor t
        cdef int i
        if tensor.is_neg():  # its memory has the other signs
            tensor = tensor.resolve_neg()
        self.api.describe(<void *> tensor, &t)
        if t.device_type != CPU:
            raise ValueError(f"a tensor must be on the CPU, not on {tensor.device}")
        if t.code == BFLOAT and t.bits == 16:
            dtype = self.bfloat16
        elif t.code == FLOAT and t.bits in (16, 32, 64):
            dtype = cnp.PyArray_DescrFromType(
                cnp.NPY_FLOAT16 if t.bits == 16 else cnp.NPY_FLOAT32 if t.bits == 32 else cnp.NPY_FLOAT64
            )
        else:
            raise TypeError(f"a tensor must be of a float dtype, not {tensor.dtype}")
        if t.ndim > MAX_SPATIAL + 2:
            raise ValueError(f"a tensor may have {MAX_SPATIAL + 2} dimensions at most, not {t.ndim}")
        for i in range(t.ndim):
            size *= t.shape[i]
            strides[i] = t.strides[i] * (t.bits // 8)
        if t.data == NULL and size:  # NumPy would take memory of its own, of any contents
            if not tensor._is_zerotensor():
                raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage is empty")
            return self.array(tensor.clone())
        Py_INCREF(dtype)  # which the array takes
        a = PyArray_NewFromDescr(<PyTypeObject *> cnp.ndarray, dtype, t.ndim, t.shape, strides,
                                 t.data + t.byte_offset, cnp.NPY_ARRAY_WRITEABLE, NULL)
        cnp.set_array_base(a, tensor)
        return a
