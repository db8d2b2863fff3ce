"""What a step works on, in one line."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowmem.simulate import StepShape


def shape_of(
    model: nn.Module, batch: int, precision: str = "fp32", layout: str = "contiguous", **more: Any
) -> StepShape:
    """A step of one micro-batch on CIFAR's pictures."""
    values = {"image_shape": (3, 32, 32), "batch": batch, "micro_batch": batch, **more}
    return StepShape(model=model, precision=precision, memory_format=layout, **values)
