"""The driver's own account of the cards: memory, who holds it, the link in use. The only module that imports `pynvml`.

Every figure may be missing (no driver, no permission, a laptop that does not tell): unknown is None, and why nothing is
known at all stands in `DriverReport.missing`. Nothing here makes a CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceProcess:
    """A process that holds memory of a card. `used_bytes` is None where the driver does not tell (Windows)."""

    pid: int
    name: str | None = None
    used_bytes: int | None = None
    graphics: bool = False


@dataclass(frozen=True, kw_only=True)
class Link:
    """The PCIe link: what is in use now (idle cards slow it down), and the most that card and slot can do together."""

    generation: int | None = None
    lanes: int | None = None
    most_generation: int | None = None
    most_lanes: int | None = None


@dataclass(frozen=True, kw_only=True)
class DriverDevice:
    """A card as the driver sees it. `used_bytes` is without `reserved_bytes`, what driver and firmware keep to
    themselves; total = free + used + reserved. `uuid` is what torch calls it too (`GPU-…`): NVML's indices ignore
    CUDA_VISIBLE_DEVICES."""

    index: int
    uuid: str | None = None
    name: str | None = None
    capability: tuple[int, int] | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    reserved_bytes: int | None = None
    processes: tuple[DeviceProcess, ...] | None = None
    link: Link | None = None
    display_active: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DriverReport:
    """What the driver says. `missing`: why it says nothing, in words; then there are no devices."""

    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None  # the newest CUDA the driver can run
    devices: tuple[DriverDevice, ...] = ()
    missing: str | None = None

    def device(self, uuid: str) -> DriverDevice | None:
        """By its UUID, with or without the leading `GPU-`; None if the driver does not list it."""
        wanted = uuid.removeprefix("GPU-").lower()
        for device in self.devices:
            if device.uuid is not None and device.uuid.removeprefix("GPU-").lower() == wanted:
                return device
        return None
