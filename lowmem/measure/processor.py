"""The processor's cores: those this process may use, and how many of them are busy with something else."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_STAT = Path("/proc/stat")


def usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def busy_cores(seconds: float = 0.25) -> float | None:
    """Of the cores that this process may use, so many were busy over a moment in which this process sleeps: with other
    programs, with its own children, or taken by the host of a virtual machine. None where the system does not tell
    (it is read from Linux's /proc/stat)."""
    before = _ticks()
    time.sleep(seconds if before else 0)
    after = _ticks()
    shares = [
        1 - (after[core][1] - idle) / (after[core][0] - total)
        for core, (total, idle) in before.items()
        if core in after and after[core][0] > total
    ]
    return sum(shares) if shares else None


def _ticks() -> dict[int, tuple[int, int]]:
    """Core -> ticks in all, and idle or waiting for a disk, since the system started; empty if it is not told."""
    found = {}
    with suppress(OSError, ValueError, IndexError):
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 0))
        for line in _STAT.read_text(encoding="ascii").splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in allowed:
                ticks = list(map(int, fields[:8]))  # what follows, guests', is part of the first
                found[int(name[3:])] = sum(ticks), ticks[3] + ticks[4]
    return found
