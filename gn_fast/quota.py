"""How many CPUs the cgroup's quota allows; the affinity is OpenMP's to tell.

OpenMP ignores quotas: in a container limited to two CPUs of 64 it would start 64 threads that are throttled
together. Linux only; elsewhere there is no limit.
"""

import math
import sys
from pathlib import Path, PurePosixPath


def cpu_quota(root: Path = Path("/")) -> int:
    """CPUs allowed by the process's cgroup and those above it, rounded up; ``sys.maxsize`` if unlimited.

    Both versions are read: ``cpu.max`` ("quota period" in us) of version 2, ``cpu.cfs_quota_us`` and
    ``cpu.cfs_period_us`` of version 1 (Linux, Documentation/admin-guide/cgroup-v2.rst).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return sys.maxsize
    limit = sys.maxsize
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers.split(",")[0]
        if controllers:
            mount = next((m for m in (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu") if m.is_dir()), mount)
        path = PurePosixPath(name.lstrip("/"))
        for group in (path, *path.parents):
            limit = min(limit, _limit_of(mount / group))
    return limit


def _limit_of(group: Path) -> int:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return sys.maxsize
