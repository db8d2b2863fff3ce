"""One `Snapshot` type in bytes for every device, and the `Meter` that takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from lowmem.measure.nvml import DeviceProcess, DriverReport


@dataclass(frozen=True)
class Snapshot:
    """Memory of a device now, and its peaks since the last `Meter.reset`, in bytes. None: nobody tells.

    `peak_allocated_bytes`: tensors; `peak_reserved_bytes`: the caching allocator's segments; `device_used_bytes`: on
    CUDA all that is in use on the card, whoever uses it; on the CPU this process's peak resident memory.

    `process_bytes`: this process on the card, by the driver; on the CPU its resident memory now. `context_bytes`: what
    of it is no segment of the allocator (CUDA context, loaded kernels, libraries). `others_bytes`: other processes.
    `alloc_retries`: how often the allocator had to empty its cache to go on; `ooms`: how often that did not help.

    `device_total_bytes` and `driver_reserved_bytes`: by NVML the card's whole memory, and what of it no program gets;
    by the CUDA runtime the former is without the latter, which is unknown then. On the CPU the machine's memory, and
    `device_free_bytes` what it can give without swapping; a container's own limit is not looked at.
    `processes`: as the driver lists them, this one included; empty as well where it does not.
    `device_source`: who told the figures of the device: "nvml", "cuda runtime", "process" (CPU) or "none".
    `missing`: a sentence for each source that could not be read, and what stands in its place.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    alloc_retries: int | None = None
    ooms: int | None = None
    process_bytes: int | None = None
    context_bytes: int | None = None
    others_bytes: int | None = None
    device_total_bytes: int | None = None
    device_free_bytes: int | None = None
    driver_reserved_bytes: int | None = None
    processes: tuple[DeviceProcess, ...] = ()
    device_source: str = "none"
    missing: tuple[str, ...] = ()


class Source(Protocol):
    """What a device's module gives the meter."""

    def reset(self) -> None: ...

    def read(self) -> Snapshot: ...

    def close(self) -> None: ...


class Meter:
    """Reads the memory of a device: `cpu` or `cuda` (torch's current one).

    The driver's library is opened once and read in a few milliseconds: cheap enough for every line of a log, not for
    every step. Where the driver does not tell what a process holds, a meter made before CUDA is first used still knows
    this process's context, from how the card filled up.

    `read_driver`: another account of the cards than this machine's driver gives.
    """

    def __init__(self, device: str, read_driver: Callable[[], DriverReport] | None = None) -> None:
        self._source: Source
        if device == "cuda":
            from lowmem.measure.cuda import CudaSource

            self._source = CudaSource(read_driver)
        else:
            from lowmem.measure.cpu import CpuSource

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
