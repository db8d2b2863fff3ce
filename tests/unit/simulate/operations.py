"""One call of each kind of operation that training steps are made of, on tensors that `make` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


class Make(Protocol):
    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """[shape], in the memory format and dtype that are tried; int64 for indices."""


def _conv(x: tuple[int, ...], w: tuple[int, ...], *, bias: bool = False, **how: Any) -> Callable[[Make], Any]:
    values = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "transposed": False, "output_padding": [0, 0]}
    how = {**values, "groups": 1, **how}
    order = [how[name] for name in (*values, "groups")]

    def call(make: Make) -> Any:
        made = w[1] * how["groups"] if how["transposed"] else w[0]
        operands = make(*x), make(*w), make(made) if bias else None
        forward = aten.convolution(*operands, *order)
        back = aten.convolution_backward(forward, *operands[:2], [made] if bias else None, *order, [True, True, bias])
        return forward, *back

    return call


def _norm(size: tuple[int, ...], training: bool, low_weight: bool = False) -> Callable[[Make], Any]:
    def call(make: Make) -> Any:
        dtype = None if low_weight else torch.float32
        x, (weight, bias, mean, var) = make(*size), (make(size[1], dtype=dtype) for _ in range(4))
        out, saved_mean, saved_invstd = aten.native_batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5)
        saved = (saved_mean, saved_invstd) if training else (None, None)
        running = (None, None) if training else (mean, var)
        back = aten.native_batch_norm_backward(out, x, weight, *running, *saved, training, 1e-5, [True, True, True])
        return out, saved_mean, saved_invstd, *back

    return call


def _layer_norm(size: tuple[int, ...], over: list[int], affine: bool) -> Callable[[Make], Any]:
    def call(make: Make) -> Any:
        x = make(*size)
        weight, bias = (make(*over), make(*over)) if affine else (None, None)
        out, mean, rstd = aten.native_layer_norm(x, over, weight, bias, 1e-5)
        mask = [True, affine, affine]
        return out, mean, rstd, *aten.native_layer_norm_backward(out, x, over, mean, rstd, weight, bias, mask)

    return call


def _group_norm(make: Make, low_weight: bool) -> Any:
    x, dtype = make(2, 6, 4, 4), None if low_weight else torch.float32
    weight, bias = make(6, dtype=dtype), make(6, dtype=dtype)
    out, mean, rstd = aten.native_group_norm(x, weight, bias, 2, 6, 16, 3, 1e-5)
    back = aten.native_group_norm_backward(out, x, mean, rstd, weight, 2, 6, 16, 3, [True, True, True])
    return out, mean, rstd, *back


def _resized(make: Make) -> Any:
    x = make(2, 4, 6, 6)
    near, far = F.interpolate(x, scale_factor=2.0), F.interpolate(x, size=(4, 9), mode="bilinear")
    back = aten.upsample_bilinear2d_backward(far, [4, 9], [2, 4, 6, 6], False)
    return near, far, back, aten.upsample_nearest2d_backward(near, [12, 12], [2, 4, 6, 6], 2.0, 2.0)


def _max_pool(make: Make, ceil_mode: bool) -> Any:
    x = make(2, 4, 9, 7)
    out, indices = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1], [1, 1], ceil_mode)
    how = ([3, 3], [2, 2], [1, 1], [1, 1], ceil_mode)
    return out, indices, aten.max_pool2d_with_indices_backward(out, x, *how, indices)


def _average_pool(make: Make, kernel: list[int], ceil_mode: bool) -> Any:
    x = make(2, 4, 9, 7)
    out = aten.avg_pool2d(x, kernel, [], [0, 0], ceil_mode)
    return out, aten.avg_pool2d_backward(out, x, kernel, [], [0, 0], ceil_mode, True, None)


def _adaptive(make: Make) -> Any:
    x = make(2, 4, 6, 6)
    out = aten._adaptive_avg_pool2d(x, [2, 3])
    return out, aten._adaptive_avg_pool2d_backward(out, x), F.adaptive_avg_pool2d(x, 1)


def _loss(make: Make, reduction: int) -> Any:
    scores, labels = make(5, 7).float(), make(5, dtype=torch.int64)
    logs = aten._log_softmax(scores, 1, False)
    loss, weight = aten.nll_loss_forward(logs, labels, None, reduction, -100)
    back = aten.nll_loss_backward(loss, logs, labels, None, reduction, -100, weight)
    return logs, loss, weight, back, aten._log_softmax_backward_data(back, logs, 1, torch.float32)


def _softmax(make: Make) -> Any:
    x = make(2, 3, 5, 5)
    out = aten._softmax(x, 1, False)
    return out, aten._softmax_backward_data(out, out, 1, out.dtype)


def _attention(make: Make) -> Any:
    q, k, v = (make(2, 6, 16).view(2, 6, 2, 8).transpose(1, 2) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v)


def _parts(make: Make) -> Any:
    x = make(2, 6, 4, 4)
    return *x.split(2, 1), *x.chunk(2, 2), *x.unbind(0)


def _views(make: Make) -> Any:
    x = make(2, 6, 4, 4)
    y = x[:, 1:3]
    flat = (x.permute(0, 2, 3, 1), x.transpose(1, 2), x[1], x[:, ::2, 1:], x.unsqueeze(0), x[:1].squeeze(0), x.detach())
    return (
        *flat,
        y,
        y.expand(3, 2, 2, 4, 4),
        make(3, 4).t(),
        make(3, 4).view(2, 6),
        make(3, 4).reshape(-1),
        x.flatten(1),
    )


def _copies(make: Make) -> Any:
    x = make(2, 6, 4, 4)
    odd, wide = x[:, 1:3], x[:, :1].expand(2, 6, 4, 4)
    made = [
        x.to(torch.float64),
        x.to(torch.bfloat16),
        odd.to(torch.float64),
        odd.clone(),
        odd.contiguous(),
        wide.clone(),
    ]
    made += [torch.empty_like(one) for one in (x, odd, wide, x.transpose(1, 3))]
    made += [
        torch.zeros_like(odd),
        torch.ones_like(x, dtype=torch.int64),
        x.contiguous(memory_format=torch.channels_last),
    ]
    return *made, x.new_empty(3, 2), x.new_zeros(3, 2, dtype=torch.float64), x.transpose(1, 2).contiguous()


def _factories(make: Make) -> Any:
    made = [torch.empty(2, 3), torch.zeros(4, dtype=torch.int64), torch.ones(2), torch.randn(2, 2), torch.full((2,), 3)]
    made += [torch.full((2,), 0.5), torch.arange(5), torch.linspace(0, 1, 3), torch.empty_strided((2, 3), (1, 2))]
    return (
        *made,
        torch.empty(2, 3, 4, 4, memory_format=torch.channels_last),
        torch.rand(3),
        torch.eye(3),
        torch.zeros(()),
    )


def _elementwise(make: Make) -> Any:
    x, y, channel = make(2, 6, 4, 4), make(2, 6, 4, 4), make(6, 1, 1)
    made = [x + y, x * channel, channel * x, x + 1, x / 2, 2 - x, x.relu(), torch.sigmoid(x), F.gelu(x), F.silu(x)]
    made += [
        F.hardtanh(x),
        F.hardswish(x),
        torch.where(x > y, x, y),
        x != y,
        x.double() + y,
        x.exp(),
        x + x.transpose(2, 3),
    ]
    made += [
        x[:, 1:3] * 2,
        x[:, :1].expand(2, 6, 4, 4) + 1,
        x.transpose(1, 3) + y.permute(0, 3, 2, 1),
        x.permute(1, 0, 2, 3) * 1.5,
    ]
    made += [make(3, 1) + make(1, 4), make(4) * make(3, 4), make(3, 4).t() + make(4, 3), x * make(2, 1, 4, 1)]
    made += [aten.threshold_backward(x, y, 0), aten.gelu_backward(x, y), aten.silu_backward(x, y), x.clamp(0, 1)]
    made += [aten.hardtanh_backward(x, y, 0.0, 6.0), aten.hardswish_backward(x, y), aten.hardsigmoid_backward(x, y)]
    made += [aten.leaky_relu_backward(x, y, 0.1, False), aten.elu_backward(x, 1.0, 1.0, 1.0, False, y)]
    return *made, make(3, dtype=torch.int64) / 2, make(3, dtype=torch.int64) + 1.5, make(3, dtype=torch.int64) * 2


def _odd_sizes(make: Make) -> Any:
    """Sizes of one, and none."""
    thin, point, none = make(2, 1, 4, 4), make(3, 5, 1, 1), make(0, 3, 4, 4)
    made = [thin + make(2, 6, 4, 4), thin * 2, point + 1, point + make(3, 5, 1, 1), none.relu(), none + 1, thin.clone()]
    return (
        *made,
        torch.empty_like(point),
        point.to(torch.float64),
        torch.cat([thin, thin], 1),
        torch.cat([point, point]),
    )


def _in_place(make: Make) -> Any:
    x, y = make(2, 6, 4, 4), make(2, 6, 4, 4)
    aten.threshold_backward.grad_input(x, y, 0, grad_input=x)
    x[:, 1:3].mul_(2)
    turned, thin = make(3, 4), make(1, 3)
    turned.t_(), thin.squeeze_(0), thin.unsqueeze_(1)
    return turned, thin, x.relu_(), x.add_(y), x.copy_(y), y.zero_(), y.fill_(2), x.mul_(y).clamp_(0, 1)


def _reductions(make: Make) -> Any:
    x = make(2, 6, 4, 4)
    made = [x.sum(), x.sum(1), x.sum((0, 2, 3), keepdim=True), x.mean(), x.mean((2, 3)), x.mean(1, True), x.argmax(1)]
    made += [*torch.var_mean(x, (0, 2, 3), correction=0), x.argmax(), (x > 0).sum(), x.sum(dtype=torch.float64)]
    return *made, x.amax(1), x.max(), *x.max(1), x.norm()


def _matrices(make: Make) -> Any:
    a, b, c = make(3, 4), make(4, 5), make(5)
    stacked = make(2, 3, 4), make(2, 4, 5)
    made = [a @ b, torch.addmm(c, a, b), F.linear(a, make(5, 4), c), F.linear(make(2, 3, 4), make(5, 4)), b.t() @ a.t()]
    return (
        *made,
        torch.bmm(*stacked),
        torch.baddbmm(make(2, 3, 5), *stacked),
        stacked[0].transpose(1, 2).bmm(make(2, 3, 2)),
    )


def _joins(make: Make) -> Any:
    x, y = make(2, 6, 4, 4), make(2, 2, 4, 4)
    made = [
        torch.cat([x, y], 1),
        torch.cat([x, x]),
        torch.cat([x.contiguous(), y.transpose(2, 3)], 1),
        torch.stack([x, x]),
    ]
    return *made, torch.cat([make(3), make(4)]), torch.cat([make(0), make(2, 3)]), torch.stack([make(3), make(3)], 1)


def _others(make: Make) -> Any:
    x = make(2, 4, 6, 6)
    made = [F.pad(x, (1, 1, 2, 0)), *aten.native_dropout(x, 0.5, True)]
    made += [F.embedding(make(2, 3, dtype=torch.int64), make(7, 5)), make(7, 5)[make(4, dtype=torch.int64)]]
    made.append(aten.index_put(x, [make(2, dtype=torch.int64)], make(2, 4, 6, 6)))
    made.append(aten.embedding_dense_backward(make(2, 3, 5), make(2, 3, dtype=torch.int64), 7, -1, False))
    return *made, aten.select_backward(x[0], x.shape, 0, 1), aten.slice_backward(x[:1], x.shape, 0, 0, 1, 1), *x.topk(2)


def _lists(make: Make) -> Any:
    many = [make(3), make(2, 6, 4, 4)[:, 1:3]]
    made = [torch._foreach_add(many, 1.0), torch._foreach_mul(many, many), torch._foreach_sqrt(many)]
    return [one for some in made for one in some]


def _rare(make: Make) -> Any:
    """Those that have no kernel here, so that torch's simulation is asked."""
    x = make(2, 4, 6, 6)
    return x.cumsum(1), x.tril(), F.conv1d(make(2, 3, 8), make(4, 3, 3))


OPERATIONS: dict[str, Callable[[Make], Any]] = {
    "convolution": _conv((2, 8, 6, 6), (16, 8, 3, 3), padding=[1, 1]),
    "strided convolution with bias": _conv((2, 8, 7, 6), (16, 8, 3, 3), bias=True, stride=[2, 2], padding=[1, 0]),
    "pointwise convolution": _conv((2, 8, 6, 6), (16, 8, 1, 1)),
    "dilated convolution": _conv((2, 8, 9, 9), (4, 8, 3, 3), padding=[2, 2], dilation=[2, 2]),
    "depthwise convolution": _conv((2, 8, 6, 6), (8, 1, 3, 3), groups=8),
    "transposed convolution": _conv(
        (2, 8, 5, 5), (8, 4, 3, 3), bias=True, transposed=True, stride=[2, 2], output_padding=[1, 1]
    ),
    "batch norm": _norm((4, 6, 3, 3), True),
    "batch norm in evaluation": _norm((4, 6, 3, 3), False),
    "layer norm": _layer_norm((2, 3, 8), [8], True),
    "layer norm of pictures": _layer_norm((2, 3, 4, 8), [4, 8], False),
    "group norm": lambda make: _group_norm(make, False),
    "group norm of one dtype": lambda make: _group_norm(make, True),
    "resizing": _resized,
    "max pooling": lambda make: _max_pool(make, False),
    "max pooling, rounded up": lambda make: _max_pool(make, True),
    "average pooling": lambda make: _average_pool(make, [2, 2], False),
    "average pooling, rounded up": lambda make: _average_pool(make, [2], True),
    "adaptive pooling": _adaptive,
    "loss": lambda make: _loss(make, 2),
    "loss of each": lambda make: _loss(make, 0),
    "softmax": _softmax,
    "attention": _attention,
    "parts": _parts,
    "views": _views,
    "copies": _copies,
    "factories": _factories,
    "elementwise": _elementwise,
    "odd sizes": _odd_sizes,
    "in place": _in_place,
    "reductions": _reductions,
    "matrices": _matrices,
    "joins": _joins,
    "others": _others,
    "roll": lambda make: make(2, 4, 6, 6).roll((1, 1), (2, 3)),
    "lists": _lists,
    "rare": _rare,
}
