"""Facts of machines that are not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.config.cards import load_card
from lowmem.core.units import GIB, MIB
from lowmem.doctor import Facts, Finding
from lowmem.measure.nvml import DeviceProcess, DriverDevice, DriverReport, Link

TORCH_2_15 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
TORCH_2_7 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")

RTX3060 = DriverDevice(
    index=0,
    uuid="GPU-aaaa",
    name="NVIDIA GeForce RTX 3060",
    capability=(8, 6),
    total_bytes=12 * GIB,
    free_bytes=12 * GIB - 300 * MIB,
    used_bytes=200 * MIB,
    reserved_bytes=100 * MIB,
    processes=(DeviceProcess(pid=77, name="Xorg", used_bytes=200 * MIB, graphics=True),),
    link=Link(generation=1, lanes=16, most_generation=4, most_lanes=16),
    display_active=False,
)
GTX1060 = replace(
    RTX3060,
    name="NVIDIA GeForce GTX 1060 6GB",
    capability=(6, 1),
    total_bytes=6 * GIB,
    free_bytes=6 * GIB - 300 * MIB,
)
GTX1660 = replace(GTX1060, name="NVIDIA GeForce GTX 1660 Ti", capability=(7, 5))

HEALTHY = Facts(
    device_asked="auto",
    precision_asked="auto",
    network="res20 (basic, width 64)",
    out=Path("runs/res20"),
    system="Linux",
    wsl=False,
    python_version="3.11.7",
    lowmem_version="0.1.0",
    cores=8,
    cpu_share=None,
    host_free_bytes=12 * GIB,
    environment={},
    torch_version="2.15.0",
    torchvision_version="0.29.2",
    torchvision_wants="torch (>=2.14.0)",
    unmet=(),
    torch_works=True,
    torch_cuda="13.2",
    arch_list=TORCH_2_15,
    threads=8,
    cuda_available=True,
    torchvision_works=True,
    kernel_works=True,
    device_uuid="aaaa",
    execution={"device": "cuda", "precision": "amp", "memory_format": "channels-last"},
    troubles={},
    driver=DriverReport(driver_version="580.65.06", cuda_version=(13, 0), devices=(RTX3060,)),
    profile=load_card("rtx3060-12g"),
    disk_folder=Path("runs"),
    disk_free_bytes=100 * GIB,
    disk_needed_bytes=400 * MIB,
    out_taken=False,
    data_there=True,
    data_words="shapes are drawn, no files needed",
)

NO_CARD = replace(
    HEALTHY,
    cuda_available=False,
    kernel_works=None,
    device_uuid=None,
    profile=None,
    execution={"device": "cpu", "precision": "fp32", "memory_format": "channels-last"},
    driver=DriverReport(missing="no NVIDIA driver here (its library NVML was not found): install the driver"),
)


def healthy(**changes: Any) -> Facts:
    return replace(HEALTHY, **changes)


def with_card(card: DriverDevice, profile: str | None = None, **changes: Any) -> Facts:
    """The healthy machine with another card; `driver_version`, `cuda_version` are those of its driver."""
    report = {key: changes.pop(key) for key in ("driver_version", "cuda_version") if key in changes}
    driver = replace(HEALTHY.driver, devices=(card,), **report)
    return replace(HEALTHY, driver=driver, profile=load_card(profile) if profile else None, **changes)


def said(check: Callable[[Facts], Finding | None], facts: Facts) -> Finding:
    """What a check that must have something to say says."""
    finding = check(facts)
    assert finding is not None
    return finding
