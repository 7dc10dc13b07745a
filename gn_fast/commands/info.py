"""`gn-fast info`: what gn_fast found on this machine and chose, and what it can work with is installed."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import gn_fast
from gn_fast.config import print_config

OPTIONAL = ("ml_dtypes", "rich", "matplotlib", "torch", "dask", "jax", "onnxruntime", "threadpoolctl")


def add_command(commands: Any) -> None:
    """Add `info` to the subparsers of the command line."""
    parser = commands.add_parser(
        "info",
        help="tell the configuration: instruction sets, threads, versions, what is installed",
        description="Tell what gn_fast found on this machine and chose, as a report of a fault needs it.",
        epilog="example:\n  gn-fast info --json",
    )
    parser.add_argument("--json", action="store_true", help="as JSON; what is not there is null")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = information()
    if arguments.json:
        print(json.dumps(config, indent=2))
    else:
        print_config(config)


def information() -> dict[str, dict[str, Any]]:
    """What `gn_fast.show_config` tells, with the system, the OpenMP library and what is installed besides."""
    config = gn_fast.show_config("dicts")
    config["versions"]["python"] = platform.python_version()
    config["threads"]["openmp library"] = _openmp_library()
    system = {
        "platform": platform.platform(),
        "processor": _processor(),
        "folder": str(Path(gn_fast.__file__).parent),
    }
    return {**config, "system": system, "installed": {name: _version(name) for name in OPTIONAL}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _openmp_library() -> list[str] | None:
    """The OpenMP libraries that the process has loaded, where the system lists its mappings."""
    mapped = os.fsdecode(_content("/proc/self/maps"))
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp)[^/\n]*)$", mapped, re.MULTILINE))) or None


def _processor() -> str | None:
    name = re.search(rb"^model name\s*:\s*(.*)$", _content("/proc/cpuinfo"), re.MULTILINE)
    return os.fsdecode(name[1]) if name else platform.processor() or None


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
