"""How torch lays results out in memory: strides of dense results, on `meta` tensors, by the rules of its C++ sources.

Torch's Python versions of these rules import sympy, a third of a second of every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def elementwise_strides(shape: Sequence[int], operands: list[Tensor]) -> Sequence[int]:
    """Of an elementwise result (aten/src/ATen/TensorIterator.cpp: `compute_fast_setup_type`, `reorder_dimensions`)."""
    if all(operand.shape == shape for operand in operands):
        for layout in (torch.contiguous_format, torch.channels_last):
            if all(operand.is_contiguous(memory_format=layout) for operand in operands):
                return torch.empty(shape, device="meta", memory_format=layout).stride()
        if len({operand.stride() for operand in operands}) == 1 and _is_dense(operands[0]):
            return operands[0].stride()
    spread = [operand.expand(shape).stride() for operand in operands]
    order = list(range(len(shape) - 1, -1, -1))  # from the fastest
    for first in range(1, len(shape)):
        place = first
        for before in range(first - 1, -1, -1):
            verdict = _order(order[before], order[place], shape, spread)
            if verdict > 0:
                order[before], order[place] = order[place], order[before]
                place = before
            elif verdict < 0:
                break
    strides, stride = [0] * len(shape), 1
    for dim in order:
        strides[dim] = stride
        stride *= shape[dim]
    return strides


def _order(one: int, other: int, shape: Sequence[int], spread: list[tuple[int, ...]]) -> int:
    """Whether the first of two dimensions is the faster one (-1), the slower one (1), or neither (0)."""
    for strides in spread:
        left, right = strides[one], strides[other]
        if left == 0 or right == 0:
            continue
        if left != right:
            return -1 if left < right else 1
        if shape[one] > shape[other]:
            return 1
    return 0


def _is_dense(tensor: Tensor) -> bool:
    """Neither gaps nor overlaps."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def like(
    x: Tensor,
    *_: Any,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    **__: Any,
) -> Tensor:
    """As x in all that is not given."""
    dtype = dtype or x.dtype
    if memory_format not in (None, torch.preserve_format):
        return torch.empty(x.shape, dtype=dtype, device="meta", memory_format=memory_format)
    strides = x.stride() if _is_dense(x) else elementwise_strides(x.shape, [x])
    return torch.empty_strided(x.shape, strides, dtype=dtype, device="meta")


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Which one a tensor's strides suggest (c10/core/MemoryFormat.h: `is_channels_last_strides_2d`, `_3d`)."""
    if tensor.dim() not in (4, 5) or tensor.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return torch.contiguous_format
        least = stride * size if size > 1 else stride
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
