"""The meter and the clock on a real card. Run with `python -m pytest -m gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest
import torch

from lowmem.core.units import GIB, MIB
from lowmem.measure import Meter, read_driver, who_holds
from lowmem.measure.cuda import device_uuid, free_and_total_bytes, read_allocator
from lowmem.measure.timing import time_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

_BEGIN = """
import dataclasses, json, torch
from lowmem.measure import Meter
meter = Meter("cuda")
meter.reset()
"""
_END = """
found = dataclasses.asdict(meter.read())
meter.close()
print(json.dumps(found))
"""


def _in_a_clean_process(program: str) -> dict[str, Any]:
    """The snapshot after the program: a process in which CUDA was not used before the meter was made."""
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + program + _END], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_clean_process_on_the_card() -> None:
    found = _in_a_clean_process(
        "x = torch.ones(64 << 20, dtype=torch.uint8, device='cuda')\n"
        "gone = torch.ones(32 << 20, dtype=torch.uint8, device='cuda')\n"
        "del gone\n"
        "torch.cuda.synchronize()\n"
    )
    assert found["allocated_bytes"] == 64 * MIB
    assert found["peak_allocated_bytes"] == 96 * MIB
    assert found["reserved_bytes"] == found["peak_reserved_bytes"] == 96 * MIB
    assert (found["alloc_retries"], found["ooms"]) == (0, 0)
    assert found["device_used_bytes"] >= 96 * MIB
    assert found["device_free_bytes"] + found["device_used_bytes"] <= found["device_total_bytes"]
    if found["device_source"] == "nvml":
        assert found["context_bytes"] is not None, found["missing"]
        assert 50 * MIB < found["context_bytes"] < 1536 * MIB
        assert found["others_bytes"] is not None
    else:
        assert found["missing"]


def test_a_capped_allocator_stays_within_its_cap_on_a_larger_card() -> None:
    found = _in_a_clean_process(
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "torch.cuda.set_per_process_memory_fraction((1 << 30) / total)\n"
        "x = torch.ones(512 << 20, dtype=torch.uint8, device='cuda')\n"
        "refused = False\n"
        "try:\n"
        "    torch.ones(768 << 20, dtype=torch.uint8, device='cuda')\n"
        "except torch.cuda.OutOfMemoryError:\n"
        "    refused = True\n"
        "assert refused\n"
    )
    assert found["allocated_bytes"] == 512 * MIB
    assert found["reserved_bytes"] <= found["peak_reserved_bytes"] <= GIB
    assert found["ooms"] == 1
    # The card itself is no smaller: an emulated card is emulated by its cap alone.
    assert found["device_total_bytes"] > GIB
    if found["process_bytes"] is not None:
        assert found["process_bytes"] - found["context_bytes"] <= GIB


def test_the_driver_and_torch_mean_the_same_card() -> None:
    report = read_driver()
    if report.missing is not None:
        pytest.skip(report.missing)
    torch.ones(1, device="cuda")
    device = report.device(device_uuid())
    if device is None:
        pytest.skip("the driver does not list torch's card: a MIG slice")
    assert device.name == torch.cuda.get_device_name()
    assert device.capability == torch.cuda.get_device_capability()
    usable = (device.total_bytes or 0) - (device.reserved_bytes or 0)
    runtime = free_and_total_bytes()
    assert runtime is not None
    assert usable == pytest.approx(runtime[1], rel=0.03)
    assert who_holds(report, device.uuid) or (device.used_bytes or 0) < 64 * MIB


def test_the_context_by_the_drivers_list_of_processes() -> None:
    torch.ones(1, device="cuda")
    device = read_driver().device(device_uuid())
    processes = (device.processes if device is not None else None) or ()
    own = next((process.used_bytes for process in processes if process.pid == os.getpid()), None)
    if own is None:
        pytest.skip("the driver does not tell what this process holds (a container, or Windows)")
    assert 50 * MIB < own - (read_allocator().reserved_bytes or 0) < 1536 * MIB


def test_a_known_tensor_is_what_the_allocator_gained() -> None:
    with closing(Meter("cuda")) as meter:
        before = meter.read()
        held = torch.ones(48 * MIB, dtype=torch.uint8, device="cuda")
        after = meter.read()
    assert before.allocated_bytes is not None
    assert after.allocated_bytes is not None
    assert after.allocated_bytes - before.allocated_bytes == held.numel()
    assert after.device_source in ("nvml", "cuda runtime")


def test_a_matrix_product_takes_time() -> None:
    left = torch.randn(1024, 1024, device="cuda")
    timing = time_calls(lambda: left @ left, "cuda", rounds=3)
    assert 0 < timing.least_seconds <= timing.median_seconds
    assert timing.inner >= 1


def test_what_a_call_waits_for() -> None:
    """Hundreds of kernels of microseconds wait for the host; a product of large matrices keeps it waiting."""
    few, many = torch.randn(1, device="cuda"), torch.randn(4096, 4096, device="cuda")
    assert time_calls(lambda: few + few, "cuda", rounds=3).bound_by_host
    assert not time_calls(lambda: many @ many, "cuda", rounds=3).bound_by_host


def test_the_driver_tells_how_the_card_works() -> None:
    """Where it tells anything at all: a container may forbid it."""
    with closing(Meter("cuda")) as meter:
        matrix = torch.randn(4096, 4096, device="cuda")
        for _ in range(50):
            matrix = torch.tanh(matrix @ matrix)
        load = meter.load()
        if load is None or load.clock_mhz is None:
            pytest.skip("NVML does not tell")
        assert load.most_clock_mhz is None or 0 < load.clock_mhz <= 1.2 * load.most_clock_mhz
        assert load.temperature_c is None or 0 < load.temperature_c < 120
        assert load.power_watts is None or 0 < load.power_watts < 2000
        assert load.utilization_pct is None or 0 <= load.utilization_pct <= 100
