"""The kernels a block is made of, forward and backward, called directly: convolution, batch norm, ReLU.

They are the ones autograd itself calls, so on a CPU the bits are the same (invariant 1). Batch norm is
repeated without gathering statistics: training's last step is `z * (weight * invstd) + (bias - mean *
weight * invstd)`, which is what evaluation does with mean, weight * invstd and a variance of one, so the
evaluation kernel with those gives training's bits (float32 and float64 parameters; others gather again).

On CUDA there are two batch norms that differ by rounding (pytorch/pytorch#82493). `F.batch_norm` takes cuDNN's for
float32 and for float16 with float32 weights, torch's native one for bfloat16 (`_select_batch_norm_backend`). With
`library` the choice is `F.batch_norm`'s, so that bits are autograd's; the price is one more tensor at a time (cuDNN
does not work in place), and gathering the statistics again when a batch norm is repeated. Without it all are native, in
place where that is safe. On a CPU both are the same kernel.

cuDNN's forward returns a reserve tensor that its backward reads; the two belong together. Known limitation: on fake
tensors, which live on the CPU, the reserve and cuDNN's workspace have no bytes.

With a `total` (`lowmem.remat.sync_batch_norm`) training's statistics are those of all processes' pictures; then the
first batch norm is computed as the repeated ones are, and `library` has no say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.remat.sync_batch_norm import Total, global_statistics, move_running, statistics_dtype

_aten = torch.ops.aten
_EXACT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class NormStats:
    """What one batch norm used in this forward pass. `mean` and `invstd`, [C], are None in evaluation mode.
    `implementation`, `reserve` and `momentum` belong to the library's choice of kernel; None: the native one. `count`,
    float64 []: values per channel over all processes; None: the statistics are this process's own."""

    training: bool
    mean: Tensor | None = None
    invstd: Tensor | None = None
    implementation: int | None = None
    reserve: Tensor | None = None
    momentum: float = 0.0
    count: Tensor | None = None


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


def norm_first(
    bn: nn.BatchNorm2d, z: Tensor, in_place: bool, library: bool = False, total: Total | None = None
) -> tuple[Tensor, NormStats]:
    """The pass's first batch norm of z, [N, C, H, W]: moves the running statistics if it is training
    (invariant 2). With `total`, which training calls once, z may be empty.

    With `in_place` the result takes z's place. Raises ValueError if there is one value per channel only.
    """
    running = (bn.running_mean, bn.running_var)
    if not bn.training:
        if library:
            return _library_norm(bn, z, running, False, 0.0)
        stats = NormStats(training=False)
        return norm_again(bn, z, stats, in_place), stats
    if total is not None:
        stats = _global_stats(bn, z, total)
        return norm_again(bn, z, stats, in_place), stats
    if z.numel() <= z.shape[1]:
        raise ValueError(f"training needs more than one value per channel, got an input of {list(z.shape)}")
    momentum = _counted(bn)
    if library:
        return _library_norm(bn, z, running, True, momentum)
    out, mean, invstd = _run_norm(z, bn.weight, bn.bias, *running, True, momentum, bn.eps, in_place)
    return out, NormStats(True, mean, invstd)


def _counted(bn: nn.BatchNorm2d) -> float:
    """One more batch: the share by which it moves the running statistics."""
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    return 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum


def _global_stats(bn: nn.BatchNorm2d, z: Tensor, total: Total) -> NormStats:
    mean, var, count = found = global_statistics(z, total)
    if z.numel() <= z.shape[1] and float(count) <= 1:  # waits for the device only where this slice is next to nothing
        raise ValueError(f"training needs more than one value per channel, all processes together got {int(count)}")
    assert bn.running_mean is not None
    assert bn.running_var is not None
    move_running(bn.running_mean, bn.running_var, found, _counted(bn))
    dtype = statistics_dtype(z)
    return NormStats(True, mean.to(dtype), (var + bn.eps).rsqrt_().to(dtype), count=count)


def _library_norm(
    bn: nn.BatchNorm2d, z: Tensor, running: tuple[Tensor | None, Tensor | None], training: bool, momentum: float
) -> tuple[Tensor, NormStats]:
    """Batch norm on the kernel that `F.batch_norm` would take."""
    out, mean, invstd, reserve, implementation = _aten._batch_norm_impl_index(
        z, bn.weight, bn.bias, *running, training, momentum, bn.eps, torch.backends.cudnn.enabled
    )
    return out, NormStats(training, mean, invstd, implementation, reserve, momentum)


def _library_again(bn: nn.BatchNorm2d, z: Tensor, stats: NormStats) -> Tensor:
    """The same call as the first, in training with running statistics that nobody reads: cuDNN's newer batch norm looks
    its graph up by shapes, not by momentum, eps or whether there are running statistics (pytorch/pytorch#175809)."""
    running = (bn.running_mean, bn.running_var)
    if stats.training and bn.running_mean is not None and bn.running_var is not None:
        running = (torch.empty_like(bn.running_mean), torch.empty_like(bn.running_var))
    return _library_norm(bn, z, running, stats.training, stats.momentum)[0]


def norm_again(bn: nn.BatchNorm2d, z: Tensor, stats: NormStats, in_place: bool) -> Tensor:
    """The same bits as the first time, without moving anything or asking other processes."""
    if not z.numel():
        return z if in_place else torch.empty_like(z)
    if stats.implementation is not None:
        return _library_again(bn, z, stats)
    if not stats.training:
        running = (bn.running_mean, bn.running_var)
        return _run_norm(z, bn.weight, bn.bias, *running, False, 0.0, bn.eps, in_place)[0]
    assert stats.mean is not None
    assert stats.invstd is not None
    if z.is_cuda:
        out = z if in_place else torch.empty_like(z)
        _aten.batch_norm_elemt.out(z, bn.weight, bn.bias, stats.mean, stats.invstd, bn.eps, out=out)
        return out
    if stats.count is None and bn.weight.dtype not in _EXACT_DTYPES:
        return _run_norm(z, bn.weight, bn.bias, None, None, True, 0.0, bn.eps, in_place)[0]
    return _affine(z, bn.weight * stats.invstd, bn.bias, stats.mean, in_place)


def _affine(z: Tensor, scale: Tensor, shift: Tensor, center: Tensor, in_place: bool) -> Tensor:
    """(z - center) * scale + shift per channel, all [C], by evaluation's kernel: rounded to z's dtype once."""
    out, _, _ = _run_norm(z, scale, shift, center, torch.ones_like(center), False, 0.0, 0.0, in_place)
    return out


def norm_backward(
    bn: nn.BatchNorm2d, grad: Tensor, z: Tensor, stats: NormStats, need_input: bool, total: Total | None = None
) -> Tensor | None:
    """Adds the gradients of weight and bias to `.grad`; returns z's, or None if not needed. z is used up.

    With statistics of all processes `total`, the forward's, is called once if z's gradient is needed. The gradients
    of weight and bias are this process's own: like those of all parameters they remain to be summed.
    """
    mask = [need_input, bn.weight.requires_grad, bn.bias.requires_grad]
    if not any(mask):
        return None
    if stats.count is not None or not z.numel():
        return _global_backward(bn, grad, z, stats, need_input, total)
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


def _global_backward(
    bn: nn.BatchNorm2d, grad: Tensor, z: Tensor, stats: NormStats, need_input: bool, total: Total | None
) -> Tensor | None:
    grad_weight, grad_bias = _parameter_grads(bn, grad, z, stats)
    grad_z = None
    if need_input:
        sums = torch.cat((grad_bias, grad_weight)).double()
        if stats.count is not None:
            assert total is not None
            total(sums)
        grad_z = torch.empty_like(z) if not z.numel() else _input_grad(bn, grad, z, stats, sums)
    if bn.weight.requires_grad:
        accumulate(bn.weight, grad_weight)
    if bn.bias.requires_grad:
        accumulate(bn.bias, grad_bias)
    return grad_z


def _parameter_grads(bn: nn.BatchNorm2d, grad: Tensor, z: Tensor, stats: NormStats) -> tuple[Tensor, Tensor]:
    """This process's sums of grad * (z - mean) * invstd and of grad, [C]; an empty z has zeros (torch's CPU kernel
    would divide by its count and end the process)."""
    if not z.numel():
        return torch.zeros_like(bn.weight), torch.zeros_like(bn.bias)
    if z.is_cuda:
        _, _, grad_weight, grad_bias = _aten.batch_norm_backward_reduce(
            grad, z, stats.mean, stats.invstd, bn.weight, False, True, True
        )
        return grad_weight, grad_bias
    mask = [False, True, True]
    _, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        grad, z, bn.weight, None, None, stats.mean, stats.invstd, True, bn.eps, mask
    )
    return grad_weight, grad_bias


def _input_grad(bn: nn.BatchNorm2d, grad: Tensor, z: Tensor, stats: NormStats, sums: Tensor) -> Tensor:
    """z's gradient from the totals of grad and of grad * (z - mean) * invstd, float64 [2C]. On a CPU, z's place holds
    the part that depends on z, so that there is one new tensor, as in the library's kernel."""
    assert stats.mean is not None
    assert stats.invstd is not None
    assert stats.count is not None
    dtype, invstd = stats.invstd.dtype, stats.invstd.double()
    sum_dy, sum_dy_xhat = sums.chunk(2)
    if z.is_cuda:
        moments, counts = (sum_dy.to(dtype), (sum_dy_xhat / invstd).to(dtype)), stats.count.int().reshape(1)
        return _aten.batch_norm_backward_elemt(grad, z, stats.mean, stats.invstd, bn.weight, *moments, counts)
    scale = bn.weight * invstd
    slope, shift = scale * invstd * sum_dy_xhat / -stats.count, scale * sum_dy / -stats.count
    zero = torch.zeros_like(stats.mean)
    grad_z = _affine(grad, scale.to(dtype), zero, zero, in_place=False)
    return grad_z.add_(_affine(z, slope.to(dtype), shift.to(dtype), stats.mean, in_place=True))


def mask_relu(grad: Tensor, result: Tensor, *, owned: bool = True) -> Tensor:
    """The gradient before a ReLU, from the one after it and the ReLU's result; in place if `grad` is `owned`.

    Never a product with a mask: that changes the memory layout in channels-last, and with it the kernels
    and the last digits of what follows.
    """
    if owned and grad.stride() == result.stride():
        _aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
        return grad
    return _aten.threshold_backward(grad, result, 0)


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
    """`native_batch_norm` of a new tensor or in z's place -> result, mean, invstd (both empty in evaluation)."""
    if not in_place or z.device.type not in ("cpu", "cuda"):
        return _aten.native_batch_norm(z, weight, bias, mean, var, training, momentum, eps)
    dtype = torch.float32 if z.is_cuda and z.dtype != torch.float64 else weight.dtype
    size = z.shape[1] if training else 0
    saved = torch.empty(size, dtype=dtype, device=z.device), torch.empty(size, dtype=dtype, device=z.device)
    _aten.native_batch_norm.out(
        z, weight, bias, mean, var, training, momentum, eps, out=z, save_mean=saved[0], save_invstd=saved[1]
    )
    return z, *saved
