"""A scripted NVML: the functions of `pynvml` that are used, answering from a table, failing with real exceptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

from lowmem.core.units import MIB

NOT_AVAILABLE = 2**64 - 1


@dataclass
class Card:
    """What the driver would say of a card; an exception in place of a figure is raised."""

    uuid: Any = "GPU-11111111-2222-3333-4444-555555555555"
    name: Any = "NVIDIA GeForce GTX 1060 6GB"
    capability: Any = (6, 1)
    total: Any = 6144 * MIB
    free: Any = 5500 * MIB
    reserved: Any = 78 * MIB
    reserved_is_used: bool = False  # as NVIDIA's manual has it; the drivers seen in the field do otherwise
    compute: Any = ()
    graphics: Any = ()
    link: Any = (1, 16, 3, 16)
    display: Any = 1
    temperature: Any = 61
    power: Any = 95_500  # milliwatts
    clock: Any = 1835
    set_clock: Any = None  # not supported, as on most
    most_clock: Any = 1911
    utilization: Any = 97
    throttle: Any = 0
    handle: Any = None


@dataclass
class ScriptedNvml:
    """Stands in for the module `pynvml`."""

    cards: Sequence[Card] = ()
    names: dict[int, Any] = field(default_factory=dict)
    driver: Any = "535.183.01"
    cuda: Any = 12020
    init: Exception | None = None
    v2: bool = True
    v3_processes: bool = True
    opened: int = 0
    closed: int = 0
    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def nvmlInit(self) -> None:
        _raise(self.init)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> Any:
        return _raise(self.driver)

    def nvmlSystemGetCudaDriverVersion(self) -> Any:
        return _raise(self.cuda)

    def nvmlDeviceGetCount(self) -> int:
        assert self.opened > self.closed, "asked while closed"
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        _raise(self.cards[index].handle)
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        found = [card for card in self.cards if card.uuid == uuid]
        if not found:
            raise pynvml.NVMLError_NotFound
        return found[0]

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:
        return SimpleNamespace(gpu=_raise(card.utilization), memory=40)

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
        if version and not self.v2:
            raise pynvml.NVMLError_FunctionNotFound
        total, free = _raise(card.total), _raise(card.free)
        if version:
            used = total - free - (0 if card.reserved_is_used else card.reserved)
            return SimpleNamespace(version=version, total=total, free=free, reserved=card.reserved, used=used)
        return SimpleNamespace(total=total, free=free, used=total - free)

    def nvmlSystemGetProcessName(self, pid: int) -> Any:
        if pid not in self.names:
            raise pynvml.NVMLError_NotFound
        return _raise(self.names[pid])

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> Any:
        return self._newest(card.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> Any:
        return self._newest(card.graphics)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, card: Card) -> Any:
        return _entries(card.compute)

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, card: Card) -> Any:
        return _entries(card.graphics)

    def _newest(self, processes: Any) -> Any:
        if not self.v3_processes:  # raised by the real package for the functions without a version; no NVMLError
            raise pynvml.NVMLLibraryMismatchError("Unversioned function called")
        return _entries(processes)


def _raise(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def _entries(processes: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in _raise(processes)]


def _figure(name: str, part: int | None = None) -> Callable[[ScriptedNvml, Card], Any]:
    def answer(self: ScriptedNvml, card: Card, which: int | None = None) -> Any:
        value = _raise(getattr(card, name))
        if value is None:
            raise pynvml.NVMLError_NotSupported
        return value if part is None else _raise(value[part])

    return answer


for _function, _answer in {
    "nvmlDeviceGetUUID": _figure("uuid"),
    "nvmlDeviceGetName": _figure("name"),
    "nvmlDeviceGetCudaComputeCapability": _figure("capability"),
    "nvmlDeviceGetDisplayActive": _figure("display"),
    "nvmlDeviceGetTemperature": _figure("temperature"),
    "nvmlDeviceGetPowerUsage": _figure("power"),
    "nvmlDeviceGetClockInfo": _figure("clock"),
    "nvmlDeviceGetApplicationsClock": _figure("set_clock"),
    "nvmlDeviceGetMaxClockInfo": _figure("most_clock"),
    "nvmlDeviceGetCurrentClocksThrottleReasons": _figure("throttle"),
    "nvmlDeviceGetCurrPcieLinkGeneration": _figure("link", 0),
    "nvmlDeviceGetCurrPcieLinkWidth": _figure("link", 1),
    "nvmlDeviceGetMaxPcieLinkGeneration": _figure("link", 2),
    "nvmlDeviceGetMaxPcieLinkWidth": _figure("link", 3),
}.items():
    setattr(ScriptedNvml, _function, _answer)
