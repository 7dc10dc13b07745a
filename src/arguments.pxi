# What is checked of an argument by itself: its type, dtype, shape and range. Errors name it, say what it was and what
# it should be.

_ACTIVATIONS = {None: IDENTITY, "relu": RELU, "leaky_relu": LEAKY_RELU, "silu": SILU, "swish": SILU, "gelu": GELU,
                "gelu_tanh": GELU_TANH, "mish": MISH, "hardswish": HARDSWISH, "sigmoid": SIGMOID, "tanh": TANH}
_DTYPES = "float16, bfloat16, float32, float64, an integer type or bool"


cdef Py_ssize_t integer(value, str name) except? -1:
    if type(value) is not int and (isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    try:
        return value if type(value) is int else value.__index__()
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is out of range: {value!r}") from None


cdef double checked_eps(value) except? -1:
    cdef double eps
    try:
        eps = value
    except TypeError:
        raise TypeError(f"eps must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError("eps must be a finite number of at least 0, not an integer beyond float64") from None
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, not {value!r}")
    return eps


cdef int checked_activation(value) except -1:
    try:
        return LEAKY_RELU if has_slope(value) else _ACTIVATIONS[value]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation must be one of {known} or ('leaky_relu', slope), not {value!r}") from None


cdef bint has_slope(activation):
    return (isinstance(activation, tuple) and len(activation) == 2 and isinstance(activation[0], str)
            and activation[0] == "leaky_relu")


cdef double checked_slope(activation, Storage compute) except? -1:
    """The slope of ("leaky_relu", slope), in the type that is computed in."""
    cdef double slope, largest = FLT_MAX if compute == FLOAT32 else DBL_MAX
    try:
        if isinstance(activation[1], (bool, np.bool_, np.complexfloating)):
            raise TypeError
        slope = activation[1]
    except TypeError:
        raise TypeError(f"activation must be ('leaky_relu', slope) with a real number as slope, not {activation!r}") from None
    except OverflowError:
        slope = NAN
    if not -largest <= slope <= largest:
        number = "float32" if compute == FLOAT32 else "float64"
        raise ValueError(f"activation must be ('leaky_relu', slope) with a slope finite in {number}, not {activation!r}")
    return <float> slope if compute == FLOAT32 else slope


cdef int storage_of(cnp.ndarray a) except -2:
    """Its Storage, or -1 for a dtype that is none."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FLOAT64
    if number == cnp.NPY_FLOAT16:
        return FLOAT16
    if number == cnp.NPY_BOOL:
        return BOOL
    scalar = (<object> a).dtype.type
    if scalar.__name__ == "bfloat16" and scalar.__module__ == "ml_dtypes":  # known without importing it
        return BFLOAT16
    return -1


cdef shape_of(cnp.ndarray a):
    return (<object> a).shape


# Of DLPack, those whose memory is not the CPU's too.
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 14: "oneAPI", 15: "WebGPU"}


cdef cnp.ndarray taken(value, str name):
    """What NumPy makes of an array-like, or of the CPU's memory behind what speaks DLPack alone."""
    if isinstance(value, np.ma.MaskedArray):
        hint = "" if name == "mask" else f", and mask=~{name}.mask for the statistics"
        raise TypeError(f"{name} must not be a masked array: pass its data{hint}")
    try:
        if hasattr(value, "__array__") or not hasattr(value, "__dlpack__"):
            return np.asarray(value)
        refuse_device(value, name)
        return np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        refuse_device(value, name)
        hint = torch_hint(value, name)
        raise TypeError(f"{name} must be an array or what NumPy can make one of: {error}{hint}") from None


cdef str torch_hint(value, str name):
    if all(t.__module__.partition(".")[0] != "torch" for t in type(value).__mro__):
        return ""
    hint = "; a torch tensor goes to gn_fast.torch"
    if getattr(value, "requires_grad", False):
        return f"{hint}, or pass {name}.detach()"
    return f"{hint}, or pass {name}.float()" if str(getattr(value, "dtype", "")) == "torch.bfloat16" else hint


cdef int refuse_device(value, str name) except -1:
    """An error that names the device if the values are not in the CPU's memory."""
    try:
        device, number = map(int, value.__dlpack_device__())
    except Exception:
        return 0  # not a device's fault
    if device in _DEVICES:
        raise TypeError(f"{name} must be in the CPU's memory, not on {_DEVICES[device]} device {number}")
    return 0


cdef cnp.ndarray as_array(value, str name):
    """Any array-like as an aligned ndarray in native byte order, of a floating storage type."""
    cdef cnp.ndarray a = value if cnp.PyArray_CheckExact(value) else taken(value, name)
    cdef int storage = storage_of(a)
    if storage <= BOOL:
        if (<object> a).dtype.kind not in "iub":
            raise TypeError(f"{name} must be of dtype {_DTYPES}, not {(<object> a).dtype}")
        return copied(a, np.float64)
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return copied(a, (<object> a).dtype.newbyteorder("="))
    return a


cdef cnp.ndarray checked_mask(mask, cnp.ndarray x, int axis):
    """The mask broadcast to x's shape."""
    mask = taken(mask, "mask")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool, not {mask.dtype}")
    wanted = list(shape_of(x))
    wanted[axis] = 1
    try:
        whole = np.broadcast_to(mask, wanted)
    except ValueError:
        raise ValueError(f"mask must be broadcastable to x with one channel, {tuple(wanted)}, not {mask.shape}"
                         f"{transposed(mask.shape, wanted)}") from None
    return np.broadcast_to(whole, shape_of(x))


cdef int check_out(value, cnp.ndarray x) except -1:
    if not cnp.PyArray_Check(value) or (not cnp.PyArray_CheckExact(value) and isinstance(value, np.ma.MaskedArray)):
        raise TypeError(f"out must be a numpy.ndarray, not {type(value).__name__}")
    cdef cnp.ndarray out = value
    if not cnp.PyArray_EquivTypenums(cnp.PyArray_TYPE(out), cnp.PyArray_TYPE(x)):
        raise TypeError(f"out must be of dtype {(<object> x).dtype}, not {(<object> out).dtype}")
    if not cnp.PyArray_SAMESHAPE(out, x):
        hint = transposed(shape_of(out), shape_of(x))
        raise ValueError(f"out must have shape {shape_of(x)}, not {shape_of(out)}{hint}")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out must be writeable, not read-only")
    if not one_place_each(out):
        raise ValueError(f"out must not overlap itself, as shape {shape_of(out)} does with strides {value.strides}")
    return 0


cdef str transposed(shape, wanted):
    """The end of an error's message about a shape that has the right dimensions in another order."""
    return ": it looks transposed" if sorted(shape) == sorted(wanted) else ""


cdef bint one_place_each(cnp.ndarray a):
    """Whether no two elements share memory."""
    if cnp.PyArray_IS_C_CONTIGUOUS(a):
        return True
    steps = sorted((abs(stride), size) for stride, size in zip((<object> a).strides, shape_of(a)) if size > 1)
    reach = a.itemsize
    for stride, size in steps:
        if stride < reach:  # the dimensions are interwoven, or overlap: count the places
            places = np.zeros((), np.intp)
            for stride, size in steps:
                places = np.add.outer(places, stride * np.arange(size))
            places = np.sort(places, axis=None)
            return bool((np.diff(places) >= a.itemsize).all())
        reach += stride * (size - 1)
    return True
