"""Batch norm, by the kernels that autograd itself calls, so that on a CPU the bits are the same (invariant 1).
`norm_first` moves the running statistics; `norm_again`, where a forward pass is repeated, does not (invariant 2; other
modules: `autograd_operation.py`).

A repetition gathers no statistics: training's last step is `z * (weight * invstd) + (bias - mean * weight * invstd)`,
which is what evaluation does with mean, weight * invstd and a variance of one, so the evaluation kernel with those
gives training's bits (float32 and float64 parameters; others gather again).

On CUDA there are two batch norms that differ by rounding (pytorch/pytorch#82493). `F.batch_norm` takes cuDNN's for
float32 and for float16 with float32 weights, torch's native one for bfloat16 (`_select_batch_norm_backend`). With
`library` the choice is `F.batch_norm`'s, so that bits are autograd's; the price is one more tensor at a time (cuDNN
does not work in place), and gathering the statistics again when a batch norm is repeated. Without it all are native, in
place where that is safe. On a CPU both are the same kernel.

cuDNN's forward returns a reserve tensor that its backward reads; the two belong together. Known limitation: on
outlines, which are on the CPU, the reserve and cuDNN's workspace have no bytes.

Several processes that train on one batch have a slice of it each, maybe an empty one. With a `total` training's
statistics are those of all: sums in [C] vectors, two calls of it per batch norm, for the statistics in the first
forward and for two sums in the backward; then the first batch norm is computed as the repeated ones are, and `library`
has no say. What follows from the totals is the same arithmetic everywhere, so that all processes have bitwise the same
statistics; recomputations use what the first run has found. The calls come in an order that depends on the model alone
(which parameters are trainable and which batch norms in training included), never on the schedule, the slice or the
process: in the forward as the model's own forward has them, in the backward the other way round. A backward that needs
no gradient of its input does not call.

Method: Ioffe and Szegedy, "Batch Normalization", ICML 2015, with the sums of `torch.nn.SyncBatchNorm`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.measure.outline import is_outline
from lowmem.remat.operation import Gradients, Norm, Operation, PassState, Total, dense, in_format, of_tensor, trainable

_aten = torch.ops.aten
_EXACT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class NormStats:
    """What one batch norm used in this forward pass."""

    training: bool
    mean: Tensor | None = None  # [C]; None in evaluation mode
    invstd: Tensor | None = None  # likewise
    implementation: int | None = None  # the library's choice of kernel; None: the native one
    reserve: Tensor | None = None
    momentum: float = 0.0
    count: Tensor | None = None  # float64 []: values per channel over all processes; None: statistics are its own


def norm_first(
    bn: Norm, z: Tensor, in_place: bool, library: bool = False, total: Total | None = None
) -> tuple[Tensor, NormStats]:
    """The pass's first batch norm of z, [N, C, H, W], in z's place if `in_place`: moves the running statistics if it is
    training (invariant 2). With `total`, which training calls once, z may be empty. Raises ValueError if there is one
    value per channel only."""
    stats: NormStats | None = None
    gathers = bn.training or bn.running_mean is None
    if gathers and total is not None:
        stats = _global_stats(bn, z, total)
    elif not (gathers or library):
        stats = NormStats(training=False)
    if stats is not None:
        return norm_again(bn, z, stats, in_place), stats
    if gathers and z.numel() <= z.shape[1]:
        raise ValueError(f"training needs more than one value per channel, got an input of {list(z.shape)}")
    momentum = _counted(bn) if bn.training else 0.0
    running = (bn.running_mean, bn.running_var)
    if library:
        return _library_norm(bn, z, running, gathers, momentum)
    out, mean, invstd = _run_norm(z, in_place, bn.weight, bn.bias, *running, True, momentum, bn.eps)
    return out, NormStats(True, mean, invstd)


def _counted(bn: Norm) -> float:
    """One more batch: the share by which it moves the running statistics."""
    count = bn.num_batches_tracked
    if count is None:
        return bn.momentum or 0.0
    count.add_(1)
    return 1.0 / float(count) if bn.momentum is None else bn.momentum


def _global_stats(bn: Norm, z: Tensor, total: Total) -> NormStats:
    """Moves the running statistics towards those of all processes; in float64, rounded once."""
    mean, var, count = global_statistics(z, total)
    if z.numel() <= z.shape[1] and float(count) <= 1:  # waits for the device only where this slice is next to nothing
        raise ValueError(f"training needs more than one value per channel, all processes together got {int(count)}")
    share = _counted(bn) if bn.training else 0.0
    for running, found in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
        if running is not None:
            running.copy_(running.double().lerp_(found, share))
    dtype = _statistics_dtype(z)
    return NormStats(True, mean.to(dtype), (var + bn.eps).rsqrt_().to(dtype), count=count)


def global_statistics(z: Tensor, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, [C], and values per channel, [], of all processes' z, [N, C, H, W]; float64 on z's
    device. N may be 0. Sums of squares lose digits where the mean is large beside the standard deviation, but they are
    float64, and each process's share is made of its own mean and variance."""
    channels = z.shape[1]
    sums = z.new_zeros(2 * channels + 1, dtype=torch.float64)
    if z.numel():
        mean, var = (one.double() for one in _statistics(z))
        count = z.numel() // channels
        sums[:channels] = mean * count
        sums[channels:-1] = (var + mean * mean) * count
        sums[-1].fill_(count)
    total(sums)
    mean = sums[:channels] / sums[-1]
    var = (sums[channels:-1] / sums[-1]).sub_(mean * mean).clamp_(min=0.0)
    return mean, var, sums[-1].clone()


def _statistics_dtype(z: Tensor) -> torch.dtype:
    """Of the mean and the inverse standard deviation that normalise z."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this process's z, in float32 at least."""
    if is_outline(z):  # torch has no kernel without data for the one below
        var, mean = torch.var_mean(z, [at for at in range(z.dim()) if at != 1], correction=0)
        return mean, var
    # Given running statistics (which momentum 0 leaves alone), the CPU's kernel answers in their dtype, not in z's.
    unmoved = [z.new_zeros(z.shape[1], dtype=_statistics_dtype(z)) for _ in range(2)]
    return _aten.batch_norm_update_stats(z, *unmoved, 0.0)


def _library_norm(
    bn: Norm, z: Tensor, running: tuple[Tensor | None, Tensor | None], training: bool, momentum: float
) -> tuple[Tensor, NormStats]:
    """Batch norm on the kernel that `F.batch_norm` would take."""
    out, mean, invstd, reserve, implementation = _aten._batch_norm_impl_index(
        z, bn.weight, bn.bias, *running, training, momentum, bn.eps, torch.backends.cudnn.enabled
    )
    return out, NormStats(training, mean, invstd, implementation, reserve, momentum)


def norm_again(bn: Norm, z: Tensor, stats: NormStats, in_place: bool) -> Tensor:
    """The same bits as the first time, without moving anything or asking other processes."""
    if not z.numel():
        return z if in_place else torch.empty_like(z)
    running = (bn.running_mean, bn.running_var)
    if stats.implementation is not None:
        # The same call as the first, in training with running statistics that nobody reads: cuDNN's newer batch norm
        # looks its graph up by shapes, not by momentum, eps or whether there are any (pytorch/pytorch#175809).
        if stats.training and bn.running_mean is not None and bn.running_var is not None:
            running = (torch.empty_like(bn.running_mean), torch.empty_like(bn.running_var))
        return _library_norm(bn, z, running, stats.training, stats.momentum)[0]
    if not stats.training:
        return _run_norm(z, in_place, bn.weight, bn.bias, *running, False, 0.0, bn.eps)[0]
    assert stats.mean is not None
    assert stats.invstd is not None
    if z.is_cuda:
        out = z if in_place else torch.empty_like(z)
        _aten.batch_norm_elemt.out(z, bn.weight, bn.bias, stats.mean, stats.invstd, bn.eps, out=out)
        return out
    if stats.count is None and _kept_in(z, bn.weight, bn.bias, bn.running_mean) not in _EXACT_DTYPES:
        return _run_norm(z, in_place, bn.weight, bn.bias, None, None, True, 0.0, bn.eps)[0]
    return _affine(z, stats.invstd if bn.weight is None else bn.weight * stats.invstd, bn.bias, stats.mean, in_place)


def _kept_in(z: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype of mean and inverse standard deviation on a CPU: of the first parameter or buffer that there is."""
    return next((one.dtype for one in parameters if one is not None), z.dtype)


def _affine(z: Tensor, scale: Tensor, shift: Tensor | None, center: Tensor, in_place: bool) -> Tensor:
    """(z - center) * scale + shift per channel, all [C], by evaluation's kernel: rounded to z's dtype once."""
    return _run_norm(z, in_place, scale, shift, center, torch.ones_like(center), False, 0.0, 0.0)[0]


def norm_backward(
    bn: Norm,
    grad: Tensor,
    z: Tensor,
    stats: NormStats,
    need_input: bool,
    total: Total | None = None,
    spent: bool = False,
) -> Gradients:
    """The gradients of z, where needed, and of weight and bias. `spent`: z may be written into.

    With statistics of all processes `total` is called once if z's gradient is needed. The gradients of weight and bias
    are this process's own: like those of all parameters they remain to be summed.
    """
    weight, bias = bn.weight, bn.bias
    mask = [need_input, trainable(weight), trainable(bias)]
    grad_z: Tensor | None = None
    if stats.count is not None or not z.numel():
        grad_weight, grad_bias = _parameter_grads(bn, grad, z, stats)
        if need_input:
            sums = torch.cat((grad_bias, grad_weight)).double()
            if stats.count is not None:
                assert total is not None
                total(sums)
            grad_z = _input_grad(bn, grad, z, stats, sums, spent) if z.numel() else torch.empty_like(z)
    else:
        running = (None, None) if stats.training else (bn.running_mean, bn.running_var)
        saved = (*running, stats.mean, stats.invstd, stats.training, bn.eps, mask)
        if stats.implementation is None:
            results = _aten.native_batch_norm_backward(grad, z, weight, *saved)
        else:
            first = stats.implementation
            results = _aten._batch_norm_impl_index_backward(first, z, grad, bn.weight, *saved, stats.reserve)
        grad_z, grad_weight, grad_bias = results
    found = ((weight, grad_weight, mask[1]), (bias, grad_bias, mask[2]))
    parameters = [(parameter, one) for parameter, one, wanted in found if wanted]
    return Gradients([grad_z if need_input else None], parameters)


def _parameter_grads(bn: Norm, grad: Tensor, z: Tensor, stats: NormStats) -> tuple[Tensor, Tensor]:
    """This process's sums of grad * (z - mean) * invstd and of grad, [C]; an empty z has zeros (torch's CPU kernel
    would divide by its count and end the process)."""
    if not z.numel():
        zeros = z.new_zeros(2, z.shape[1], dtype=_statistics_dtype(z))
        return zeros[0], zeros[1]
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


def _input_grad(bn: Norm, grad: Tensor, z: Tensor, stats: NormStats, sums: Tensor, spent: bool) -> Tensor:
    """z's gradient from the totals of grad and of grad * (z - mean) * invstd, float64 [2C]. On a CPU, z's place holds
    the part that depends on z if z is `spent`, so that there is one new tensor, as in the library's kernel."""
    assert stats.mean is not None
    assert stats.invstd is not None
    assert stats.count is not None
    dtype, invstd = stats.invstd.dtype, stats.invstd.double()
    sum_dy, sum_dy_xhat = sums.chunk(2)
    if z.is_cuda:
        moments, counts = (sum_dy.to(dtype), (sum_dy_xhat / invstd).to(dtype)), stats.count.int().reshape(1)
        return _aten.batch_norm_backward_elemt(grad, z, stats.mean, stats.invstd, bn.weight, *moments, counts)
    scale = invstd if bn.weight is None else bn.weight * invstd
    slope, shift = scale * invstd * sum_dy_xhat / -stats.count, scale * sum_dy / -stats.count
    zero = torch.zeros_like(stats.mean)
    grad_z = _affine(grad, scale.to(dtype), zero, zero, in_place=False)
    return grad_z.add_(_affine(z, slope.to(dtype), shift.to(dtype), stats.mean, in_place=spent))


def _run_norm(z: Tensor, in_place: bool, weight: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`native_batch_norm` (z, weight, bias, mean, var, training, momentum, eps) of a new tensor or in z's place ->
    result, mean, invstd (both empty in evaluation)."""
    if not in_place or z.device.type not in ("cpu", "cuda"):
        return torch.native_batch_norm(z, weight, *others)
    dtype = _kept_in(z, weight, *others[:2])
    if z.is_cuda and z.dtype != torch.float64:
        dtype = torch.float32
    size = z.shape[1] if others[3] else 0
    mean, invstd = torch.empty(size, dtype=dtype, device=z.device), torch.empty(size, dtype=dtype, device=z.device)
    torch.native_batch_norm(z, weight, *others, out=(z, mean, invstd))
    return z, mean, invstd


@dataclass(frozen=True, eq=False)
class BatchNorm(Operation):
    """Of [N, C, ...]; affine or not, with running statistics or without, frozen or in training."""

    name: str
    operands: tuple[int, ...]
    norm: Norm
    in_place = (0,)
    reads = (0,)
    uses_up = 0

    @staticmethod
    def covers(module: nn.Module) -> bool:
        return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    @property
    def signature(self) -> Hashable:
        bn = self.norm
        gathers = bn.training or bn.running_mean is None
        return "batch norm", of_tensor(bn.weight), of_tensor(bn.bias), of_tensor(bn.running_mean), bn.training, gathers

    def parameters(self) -> Iterator[Tensor]:
        return (one for one in (self.norm.weight, self.norm.bias) if one is not None)

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        z = operands[0]
        in_place = into is not None and in_format(z) and dense(z)
        if (stats := state.notes.get(self)) is not None:
            return norm_again(self.norm, z, stats, in_place)
        out, state.notes[self] = norm_first(self.norm, z, in_place, state.library_norm, state.total)
        return out

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        result: Tensor = self.norm(operands[0])
        return result

    def backward(
        self,
        grad: Any,
        operands: Sequence[Any],
        output: Any,
        state: PassState,
        needed: Sequence[bool],
        owned: bool,
        spent: bool = False,
    ) -> Gradients:
        return norm_backward(self.norm, grad, operands[0], state.notes[self], needed[0], state.total, spent)
