"""No test may run a convolution that corrupts memory: it would end the process, or another test much later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from lowmem.measure.outline import is_outline
from lowmem.models.resnet import unsafe_convolutions
from lowmem.remat.linear_maps import Convolution
from lowmem.remat.operation import PassState


def corrupts(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> bool:
    """Whether the library would, computed with `x` under autocast to `low`. It looks at the strides of both operands:
    of a 1x1 convolution's weight, too."""
    if torch.jit.is_tracing():
        return False  # sizes are tensors then, and no backward pass follows, which is what writes past its buffers
    real = x.device.type == "cpu" and not is_outline(x)
    if not real or low is not None or x.dtype != torch.float32 or x.dim() != 4 or not unsafe_convolutions(conv):
        return False
    return torch.channels_last in (suggest_memory_format(x), suggest_memory_format(conv.weight))


def refuse_corrupting() -> None:
    """From here on such a convolution is an error in this process, a module's own and the engine's."""
    module, engine = nn.Conv2d.forward, Convolution.forward

    def check(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> None:
        if corrupts(conv, x, low):
            raise AssertionError(f"{conv} in fp32 and channels-last corrupts memory on the CPU: take a wider net")

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        check(self, x, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return module(self, x)

    def operation(self: Convolution, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        check(self.conv, operands[0], state.low)
        return engine(self, operands, state, into)

    replaced: Any = nn.Conv2d
    replaced.forward = forward
    replaced = Convolution
    replaced.forward = operation
