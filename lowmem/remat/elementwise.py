"""Activations and sums, by the kernels that autograd itself calls; in place where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.remat.operation import Gradients, Operation, PassState

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class OutputActivation(Operation):
    """An activation whose backward reads its result: ReLU, ReLU6, sigmoid, tanh. `lowest`, `highest`: of a clamp
    (`highest` None: none), whose gradient is masked by the result, as by the operand: both are inside at once."""

    name: str
    operands: tuple[int, ...]
    kind: str  # relu, relu6, sigmoid, tanh
    in_place = (0,)
    reads_output = True

    @property
    def signature(self) -> Hashable:
        return self.kind

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        x = operands[0]
        if self.kind == "relu6":
            return _aten.hardtanh(x, 0.0, 6.0) if into is None else _aten.hardtanh_(x, 0.0, 6.0)
        return getattr(x, self.kind if into is None else self.kind + "_")()

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        return Gradients([self.mask(grad, output, owned)])

    def mask(self, grad: Tensor, output: Tensor, owned: bool) -> Tensor:
        """The gradient before the activation, from the one after it and its result; in place if `grad` is `owned`.
        Never a product with a mask: that changes the memory layout in channels-last, and so the last digits of what
        follows."""
        args: tuple[Any, ...] = {"relu": (0,), "relu6": (0.0, 6.0)}.get(self.kind, ())
        kernel = _BACKWARD[self.kind]
        if owned and grad.stride() == output.stride() and grad.dtype == output.dtype:
            kernel.grad_input(grad, output, *args, grad_input=grad)
            return grad
        return kernel(grad, output, *args)


_BACKWARD = {
    "relu": _aten.threshold_backward,
    "relu6": _aten.hardtanh_backward,
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}


@dataclass(frozen=True, eq=False)
class InputActivation(Operation):
    """An activation whose backward reads its operand: SiLU, hardswish, hardsigmoid, GELU. `arguments`: the kernel's."""

    name: str
    operands: tuple[int, ...]
    kind: str  # silu, hardswish, hardsigmoid, gelu
    arguments: tuple[tuple[str, Any], ...] = ()
    in_place = (0,)
    reads = (0,)

    @property
    def signature(self) -> Hashable:
        return self.kind, self.arguments

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        kernel: Callable[..., Tensor] = getattr(_aten, self.kind if into is None else self.kind + "_")
        return kernel(operands[0], **dict(self.arguments))

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        kernel = getattr(_aten, self.kind + "_backward")
        return Gradients([kernel(grad, operands[0], **dict(self.arguments))])


@dataclass(frozen=True, eq=False)
class Add(Operation):
    """The sum of two tensors of one shape; of different ones, or of other dtypes, autograd's own way is taken (see
    `lowmem.remat.reading`)."""

    name: str
    operands: tuple[int, ...]
    as_first: bool = False  # `+=`: in the first operand's dtype
    in_place = (0, 1)
    shares = (0, 1)

    @property
    def signature(self) -> Hashable:
        return "add", self.as_first

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        a, b = operands
        if state.notes.get(self) is None:
            state.notes[self] = a.shape, b.shape, a.dtype, b.dtype
        if into is not None:
            target, other = (a, b) if into == 0 else (b, a)
            alike = target.shape == other.shape and target.stride() == other.stride()
            if alike and target.dtype == torch.result_type(a, b):
                return target.add_(other)
        y = a + b
        return y.to(a.dtype) if self.as_first else y

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        shape_a, shape_b, *dtypes = state.notes[self]
        found = []
        for shape, dtype, wanted in zip((shape_a, shape_b), dtypes, needed, strict=True):
            mine = grad if not wanted or shape == grad.shape else grad.sum_to_size(shape)
            found.append(mine.to(dtype) if wanted else None)
        return Gradients(found)
