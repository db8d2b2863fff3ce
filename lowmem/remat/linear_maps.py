"""Convolutions and linear layers by the kernels that autograd itself calls. Operands are cast as autocast does."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.remat.operation import Gradients, Operation, PassState, of_tensor, trainable

# Where there is a binding of its own (`torch.convolution`), it takes 10 microseconds less than through `torch.ops`.
_convolution_backward = torch.ops.aten.convolution_backward.default
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
        rest: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, False, zeros, conv.groups)
        return torch.convolution(x, weight, bias, *rest)

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        result: Tensor = self.conv(operands[0])
        return result

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        conv, x = self.conv, operands[0]
        weight, bias = parameters = conv.weight, conv.bias
        mask = [needed[0], weight.requires_grad, trainable(bias)]
        dtype, sizes = x.dtype, None if bias is None else [bias.shape[0]]
        if state.low is not None:
            x, weight = x.to(state.low), weight.to(state.low)
        zeros = (0,) * len(conv.stride)
        rest = (conv.stride, conv.padding, conv.dilation, False, zeros, conv.groups, mask)
        grad_x, grad_weight, grad_bias = _convolution_backward(grad, x, weight, sizes, *rest)
        pairs = zip(parameters, (grad_weight, grad_bias), mask[1:], strict=True)
        found = [(mine, one) for mine, one, wanted in pairs if wanted and mine is not None]
        return Gradients([grad_x.to(dtype) if needed[0] else None], found)


@dataclass(frozen=True, eq=False)
class Linear(Operation):
    """x W^T + b of [..., in] -> [..., out]. Its kernels are chosen inside the library by the operand's shape and
    layout, so that the forward is the library's own function; the backward is autograd's arithmetic for two dimensions
    (`addmm`, `mm`), to which the library folds more if they are contiguous. Of others it is autograd's own, which
    multiplies once more."""

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
        given: list[Any] = [operands[0], self.linear.weight, self.linear.bias]
        x, weight, bias = (one if one is None or state.low is None else one.to(state.low) for one in given)
        if x.dim() == 2 or x.is_contiguous():
            return F.linear(x, weight, bias)
        with torch.enable_grad():  # its kernels depend on whether the weight is trained
            return F.linear(x, weight, bias).detach()

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        result: Tensor = self.linear(operands[0])
        return result

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        weight, bias, x = self.linear.weight, self.linear.bias, operands[0]
        dtype = x.dtype
        low_weight: Tensor = weight
        if state.low is not None:
            x, low_weight = x.to(state.low), weight.to(state.low)
        if not (x.dim() == 2 or x.is_contiguous()):
            return self._by_autograd(grad, operands[0], state, needed[0])
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = rows.mm(low_weight).view(*x.shape).to(dtype) if needed[0] else None
        found: list[tuple[Tensor, Tensor]] = []
        if weight.requires_grad:
            found.append((weight, rows.t().mm(x.reshape(-1, x.shape[-1]))))
        if bias is not None and bias.requires_grad:
            found.append((bias, rows.sum(0)))
        return Gradients([grad_x], found)

    def _by_autograd(self, grad: Tensor, x: Tensor, state: PassState, need_input: bool) -> Gradients:
        given: list[Tensor | None] = [x, self.linear.weight, self.linear.bias]
        wanted = [need_input, *map(trainable, given[1:])]
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            pairs = zip(given, wanted, strict=True)
            leaves = [None if one is None else one.detach().requires_grad_(want) for one, want in pairs]
            low: list[Any] = [one if one is None or state.low is None else one.to(state.low) for one in leaves]
            asked = [one for one, want in zip(leaves, wanted, strict=True) if one is not None and want]
            found = iter(torch.autograd.grad(F.linear(*low), asked, grad))
        grads = [next(found) if want else None for want in wanted]
        both = zip(given[1:], grads[1:], strict=True)
        return Gradients(grads[:1], [(one, mine) for one, mine in both if one is not None and mine is not None])
