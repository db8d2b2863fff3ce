"""Memory of the current CUDA device, from the caching allocator, the driver (NVML) and the CUDA runtime.

The figures of the card come from NVML where it answers, else from `torch.cuda.mem_get_info`, else from nobody; a
`Snapshot` says which. The context's size is this process's share by NVML less the allocator's segments. Windows and
containers do not tell that share; then it is how much fuller the card got since before CUDA was first used, others'
changes counted in. The CUDA runtime cannot tell it: asking it for the free memory is what makes the context.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lowmem.measure.nvml import CardLoad, Driver, DriverDevice, DriverReport
from lowmem.measure.snapshot import Snapshot


def read_allocator() -> Snapshot:
    """torch's caching allocator on the current device, and nothing else; the counts are since the start of the process.
    All zero as long as CUDA was not used."""
    stats = torch.cuda.memory_stats()
    return Snapshot(
        peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
        peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
        allocated_bytes=stats.get("allocated_bytes.all.current", 0),
        reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        alloc_retries=stats.get("num_alloc_retries", 0),
        ooms=stats.get("num_ooms", 0),
    )


def torch_build() -> dict[str, Any]:
    """Which torch this is, under the names of `CardFacts`; no CUDA context is made."""
    # get_arch_list() is empty on older releases where no card is found; the build itself is asked then.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    archs = torch.cuda.get_arch_list() or flags.split()
    return {"torch_version": torch.__version__, "torch_cuda": torch.version.cuda, "arch_list": archs}


def cap_allocator(cap_bytes: int) -> bool:
    """Makes a larger card behave like a smaller one: lets the caching allocator of the current CUDA device hold at most
    `cap_bytes` in segments, without the context and what libraries allocate on their own (pytorch/pytorch#107667).
    Whether there was anything to cap: on the CPU, and for a cap that the card does not reach, there is not."""
    if not torch.cuda.is_available():
        return False
    share = cap_bytes / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if not 0 < share < 1:
        return False
    torch.cuda.set_per_process_memory_fraction(share)
    return True


def device_uuid() -> str | None:
    """The current device's UUID as NVML writes it (`GPU-…`); None if this torch does not tell it."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def free_and_total_bytes() -> tuple[int, int] | None:
    """By the CUDA runtime, on the current device; makes a context if there is none. None if it does not answer."""
    try:
        return torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # the latter: torch without CUDA
        return None


class CudaSource:
    """The current device, asked again and again; the driver's library stays open until `close`."""

    def __init__(self) -> None:
        self._driver = Driver()
        self.reset, self.close = torch.cuda.reset_peak_memory_stats, self._driver.close
        # Only a report from before the context can tell its size where the driver does not name processes.
        self._before = None if torch.cuda.is_initialized() else self._driver.read()

    def load(self) -> CardLoad | None:
        return self._driver.load(device_uuid())

    def read(self) -> Snapshot:
        uuid = device_uuid()
        return describe(
            read_allocator(),
            self._driver.read(uuid),
            uuid=uuid,
            pid=os.getpid(),
            before=self._before,
            runtime=free_and_total_bytes,
        )


def describe(
    allocator: Snapshot,
    report: DriverReport,
    *,
    uuid: str | None,
    pid: int,
    before: DriverReport | None,
    runtime: Callable[[], tuple[int, int] | None],
) -> Snapshot:
    """Puts the sources together. `allocator`: see `read_allocator`; `before`: the driver's report from before CUDA was
    first used, if there is one; `runtime`: (free, total) in bytes by the CUDA runtime, called only where NVML fails."""
    device = report.device(uuid)
    if device is None or device.used_bytes is None:
        why, told = _why_not(report, device, uuid), runtime()
        if told is None:
            silent = "the CUDA runtime does not answer either: how full the card is, is unknown"
            return replace(allocator, missing=(why, silent))
        free, total = told
        return replace(
            allocator,
            device_used_bytes=total - free,
            device_total_bytes=total,
            device_free_bytes=free,
            device_source="cuda runtime",
            missing=(f"{why}; the CUDA runtime tells how full the card is, but not who fills it",),
        )
    reserved = allocator.reserved_bytes or 0
    whole = process = next((one.used_bytes for one in device.processes or () if one.pid == pid), None)
    was = before.device(uuid) if before is not None else None
    if process is None and was is not None and was.used_bytes is not None:
        whole = device.used_bytes - was.used_bytes  # what others took or gave back in between is counted in
    context = whole - reserved if whole is not None and whole >= reserved else None
    own = process if process is not None or context is None else reserved + context
    missing: tuple[str, ...] = ()
    if process is None:
        instead = "the context is how much fuller the card got since before CUDA was used"
        if context is None:
            instead = "the context and the other processes' share are unknown"
        missing = (f"NVML does not tell what this process holds (as on Windows and in containers): {instead}",)
    return replace(
        allocator,
        device_used_bytes=device.used_bytes,
        process_bytes=process,
        context_bytes=context,
        others_bytes=None if own is None else max(0, device.used_bytes - own),
        device_total_bytes=device.total_bytes,
        device_free_bytes=device.free_bytes,
        driver_reserved_bytes=device.reserved_bytes,
        processes=device.processes or (),
        device_source="nvml",
        missing=missing,
    )


def _why_not(report: DriverReport, device: DriverDevice | None, uuid: str | None) -> str:
    if report.missing is not None:
        return report.missing
    if device is not None:
        return f"NVML says nothing of this card's memory ({device.trouble or 'not supported'})"
    if uuid is None:
        return "this torch does not tell the card's UUID, and NVML lists several cards"
    troubled = ", ".join(f"card {one.index}: {one.trouble}" for one in report.devices if one.trouble)
    return f"NVML does not list the card {uuid}" + (f" ({troubled})" if troubled else "")
