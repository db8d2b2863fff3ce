"""The kernels a block is made of, forward and backward, called directly: convolution, batch norm, ReLU.

They are the ones autograd itself calls, so on a CPU the bits are the same (invariant 1). Batch norm is
repeated without gathering statistics: training's last step is `z * (weight * invstd) + (bias - mean *
weight * invstd)`, which is what evaluation does with mean, weight * invstd and a variance of one, so the
evaluation kernel with those gives training's bits (float32 and float64 parameters; others gather again).

On CUDA batch norm runs on torch's native kernels, which can work in place; `F.batch_norm` prefers cuDNN's for
float32, and the two differ by rounding. With `library` the choice is `F.batch_norm`'s, at the price of one
more tensor at a time, and of gathering the statistics again when a batch norm is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_aten = torch.ops.aten
_EXACT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class NormStats:
    """What one batch norm used in this forward pass. `mean` and `invstd`, [C], are None in evaluation mode.
    `implementation` and `reserve` belong to the library's choice of kernel; None: the native one."""

    training: bool
    mean: Tensor | None = None
    invstd: Tensor | None = None
    implementation: int | None = None
    reserve: Tensor | None = None


def convolve(conv: nn.Conv2d, x: Tensor, low: torch.dtype | None) -> Tensor:
    """Convolution without bias, [N, C, H, W]; operands are cast to `low` as autocast does."""
    weight = conv.weight
    if low is not None:
        x, weight = x.to(low), weight.to(low)
    return _aten.convolution(x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)


def convolve_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, low: torch.dtype | None, need_input: bool
) -> Tensor | None:
    """Adds the weight's gradient to `.grad`; returns the input's, in the input's dtype, or None if not
    needed."""
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
    if parameter.grad is not None:
        parameter.grad.add_(grad)
    elif _laid_out_alike(grad, parameter):
        parameter.grad = grad
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def _laid_out_alike(grad: Tensor, parameter: Tensor) -> bool:
    """Autograd's own rule for taking a gradient as it is: strides agree wherever there is more than one."""
    dims = zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
    return all(mine == other for size, mine, other in dims if size > 1)


def norm_first(bn: nn.BatchNorm2d, z: Tensor, in_place: bool, library: bool = False) -> tuple[Tensor, NormStats]:
    """The pass's first batch norm of z, [N, C, H, W]: moves the running statistics if it is training
    (invariant 2).

    With `in_place` the result takes z's place. Raises ValueError if there is one value per channel only.
    """
    if not bn.training:
        stats = NormStats(training=False)
        return norm_again(bn, z, stats, in_place), stats
    if z.numel() == z.shape[1]:
        raise ValueError(f"training needs more than one value per channel, got an input of {list(z.shape)}")
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    if library:
        return _library_norm(bn, z, bn.running_mean, bn.running_var, momentum)
    out, mean, invstd = _norm(bn, z, in_place, bn.running_mean, bn.running_var, True, momentum)
    return out, NormStats(True, mean, invstd)


def _library_norm(
    bn: nn.BatchNorm2d, z: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float
) -> tuple[Tensor, NormStats]:
    """Training's batch norm on the kernel that `F.batch_norm` would take."""
    out, saved_mean, invstd, reserve, implementation = _aten._batch_norm_impl_index(
        z, bn.weight, bn.bias, mean, var, True, momentum, bn.eps, torch.backends.cudnn.enabled
    )
    return out, NormStats(True, saved_mean, invstd, implementation, reserve)


def norm_again(bn: nn.BatchNorm2d, z: Tensor, stats: NormStats, in_place: bool) -> Tensor:
    """The same bits as the first time, without moving anything."""
    if not stats.training:
        return _norm(bn, z, in_place, bn.running_mean, bn.running_var, False, 0.0)[0]
    if stats.implementation is not None:
        return _library_norm(bn, z, None, None, 0.0)[0]
    assert stats.mean is not None
    assert stats.invstd is not None
    if z.is_cuda:
        out = z if in_place else torch.empty_like(z)
        _aten.batch_norm_elemt.out(z, bn.weight, bn.bias, stats.mean, stats.invstd, bn.eps, out=out)
        return out
    if bn.weight.dtype not in _EXACT_DTYPES:
        return _norm(bn, z, in_place, None, None, True, 0.0)[0]
    scale, one = bn.weight * stats.invstd, torch.ones_like(stats.invstd)
    out, _, _ = _run_norm(z, scale, bn.bias, stats.mean, one, False, 0.0, 0.0, in_place)
    return out


def norm_backward(bn: nn.BatchNorm2d, grad: Tensor, z: Tensor, stats: NormStats, need_input: bool) -> Tensor | None:
    """Adds the gradients of weight and bias to `.grad`; returns z's, or None if not needed."""
    mask = [need_input, bn.weight.requires_grad, bn.bias.requires_grad]
    if not any(mask):
        return None
    running = (None, None) if stats.training else (bn.running_mean, bn.running_var)
    saved = (*running, stats.mean, stats.invstd, stats.training, bn.eps, mask)
    if stats.implementation is None:
        results = _aten.native_batch_norm_backward(grad, z, bn.weight, *saved)
    else:
        results = _aten._batch_norm_impl_index_backward(stats.implementation, z, grad, bn.weight, *saved, stats.reserve)
    grad_z, grad_weight, grad_bias = results
    if mask[1]:
        accumulate(bn.weight, grad_weight)
    if mask[2]:
        accumulate(bn.bias, grad_bias)
    return grad_z if need_input else None


def mask_relu(grad: Tensor, result: Tensor, *, owned: bool = True) -> Tensor:
    """The gradient before a ReLU, from the one after it and the ReLU's result; in place if `grad` is `owned`.

    Never a product with a mask: that changes the memory layout in channels-last, and with it the kernels
    and the last digits of what follows.
    """
    if owned and grad.stride() == result.stride():
        _aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
        return grad
    return _aten.threshold_backward(grad, result, 0)


def _norm(
    bn: nn.BatchNorm2d,
    z: Tensor,
    in_place: bool,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_norm(z, bn.weight, bn.bias, mean, var, training, momentum, bn.eps, in_place)


def _run_norm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`native_batch_norm` of a new tensor or in z's place -> result, mean, invstd (both empty in
    evaluation)."""
    if not in_place or z.device.type not in ("cpu", "cuda"):
        return _aten.native_batch_norm(z, weight, bias, mean, var, training, momentum, eps)
    dtype = torch.float32 if z.is_cuda and z.dtype != torch.float64 else weight.dtype
    size = z.shape[1] if training else 0
    saved = torch.empty(size, dtype=dtype, device=z.device), torch.empty(size, dtype=dtype, device=z.device)
    _aten.native_batch_norm.out(
        z, weight, bias, mean, var, training, momentum, eps, out=z, save_mean=saved[0], save_invstd=saved[1]
    )
    return z, *saved
