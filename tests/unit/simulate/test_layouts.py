"""Strides of results, against what the CPU's kernels make of tensors that lie in memory in any way."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.simulate.layouts import elementwise_strides, like, memory_format


def _any(draw: random.Random, shape: list[int]) -> Tensor:
    """Permuted, cut out of a larger one, spread over a dimension, or none of these."""
    order = draw.sample(range(len(shape)), len(shape))
    room = [size + draw.choice((0, 0, 0, 2)) for size in shape]
    base = torch.zeros([room[dim] for dim in order])
    tensor = base.permute([order.index(dim) for dim in range(len(shape))])
    tensor = tensor[tuple(slice(0, size) for size in shape)]
    spread = draw.randrange(len(shape) * 3)
    return tensor.narrow(spread, 0, 1).expand(shape) if spread < len(shape) and shape[spread] else tensor


def _told(strides: object, tensor: Tensor) -> list[int]:
    """Without those of dimensions that have one element."""
    assert isinstance(strides, (list, tuple))
    return [stride for stride, size in zip(strides, tensor.shape, strict=True) if size != 1]


def test_elementwise_results() -> None:
    draw = random.Random(0)
    for _ in range(600):
        shape = [draw.choice((1, 2, 3, 4)) for _ in range(draw.randint(1, 5))]
        one, other = _any(draw, shape), _any(draw, shape)
        pair = [one, other]
        assert _told(elementwise_strides(shape, pair), one) == _told((one + other).stride(), one), (
            shape,
            [tensor.stride() for tensor in pair],
        )


def test_copies_and_formats() -> None:
    draw = random.Random(1)
    for _ in range(600):
        tensor = _any(draw, [draw.choice((1, 2, 3)) for _ in range(draw.randint(1, 5))])
        assert _told(like(tensor).stride(), tensor) == _told(torch.empty_like(tensor).stride(), tensor), tensor.stride()
        if tensor.dim() > 3:  # a result that torch gives its operand's memory format
            result = F.interpolate(tensor, size=tensor.shape[2:], mode="nearest")
            told = torch.empty(tensor.shape, memory_format=memory_format(tensor))
            assert told.stride() == result.stride(), (tensor.shape, tensor.stride())
