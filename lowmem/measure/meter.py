"""One `Snapshot` type in bytes for every device, and the `Meter` that takes it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """Bytes since the last `Meter.reset`. None: this device does not tell.

    `peak_allocated_bytes`: tensors; `peak_reserved_bytes`: the caching allocator's segments; `device_used_bytes`: on
    CUDA all that is in use on the card, whoever uses it; on the CPU this process's peak resident memory.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None


class Meter:
    """Reads the memory of a device: `cpu` or `cuda`."""

    def __init__(self, device: str) -> None:
        self._source = importlib.import_module(f"lowmem.measure.{'cuda' if device == 'cuda' else 'cpu'}")

    def reset(self) -> None:
        """Starts new peaks, where the device has any to reset."""
        self._source.reset()

    def read(self) -> Snapshot:
        """The figures since the last reset."""
        return Snapshot(*self._source.read())
