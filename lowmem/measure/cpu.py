"""Memory of this process on the CPU. The C allocator keeps no count of tensors, so those two figures are None."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset() -> None:
    """Starts a new resident peak where the system can (Linux); elsewhere the peak is of the whole process."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return


def read() -> tuple[None, None, int | None]:
    """(None, None, peak resident bytes or None)."""
    return None, None, _peak_resident_bytes()


def _peak_resident_bytes() -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
