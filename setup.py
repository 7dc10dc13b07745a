"""The build: an extension for each instruction set from one kernel source, and the entry points."""

import os
import platform
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# The table of instruction sets, weakest first. GCC stays at 256 bits on v4 unless it is told otherwise, and
# unless tuned for this clears arrays of 128 bytes by `rep stos`, which takes as long as some hundred values.
TUNE = "-mtune=skylake-avx512"
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA = {
        "x86_64_v2": ["-march=x86-64-v2", TUNE],
        "x86_64_v3": ["-march=x86-64-v3", TUNE],
        "x86_64_v4": ["-march=x86-64-v4", TUNE, "-mprefer-vector-width=512"],
    }
else:
    ISA = {"baseline": []}

# The same bits from every compiler and level: no contraction to FMA but where the source says so, and none of
# -ffast-math. Traps are respected: nothing is computed that is not asked for. errno, which nobody reads, is
# given up.
FLAGS = [
    "-O3",
    "-g0",  # it takes a third of the time and most of the size of a kernel
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unused-function",  # of fused types not every combination is asked for
]

# A kernel's inline functions are inlined whatever the compiler thinks of their size: a loop that calls one is
# scalar (the gradient of silu took 20 ns a value, and takes 2.6).
KERNEL = [("CYTHON_INLINE", "__inline__ __attribute__((__always_inline__, __unused__))")]

# GCC's own: short loops that copy stay loops. As calls of memcpy they would send values through the stack
# that are in registers (an affine of float32 took 1.4 times as long).
COPIES = ["-fno-tree-loop-distribute-patterns"]

OPENMP = [  # compile and link flags to try, in order
    (["-fopenmp"], ["-fopenmp"]),
    (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),  # Apple's clang with Homebrew's libomp
]

PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


class BuildExt(build_ext):
    """Compiles in parallel: entry points with OpenMP and kernels with COPIES, where the compiler has them."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        compile_flags, link_flags = self.openmp()
        copies = COPIES if self.builds("int main(void) { return 0; }\n", COPIES) else []
        for extension in self.extensions:
            if extension.name == "gn_fast._core":  # the kernels know nothing of threads
                extension.extra_compile_args += compile_flags
                extension.extra_link_args += link_flags
            else:
                extension.extra_compile_args += copies
        super().build_extensions()

    def openmp(self):
        if os.environ.get("GN_FAST_BUILD_OPENMP") != "0":
            for compile_flags, link_flags in OPENMP:
                if self.builds(PROBE, compile_flags, link_flags):
                    return compile_flags, link_flags
        print("gn_fast is built without OpenMP: it will run on one thread")
        return [], []

    def builds(self, program, compile_flags, link_flags=()):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=list(compile_flags))
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=list(link_flags))
            except (CompileError, LinkError):
                return False
            return True


def extension(name, source, flags=(), macros=()):
    return Extension(
        f"gn_fast.{name}",
        [f"src/{source}.pyx"],
        include_dirs=["src", "src/kernel", numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            *macros,
        ],
        extra_compile_args=[*FLAGS, *flags],
        depends=sorted(str(p) for p in Path("src").rglob("*") if p.suffix in (".pxi", ".pxd", ".h")),
    )


setup(
    ext_modules=cythonize(
        [extension("_core", "_core")]
        + [
            extension(f"_kernel_{level}", f"kernel/_kernel_{level}", flags, KERNEL)
            for level, flags in ISA.items()
        ],
        include_path=["src", "src/kernel"],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "autotestdict": False,
        },
        build_dir="build",
    ),
    cmdclass={"build_ext": BuildExt},
)
