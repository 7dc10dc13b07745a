"""Whether files are fit for a release: python .ci/check_distributions.py FILE...

A source distribution has every file of the repository and nothing that was generated. A wheel has the
modules of its platform, the OpenMP library that they are linked with, and the licences of both; it has no
more, and is small.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1_500_000  # bytes of a wheel
METADATA = {"PKG-INFO", "setup.cfg"}  # of setuptools, with gn_fast.egg-info
X86 = ["_core", "_kernel_x86_64_v2", "_kernel_x86_64_v3", "_kernel_x86_64_v4"]
OTHERS = ["_core", "_kernel_baseline"]
OPENMP = {
    "linux": r"gn_fast\.libs/libgomp-[0-9a-f]+\.so[.0-9]*",
    "macosx": r"gn_fast/\.dylibs/libomp\.dylib",
}


def tracked():
    """The repository's files, and what is about to become one."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if Path(ROOT, name).exists()}


def licences():
    return [ROOT / "LICENSE", *sorted((ROOT / "LICENSES").iterdir())]


def wrong_in_sdist(path):
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    files = {name for name in files - METADATA if not name.startswith("gn_fast.egg-info/")}
    repository = tracked()
    yield from (f"{name} is missing" for name in sorted(repository - files))
    yield from (f"{name} is not of the repository" for name in sorted(files - repository))


def wrong_in_wheel(path):
    name, version, _, _, platform = path.stem.split("-")
    system = "macosx" if platform.startswith("macosx") else "linux"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path) as archive:
        files = {each for each in archive.namelist() if not each.endswith("/")}
        for licence in licences():
            kept = f"{info}/licenses/{licence.relative_to(ROOT)}"
            if kept not in files or archive.read(kept) != licence.read_bytes():
                yield f"{kept} is missing or another text"
        if system == "linux" and not any(each.startswith(f"{info}/sboms/") for each in files):
            yield "nothing says where the OpenMP library came from"
    if path.stat().st_size > LARGEST:
        yield f"it has {path.stat().st_size} bytes, which is more than {LARGEST}"
    if not re.match(r"(manylinux|musllinux|macosx)_\d+_\d+_", platform):
        yield f"{platform} is the platform of this machine only: it is not repaired"
    files = {each for each in files if not each.startswith(f"{info}/")}
    libraries = {each for each in files if re.fullmatch(OPENMP[system], each)}
    if len(libraries) != 1:
        yield f"there should be one OpenMP library, not {sorted(libraries)}"
    modules = {each for each in files if re.fullmatch(r"gn_fast/_\w+\.cpython-[\w-]+\.so", each)}
    names = sorted(each.removeprefix("gn_fast/").partition(".")[0] for each in modules)
    expected = X86 if platform.endswith("x86_64") else OTHERS
    if names != expected:
        yield f"the modules should be {expected}, not {names}"
    sources = {
        str(each.relative_to(ROOT))
        for each in (ROOT / "gn_fast").rglob("*")
        if each.suffix in (".py", ".pyi") or each.name == "py.typed"
    }
    yield from (f"{each} is missing" for each in sorted(sources - files))
    yield from (f"{each} does not belong here" for each in sorted(files - sources - modules - libraries))


def main(paths):
    failed = not paths
    for path in map(Path, paths):
        wrong = list((wrong_in_wheel if path.suffix == ".whl" else wrong_in_sdist)(path))
        print(path.name, path.stat().st_size, "bytes:", "as it should be" if not wrong else "")
        print(*(f"  {each}\n" for each in wrong), sep="", end="")
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
