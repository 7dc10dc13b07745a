"""The build: the entry points, and from one kernel source an extension for each instruction set.

What is built depends on what the compiler compiles for and knows. It is asked when extensions are built, not
before: neither metadata nor a source distribution needs one.
"""

import os
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# The table of instruction sets, weakest first, by the macro of what is compiled for: the machine that
# compiles may be another, or run a 32-bit Python. GCC stays at 256 bits on v4 unless told otherwise, and
# unless tuned for this clears arrays of 128 bytes by `rep stos`, which takes as long as some hundred
# values.
TUNE = "-mtune=skylake-avx512"
ISA = {
    "__x86_64__": {
        "x86_64_v2": ["-march=x86-64-v2", TUNE],
        "x86_64_v3": ["-march=x86-64-v3", TUNE],
        "x86_64_v4": ["-march=x86-64-v4", TUNE, "-mprefer-vector-width=512"],
    },
    "__i386__": {"baseline": ["-msse2", "-mfpmath=sse"]},  # x87 would round otherwise
}
OTHERS = {"baseline": []}  # also for several at once, as in macOS's universal2
KERNELS = sorted({level for levels in (*ISA.values(), OTHERS) for level in levels})

# The same bits from every compiler and level: no contraction to FMA but where the source says so, and none of
# -ffast-math. Traps are respected: nothing is computed that is not asked for. errno, which nobody reads, is
# given up. These come after CFLAGS and undo what it says of that; -fno-fast-math stands before what it sets.
FLAGS = [
    "-O3",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-g0",  # it takes a third of the time and most of the size of a kernel
    "-Wall",
    "-Wno-unused-function",  # of fused types not every combination is asked for
]

# CFLAGS reaches the linker too, which for -ffast-math adds code that sets flush-to-zero in who imports us.
LINK_FLAGS = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]

# A kernel's inline functions are inlined whatever the compiler thinks of their size: a loop that calls one is
# scalar (the gradient of silu took 20 ns a value, and takes 2.6).
KERNEL = [("CYTHON_INLINE", "__inline__ __attribute__((__always_inline__, __unused__))")]

# Compile and link flags, each where compiler and linker know it. -mdaz-ftz adds that code by itself (GCC 13).
ALL_KNOWN = [
    ([], ["-mno-daz-ftz"]),
    (["-fvisibility=hidden"], []),
    (["-fno-asynchronous-unwind-tables"], []),  # nothing is thrown through C; they are 19 KB of a wheel
    ([], ["-Wl,-z,relro,-z,now"]),  # the table of other libraries' functions is read-only
    ([], ["-Wl,-z,noexecstack"]),
]
# The entry points have no loops: -O2 is an eighth smaller and takes 0.02 us of a call (-Os 0.15).
CORE_KNOWN = [(["-fstack-protector-strong"], []), (["-O2"], [])]

# GCC's own: short loops that copy stay loops. As calls of memcpy they would send values through the stack
# that are in registers (an affine of float32 took 1.4 times as long). No guards on the stack: functions that
# are called for each run of values have arrays, of fixed places; guards took 5% of a gradient of float16.
# Loops that are not unswitched are as fast (a masked gradient takes 1.15 on v4) and 45 KB less of a wheel.
KERNEL_KNOWN = [
    (["-fno-tree-loop-distribute-patterns"], []),
    (["-fno-stack-protector"], []),
    (["-fno-unswitch-loops"], []),
]

FORTIFIED = (["-D_FORTIFY_SOURCE=2"], [])  # where the compiler or CFLAGS has no level yet

OPENMP = [  # compile and link flags to try, in order
    (["-fopenmp"], ["-fopenmp"]),
    (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),  # Apple's clang with Homebrew's libomp
]

PROBE = "extern int gn_probe;\nint gn_probe = 1;\n"
OPENMP_PROBE = """
#ifndef _OPENMP
#error OpenMP is off
#endif
#include <omp.h>
int gn_probe(void);
int gn_probe(void) { return omp_get_max_threads(); }
"""


class BuildExt(build_ext):
    """Asks the compiler, then compiles in parallel."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        levels = next((levels for macro, levels in ISA.items() if self.defines(macro)), OTHERS)
        kernels = {f"gn_fast._kernel_{level}": flags for level, flags in levels.items()}
        self.extensions = [e for e in self.extensions if e.name == "gn_fast._core" or e.name in kernels]
        common = self.known(ALL_KNOWN) + ([] if self.defines("_FORTIFY_SOURCE") else [FORTIFIED])
        in_core, in_kernels = [*self.known(CORE_KNOWN), self.openmp()], self.known(KERNEL_KNOWN)
        for extension in self.extensions:
            if extension.name in kernels:  # which know nothing of threads
                flags = [*common, (kernels[extension.name], []), *in_kernels]
            else:
                flags = [*common, *in_core]
                if "baseline" in levels:
                    extension.define_macros.append(("GN_BASELINE", None))
            for compile_flags, link_flags in flags:
                extension.extra_compile_args += compile_flags
                extension.extra_link_args += link_flags
        for extension, translated in zip(self.extensions, self.translated(), strict=True):
            extension.sources, extension.depends = translated.sources, translated.depends
        super().build_extensions()

    def translated(self):
        return cythonize(
            self.extensions,
            include_path=["src", "src/kernel"],
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": False,
                "autotestdict": False,
                "freethreading_compatible": True,  # src/threads.pxi tells why
            },
            build_dir="build",
        )

    def openmp(self):
        if os.environ.get("GN_FAST_BUILD_OPENMP") != "0":
            for compile_flags, link_flags in OPENMP:
                if self.builds(compile_flags, link_flags, OPENMP_PROBE):
                    return compile_flags, link_flags
        print("gn_fast is built without OpenMP: it will run on one thread")
        return [], []

    def known(self, flags):
        return [each for each in flags if self.builds(*each)]

    def defines(self, macro):
        return self.builds(program=f"#ifndef {macro}\n#error {macro} is not defined\n#endif\n{PROBE}")

    def builds(self, compile_flags=(), link_flags=(), program=PROBE):
        """Whether a program is compiled and linked as the extensions are."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile(
                    [str(source)], folder, extra_postargs=[*FLAGS, *compile_flags]
                )
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.so")), extra_postargs=[*LINK_FLAGS, *link_flags]
                )
            except (CompileError, LinkError):
                return False
            return True


def extension(name, source, macros=()):
    return Extension(
        f"gn_fast.{name}",
        [f"src/{source}.pyx"],
        include_dirs=["src", "src/kernel", numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            *macros,
        ],
        extra_compile_args=list(FLAGS),
        extra_link_args=list(LINK_FLAGS),
        depends=sorted(str(p) for p in Path("src").rglob("*") if p.suffix in (".pxi", ".pxd", ".h")),
    )


setup(
    ext_modules=[
        extension("_core", "_core"),
        *(extension(f"_kernel_{level}", f"kernel/_kernel_{level}", KERNEL) for level in KERNELS),
    ],
    cmdclass={"build_ext": BuildExt},
)
