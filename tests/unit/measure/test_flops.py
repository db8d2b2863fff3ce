"""Operations of a call: as torch counts them, where it is right, and by hand where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from lowmem.measure.flops import flops_of
from lowmem.measure.tensors import TensorMeter

aten = torch.ops.aten
SIMPLE = ([1, 2], [1, 0], [1, 1], False, [0, 0], 1)
TRANSPOSED = ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)


def _made(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm": (aten.mm.default, (*_made((3, 4), (4, 5)),)),
    "addmm": (aten.addmm.default, (*_made((5,), (3, 4), (4, 5)),)),
    "bmm": (aten.bmm.default, (*_made((2, 3, 4), (2, 4, 5)),)),
    "baddbmm": (aten.baddbmm.default, (*_made((2, 3, 5), (2, 3, 4), (2, 4, 5)),)),
    "convolution": (aten.convolution.default, (*_made((2, 3, 8, 9), (5, 3, 3, 3)), None, *SIMPLE)),
    "grouped": (aten.convolution.default, (*_made((2, 4, 8, 9), (6, 2, 3, 3)), None, *SIMPLE[:-1], 2)),
    "dilated": (
        aten.convolution.default,
        (*_made((2, 3, 9, 9), (5, 3, 3, 3)), None, [2, 2], [2, 2], [2, 2], False, [0, 0], 1),
    ),
    "transposed": (aten.convolution.default, (*_made((2, 5, 4, 4), (5, 3, 3, 3)), None, *TRANSPOSED)),
    "backward": (
        aten.convolution_backward.default,
        (*_made((2, 5, 8, 4), (2, 3, 8, 9), (5, 3, 3, 3)), None, *SIMPLE, [True] * 2 + [False]),
    ),
    "weight alone": (
        aten.convolution_backward.default,
        (*_made((2, 5, 8, 4), (2, 3, 8, 9), (5, 3, 3, 3)), None, *SIMPLE, [False, True, False]),
    ),
    "transposed backward": (
        aten.convolution_backward.default,
        (*_made((2, 3, 8, 8), (2, 5, 4, 4), (5, 3, 3, 3)), None, *TRANSPOSED, [True] * 2 + [False]),
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_as_the_library_counts(name: str) -> None:
    func, args = CALLS[name]
    result = func(*args)
    assert flops_of(func, args, {}, result) == flop_registry[func.overloadpacket](*args, out_val=result) > 0


def test_a_grouped_weight_meets_its_own_channels_only() -> None:
    """Depthwise: as many operations for each gradient as forward."""
    args = (*_made((2, 8, 6, 6), (2, 8, 6, 6), (8, 1, 3, 3)), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 8)
    forward = 2 * (2 * 8 * 6 * 6) * 9
    for mask, times in (([True, False, False], 1), ([False, True, False], 1), ([True, True, False], 2)):
        result = aten.convolution_backward(*args, mask)
        assert flops_of(aten.convolution_backward.default, (*args, mask), {}, result) == times * forward


def test_attention_on_the_cpu_counts() -> None:
    q, k, v = (torch.rand(2, 3, size, 8, requires_grad=True) for size in (5, 7, 7))
    with TensorMeter() as meter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        products = 2 * (2 * 3) * 5 * 7 * 8
        assert meter.flops == 2 * products
        out.sum().backward()
    assert meter.flops == 7 * products


def test_others_count_nothing() -> None:
    x = torch.rand(3)
    assert flops_of(aten.add.Tensor, (x, x), {}, x) == 0
