"""The build keeps the promises whatever the compiler, the machine and the environment are, and is hardened.

That another build has the same bits is checked by `.ci/run`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import fresh_python, linux

import gn_fast

ROOT = Path(__file__).parents[1]
# Each once: cc is one of the others, if they are there.
COMPILERS = sorted({os.path.realpath(path) for path in map(shutil.which, ("cc", "gcc", "clang")) if path})
VARIABLES = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "GN_FAST_BUILD_OPENMP")

compilers = pytest.mark.parametrize("compiler", COMPILERS, ids=os.path.basename)

# What setup.py would build, and how: the compiler's and the linker's commands, and each extension's flags.
CONFIGURE = """
import json, runpy, sys
import Cython.Build
from setuptools.command.build_ext import build_ext

def tell(self):
    told = {e.name.removeprefix("gn_fast."): [e.extra_compile_args, e.extra_link_args, e.define_macros]
            for e in self.extensions}
    print("\\n" + json.dumps([self.compiler.compiler_so, self.compiler.linker_so, told]))

build_ext.build_extensions = tell
Cython.Build.cythonize = lambda extensions, **options: extensions
sys.argv = ["setup.py", "-q", "build_ext", "-b", sys.argv[1], "-t", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


class Build:
    def __init__(self, tmp_path, environment):
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        result = subprocess.run(
            [sys.executable, "-c", CONFIGURE, str(tmp_path / "build")],
            cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        self.folder, self.log = tmp_path, result.stdout
        self.compiler, self.linker, self.extensions = json.loads(result.stdout.splitlines()[-1])

    def kernels(self):
        return sorted(name.removeprefix("_kernel_") for name in self.extensions if name != "_core")

    def flags(self, name="_core"):
        return self.extensions[name][0]

    def link_flags(self, name="_core"):
        return self.extensions[name][1]

    def made(self, name, program):
        """A library of the program, with an extension's flags."""
        source, library = self.folder / "program.c", self.folder / f"{name}.so"
        source.write_text(program)
        for command in (
            [*self.compiler, "-c", source, "-o", source.with_suffix(".o"), *self.flags(name)],
            [*self.linker, source.with_suffix(".o"), "-o", library, *self.link_flags(name)],
        ):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
        return library


@pytest.fixture
def configure(tmp_path):
    return lambda **environment: Build(tmp_path, environment)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ---- arithmetic ------------------------------------------------------------------------------------------

UNSAFE = [
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffp-contract=fast",
    "-Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -ffp-contract=fast",
]
IEEE = """
#pragma GCC visibility push(default)
int nan_differs(double), negative_zero_stays(double), contracted(double, double), subnormal(double);
int nan_differs(double nan) { return nan != nan; }
int negative_zero_stays(double zero) { return 1 / (-zero - 0.0) < 0 && 1 / (0.0 - zero) > 0; }
int contracted(double a, double square) { return a * a - square != 0; }
int subnormal(double tiny) { return tiny / 2 > 0; }
"""
CHECK = """
import ctypes, math, sys
library, tiny, a = ctypes.CDLL(sys.argv[1]), float.fromhex("0x1p-1022"), 1 + 2**-30
call = lambda name, *arguments: getattr(library, name)(*map(ctypes.c_double, arguments))
assert call("nan_differs", math.nan)
assert call("negative_zero_stays", 0.0)
assert not call("contracted", a, a * a)
assert call("subnormal", tiny)
assert tiny / 2 > 0, "flush-to-zero is on"
"""


@compilers
@pytest.mark.parametrize("variable", ["CFLAGS", "LDFLAGS"])
@pytest.mark.parametrize("flags", UNSAFE)
def test_unsafe_arithmetic_is_undone(configure, compiler, variable, flags):
    """In what is computed, and in what the linker adds to an import."""
    build = configure(CC=compiler, **{variable: flags})
    for name in build.extensions:
        if name.endswith(("_core", "_v3", "baseline")):
            library = build.made(name, IEEE)
            result = subprocess.run(
                [sys.executable, "-c", CHECK, library], capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, (name, result.stderr)


@compilers
@pytest.mark.parametrize("flags", ["-Ofast", "-ffinite-math-only"])
def test_unsafe_arithmetic_is_refused(compiler, flags):
    """Where something else than setup.py builds."""
    command = [compiler, f"-I{ROOT}/src", "-fsyntax-only", *flags.split(), "-x", "c"]
    for header in ("ieee.h", "kernel/vector.h"):
        file = ROOT / "src" / header
        result = subprocess.run([*command, file], capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert "gn_fast needs IEEE 754 arithmetic" in result.stderr


def test_an_import_leaves_the_floating_point_mode():
    code = """
tiny = float.fromhex("0x1p-1022")
import gn_fast
assert tiny / 2 > 0 and tiny / 4 * 4 == tiny"""
    result = fresh_python(code)
    assert result.returncode == 0, result.stderr


# ---- the compiler is asked -------------------------------------------------------------------------------

X86, ARM = ["x86_64_v2", "x86_64_v3", "x86_64_v4"], ["baseline"]
OTHER = "-U__x86_64__ -U__i386__ -U__aarch64__"
TARGETS = {
    "x86-64": (["-D__x86_64__"], X86),
    "arm64": (["-D__aarch64__"], ARM),
    "i386": (["-D__i386__"], ARM),
    "universal2": (["-D__x86_64__", "-D__aarch64__"], ARM),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_instruction_sets_are_those_the_compiler_compiles_for(configure, tmp_path, target, machine):
    """Not those of the machine, which is another in a cross-build, and has others in a 32-bit Python."""
    slices, levels = TARGETS[target]
    compiler = script(tmp_path / "cc", "\n".join(f'cc {OTHER} {one} "$@" || exit 1' for one in slices))
    site = tmp_path / "sitecustomize.py"
    site.write_text(f"import platform\nplatform.machine = lambda: {machine!r}\n")
    build = configure(CC=compiler, PYTHONPATH=str(tmp_path), GN_FAST_BUILD_OPENMP="0")
    assert build.kernels() == levels
    assert (["GN_BASELINE", None] in build.extensions["_core"][2]) == (levels == ARM)
    assert ("-mfpmath=sse" in build.flags(f"_kernel_{levels[0]}")) == (target == "i386")
    assert ("-march=x86-64-v2" in build.flags(f"_kernel_{levels[0]}")) == (target == "x86-64")


KEG_ONLY = """
last=
for argument in "$@"; do
    case $argument in -fopenmp) test "$last" = -Xpreprocessor || exit 1 ;; esac
    last=$argument
done
exec gcc "$@"
"""


@linux
def test_openmp_is_found_where_the_linker_is_told(configure, tmp_path):
    """As with Apple's compiler and Homebrew's libomp, which is in a folder of its own."""
    build = configure(CC=script(tmp_path / "cc", KEG_ONLY))
    assert "-lomp" not in build.link_flags()
    assert "built without OpenMP" in build.log
    keg = tmp_path / "keg"
    keg.mkdir()
    (keg / "omp.c").write_text("int omp_get_max_threads(void) { return 1; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "omp.c", "-o", "libomp.so"], cwd=keg, check=True)
    build = configure(CC=script(tmp_path / "cc", KEG_ONLY), LDFLAGS=f"-L{keg}")
    assert "-lomp" in build.link_flags()
    assert "built without OpenMP" not in build.log


@linux
def test_openmp_is_found_beside_a_sanitizer(configure):
    plain = configure()
    assert configure(CFLAGS="-fsanitize=undefined").link_flags() == plain.link_flags()
    assert configure(CFLAGS="-fsanitize=address").link_flags() == plain.link_flags()


def test_a_build_without_openmp_says_so(configure):
    build = configure(GN_FAST_BUILD_OPENMP="0")
    assert "gn_fast is built without OpenMP" in build.log
    assert not any("openmp" in flag for flag in build.flags())


def test_kernels_have_no_openmp(configure):
    build = configure()
    for name in build.extensions.keys() - {"_core"}:
        assert not any("omp" in flag for flag in build.flags(name) + build.link_flags(name))


# ---- distributions ---------------------------------------------------------------------------------------


def test_a_source_distribution_needs_no_compiler(tmp_path):
    tree = tmp_path / "tree"
    built = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=built)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment | {"CC": "/no/compiler", "PYTHONPATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    name = result.stdout.split()[-1]
    assert name == f"gn_fast-{gn_fast.__version__}.tar.gz"
    with tarfile.open(tmp_path / name) as archive:
        listed = {member.partition("/")[2] for member in archive.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "src").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "gn_fast/__init__.py", "gn_fast/_core.pyi"} <= listed
    assert not {path for path in listed if path.endswith((".c", ".so"))} - sources - {"benchmarks/limit.c"}


# ---- hardening -------------------------------------------------------------------------------------------

MODULES = sorted(Path(gn_fast.__file__).parent.glob("_*.so"))
modules = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.partition(".")[0])


def readelf(module, *options):
    environment = os.environ | {"LC_ALL": "C"}
    command = ["readelf", "--wide", *options, module]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@linux
def test_every_module_is_looked_at():
    assert {path.name.partition(".")[0] for path in MODULES} >= {
        "_core", *(f"_kernel_{level}" for level in gn_fast.isa_levels()),
    }  # fmt: skip


@linux
@modules
def test_what_the_loader_writes_is_read_only_afterwards(module):
    assert "GNU_RELRO" in readelf(module, "--program-headers")
    assert re.search(r"\(FLAGS\).*BIND_NOW", readelf(module, "--dynamic"))


@linux
@modules
def test_no_memory_can_be_both_written_and_executed(module):
    headers = readelf(module, "--program-headers")
    permissions = re.findall(r"^  (LOAD|GNU_STACK) +(?:0x\w+ +){5}([RWE ]{3})", headers, re.MULTILINE)
    assert {name for name, _ in permissions} == {"LOAD", "GNU_STACK"}
    for name, flags in permissions:
        assert not ("W" in flags and "E" in flags), (name, flags)


@linux
@modules
def test_only_what_python_looks_for_is_visible(module):
    symbols = [line.split() for line in readelf(module, "--dyn-syms").splitlines()]
    defined = [fields[7] for fields in symbols if len(fields) > 7 and fields[4] in ("GLOBAL", "WEAK")
               and fields[6] != "UND"]  # fmt: skip
    assert defined == [f"PyInit_{module.name.partition('.')[0]}"]


@linux
@modules
def test_the_stack_is_guarded_but_in_the_kernels(module):
    """Where a guard would cost as much as a run of values."""
    assert ("__stack_chk_fail" in readelf(module, "--dyn-syms")) == module.name.startswith("_core")


@linux
def test_fortified_once(configure):
    for name, (flags, _, _) in configure().extensions.items():
        assert flags.count("-D_FORTIFY_SOURCE=2") == 1, name
    for name, (flags, _, _) in configure(CPPFLAGS="-D_FORTIFY_SOURCE=1").extensions.items():
        assert "-D_FORTIFY_SOURCE=2" not in flags, name
