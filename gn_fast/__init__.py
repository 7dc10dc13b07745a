"""Group normalization for NumPy arrays on CPUs: `group_norm`, its statistics, and how it runs.

This file is the list of what is public. The functions live in the compiled ``_core``; the same
functions in plain NumPy, to read and to test against, in `gn_fast.reference`.
"""

import sys

__version__ = "0.1.0"  # here only: the build reads it from the text

from . import reference

try:
    from ._core import (
        clear_pool,
        get_num_threads,
        group_gradient_sums,
        group_moments,
        group_norm,
        group_norm_backward,
        isa_levels,
        num_threads,
        set_num_threads,
        use_isa,
    )
except ModuleNotFoundError as _error:
    if not (_error.name or "").startswith(f"{__name__}._"):
        raise
    raise ImportError(
        f"{_error.name} is not built for this Python ({sys.implementation.cache_tag}) in {__path__[0]}. If "
        "these are gn_fast's sources, build them there: pip install -e . To use a gn_fast that is installed, "
        "start Python in another folder: one with the sources hides it, as does PYTHONPATH",
        name=_error.name,
    ) from _error
from .config import show_config
from .gradient_sums import GradientSums
from .layer import GroupNorm
from .moments import Moments

__all__ = [
    "GradientSums",
    "GroupNorm",
    "Moments",
    "clear_pool",
    "get_num_threads",
    "group_gradient_sums",
    "group_moments",
    "group_norm",
    "group_norm_backward",
    "isa_levels",
    "num_threads",
    "reference",
    "set_num_threads",
    "show_config",
    "use_isa",
]
