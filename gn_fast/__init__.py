"""Group normalization for NumPy arrays on CPUs: `group_norm`, its statistics, and how it runs.

This file is the list of what is public. The functions live in the compiled ``_core``; the same
functions in plain NumPy, to read and to test against, in `gn_fast.reference`.
"""

from . import reference
from ._core import (
    clear_pool,
    get_num_threads,
    group_moments,
    group_norm,
    group_norm_backward,
    isa_levels,
    num_threads,
    set_num_threads,
    use_isa,
)
from .config import show_config
from .moments import Moments

__all__ = [
    "Moments",
    "clear_pool",
    "get_num_threads",
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
