"""The `Meter` that takes a `Snapshot` of any device, and what it reads on the CPU.

The C allocator keeps no count of tensors, so on the CPU those figures are None.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Protocol

from lowmem.measure.snapshot import Snapshot

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")


class MemorySource(Protocol):
    """What a device's module gives the meter."""

    def reset(self) -> None: ...

    def read(self) -> Snapshot: ...

    def close(self) -> None: ...


class Meter:
    """Reads the memory of a device: `cpu` or `cuda` (torch's current one).

    The driver's library is opened once and read in a few milliseconds: cheap enough for every line of a log, not for
    every step. Where the driver does not tell what a process holds, a meter made before CUDA is first used still knows
    this process's context, from how the card filled up.
    """

    def __init__(self, device: str) -> None:
        self._source: MemorySource
        if device == "cuda":
            from lowmem.measure.cuda import CudaSource

            self._source = CudaSource()
        else:
            self._source = CpuSource()

    def reset(self) -> None:
        """Starts new peaks, where the device has any to reset."""
        self._source.reset()

    def read(self) -> Snapshot:
        """The figures now and since the last reset."""
        return self._source.read()

    def close(self) -> None:
        """Lets go of the driver's library. Happens by itself when the meter is forgotten or Python leaves."""
        self._source.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class CpuSource:
    """Resident memory of this process and memory of the machine."""

    def __init__(self) -> None:
        self._peak_restarts = True

    def reset(self) -> None:
        """Starts a new resident peak where the system can (Linux); elsewhere the peak is of the whole process."""
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            self._peak_restarts = False

    def read(self) -> Snapshot:
        process, machine = _kernel_table(_STATUS), _kernel_table(_MACHINE)
        missing = []
        if "VmRSS" not in process:
            missing.append("this system has no /proc: what the process and the machine hold now is unknown")
        peak = process.get("VmHWM", _peak_of_the_process())
        if peak is None:
            missing.append("this system does not tell the resident peak")
        elif "VmHWM" not in process or not self._peak_restarts:
            missing.append("the resident peak is the whole process's, not since the last reset")
        return Snapshot(
            device_used_bytes=peak,
            process_bytes=process.get("VmRSS"),
            device_total_bytes=machine.get("MemTotal"),
            device_free_bytes=machine.get("MemAvailable"),
            device_source="none" if peak is None else "process",
            missing=tuple(missing),
        )

    def close(self) -> None:
        """Nothing is open."""


def _kernel_table(path: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of one of Linux's files, in bytes; empty where there is no such file."""
    figures = {}
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            figures[name] = int(words[0]) * 1024
    return figures


def _peak_of_the_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor_name() -> str | None:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None
