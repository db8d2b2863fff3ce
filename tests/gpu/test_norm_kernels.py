"""Batch norm on a card: autograd's bits from the library's choice of kernel, native bits in place, and the same again
in every repetition. Run with `python -m pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.remat.batch_norm import norm_again, norm_backward, norm_first
from lowmem.trial import native_norms
from tests.exact.compare import FORMAT_NAMES, FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_format = pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_kernel = pytest.mark.parametrize("library", [True, False], ids=["library", "native"])


def _input(dtype: torch.dtype, memory_format: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, 24, 9, 9, generator=generator) * 3 + 2
    return values.to("cuda", dtype).contiguous(memory_format=memory_format)


@by_kernel
@by_dtype
@by_format
def test_a_norm_by_hand_has_autograds_bits(memory_format: Any, dtype: torch.dtype, library: bool) -> None:
    ours, theirs = nn.BatchNorm2d(24).cuda(), nn.BatchNorm2d(24).cuda()
    z, grad = _input(dtype, memory_format), _input(dtype, memory_format, seed=1)
    leaf = z.clone().requires_grad_()
    if library:
        expected = theirs(leaf)
    else:
        with native_norms():
            expected = theirs(leaf)
    with torch.autograd.set_multithreading_enabled(False):
        expected.backward(grad)
    with torch.no_grad():
        y, stats = norm_first(ours, z.clone(), False, library)
        assert torch.equal(y, expected)
        found = norm_backward(ours, grad, z, stats, True)
    assert leaf.grad is not None
    assert torch.equal(found.operands[0], leaf.grad)
    for (_, mine), parameter in zip(found.parameters, theirs.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(mine, parameter.grad)
    assert all(torch.equal(*pair) for pair in zip(ours.buffers(), theirs.buffers(), strict=True))


@by_kernel
@by_dtype
@by_format
@torch.no_grad()
def test_a_repeated_norm_has_the_firsts_bits(memory_format: Any, dtype: torch.dtype, library: bool) -> None:
    """Also after norms of the same shape with another eps, another momentum and no running statistics: the library's
    newer batch norm looks its graph up by less than these (pytorch/pytorch#175809)."""
    bn, z = nn.BatchNorm2d(24).cuda(), _input(dtype, memory_format)
    first, stats = norm_first(bn, z.clone(), False, library)
    moved = [buffer.clone() for buffer in bn.buffers()]
    for other in (nn.BatchNorm2d(24, eps=0.5), nn.BatchNorm2d(24, momentum=0.9)):
        norm_first(other.cuda(), z.clone(), False, library)
    torch.nn.functional.batch_norm(z, None, None, bn.weight, bn.bias, training=True)
    for in_place in (False, True):
        assert torch.equal(norm_again(bn, z.clone(), stats, in_place), first)
    assert all(torch.equal(*pair) for pair in zip(bn.buffers(), moved, strict=True))


@by_kernel
@by_dtype
@torch.no_grad()
def test_a_norm_in_evaluation(dtype: torch.dtype, library: bool) -> None:
    """Frozen statistics in a training step, as fine-tuning has them."""
    bn, z = nn.BatchNorm2d(24).cuda(), _input(dtype, torch.contiguous_format)
    bn.running_mean.normal_()  # type: ignore[union-attr]
    bn.eval()
    y, stats = norm_first(bn, z.clone(), False, library)
    assert torch.equal(y, bn(z)) or not library
    assert torch.equal(norm_again(bn, z.clone(), stats, False), y)
