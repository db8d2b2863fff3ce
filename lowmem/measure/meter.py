"""The `Meter` that takes a `Snapshot` of any device, and what it reads on the CPU: its allocator keeps no count of
tensors, so those figures are None."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

from lowmem.measure.nvml import CardLoad
from lowmem.measure.snapshot import Snapshot

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
MACHINE = Path("/proc/meminfo")


class Meter:
    """Reads the memory of a device: `cpu` or `cuda` (torch's current one). `reset` starts new peaks, where the device
    has any to reset; `read` gives the figures now and since the last reset, in a few milliseconds: cheap enough for
    every line of a log, not for every step; `load` tells how the card works (None: the CPU, or nobody tells); `close`
    lets go of the driver's library.

    Where the driver does not tell what a process holds, a meter made before CUDA is first used still knows this
    process's context, from how the card filled up.
    """

    reset: Callable[[], None]
    read: Callable[[], Snapshot]
    load: Callable[[], CardLoad | None]
    close: Callable[[], None]

    def __init__(self, device: str) -> None:
        if device == "cuda":
            from lowmem.measure.cuda import CudaSource

            card = CudaSource()
            self.reset, self.read, self.load, self.close = card.reset, card.read, card.load, card.close
        else:
            processor = CpuSource()
            self.reset, self.read, self.close = processor.reset, processor.read, lambda: None
            self.load = lambda: None


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
        process, machine = kernel_table(_STATUS), kernel_table(MACHINE)
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


def kernel_table(path: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of one of Linux's files, in bytes; empty where there is no such file."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^([^:\n]*):[ \t]*([0-9]+) kB$", text, re.MULTILINE)}


def _peak_of_the_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name[^:\n]*:(.*)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None
