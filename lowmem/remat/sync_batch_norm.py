"""What batch norm has to know of the other processes when several train on one batch: sums, in [C] vectors.

Each process has a slice of the batch, maybe an empty one. `Total` is all that is known of the others, and two
calls of it per batch norm is all that is said: the statistics in the first forward, the two sums of the
backward. Everything that follows from the totals is the same arithmetic everywhere, so that all processes have
bitwise the same statistics. Recomputations say nothing: they use what the first run has found.

The calls come in an order that depends on the model alone (which parameters are trainable and which batch norms
are in training included), never on the schedule, the slice or the process: forward by stage and within a block
bn1 … bn_n, then the shortcut's; backward by stage from the last, and within a block the shortcut's, then bn_n …
bn1. A backward that needs no gradient of its input has nothing to ask, and does not call.

Method: Ioffe and Szegedy, "Batch Normalization", ICML 2015, with the sums of `torch.nn.SyncBatchNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Total: TypeAlias = Callable[[Tensor], None]
"""Sums a contiguous float64 vector over all processes, in place; returns when the tensor may be used."""


def sum_sizes(norms: Iterable[Sequence[nn.BatchNorm2d]]) -> tuple[int, ...]:
    """Elements of every sum of one pass over a chain whose stages have these batch norms, forward then backward:
    2C + 1 (sum, sum of squares, count) and 2C (of the gradient, and of it with the normalised input) for C channels."""
    channels = [norm.num_features for stage in norms for norm in stage]
    return (*(2 * count + 1 for count in channels), *(2 * count for count in reversed(channels)))


def global_statistics(z: Tensor, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, [C], and values per channel, [], of all processes' z, [N, C, H, W]; float64 on
    z's device. N may be 0.

    One call of `total`, on 2C + 1 values. Sums of squares lose digits where the mean is large beside the standard
    deviation, but they are float64, and each process's share is made of its own mean and variance.
    """
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


def statistics_dtype(z: Tensor) -> torch.dtype:
    """Of the mean and the inverse standard deviation that normalise z."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this process's z, in float32 at least."""
    if isinstance(z, FakeTensor):  # the kernel below has no fake one: torch would run it on real zeros of z's size
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        return mean, var
    # Given running statistics (which momentum 0 leaves alone), the CPU's kernel answers in their dtype, not in z's.
    unmoved = [z.new_zeros(z.shape[1], dtype=statistics_dtype(z)) for _ in range(2)]
    return torch.ops.aten.batch_norm_update_stats(z, *unmoved, 0.0)


def move_running(running_mean: Tensor, running_var: Tensor, stats: tuple[Tensor, Tensor, Tensor], w: float) -> None:
    """Moves the running statistics by the share `w` towards what `global_statistics` says; the variance that is
    kept is the unbiased one. Computed in float64, rounded once."""
    mean, var, count = stats
    running_mean.copy_(running_mean.double().lerp_(mean, w))
    running_var.copy_(running_var.double().lerp_(var * (count / (count - 1)), w))
