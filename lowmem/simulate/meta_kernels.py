"""Shapes, strides and dtypes of operations' results, on `meta` tensors.

Torch's own kernels for `meta` are the reference, but most of them are Python that imports torch._dynamo when it first
runs, over a second of every plan, and takes milliseconds a call. So the operations that training steps are made of have
light ones here, which the tests hold equal to torch's and to what real tensors do; every other operation is run on
`FakeTensorMode`, torch's own simulation, whatever it costs. Each is only asked once per geometry (`effects.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.core.errors import PreflightError
from lowmem.measure.outline import OutlineStorage, geometry_of, outline
from lowmem.measure.tensors import tensors_among
from lowmem.simulate.layouts import elementwise_strides, like, memory_format

_aten = torch.ops.aten


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation's result, in tensors on `meta`; `func` neither writes its arguments nor needs their values."""
    kernel = _KERNELS.get(func)
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        if kernel is not None and (result := kernel(*args, **kwargs)) is not NotImplemented:
            return result
        if func.is_view or func.overloadpacket.__name__ in _LIGHT:
            return func(*args, **kwargs)
        if not tensors_among((*args, *kwargs.values())):
            made = func(*args, **{**kwargs, "device": "cpu"})  # a range or the like, small enough to look at
            return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
        if kernel is None and (torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _ELEMENTWISE):
            return _pointwise(func, args, kwargs)
    return _by_fake_tensors(func, args, kwargs)


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """By the rules of torch's TensorIterator: broadcast, and laid out as the operands are. The dtype is what the CPU's
    kernel makes of one element."""
    operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    shape = torch.broadcast_tensors(*operands)[0].shape
    probes = [_probe(value) for value in args]
    dtype = func(*probes, **{name: _probe(value) for name, value in kwargs.items()}).dtype
    return torch.empty_strided(shape, elementwise_strides(shape, operands), dtype=dtype, device="meta")


def _probe(value: Any) -> Any:
    return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, Tensor) else value


def _by_fake_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from torch._subclasses import fake_tensor
    from torch.utils._python_dispatch import _disable_current_modes

    mode = fake_tensor.FakeTensorMode()
    cpu = torch.device("cpu")

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fake_tensor.FakeTensor(mode, value, cpu)
        return type(value)(map(fake, value)) if isinstance(value, (list, tuple)) else value

    kwargs = {**kwargs, "device": cpu} if kwargs.get("device") is not None else kwargs
    unknowable = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    with _disable_current_modes(), torch.no_grad():
        try:
            with mode:
                return func(*map(fake, args), **{name: fake(value) for name, value in kwargs.items()})
        except (*unknowable, fake_tensor.UnsupportedOperatorException, NotImplementedError) as error:
            raise PreflightError(f"{func} cannot be simulated without data, so the step cannot be planned") from error


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
    kernel = torch._C._select_conv_backend(*operands, **said, **dict(zip(names, how, strict=True)))  # type: ignore[attr-defined]
    return torch._C._conv_determine_backend_memory_format(*operands, kernel)  # type: ignore[attr-defined]


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


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """In the memory format that all have, else contiguous."""
    real = [tensor for tensor in tensors if tensor.shape != (0,)] or tensors[:1]
    shape = list(real[0].shape)
    if shape:
        shape[dim] = sum(tensor.shape[dim] for tensor in real) if real[0].shape != (0,) else 0
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    formats = {memory_format(tensor) for tensor in real}
    layout = formats.pop() if len(formats) == 1 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    dim %= len(shape) + 1
    if dim == len(shape):
        return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)
    shape.insert(dim, len(tensors))
    return _cat(tensors, dim).view(shape)


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return NotImplemented
    return _aten.index.Tensor(x, indices)


def _reduced(x: Tensor, dim: Any, keepdim: bool, dtype: torch.dtype) -> Tensor:
    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = {one % max(x.dim(), 1) for one in dims}
    shape = [1 if one in gone else size for one, size in enumerate(x.shape) if keepdim or one not in gone]
    return torch.empty(shape, dtype=dtype, device="meta")


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    whole = not (x.dtype.is_floating_point or x.dtype.is_complex)
    return _reduced(x, dim, keepdim, dtype or (torch.int64 if whole else x.dtype))


def _argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _reduced(x, dim, keepdim, torch.int64)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return like(x, dtype=torch.float32 if half_to_float else x.dtype, memory_format=torch.contiguous_format)


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*indices.shape, *weight.shape[1:]))


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _reduced(x, dim, keepdim, dtype or x.dtype)


def _mean_of_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((), dtype=dtype or x.dtype)


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _mean(x, dim, keepdim), _mean(x, dim, keepdim)


def _embedding_backward(grad: Tensor, indices: Tensor, count: int, *_: Any) -> Tensor:
    return grad.new_empty((count, grad.shape[-1]))


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


def _resized(x: Tensor, sizes: list[int], *_: Any) -> Tensor:
    return _pooled(x, sizes)


def _resized_backward(grad: Tensor, sizes: list[int], input_sizes: list[int], *_: Any) -> Tensor:
    return torch.empty(input_sizes, dtype=grad.dtype, device="meta", memory_format=memory_format(grad))


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return like(grad, dtype=input_dtype, memory_format=torch.contiguous_format)


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, _: int) -> tuple[Tensor, Tensor]:
    each = reduction == 0 and x.dim() == 2
    return x.new_empty(x.shape[:1] if each else ()), x.new_empty(())


def _nll_loss_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return like(x, memory_format=torch.contiguous_format)


def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise RuntimeError(f"matrices of {list(left.shape)} and {list(right.shape)} cannot be multiplied")
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def _added_product(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> Tensor:
    return _matrix_product(left, right)


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


def _average_pool(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, *_: Any) -> Tensor:
    return _pooled(x, _window_sizes(x, kernel, stride, padding, 1, ceil_mode))


def _max_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    sizes = _window_sizes(x, kernel, stride, padding, dilation, ceil_mode)
    return _pooled(x, sizes), _pooled(x, sizes, torch.int64)


def _pool_backward(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return like(x, memory_format=memory_format(x))


def _scattered(grad: Tensor, sizes: list[int], *_: Any) -> Tensor:
    """The gradient of a part, within zeros."""
    return grad.new_empty(sizes)


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return like(x), like(x, dtype=torch.bool)


def _full(size: list[int], fill: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = {bool: torch.bool, int: torch.int64}.get(type(fill), torch.get_default_dtype())
    return torch.empty(size, **{**kwargs, "device": "meta"})


def _factory(size: list[int], *_: Any, **kwargs: Any) -> Tensor:
    return torch.empty(size, **{**kwargs, "device": "meta"})


_KERNELS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.mean.default: _mean_of_all,
    _aten.mean.dim: _mean,
    _aten.var_mean.correction: _var_mean,
    _aten.index.Tensor: _index,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.argmax.default: _argmax,
    _aten._softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten.embedding.default: _embedding,
    _aten.mm.default: _matrix_product,
    _aten.bmm.default: _matrix_product,
    _aten.baddbmm.default: _added_product,
    _aten.avg_pool2d.default: _average_pool,
    _aten.avg_pool2d_backward.default: _pool_backward,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.max_pool2d_with_indices_backward.default: _pool_backward,
    _aten._adaptive_avg_pool2d.default: _pooled,
    _aten._adaptive_avg_pool2d_backward.default: _pool_backward,
    _aten.select_backward.default: _scattered,
    _aten.slice_backward.default: _scattered,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten.nll_loss_forward.default: _nll_loss,
    _aten.nll_loss_backward.default: _nll_loss_backward,
    _aten.addmm.default: _added_product,
    _aten.native_dropout.default: _dropout,
    _aten.index_put.default: like,
    _aten.embedding_dense_backward.default: _embedding_backward,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.upsample_bilinear2d.default: _resized,
    _aten.upsample_nearest2d.default: _resized,
    _aten.upsample_bilinear2d_backward.default: _resized_backward,
    _aten.upsample_nearest2d_backward.default: _resized_backward,
    _aten.roll.default: like,
    _aten.empty_like.default: like,
    _aten.zeros_like.default: like,
    _aten.ones_like.default: like,
    _aten.rand_like.default: like,
    _aten.randn_like.default: like,
    _aten.full_like.default: like,
    _aten.clone.default: like,
    _aten.zeros.default: _factory,
    _aten.ones.default: _factory,
    _aten.rand.default: _factory,
    _aten.randn.default: _factory,
    _aten.full.default: _full,
    _aten.empty.memory_format: _factory,
    _aten.empty_strided.default: lambda size, strides, **kwargs: torch.empty_strided(
        size, strides, **{**kwargs, "device": "meta"}
    ),
    _aten.lift_fresh.default: _aten.alias.default,
}

# Elementwise, though torch does not say so.
_ELEMENTWISE = frozenset(
    {"hardswish", "hardswish_backward", "hardtanh_backward", "hardsigmoid_backward", "leaky_relu_backward"}
    | {"elu_backward", "mish_backward", "softplus_backward"}
)

# Those whose own kernels for `meta` import nothing, or no more than sympy.
_LIGHT = frozenset(
    {"_to_copy", "new_empty", "new_empty_strided", "new_zeros", "constant_pad_nd", "_unsafe_view", "bernoulli", "max"}
    | {"is_same_size", "silu_backward", "topk"}
    | {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
)
