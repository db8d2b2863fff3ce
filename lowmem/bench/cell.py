"""One cell, run as `python -m lowmem.bench.cell '{"arch": ...}'`; prints one JSON line."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from lowmem.bench.suite import Cell
from lowmem.config import OptimConfig
from lowmem.measure import Meter
from lowmem.models import build
from lowmem.train.step import Execution, TrainStep, make_optimizer, make_scaler


def main(cell: Cell) -> dict[str, float | int | None]:
    """Measures the cell in this process."""
    execution = Execution(cell.device, cell.precision, cell.memory_format)
    images = torch.randn(cell.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(cell.batch) % 10
    meter = Meter(cell.device)
    meter.reset()
    before = meter.read()
    model = build(cell.arch, cell.block, width=cell.width)
    model = model.to(device=cell.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    images = images.to(device=cell.device, memory_format=execution.torch_memory_format)
    labels = labels.to(cell.device)
    step = TrainStep(model, make_optimizer(model, OptimConfig(), cell.device), make_scaler(execution), execution, None)
    seconds = []
    for index in range(cell.warmup + cell.steps):
        began = time.perf_counter()
        loss_sum, _ = step(images, labels, 0.01)
        loss_sum.item()  # waits for the device
        if index >= cell.warmup:
            seconds.append(time.perf_counter() - began)
    after = meter.read()
    peak = after.peak_allocated_bytes
    if peak is None and after.device_used_bytes is not None and before.device_used_bytes is not None:
        peak = after.device_used_bytes - before.device_used_bytes
    return {
        "step_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "most_seconds": max(seconds),
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    print(json.dumps(main(Cell(**json.loads(sys.argv[1])))))
