"""Training steps of small networks, real and without data, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem.config.optimization import OptimConfig
from lowmem.models.resnet import Bottleneck, ResNet
from lowmem.plan.policy import Schedule
from lowmem.remat import apply_plan, decompose
from lowmem.remat.stage import Stage
from lowmem.simulate import StepRun, empty_copy
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler

MakeSchedule = Callable[[Sequence[Stage]], Schedule]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`schedule` None: plain autograd."""

    schedule: MakeSchedule | None = None
    block: Any = Bottleneck
    residual: bool = True
    layout: tuple[int, int, int, int] = (1, 2, 1, 1)
    width: int = 16
    batch: int = 16
    accumulation: int = 1
    low: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    library_norm: bool = False
    optim: OptimConfig = OptimConfig()  # noqa: RUF009 (frozen)

    def model(self, *, fake: bool) -> ResNet:
        model = ResNet(self.block, self.layout, width=self.width, residual=self.residual)
        if fake:
            return empty_copy(model, self.memory_format)  # type: ignore[return-value]
        return model.to(memory_format=self.memory_format)

    def build(self, *, fake: bool = True) -> StepRun:
        """Inside an `OutlineMode`, if `fake`."""
        model = self.model(fake=fake)
        run: nn.Module = model
        if self.schedule is not None:
            run = apply_plan(model, self.schedule(decompose(model)), library_norm=self.library_norm)
        layout = "channels-last" if self.memory_format is torch.channels_last else "contiguous"
        execution = Execution("cpu", "fp32" if self.low is None else "amp", layout)
        optimizer = make_optimizer(model, self.optim, "cpu")
        step = TrainStep(run, optimizer, make_scaler(execution), execution, self.batch)
        images = torch.randn(self.batch * self.accumulation, 3, 32, 32).contiguous(memory_format=self.memory_format)
        return StepRun(step=step, images=images, labels=torch.zeros(len(images), dtype=torch.long))
