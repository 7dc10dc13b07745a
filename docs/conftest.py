"""The examples of the pages are run by pytest; those of an extra that is not installed are skipped."""

from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = ["*.py"]  # scripts
EXTRAS = {"torch.md": ("torch",), "dask.md": ("dask", "distributed", "zarr", "xarray")}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        missing = [name for name in EXTRAS.get(item.path.name, ()) if not find_spec(name)]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"{item.path.name} needs {', '.join(missing)}"))
