"""Activations, sums and products, by the kernels that autograd itself calls; in place where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lowmem.remat.operation import Gradients, Operation, PassState, dense, dense_strides

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class OutputActivation(Operation):
    """An activation whose backward can read its result: ReLU, ReLU6, leaky ReLU (slopes above zero: the result has the
    operand's sign), sigmoid, tanh. `arguments`: of the kernel. `as_first`: see `_laid_out_as`."""

    name: str
    operands: tuple[int, ...]
    kind: str  # relu, relu6, leaky_relu, sigmoid, tanh
    arguments: tuple[Any, ...] = ()
    as_first: bool = False
    in_place = (0,)
    reads_output = True

    @property
    def signature(self) -> Hashable:
        return self.kind, self.arguments

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        x = operands[0]
        into = into if dense(x) else None
        if self.kind in _FORWARD:
            kernel = _FORWARD[self.kind][into is not None]
            y: Tensor = kernel(x, *(self.arguments or _ARGUMENTS[self.kind]))
        else:
            y = getattr(x, self.kind if into is None else self.kind + "_")()
        return _laid_out_as(x, y) if self.as_first else y

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
        args = (*self.arguments, True) if self.kind == "leaky_relu" else _ARGUMENTS.get(self.kind, ())
        kernel = _BACKWARD[self.kind]
        if owned and grad.stride() == output.stride() and grad.dtype == output.dtype and dense(grad):
            kernel.grad_input(grad, output, *args, grad_input=grad)
            return grad
        return kernel(grad, output, *args)


_FORWARD = {"relu6": (_aten.hardtanh, _aten.hardtanh_), "leaky_relu": (_aten.leaky_relu, _aten.leaky_relu_)}
_ARGUMENTS: dict[str, tuple[Any, ...]] = {"relu": (0,), "relu6": (0.0, 6.0)}  # `relu`: of its backward alone
_BACKWARD = {
    "relu": _aten.threshold_backward,
    "relu6": _aten.hardtanh_backward,
    "leaky_relu": _aten.leaky_relu_backward,
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
    as_first: bool = False
    in_place = (0,)
    reads = (0,)

    @property
    def signature(self) -> Hashable:
        return self.kind, self.arguments

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        in_place = into is not None and dense(operands[0])
        kernel: Callable[..., Tensor] = getattr(_aten, self.kind + "_" if in_place else self.kind)
        y = kernel(operands[0], **dict(self.arguments))
        return _laid_out_as(operands[0], y) if self.as_first else y

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        kernel = getattr(_aten, self.kind + "_backward")
        return Gradients([kernel(grad, operands[0], **dict(self.arguments))])


@dataclass(frozen=True, eq=False)
class _OfTwo(Operation):
    """`as_first`: `+=`, `*=`: in the first operand's dtype and layout."""

    name: str
    operands: tuple[int, ...]
    as_first: bool = False
    in_place = (0, 1)

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self.forward(operands, state)


class Add(_OfTwo):
    """The sum of two tensors."""

    shares = (0, 1)

    @property
    def signature(self) -> Hashable:
        return "add", self.as_first

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        a, b = operands
        if state.notes.get(self) is None:
            state.notes[self] = a.shape, b.shape, a.dtype, b.dtype
        if into is not None and _fits(a, b, into):
            target: Tensor = operands[into].add_(operands[1 - into])
            return target
        y = a + b
        return _laid_out_as(a, y.to(a.dtype)) if self.as_first else y

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        shape_a, shape_b, *dtypes = state.notes[self]
        found = []
        for shape, dtype, wanted in zip((shape_a, shape_b), dtypes, needed, strict=True):
            mine = grad if not wanted or shape == grad.shape else grad.sum_to_size(shape)
            found.append(mine.to(dtype) if wanted else None)
        return Gradients(found)


class Mul(_OfTwo):
    """The product of two tensors. The gradient of the larger is made in the incoming one's place if that is owned."""

    reads = (0, 1)

    @property
    def signature(self) -> Hashable:
        return "mul", self.as_first

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        a, b = operands
        if into is not None and _fits(a, b, into):
            target: Tensor = operands[into].mul_(operands[1 - into])
            return target
        y = a * b
        return _laid_out_as(a, y.to(a.dtype)) if self.as_first else y

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        found: list[Any] = [None, None]
        wanted = [at for at in (0, 1) if needed[at]]
        wanted.sort(key=lambda at: operands[at].shape == grad.shape)  # what may take the gradient's place comes last
        for at in wanted:
            mine, other = operands[at], operands[1 - at].conj()
            in_place = owned and at == wanted[-1] and mine.shape == grad.shape and _fits(grad, other, 0)
            one = grad.mul_(other) if in_place else grad * other
            found[at] = (one if one.shape == mine.shape else one.sum_to_size(mine.shape)).to(mine.dtype)
        return Gradients(found)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """What the model itself writes in x's place (`ReLU(inplace=True)`, `+=`) has its strides, whatever they are."""
    if y.stride() == x.stride() or not x.numel():
        return y
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)


def _fits(a: Tensor, b: Tensor, into: int) -> bool:
    """Whether the elementwise result of the two has the dtype, shape and strides of the one at position `into`."""
    target, other = (a, b) if into == 0 else (b, a)
    if target.dtype != other.dtype and target.dtype != torch.result_type(a, b):
        return False
    return _strides_fit(target.shape, target.stride(), other.shape, other.stride())


@lru_cache(maxsize=4096)
def _strides_fit(
    shape: tuple[int, ...], stride: tuple[int, ...], other_shape: tuple[int, ...], other_stride: tuple[int, ...]
) -> bool:
    """By the library's rule (TensorIterator): the result's dimensions are in the order of the operands' strides, the
    first operand that tells two apart deciding, and a broadcast one telling nothing. Here both operands have to agree,
    so that their order does not matter; where nothing tells, the answer is no."""
    if shape == other_shape and stride == other_stride:
        return dense_strides(shape, stride)
    missing = len(shape) - len(other_shape)
    if missing < 0 or any(size not in (1, full) for size, full in zip(other_shape, shape[missing:], strict=True)):
        return False
    theirs = [0] * missing
    for size, full, step in zip(other_shape, shape[missing:], other_stride, strict=True):
        theirs.append(step if size == full else 0)
    for i, j in combinations(range(len(shape)), 2):
        if stride[i] == stride[j] or (theirs[i] and theirs[j] and (theirs[i] < theirs[j]) != (stride[i] < stride[j])):
            return False
        if theirs[i] and theirs[i] == theirs[j]:
            return False
    return dense_strides(shape, stride)
