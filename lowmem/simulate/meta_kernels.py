"""Shapes, strides and dtypes of operations' results, on `meta` tensors.

Torch's own kernels for `meta` are the reference, but most of them are Python that imports torch._dynamo when it first
runs, over a second of every plan, and takes milliseconds a call. So the operations that training steps are made of have
light ones here, which the tests hold equal to torch's and to what real tensors do; every other operation is run on
`FakeTensorMode`, torch's own simulation, whatever it costs. Each is only asked once per geometry (`effects.py`).
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.core.errors import PreflightError
from lowmem.core.reading import shorten
from lowmem.measure.tensors import tensors_among
from lowmem.simulate.layouts import elementwise_strides, like, memory_format
from lowmem.simulate.meta_layers import LAYERS

_aten = torch.ops.aten
_HOUSE = Path(__file__).parents[1]


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
            raise needs_values(func) from error


def needs_values(func: Any) -> PreflightError:
    """Of a call whose result hangs on the values of tensors. Names the line of the network's code that it is from."""
    here, torchs, ours = (f"{place}{os.sep}" for place in (Path(__file__).parent, Path(torch.__file__).parent, _HOUSE))
    calls = dropwhile(lambda one: one.filename.startswith(here), reversed(traceback.extract_stack()))
    inside = takewhile(lambda one: not one.filename.startswith(ours), calls)
    place = next((one for one in inside if not one.filename.startswith((torchs, "<"))), None)
    line = "" if place is None else f"{Path(place.filename).name}, line {place.lineno} (`{shorten(place.line, 80)}`): "
    return PreflightError(
        f"{line}{func} asks for the values of a tensor, and a step's memory is predicted without any: the network "
        "cannot be planned; write it without them (torch.where for an if)"
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


def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise RuntimeError(f"matrices of {list(left.shape)} and {list(right.shape)} cannot be multiplied")
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def _added_product(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> Tensor:
    return _matrix_product(left, right)


def _scattered(grad: Tensor, sizes: list[int], *_: Any) -> Tensor:
    """The gradient of a part, within zeros."""
    return grad.new_empty(sizes)


def _full(size: list[int], fill: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = {bool: torch.bool, int: torch.int64}.get(type(fill), torch.get_default_dtype())
    return torch.empty(size, **{**kwargs, "device": "meta"})


def _factory(size: list[int], *_: Any, **kwargs: Any) -> Tensor:
    return torch.empty(size, **{**kwargs, "device": "meta"})


def _empty_strided(size: list[int], strides: list[int], **kwargs: Any) -> Tensor:
    return torch.empty_strided(size, strides, **{**kwargs, "device": "meta"})


def _each(tensors: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [like(tensor) for tensor in tensors]


_KERNELS: dict[Any, Callable[..., Any]] = {
    **LAYERS,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.mean.default: _mean_of_all,
    _aten.mean.dim: _mean,
    _aten.var_mean.correction: _var_mean,
    _aten.index.Tensor: _index,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.argmax.default: _argmax,
    _aten.embedding.default: _embedding,
    _aten.mm.default: _matrix_product,
    _aten.bmm.default: _matrix_product,
    _aten.baddbmm.default: _added_product,
    _aten.select_backward.default: _scattered,
    _aten.slice_backward.default: _scattered,
    _aten.addmm.default: _added_product,
    _aten.index_put.default: like,
    _aten.embedding_dense_backward.default: _embedding_backward,
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
    _aten.empty_strided.default: _empty_strided,
    _aten.lift_fresh.default: _aten.alias.default,
    _aten._foreach_add.List: _each,
    _aten._foreach_add.Scalar: _each,
    _aten._foreach_mul.List: _each,
    _aten._foreach_mul.Scalar: _each,
    _aten._foreach_sqrt.default: _each,
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
