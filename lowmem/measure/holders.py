"""Who holds a card's memory, in lines for people: for out-of-memory messages and `lowmem doctor`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lowmem.core.units import MIB, format_size
from lowmem.measure.meter import Snapshot
from lowmem.measure.nvml import DeviceProcess, DriverReport

_NAMED = 5
# The driver's sum and its list of processes differ by some MiB of its own; less than this is no holder.
_TOO_SMALL_BYTES = 32 * MIB


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
    if uuid is not None:
        device = report.device(uuid)
    else:
        device = report.devices[0] if len(report.devices) == 1 else None
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
