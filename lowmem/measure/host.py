"""Host memory that is free: of the machine, and of the container that this process is in. No torch here."""

from __future__ import annotations

from pathlib import Path

from lowmem.measure.meter import MACHINE, kernel_table

_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(machine: Path = MACHINE, container: Path = CGROUP) -> int | None:
    """What can be taken without swapping, within the limit of the container (cgroup v2 or v1); None where the system
    does not tell."""
    free = kernel_table(machine).get("MemAvailable")
    for limit, usage in _CGROUPS:
        try:
            left = int((container / limit).read_text("ascii")) - int((container / usage).read_text("ascii"))
        except (OSError, ValueError):  # no such file, or `max`
            continue
        free = left if free is None else min(free, left)
    return None if free is None else max(0, free)
