"""No test may run a convolution that corrupts memory: it would end the process, or another test much later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from lowmem.measure.outline import is_outline
from lowmem.models.resnet import unsafe_convolutions
from lowmem.remat import kernels


def corrupts(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> bool:
    """Whether the library would, computed with `x` under autocast to `low`. It looks at the strides of both operands:
    of a 1x1 convolution's weight, too."""
    real = x.device.type == "cpu" and not is_outline(x)
    if not real or low is not None or x.dtype != torch.float32 or not unsafe_convolutions(conv):
        return False
    return torch.channels_last in (suggest_memory_format(x), suggest_memory_format(conv.weight))


def refuse_corrupting() -> None:
    """From here on such a convolution is an error in this process, a module's own and the engine's."""
    module, engine = nn.Conv2d.forward, kernels.convolve

    def check(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> None:
        if corrupts(conv, x, low):
            raise AssertionError(f"{conv} in fp32 and channels-last corrupts memory on the CPU: take a wider net")

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        check(self, x, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return module(self, x)

    def convolve(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> Tensor:
        check(conv, x, low)
        return engine(conv, x, low)

    replaced: Any = nn.Conv2d
    replaced.forward, kernels.convolve = forward, convolve
