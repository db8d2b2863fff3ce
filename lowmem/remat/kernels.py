"""The kernels a block is made of beside its batch norms (`batch_norm.py`), forward and backward, called directly:
convolution, ReLU. They are the ones autograd itself calls, so on a CPU the bits are the same (invariant 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_aten = torch.ops.aten


def convolve(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> Tensor:
    """Convolution without bias, [N, C, H, W]; operands are cast to `low` as autocast does."""
    weight = conv.weight
    if low is not None:
        x, weight = x.to(low), weight.to(low)
    return _aten.convolution(x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)


def convolve_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, low: torch.dtype | None, need_input: bool
) -> Tensor | None:
    """Adds the weight's gradient to `.grad`; returns the input's, in the input's dtype, or None if not needed."""
    weight, dtype = conv.weight, x.dtype
    mask = [need_input, weight.requires_grad, False]
    if not any(mask):
        return None
    if low is not None:
        x, weight = x.to(low), weight.to(low)
    grad_x, grad_weight, _ = _aten.convolution_backward(
        grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, mask
    )
    del grad, x, weight
    if grad_weight is not None:
        accumulate(conv.weight, grad_weight)
    return None if grad_x is None else grad_x.to(dtype)


def accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Adds to `.grad` in place, or becomes it, in the parameter's dtype and memory layout."""
    grad = grad.to(parameter.dtype)
    dims = zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
    if parameter.grad is not None:
        parameter.grad.add_(grad)
    elif all(mine == other for size, mine, other in dims if size > 1):  # autograd's own rule for taking it as it is
        parameter.grad = grad
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def mask_relu(grad: Tensor, result: Tensor, *, owned: bool = True) -> Tensor:
    """The gradient before a ReLU, from the one after it and the ReLU's result; in place if `grad` is `owned`. Never a
    product with a mask: that changes the memory layout in channels-last, and so the last digits of what follows."""
    if owned and grad.stride() == result.stride():
        _aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
        return grad
    return _aten.threshold_backward(grad, result, 0)
