"""Shapes, strides and dtypes of operations' results, on `meta` tensors.

Torch's own kernels for `meta` are the reference, but most of them are Python that imports torch._dynamo when it first
runs, over a second of every plan, and takes milliseconds a call. So the operations that training steps are made of have
light ones here, which the tests hold equal to torch's and to what real tensors do; every other operation is run on
`FakeTensorMode`, torch's own simulation, whatever it costs. Each is only asked once per geometry (`effects.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides, suggest_memory_format

from lowmem.core.errors import PreflightError
from lowmem.measure.outline import OutlineStorage, geometry_of, outline
from lowmem.measure.tensors import tensors_among

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
        if kernel is None and torch.Tag.pointwise in func.tags:
            return _pointwise(func, args, kwargs)
    return _by_fake_tensors(func, args, kwargs)


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """By the rules of torch's TensorIterator: broadcast, and laid out as the operands are. The dtype is what the CPU's
    kernel makes of one element."""
    operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*[operand.shape for operand in operands])
    large = [operand.expand(shape) for operand in operands if operand.dim()]
    strides = compute_elementwise_output_strides(*large) if large else ()
    probes = [_probe(value) for value in args]
    dtype = func(*probes, **{name: _probe(value) for name, value in kwargs.items()}).dtype
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


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


def _convolution(*args: Any) -> Any:
    """Forward and backward: see `torch._subclasses.fake_impls.conv`, which asks for the kernel's memory format."""
    backward = len(args) == 11
    func = _aten.convolution_backward.default if backward else _aten.convolution.default
    x, weight, rest = (args[1], args[2], args[3:]) if backward else (args[0], args[1], args[2:])
    if weight.dim() != x.dim() or weight.dim() == 3:
        return NotImplemented  # the choice below knows two dimensions and more
    if not backward and x.dtype != weight.dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    # The choice looks at the device, not at data.
    operands = [_on_cpu(x), _on_cpu(weight)]
    bias = {"bias": None, "bias_sizes": rest[0]} if backward else {"bias": None if rest[0] is None else _on_cpu(rest[0])}
    chosen = torch._C._select_conv_backend(*operands, **bias, **dict(zip(names, rest[1:7], strict=True)))  # type: ignore[attr-defined]
    layout = torch._C._conv_determine_backend_memory_format(*operands, chosen)  # type: ignore[attr-defined]
    results = func(*args)
    if not backward:
        return results.to(memory_format=layout)
    return (*[None if one is None else one.to(memory_format=layout) for one in results[:2]], results[2])


def _on_cpu(tensor: Tensor) -> Tensor:
    return outline(geometry_of(tensor), OutlineStorage(0))


def _batch_norm(z: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own for `meta` has statistics in the input's dtype; kernels have the weight's."""
    dtype = z.dtype if weight is None else weight.dtype
    size = z.shape[1] if rest[3] else 0  # in training
    return torch.empty_like(z), z.new_empty(size, dtype=dtype), z.new_empty(size, dtype=dtype)


def _batch_norm_backward(grad: Tensor, z: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    mask = rest[-1]
    dtype = z.dtype if weight is None else weight.dtype
    sizes = [z.new_empty(z.shape[1], dtype=dtype) if wanted else None for wanted in mask[1:]]
    return torch.empty_like(z) if mask[0] else None, *sizes


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    outer = x.dim() - len(shape)
    size = (*x.shape[:outer], *(1 for _ in shape))
    statistics = x.dtype if weight is None else weight.dtype
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(size, dtype=statistics),
        x.new_empty(size, dtype=statistics),
    )


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Any, bias: Any, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    given = (x, weight, bias)
    made = (x, weight, x.new_empty(shape, dtype=x.dtype if bias is None else bias.dtype))
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format) if wanted and one is not None else None
        for wanted, one, like in zip(mask, given, made, strict=True)
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
    formats = {suggest_memory_format(tensor) for tensor in real}
    layout = formats.pop() if len(formats) == 1 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _aten.sum.dim_IntList(x, dim, keepdim, dtype=dtype or x.dtype)


def _mean_of_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((), dtype=dtype or x.dtype)


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _mean(x, dim, keepdim), _mean(x, dim, keepdim)


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _contiguous_like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=input_dtype, memory_format=torch.contiguous_format)


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, _: int) -> tuple[Tensor, Tensor]:
    each = reduction == 0 and x.dim() == 2
    return x.new_empty(x.shape[:1] if each else ()), x.new_empty(())


def _nll_loss_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _full(size: list[int], fill: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = {bool: torch.bool, int: torch.int64}.get(type(fill), torch.get_default_dtype())
    return torch.empty(size, **{**kwargs, "device": "meta"})


def _factory(size: list[int], *_: Any, **kwargs: Any) -> Tensor:
    return torch.empty(size, **{**kwargs, "device": "meta"})


_KERNELS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.mean.default: _mean_of_all,
    _aten.mean.dim: _mean,
    _aten.var_mean.correction: _var_mean,
    _aten._log_softmax.default: _aten._softmax.default,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten.nll_loss_forward.default: _nll_loss,
    _aten.nll_loss_backward.default: _nll_loss_backward,
    _aten.addmm.default: _addmm,
    _aten.native_dropout.default: _dropout,
    _aten.hardswish.default: _like_first,
    _aten.roll.default: _contiguous_like_first,
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

# Those whose own kernel for `meta` imports nothing.
_LIGHT = frozenset(
    {"mm", "bmm", "baddbmm", "avg_pool2d", "avg_pool2d_backward", "max_pool2d_with_indices", "_softmax", "sum", "argmax"}
    | {"max_pool2d_with_indices_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "embedding", "index"}
    | {"_to_copy", "clone", "empty_like", "zeros_like", "ones_like", "new_empty", "new_empty_strided", "new_zeros"}
    | {"constant_pad_nd", "_unsafe_view", "upsample_nearest2d", "select_backward", "slice_backward", "topk", "max"}
    | {"_scaled_dot_product_flash_attention_for_cpu", "bernoulli", "is_same_size", "silu_backward"}
)
