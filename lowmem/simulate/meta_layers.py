"""Shapes, strides and dtypes of what networks' layers and losses make, on `meta` tensors: see `meta_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.measure.outline import OutlineStorage, geometry_of, outline
from lowmem.simulate.layouts import like, memory_format

_aten = torch.ops.aten


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    if x.dtype != weight.dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    if (layout := _convolution_layout(x, weight, {"bias": bias}, rest)) is None:
        return NotImplemented
    stride, padding, dilation, transposed, output_padding, groups = rest
    taken, made = weight.shape[1] * (1 if transposed else groups), weight.shape[0]
    if transposed:
        taken, made = made, weight.shape[1] * groups
    if x.shape[1] != taken:
        raise RuntimeError(f"convolution: the input has {x.shape[1]} channels, the weight takes {taken}")
    sizes = []
    for dim, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        reach, step, pad = dilation[dim] * (kernel - 1) + 1, stride[dim], padding[dim]
        grown = (size - 1) * step - 2 * pad + reach + output_padding[dim]
        sizes.append(grown if transposed else (size + 2 * pad - reach) // step + 1)
    return torch.empty((x.shape[0], made, *sizes), dtype=x.dtype, device="meta", memory_format=layout)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any) -> Any:
    *how, mask = rest
    if (layout := _convolution_layout(x, weight, {"bias": None, "bias_sizes": bias_sizes}, how)) is None:
        return NotImplemented
    grad_x = like(x, memory_format=layout) if mask[0] else None
    grad_weight = like(weight, memory_format=layout) if mask[1] else None
    return grad_x, grad_weight, grad.new_empty(grad.shape[1]) if mask[2] else None


def _convolution_layout(
    x: Tensor, weight: Tensor, bias: dict[str, Any], how: Sequence[Any]
) -> torch.memory_format | None:
    """Of its results: the kernel's, which torch chooses by all but the values (`torch._subclasses.fake_impls.conv`).
    None for what it is not asked about: one dimension, or a picture without a batch."""
    if weight.dim() != x.dim() or weight.dim() == 3:
        return None
    operands = [_on_cpu(x), _on_cpu(weight)]
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    said = {name: _on_cpu(value) if isinstance(value, Tensor) else value for name, value in bias.items()}
    library: Any = torch._C
    kernel = library._select_conv_backend(*operands, **said, **dict(zip(names, how, strict=True)))
    layout: torch.memory_format = library._conv_determine_backend_memory_format(*operands, kernel)
    return layout


def _on_cpu(tensor: Tensor) -> Tensor:
    return outline(geometry_of(tensor), OutlineStorage(0))


def _batch_norm(z: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own for `meta` has statistics in the input's dtype; kernels have the weight's."""
    dtype = z.dtype if weight is None else weight.dtype
    size = z.shape[1] if rest[3] else 0  # in training
    return like(z), z.new_empty(size, dtype=dtype), z.new_empty(size, dtype=dtype)


def _batch_norm_backward(grad: Tensor, z: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    mask = rest[-1]
    dtype = z.dtype if weight is None else weight.dtype
    sizes = [z.new_empty(z.shape[1], dtype=dtype) if wanted else None for wanted in mask[1:]]
    return like(z) if mask[0] else None, *sizes


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    outer = x.dim() - len(shape)
    size = (*x.shape[:outer], *(1 for _ in shape))
    statistics = x.dtype if weight is None else weight.dtype
    return (
        like(x, memory_format=torch.contiguous_format),
        x.new_empty(size, dtype=statistics),
        x.new_empty(size, dtype=statistics),
    )


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Any, bias: Any, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    given = (x, weight, bias)
    made = (x, weight, x.new_empty(shape, dtype=x.dtype if bias is None else bias.dtype))
    return tuple(
        like(model, memory_format=torch.contiguous_format) if wanted and one is not None else None
        for wanted, one, model in zip(mask, given, made, strict=True)
    )


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Any, n: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.dtype if weight is None else weight.dtype
    each = [x.new_empty((n, groups), dtype=statistics) for _ in range(2)]
    return like(x, memory_format=memory_format(x)), each[0], each[1]


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    dtype = x.dtype if weight is None else weight.dtype
    sizes = [x.new_empty(x.shape[1], dtype=dtype) if wanted else None for wanted in rest[-1][1:]]
    return like(x, memory_format=memory_format(x)) if rest[-1][0] else None, *sizes


def _average_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, *_: Any
) -> Tensor:
    return _pooled(x, _window_sizes(x, kernel, stride, padding, 1, ceil_mode))


def _max_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    sizes = _window_sizes(x, kernel, stride, padding, dilation, ceil_mode)
    return _pooled(x, sizes), _pooled(x, sizes, torch.int64)


def _pool_backward(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return like(x, memory_format=memory_format(x))


def _window_sizes(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> list[int]:
    """Of what a pooling makes (aten/src/ATen/native/Pool.h)."""
    sizes = []
    for place, size in enumerate(x.shape[-2:]):
        length, step, pad, spread = (_one_of(value, place) for value in (kernel, stride or kernel, padding, dilation))
        free = size + 2 * pad - spread * (length - 1) - 1
        count = (free + (step - 1 if ceil_mode else 0)) // step + 1
        sizes.append(count - 1 if ceil_mode and (count - 1) * step >= size + pad else count)
    return sizes


def _one_of(value: Any, place: int) -> int:
    return value[place % len(value)] if isinstance(value, (list, tuple)) else value


def _pooled(x: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    shape = (*x.shape[:-2], *sizes)
    return torch.empty(shape, dtype=dtype or x.dtype, device="meta", memory_format=memory_format(x))


def _resized(x: Tensor, sizes: list[int], *_: Any) -> Tensor:
    return _pooled(x, sizes)


def _resized_backward(grad: Tensor, sizes: list[int], input_sizes: list[int], *_: Any) -> Tensor:
    return torch.empty(input_sizes, dtype=grad.dtype, device="meta", memory_format=memory_format(grad))


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return like(x, dtype=torch.float32 if half_to_float else x.dtype, memory_format=torch.contiguous_format)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return like(grad, dtype=input_dtype, memory_format=torch.contiguous_format)


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, _: int) -> tuple[Tensor, Tensor]:
    each = reduction == 0 and x.dim() == 2
    return x.new_empty(x.shape[:1] if each else ()), x.new_empty(())


def _nll_loss_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return like(x, memory_format=torch.contiguous_format)


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return like(x), like(x, dtype=torch.bool)


LAYERS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten._softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten.avg_pool2d.default: _average_pool,
    _aten.avg_pool2d_backward.default: _pool_backward,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.max_pool2d_with_indices_backward.default: _pool_backward,
    _aten._adaptive_avg_pool2d.default: _pooled,
    _aten._adaptive_avg_pool2d_backward.default: _pool_backward,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten.nll_loss_forward.default: _nll_loss,
    _aten.nll_loss_backward.default: _nll_loss_backward,
    _aten.native_dropout.default: _dropout,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.upsample_bilinear2d.default: _resized,
    _aten.upsample_nearest2d.default: _resized,
    _aten.upsample_bilinear2d_backward.default: _resized_backward,
    _aten.upsample_nearest2d_backward.default: _resized_backward,
}
