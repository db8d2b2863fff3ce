"""Seconds in which the host launches a step, against the seconds that the step takes: where the first is nearly the
second, the card waits for the host, and a plan costs what its operations cost to launch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from lowmem.config.optimization import OptimConfig
from lowmem.models import build
from lowmem.plan.record import Plan
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.trial import PLAIN, PLANNED, executed

_ROUNDS = 3


def look(
    device: str, arch: str, block: str, width: int, batches: list[int], plan: dict[str, Any], precisions: list[str]
) -> dict[str, Any]:
    """By way, precision and batch. `plan`: what it keeps and repeats, at every batch (it is not held to its budget)."""
    found: dict[str, Any] = {}
    for precision in precisions:
        execution = Execution(device, precision, "channels-last" if precision == "amp" else "contiguous")
        model = build(arch, block, width=width)
        model.to(device=device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
        model.train()
        for way in (PLAIN, PLANNED):
            run = executed(model, way, Plan.from_json(plan) if way == PLANNED else None)
            for batch in batches:
                found[f"{way}, {precision}, batch {batch}"] = _timed(model, run, execution, batch)
    return found


def _timed(model: nn.Module, run: nn.Module, execution: Execution, batch: int) -> dict[str, float]:
    device = execution.device
    optimizer = make_optimizer(model, OptimConfig(), device)
    step = TrainStep(run, optimizer, make_scaler(execution), execution, None)
    images = torch.randn(batch, 3, 32, 32).to(device).contiguous(memory_format=execution.torch_memory_format)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    launched, whole = [], []
    for number in range(2 + _ROUNDS):
        wait()
        began = time.perf_counter()
        step(images, labels, 0.01)
        after_launch = time.perf_counter()
        wait()
        if number >= 2:
            launched.append(after_launch - began)
            whole.append(time.perf_counter() - began)
    host, seconds = statistics.median(launched), statistics.median(whole)
    return {"launch_seconds": host, "step_seconds": seconds, "share": host / seconds}
