# The kernel for one instruction set (see setup.py): this file only gives it a name.
from job cimport *

include "kernel.pxi"
