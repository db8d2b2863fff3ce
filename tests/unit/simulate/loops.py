"""Training loops of small networks, real and fake, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem.models.resnet import Bottleneck, ResNet
from lowmem.plan import Schedule
from lowmem.remat import apply_plan, decompose
from lowmem.remat.stage import Stage
from lowmem.simulate import Loop, empty_copy

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

    def model(self, *, fake: bool) -> ResNet:
        model = ResNet(self.block, self.layout, width=self.width, residual=self.residual)
        if fake:
            return empty_copy(model, self.memory_format)  # type: ignore[return-value]
        return model.to(memory_format=self.memory_format)

    def build(self, *, fake: bool) -> Loop:
        """Inside a fake mode, if `fake`."""
        model = self.model(fake=fake)
        run: nn.Module = model
        if self.schedule is not None:
            run = apply_plan(model, self.schedule(decompose(model)), library_norm=self.library_norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
        batches = [self._batch() for _ in range(self.accumulation)]
        return Loop(run, model, optimizer, batches, self.low)

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(self.batch, 3, 32, 32).contiguous(memory_format=self.memory_format)
        return x, torch.zeros(self.batch, dtype=torch.long)
