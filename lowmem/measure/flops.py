"""Operations of a call: a multiplication and its addition are two; what is not a product of matrices counts nothing.

As `torch.utils.flop_counter` counts them, whose import takes a quarter of a second and more (it imports Triton), but
for two things that it gets wrong: the gradient of a grouped convolution's weight (it counts all pairs of channels), and
attention on the CPU (it does not know it). What else it knows is counted by its formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch

_aten = torch.ops.aten


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of one call of an operation of `torch.ops`; 0 for what has no formula."""
    packet = func.overloadpacket
    own = _FORMULAS.get(packet)
    if own is not None:
        return own(*args)
    formula = _library_formula(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _matrix_product(left: Any, right: Any, *_: Any) -> int:
    """[..., m, k] and [..., k, n]."""
    return 2 * prod(left.shape) * right.shape[-1]


def _added_product(_: Any, left: Any, right: Any, *__: Any) -> int:
    return _matrix_product(left, right)


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any
) -> int:
    # Each element of the output, of the input if transposed, meets each of the weight's that its channel has.
    if transposed:
        return 2 * prod(x.shape) // x.shape[1] * prod(weight.shape)
    sizes = [
        (size + 2 * pad - reach * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, reach in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return 2 * x.shape[0] * prod(sizes) * prod(weight.shape)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any) -> int:
    # The same products as forward, once for each gradient.
    transposed, mask = rest[4], rest[7]
    points = x if transposed else grad
    return 2 * prod(points.shape) // points.shape[1] * prod(weight.shape) * sum(mask[:2])


def _attention(query: Any, key: Any, value: Any, *_: Any) -> int:
    """[..., queries, d], [..., keys, d], [..., keys, v]: scores, and what they weigh."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any) -> int:
    """Scores again, and two products for each of the forward's two."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mm: _matrix_product,
    _aten.bmm: _matrix_product,
    _aten.addmm: _added_product,
    _aten.baddbmm: _added_product,
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@cache
def _library_formula(packet: Any) -> Any:
    name = packet.__name__
    if not any(part in name for part in ("mm", "conv", "attention")):
        return None
    from torch.utils.flop_counter import flop_registry

    return flop_registry.get(packet)
