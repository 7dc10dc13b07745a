# The kernel for one instruction set (see setup.py): this file only gives it a name.
from kernel cimport *

include "kernel.pxi"
