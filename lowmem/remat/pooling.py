"""Max pooling, by the kernels that autograd itself calls.

Autograd keeps operand and indices; the backward reads the indices alone, and of the operand its shape and layout. So
this one keeps indices (8 bytes for each element of the result), or finds them again from the operand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.remat.operation import Gradients, Operation, PassState, memory_format_of

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class MaxPool(Operation):
    """Of [N, C, H, W] or [C, H, W]. `window`: kernel size, stride (empty: the same), padding, dilation, and whether
    sizes are rounded up."""

    name: str
    operands: tuple[int, ...]
    window: tuple[Any, ...]
    graphed = True
    reads = (0,)

    @property
    def signature(self) -> Hashable:
        return "max pool", repr(self.window)

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        return self._kernel(operands[0], state)[0]

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)

    def with_graph(self, operands: Sequence[Any], state: PassState, needed: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """The result, and its indices: int64 of its shape."""
        return self._kernel(operands[0], state)

    def _kernel(self, x: Tensor, state: PassState) -> tuple[Tensor, Tensor]:
        if self not in state.notes:
            state.notes[self] = x.shape, memory_format_of(x.shape, x.stride())
        return _aten.max_pool2d_with_indices(x, *self.window)

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        indices = self._kernel(operands[0], state)[1] if output is None else output
        shape, memory_format = state.notes[self]
        grad_x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        # What is asked of the operand, shape and layout, its gradient has too.
        _aten.max_pool2d_with_indices_backward.grad_input(grad, grad_x, *self.window, indices, grad_input=grad_x)
        return Gradients([grad_x])
