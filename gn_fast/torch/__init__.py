"""The kernel under PyTorch models on CPUs: the same parameters, memory formats, autograd and `torch.compile`.

This file is the list of what is public. What a call does lives in _functional.py, what the registered operators are in
_operators.py.
"""

try:
    import ml_dtypes  # noqa: F401  NumPy's bfloat16
    import torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise ImportError(
        f"gn_fast.torch needs {_error.name}, which is not installed: pip install 'gn_fast[torch]'",
        name=_error.name,
    ) from _error

from ._accelerate import Report, accelerate, restore
from ._backend import backend
from ._functional import group_norm
from ._module import GroupNorm

__all__ = ["GroupNorm", "Report", "accelerate", "backend", "group_norm", "restore"]
