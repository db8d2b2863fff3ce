"""What a device's memory looked like at one moment, in bytes, and who holds it, in lines for people."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lowmem.core.units import MIB, format_size
from lowmem.measure.nvml import DeviceProcess, DriverReport

_NAMED = 5
# The driver's sum and its list of processes differ by some MiB of its own; less than this is no holder.
_TOO_SMALL_BYTES = 32 * MIB


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


@dataclass(frozen=True)
class _Account:
    """What programs use of a card, and by whom. `own`: what this process knows of itself, with or without context."""

    processes: tuple[DeviceProcess, ...] = ()
    used_bytes: int | None = None
    own_bytes: int | None = None
    own_has_context: bool = True


def who_holds(source: Snapshot | DriverReport, uuid: str | None = None) -> list[str]:
    """Readable lines, the biggest holder first and what cannot be told last; empty if nothing is held or known.

    `uuid`: which card of a report (a snapshot is of one); None is the only card there is.
    """
    account = _of_snapshot(source) if isinstance(source, Snapshot) else _of_report(source, uuid)
    told = {process.pid: process for process in account.processes if process.used_bytes is not None}
    silent = [process for process in account.processes if process.used_bytes is None]
    guessed = account.own_bytes is not None and os.getpid() not in told
    if guessed and account.own_bytes:
        told[os.getpid()] = DeviceProcess(pid=os.getpid(), used_bytes=account.own_bytes)
        silent = [process for process in silent if process.pid != os.getpid()]
    ordered = sorted(told.values(), key=lambda process: (-(process.used_bytes or 0), process.pid))
    lines = [f"{_name(process)}: {format_size(process.used_bytes)}" for process in ordered[:_NAMED]]
    if rest := ordered[_NAMED:]:
        lines.append(f"… and {len(rest)} more: {format_size(sum(process.used_bytes or 0 for process in rest))}")
    unknown = (account.used_bytes or 0) - sum(process.used_bytes or 0 for process in ordered)
    if unknown >= _TOO_SMALL_BYTES:
        lines.append(_unknown(silent, unknown, own_context=guessed and not account.own_has_context))
    return lines


def _of_snapshot(snapshot: Snapshot) -> _Account:
    if snapshot.device_source == "process":  # the CPU: no card to hold anything of
        return _Account()
    own = snapshot.reserved_bytes
    if own is not None and snapshot.context_bytes is not None:
        return _Account(snapshot.processes, snapshot.device_used_bytes, own + snapshot.context_bytes)
    return _Account(snapshot.processes, snapshot.device_used_bytes, own, own_has_context=False)


def _of_report(report: DriverReport, uuid: str | None) -> _Account:
    device = report.device(uuid)
    return _Account() if device is None else _Account(device.processes or (), device.used_bytes)


def _name(process: DeviceProcess) -> str:
    if process.pid == os.getpid():
        return f"this process (pid {process.pid})"
    return f"{process.name} (pid {process.pid})" if process.name else f"pid {process.pid}"


def _unknown(silent: list[DeviceProcess], unknown_bytes: int, *, own_context: bool) -> str:
    """`own_context`: this process's own CUDA context is among it."""
    context = " and this process's CUDA context" if own_context else ""
    if not silent:
        return f"unknown holders{context}: {format_size(unknown_bytes)} (the driver does not name them)"
    names = ", ".join(_name(process) for process in silent[:_NAMED])
    more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
    return f"{names}{more}{context}: {format_size(unknown_bytes)} together (the driver does not tell who how much)"
