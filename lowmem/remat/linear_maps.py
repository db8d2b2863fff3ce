"""Convolutions and linear layers by the kernels that autograd itself calls. Operands are cast as autocast does."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.remat.operation import Gradients, Operation, PassState, of_tensor, trainable

_aten = torch.ops.aten
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """Of [N, C, ...], with zero padding given in numbers; any groups, dilation and bias."""

    name: str
    operands: tuple[int, ...]
    conv: nn.Conv2d
    dear = True
    reads = (0,)

    @staticmethod
    def covers(module: nn.Module) -> bool:
        return type(module) in CONVOLUTIONS and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    @property
    def signature(self) -> Hashable:
        conv = self.conv
        shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return "convolution", of_tensor(conv.weight), of_tensor(conv.bias), *shape

    def parameters(self) -> Iterator[Tensor]:
        yield self.conv.weight
        if self.conv.bias is not None:
            yield self.conv.bias

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        x, weight, bias = operands[0], self.conv.weight, self.conv.bias
        if state.low is not None:
            x, weight, bias = x.to(state.low), weight.to(state.low), None if bias is None else bias.to(state.low)
        conv = self.conv
        zeros = (0,) * len(conv.stride)
        return _aten.convolution(x, weight, bias, conv.stride, conv.padding, conv.dilation, False, zeros, conv.groups)

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        result: Tensor = self.conv(operands[0])
        return result

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        conv, weight, bias, x = self.conv, self.conv.weight, self.conv.bias, operands[0]
        mask = [needed[0], weight.requires_grad, trainable(bias)]
        dtype, sizes = x.dtype, None if bias is None else [bias.shape[0]]
        if state.low is not None:
            x, weight = x.to(state.low), weight.to(state.low)
        zeros = (0,) * len(conv.stride)
        rest = (conv.stride, conv.padding, conv.dilation, False, zeros, conv.groups, mask)
        grad_x, grad_weight, grad_bias = _aten.convolution_backward(grad, x, weight, sizes, *rest)
        del x, weight
        found = [(conv.weight, grad_weight)] if mask[1] else []
        if bias is not None and mask[2]:
            found.append((bias, grad_bias))
        return Gradients([grad_x.to(dtype) if needed[0] else None], found)


@dataclass(frozen=True, eq=False)
class Linear(Operation):
    """x W^T + b of [..., in] -> [..., out]. Its kernels are chosen inside the library by the operand's shape and
    layout, so that the forward is the library's own function; the backward is autograd's arithmetic for two dimensions
    (`addmm`, `mm`), to which the library folds more."""

    name: str
    operands: tuple[int, ...]
    linear: nn.Linear
    dear = True
    reads = (0,)

    @staticmethod
    def covers(module: nn.Module) -> bool:
        return type(module) is nn.Linear

    @property
    def signature(self) -> Hashable:
        return "linear", of_tensor(self.linear.weight), of_tensor(self.linear.bias)

    def parameters(self) -> Iterator[Tensor]:
        yield self.linear.weight
        if self.linear.bias is not None:
            yield self.linear.bias

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        x, weight, bias = operands[0], self.linear.weight, self.linear.bias
        if state.low is None:
            return F.linear(x, weight, bias)
        return F.linear(x.to(state.low), weight.to(state.low), None if bias is None else bias.to(state.low))

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        result: Tensor = self.linear(operands[0])
        return result

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        weight, bias, x = self.linear.weight, self.linear.bias, operands[0]
        dtype, rows = x.dtype, grad.reshape(-1, grad.shape[-1])
        grad_x = None
        low_weight = weight if state.low is None else weight.to(state.low)
        if needed[0]:
            grad_x = rows.mm(low_weight).view(*x.shape).to(dtype)
        found: list[tuple[Tensor, Tensor]] = []
        if weight.requires_grad:
            flat = x.reshape(-1, x.shape[-1])
            found.append((weight, rows.t().mm(flat if state.low is None else flat.to(state.low))))
        if bias is not None and bias.requires_grad:
            found.append((bias, rows.sum(0)))
        return Gradients([grad_x], found)
