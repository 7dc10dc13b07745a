"""What Linux says of the machine: the CPU quota and the cache sizes. The affinity is OpenMP's to tell.

The files are read as bytes: a cgroup may have any name, and the locale's encoding may be ASCII. What is not
understood counts as not said.
"""

import os
import re
import sys
from pathlib import Path, PurePosixPath


def cpu_quota(root: Path = Path("/")) -> int:
    """CPUs allowed by the process's cgroup and those above it, rounded up; ``sys.maxsize`` if unlimited.

    OpenMP ignores quotas: in a container limited to two CPUs of 64 it would start 64 threads that are
    throttled together. Both versions are read: ``cpu.max`` ("quota period" in microseconds) of version 2,
    and ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` of version 1 (Linux,
    Documentation/admin-guide/cgroup-v2.rst).
    """
    try:
        lines = os.fsdecode((root / "proc/self/cgroup").read_bytes()).splitlines()
    except OSError:
        return sys.maxsize
    limit = sys.maxsize
    for line in lines:
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup"
        if controllers:
            mount = mount / controllers if (mount / controllers).is_dir() else mount / "cpu"
        path = PurePosixPath(name.lstrip("/"))
        limit = min(limit, *(_limit(mount / group) for group in (path, *path.parents)))
    return limit


def _limit(group: Path) -> int:
    try:
        if (group / "cpu.max").exists():
            quota, period = map(int, (group / "cpu.max").read_bytes().split())
        else:
            quota = int((group / "cpu.cfs_quota_us").read_bytes())
            period = int((group / "cpu.cfs_period_us").read_bytes())
    except (OSError, ValueError):  # no such group, or "max"
        return sys.maxsize
    return -(-quota // period) if quota > 0 and period > 0 else sys.maxsize


def cache_bytes(level: int, root: Path = Path("/")) -> int:
    """The size of one level 2 or 3 cache in bytes; 1 MiB or 32 MiB where the system does not say.

    Read from sysfs: ``sysconf`` multiplies the level 3 cache by cores it is not shared with on some machines.
    """
    for index in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_bytes()) == level:
                size = _size((index / "size").read_bytes())
                if 1 << 12 <= size <= 1 << 40:  # some virtual machines say 0K
                    return size
        except (OSError, ValueError):
            continue
    return {2: 1, 3: 32}[level] << 20


def _size(text: bytes) -> int:
    match = re.fullmatch(rb"(\d+)([KMG]?)", text.strip())
    if match is None:
        raise ValueError(text)
    return int(match[1]) << {b"": 0, b"K": 10, b"M": 20, b"G": 30}[match[2]]
