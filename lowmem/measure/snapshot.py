"""What a device's memory looked like at one moment, in bytes, and who holds it, in lines for people."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lowmem.core.units import MIB, format_size, name_some
from lowmem.measure.nvml import DeviceProcess, DriverDevice, DriverReport

_NAMED = 5
# The driver's sum and its list of processes differ by some MiB of its own; less than this is no holder.
_TOO_SMALL_BYTES = 32 * MIB


@dataclass(frozen=True)
class Snapshot:
    """Memory of a device now, and its peaks since the last `Meter.reset`, in bytes. None: nobody tells.

    `device_total_bytes` and `driver_reserved_bytes`: by NVML the card's whole memory, and what of it no program gets;
    by the CUDA runtime the former is without the latter, which is unknown then. On the CPU the machine's memory, and
    `device_free_bytes` what it can give without swapping; a container's own limit is not looked at.
    """

    peak_allocated_bytes: int | None = None  # tensors
    peak_reserved_bytes: int | None = None  # the caching allocator's segments
    device_used_bytes: int | None = None  # on the card, whoever uses it; on the CPU this process's peak resident memory
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    alloc_retries: int | None = None  # how often the allocator had to empty its cache to go on
    ooms: int | None = None  # how often that did not help
    process_bytes: int | None = None  # this process on the card, by the driver; on the CPU its resident memory now
    context_bytes: int | None = None  # what of it is no segment: CUDA context, loaded kernels, libraries
    others_bytes: int | None = None  # other processes
    device_total_bytes: int | None = None
    device_free_bytes: int | None = None
    driver_reserved_bytes: int | None = None
    processes: tuple[DeviceProcess, ...] = ()  # as the driver lists them, this one included; empty where it does not
    device_source: str = "none"  # who told the figures of the device: "nvml", "cuda runtime", "process" (CPU), "none"
    missing: tuple[str, ...] = ()  # a sentence for each source that could not be read, and what stands in its place


def who_holds(source: Snapshot | DriverReport, uuid: str | None = None) -> list[str]:
    """Readable lines, the biggest holder first and what cannot be told last; empty if nothing is held or known. `uuid`:
    which card of a report (a snapshot is of one); None is the only card there is."""
    if isinstance(source, DriverReport):
        device = source.device(uuid) or DriverDevice(index=0)
        source = Snapshot(processes=device.processes or (), device_used_bytes=device.used_bytes)
    if source.device_source == "process":  # the CPU: no card to hold anything of
        return []
    me, own = os.getpid(), source.reserved_bytes
    told = {process.pid: process.used_bytes for process in source.processes if process.used_bytes is not None}
    silent = [process.pid for process in source.processes if process.used_bytes is None]
    guessed = own is not None and me not in told
    if guessed and (own := (own or 0) + (source.context_bytes or 0)):
        told[me] = own
        silent = [pid for pid in silent if pid != me]
    names = {process.pid: f"{process.name} (pid {process.pid})" for process in source.processes if process.name}
    names[me] = f"this process (pid {me})"
    ordered = sorted(told.items(), key=lambda holder: (-holder[1], holder[0]))
    lines = [f"{names.get(pid, f'pid {pid}')}: {format_size(size)}" for pid, size in ordered[:_NAMED]]
    if rest := ordered[_NAMED:]:
        lines.append(f"… and {len(rest)} more: {format_size(sum(size for _, size in rest))}")
    unknown = (source.device_used_bytes or 0) - sum(told.values())
    if unknown >= _TOO_SMALL_BYTES:
        holders = name_some([names.get(pid, f"pid {pid}") for pid in silent], _NAMED) or "unknown holders"
        context = " and this process's CUDA context" if guessed and source.context_bytes is None else ""
        why = " together (the driver does not tell who how much)" if silent else " (the driver does not name them)"
        lines.append(f"{holders}{context}: {format_size(unknown)}{why}")
    return lines
