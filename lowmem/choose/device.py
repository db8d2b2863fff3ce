"""The device at hand: what it is called, what of its memory is free, what a process costs before its first tensor."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lowmem.cards import Card, find_card
from lowmem.choose.budget import ASSUMED_CONTEXT_BYTES
from lowmem.choose.calibration import Calibration, Identity
from lowmem.choose.describe import describe_card, measured_rates
from lowmem.environment import cpu_model
from lowmem.measure.nvml import DriverDevice, DriverReport, read_driver
from lowmem.units import MIB

# What a context can be; anything else is somebody else's memory coming or going in the same moment.
_LEAST_CONTEXT_BYTES, _MOST_CONTEXT_BYTES = 32 * MIB, 2048 * MIB


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of the current CUDA device. `free_bytes` counts what torch has cached as free; the context exists.
    `context_bytes` is None if it could not be measured."""

    name: str
    total_bytes: int
    free_bytes: int
    context_bytes: int | None


def identity(device: str, report: DriverReport | None = None) -> Identity:
    """What figures measured on the device are filed under."""
    if device == "cuda":
        driver = (report or read_driver()).driver_version
        library = torch.backends.cudnn.version()
        return Identity(
            device="cuda",
            name=torch.cuda.get_device_name(),
            driver=driver,
            torch=torch.__version__,
            library=None if library is None else str(library),
        )
    return Identity(
        device="cpu",
        name=cpu_model() or "processor",
        driver=None,
        torch=torch.__version__,
        library=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )


def device_memory(calibration: Calibration) -> DeviceMemory:
    """Of the current CUDA device. Makes the context if there is none, and measures it unless the calibration has it."""
    key = ("context",)
    before = None if torch.cuda.is_initialized() else _device_of(read_driver())
    _warm_up()
    report = read_driver()
    context = calibration.size_bytes(key)
    if context is None:
        context = _context_bytes(before, _device_of(report))
        if context is not None:
            calibration.put_size(key, context)
            calibration.save()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(
        name=torch.cuda.get_device_name(),
        total_bytes=total,
        free_bytes=free + torch.cuda.memory_reserved(),
        context_bytes=context,
    )


def card_at_hand(calibration: Calibration) -> Card:
    """The profile of the current CUDA device; one made from its driver and short measurements if none is shipped."""
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties().total_memory
    known = find_card(name, total)
    if known is not None:
        return known
    rates = measured_rates("cuda", torch.float16, calibration)
    calibration.save()
    torch.cuda.empty_cache()
    device = _device_of(read_driver())
    link = device.link if device is not None else None
    context = calibration.size_bytes(("context",))
    return describe_card(
        name,
        memory_bytes=total,
        capability=torch.cuda.get_device_capability(),
        context_bytes=ASSUMED_CONTEXT_BYTES if context is None else context,
        rates=rates,
        link=(None, None) if link is None else (link.most_generation, link.most_lanes),
    )


def _device_of(report: DriverReport) -> DriverDevice | None:
    """The driver's entry of torch's current device, by UUID; with one card of each, that one."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    found = None if uuid is None else report.device(str(uuid))
    if found is None and len(report.devices) == 1 and torch.cuda.device_count() == 1:
        return report.devices[0]
    return found


def _context_bytes(before: DriverDevice | None, after: DriverDevice | None) -> int | None:
    """By this process's own figure, less what torch has reserved; where the driver does not tell it (Windows,
    containers), by what the whole card has more in use than before."""
    if after is None:
        return None
    reserved = torch.cuda.memory_reserved()
    own = [process.used_bytes for process in after.processes or () if process.pid == os.getpid()]
    candidates = [] if not own or own[0] is None else [own[0] - reserved]
    if before is not None and before.used_bytes is not None and after.used_bytes is not None:
        candidates.append(after.used_bytes - before.used_bytes - reserved)
    plausible = [size for size in candidates if _LEAST_CONTEXT_BYTES <= size <= _MOST_CONTEXT_BYTES]
    return plausible[0] if plausible else None


def _warm_up() -> None:
    """A small step: kernels are loaded when they are first used, and are a part of what a process takes."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    net = net.append(nn.Linear(16 * 64, 10)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    F.cross_entropy(net(torch.randn(8, 3, 8, 8, device="cuda")), torch.zeros(8, dtype=torch.int64).cuda()).backward()
    optimizer.step()
    torch.cuda.synchronize()
