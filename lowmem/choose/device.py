"""The device at hand: what it is called, what of its memory is free, what a process costs before its first tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lowmem.cards import Card, find_card
from lowmem.choose.budget import ASSUMED_CONTEXT_BYTES
from lowmem.choose.calibration import Calibration, Identity
from lowmem.choose.describe import describe_card, measured_rates
from lowmem.environment import cpu_model
from lowmem.measure import Meter
from lowmem.measure.cuda import device_uuid, find_device
from lowmem.measure.nvml import DriverReport, read_driver
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
    """Of the current CUDA device. Makes the context, which is measured best before CUDA was first used; where it cannot
    be told now, it is what the calibration remembers."""
    key = ("context",)
    with Meter("cuda") as meter:
        _warm_up()
        torch.cuda.empty_cache()
        seen = meter.read()
    context = seen.context_bytes
    if context is not None and _LEAST_CONTEXT_BYTES <= context <= _MOST_CONTEXT_BYTES:
        calibration.put_size(key, context)
        calibration.save()
    else:
        context = calibration.size_bytes(key)
    free, total = seen.device_free_bytes, seen.device_total_bytes
    if free is None or total is None:
        free, total = torch.cuda.mem_get_info()
    return DeviceMemory(
        name=torch.cuda.get_device_name(),
        total_bytes=total,
        free_bytes=free + (seen.reserved_bytes or 0),
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
    device = find_device(read_driver(), device_uuid())
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


def _warm_up() -> None:
    """A small step: kernels are loaded when they are first used, and are a part of what a process takes."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    net = net.append(nn.Linear(16 * 64, 10)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    F.cross_entropy(net(torch.randn(8, 3, 8, 8, device="cuda")), torch.zeros(8, dtype=torch.int64).cuda()).backward()
    optimizer.step()
    torch.cuda.synchronize()
