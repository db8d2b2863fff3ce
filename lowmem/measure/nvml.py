"""The driver's own account of the cards: memory, who holds it, the link in use, how they work. The only module that
imports `pynvml`.

Every figure may be missing (no driver, no permission, a laptop that does not tell). Nothing here makes a CUDA context.

Known limits: inside a container the driver counts processes as the host does, so that this process may not be found in
its lists; on Windows (WDDM) it lists them without their bytes; a MIG slice has no entry of its own.
"""

from __future__ import annotations

import weakref
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import PureWindowsPath
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeviceProcess:
    pid: int
    name: str | None = None
    used_bytes: int | None = None  # None where the driver does not tell (Windows)
    graphics: bool = False


@dataclass(frozen=True, kw_only=True)
class Link:
    """The PCIe link: what is in use now (idle cards slow it down), and the most that card and slot can do together."""

    generation: int | None = None
    lanes: int | None = None
    most_generation: int | None = None
    most_lanes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CardLoad:
    """How a card works at one moment. Clocks are of its multiprocessors; `most_clock_mhz`: as it is set, else as it
    could; `utilization_pct`: of the last second or less, with any kernel running; `throttle_reasons`: NVML's bits."""

    temperature_c: int | None = None
    power_watts: float | None = None
    clock_mhz: int | None = None
    most_clock_mhz: int | None = None
    utilization_pct: int | None = None
    throttle_reasons: int | None = None


# The bits that say that a card would run faster if it could (nvml.h, nvmlClocksEventReasons); others are idleness and
# clocks that somebody set.
THROTTLE_REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


def throttled_by(bits: int | None) -> list[str]:
    """What holds a card back, in words; empty if nothing does, or nobody tells."""
    return [words for bit, words in THROTTLE_REASONS.items() if (bits or 0) & bit]


@dataclass(frozen=True, kw_only=True)
class DriverDevice:
    """A card as the driver sees it; total = free + used + reserved."""

    index: int
    uuid: str | None = None  # `GPU-…`, what torch calls it too: NVML's indices ignore CUDA_VISIBLE_DEVICES
    name: str | None = None
    capability: tuple[int, int] | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    reserved_bytes: int | None = None  # what driver and firmware keep; part of `used_bytes` where an old one is silent
    processes: tuple[DeviceProcess, ...] | None = None
    link: Link | None = None
    display_active: bool | None = None
    trouble: str | None = None  # why the driver says nothing of this card ("GPU is lost")


@dataclass(frozen=True, kw_only=True)
class DriverReport:
    """What the driver says. `missing`: why it says nothing, in words; then there are no devices. `installed`: there is
    one at all, as far as this process can tell."""

    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None  # the newest CUDA the driver can run
    devices: tuple[DriverDevice, ...] = ()
    missing: str | None = None
    installed: bool = True

    def device(self, uuid: str | None) -> DriverDevice | None:
        """By its UUID, with or without the leading `GPU-`, since NVML's order is not CUDA's; without one only if there
        is but one card to be meant. None if the driver does not list it."""
        if uuid is None:
            return self.devices[0] if len(self.devices) == 1 else None
        return next((card for card in self.devices if card.uuid and _same_card(card.uuid, uuid)), None)


def _same_card(left: str, right: str) -> bool:
    return left.removeprefix("GPU-").lower() == right.removeprefix("GPU-").lower()


def read_driver(library: Any | None = None) -> DriverReport:
    """Asks the driver once and lets go of it. `library`: as of `Driver`."""
    with closing(Driver(library)) as driver:
        return driver.read()


class Driver:
    """The driver's library kept open, for repeated reading; opening takes tens of milliseconds, reading a few. Never
    raises. `library`: the `pynvml` module, or a stand-in with its functions; None imports it."""

    def __init__(self, library: Any | None = None) -> None:
        self._library = library
        self.missing: str | None = None
        self._installed = True
        try:
            if library is None:
                import pynvml

                self._library = pynvml
            self._library.nvmlInit()  # type: ignore[union-attr]
        except ImportError:
            self.missing, self._installed = _NO_PACKAGE, False
        except Exception as error:
            kind = type(error).__name__
            self.missing = _REASONS.get(kind, f"the NVIDIA driver does not answer (NVML: {error})")
            self._installed = kind != "NVMLError_LibraryNotFound"
        else:
            self._closing = weakref.finalize(self, _ask, self._library, "nvmlShutdown")

    def close(self) -> None:
        """Lets go of the library, as Python does when it is forgotten; a later `read` says so in `missing`."""
        if self.missing is None:
            self._closing()
            self.missing = "the driver is no longer asked: its meter was closed"

    def load(self, uuid: str | None) -> CardLoad | None:
        """How the card of `uuid` (as NVML writes it) works now; None where that cannot be asked. Some calls of the
        driver, which wait for nothing that the card does."""
        library = self._library
        handle = None if self.missing else _ask(library, "nvmlDeviceGetHandleByUUID", uuid)
        if handle is None:
            return None
        power, rates = (
            _ask(library, "nvmlDeviceGetPowerUsage", handle),
            _ask(library, "nvmlDeviceGetUtilizationRates", handle),
        )
        most = _ask(library, "nvmlDeviceGetApplicationsClock", handle, _SM)
        return CardLoad(
            temperature_c=_ask(library, "nvmlDeviceGetTemperature", handle, _CORE),
            power_watts=None if power is None else power / 1000,
            clock_mhz=_ask(library, "nvmlDeviceGetClockInfo", handle, _SM),
            most_clock_mhz=most or _ask(library, "nvmlDeviceGetMaxClockInfo", handle, _SM),
            utilization_pct=None if rates is None else rates.gpu,
            throttle_reasons=_ask(library, "nvmlDeviceGetCurrentClocksThrottleReasons", handle),
        )

    def read(self, uuid: str | None = None) -> DriverReport:
        """The cards as they are now: all of them, or only that of `uuid` (and those that do not tell theirs), which
        asks nothing more of the others."""
        if self.missing is not None:
            return DriverReport(missing=self.missing, installed=self._installed)
        library = self._library
        count = _ask(library, "nvmlDeviceGetCount") or 0
        newest = _ask(library, "nvmlSystemGetCudaDriverVersion")
        devices = (_device(library, index, uuid) for index in range(count))
        return DriverReport(
            driver_version=_text(_ask(library, "nvmlSystemGetDriverVersion")),
            cuda_version=(newest // 1000, newest % 1000 // 10) if newest else None,
            devices=tuple(device for device in devices if device is not None),
            missing=None if count else "the NVIDIA driver answers, but lists no card",
        )


_SM, _CORE = 1, 0  # of NVML's clocks, and of its thermometers
_NO_PACKAGE = "the driver cannot be asked without the package nvidia-ml-py (module pynvml): pip install nvidia-ml-py"
_REASONS = {
    "NVMLError_LibraryNotFound": "no NVIDIA driver here (its library NVML was not found): install the driver; in a "
    "container, start it with access to the card",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not running: restart the machine, or load it "
    "(Linux: modprobe nvidia)",
    "NVMLError_NoPermission": "this user may not ask the NVIDIA driver (NVML: insufficient permissions): on Linux give "
    "the user access to /dev/nvidiactl",
    "NVMLError_LibRmVersionMismatch": "the NVIDIA driver was updated while the old one is still running: restart the "
    "machine",
}


def _ask(library: Any, function: str, *arguments: Any, **named: Any) -> Any:
    """What the function returns, None if it fails in any way. NVMLError is not all: the package raises an error of its
    own for a driver older than itself, lacks functions when it is old, and may fail at a name that is no UTF-8."""
    try:
        return getattr(library, function)(*arguments, **named)
    except Exception:
        return None


def _text(value: Any) -> str | None:
    """Old versions of the package return bytes."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return str(value) if value else None


def _device(library: Any, index: int, wanted: str | None) -> DriverDevice | None:
    """None: it is another card than the wanted one."""
    try:
        handle = library.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # one card fell off the bus: the others are still there
        return DriverDevice(index=index, trouble=str(error) or type(error).__name__)
    uuid = _text(_ask(library, "nvmlDeviceGetUUID", handle))
    if wanted is not None and uuid is not None and not _same_card(uuid, wanted):
        return None
    memory = _memory(library, handle)
    capability = _ask(library, "nvmlDeviceGetCudaComputeCapability", handle)
    display = _ask(library, "nvmlDeviceGetDisplayActive", handle)
    link = {name: _ask(library, function, handle) or None for name, function in _LINK.items()}
    return DriverDevice(
        index=index,
        uuid=uuid,
        name=_text(_ask(library, "nvmlDeviceGetName", handle)),
        capability=(int(capability[0]), int(capability[1])) if capability else None,
        processes=_processes(library, handle, memory.get("total_bytes")),
        link=Link(**link) if any(link.values()) else None,
        display_active=None if display is None else bool(display),
        **memory,
    )


_LINK = {
    "generation": "nvmlDeviceGetCurrPcieLinkGeneration",
    "lanes": "nvmlDeviceGetCurrPcieLinkWidth",
    "most_generation": "nvmlDeviceGetMaxPcieLinkGeneration",
    "most_lanes": "nvmlDeviceGetMaxPcieLinkWidth",
}


def _memory(library: Any, handle: Any) -> dict[str, Any]:
    """The card's figures in bytes that are told. What is used is taken by difference: NVIDIA's manual says that version
    2 counts the reserved memory as used, the drivers seen in the field do not (rust-nvml/nvml-wrapper#57: 912 MB by
    version 1, 7.8 MB by version 2)."""
    version = getattr(library, "nvmlMemory_v2", None)
    figures = _ask(library, "nvmlDeviceGetMemoryInfo", handle, version=version) if version else None
    reserved = {} if figures is None else {"reserved_bytes": int(figures.reserved)}
    figures = figures or _ask(library, "nvmlDeviceGetMemoryInfo", handle)  # a driver or package without version 2
    if figures is None:
        return {}
    total, free = int(figures.total), int(figures.free)
    used = max(0, total - free - sum(reserved.values()))
    return {"total_bytes": total, "free_bytes": free, "used_bytes": used, **reserved}


def _processes(library: Any, handle: Any, total_bytes: int | None) -> tuple[DeviceProcess, ...] | None:
    """One entry a process, though a program that computes and draws is in both lists with the same bytes."""
    found: dict[int, DeviceProcess] = {}
    told = False
    for kind in ("Compute", "Graphics"):
        entries = _ask(library, f"nvmlDeviceGet{kind}RunningProcesses", handle)
        if entries is None:  # the plain name asks for the newest form, which an old driver refuses
            entries = _ask(library, f"nvmlDeviceGet{kind}RunningProcesses_v2", handle)
        told = told or entries is not None
        for entry in entries or ():
            pid, used = int(entry.pid), entry.usedGpuMemory
            if used is not None and used > (total_bytes or 2**62):  # "not available" is the largest 64-bit number
                used = None
            known = found.get(pid) or DeviceProcess(pid=pid, name=_program(library, pid))
            most = max((size for size in (known.used_bytes, used) if size is not None), default=None)
            found[pid] = replace(known, used_bytes=most, graphics=kind == "Graphics")
    ordered = tuple(sorted(found.values(), key=lambda process: (-(process.used_bytes or 0), process.pid)))
    return ordered if told else None


def _program(library: Any, pid: int) -> str | None:
    """The program alone: no folders (they name users) and no arguments."""
    path = _text(_ask(library, "nvmlSystemGetProcessName", pid))
    return PureWindowsPath(path.partition(" -")[0]).name or None if path else None
