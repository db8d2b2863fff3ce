"""Host memory that is free: of the machine, and of the container that this process is in. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from lowmem.measure.meter import MACHINE, kernel_table

# Limit, usage, statistics and in them the name of the cached files that it gives up first.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(machine: Path = MACHINE, container: Path = CGROUP) -> int | None:
    """What can be taken without swapping, within the limit of the container (cgroup v2 or v1); None where the system
    does not tell."""
    free = kernel_table(machine).get("MemAvailable")
    for limit, usage, statistics, cached in _CGROUPS:
        try:
            left = int((container / limit).read_text("ascii")) - int((container / usage).read_text("ascii"))
        except (OSError, ValueError):  # no such file, or `max`
            continue
        left += _counter(container / statistics, cached)
        free = left if free is None else min(free, left)
    return None if free is None else max(0, free)


def _counter(path: Path, name: str) -> int:
    """Of a file of lines `name 123`; 0 where it is not told."""
    try:
        found = re.search(rf"^{name} ([0-9]+)$", path.read_text("ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return 0
    return int(found[1]) if found else 0
