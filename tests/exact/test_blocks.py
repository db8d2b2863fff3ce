"""One block: every subset of what can be kept gives autograd's bits, input gradient included."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.policy import LEAN, SAVE_ALL, BlockPolicy, Keep, PolicyKind, Schedule
from lowmem.remat import decompose
from lowmem.remat.stage import Stage
from tests.exact.compare import FORMAT_NAMES, FORMATS, differences, twins

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck-projection": lambda: Bottleneck(16, 4, stride=2),
    "bottleneck-plain": lambda: Bottleneck(16, 4, residual=False),
    "basic": lambda: BasicBlock(8, 8),
    "basic-projection": lambda: BasicBlock(16, 8, stride=2),
    "basic-plain": lambda: BasicBlock(6, 8, stride=2, residual=False),
}


def _subsets(stage: Stage) -> list[BlockPolicy]:
    names = sorted(stage.tensors)
    kept = [frozenset(some) for size in range(len(names) + 1) for some in combinations(names, size)]
    return [SAVE_ALL, LEAN, *(BlockPolicy(PolicyKind.KEEP, some) for some in kept)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_subset(shape: str, memory_format: Any) -> None:
    torch.manual_seed(0)
    block = SHAPES[shape]()
    chain = nn.Sequential(block)
    (stage,) = decompose(chain)
    channels = block.get_submodule("conv1").in_channels
    x = torch.randn(3, channels, 6, 6).contiguous(memory_format=memory_format)
    for policy in _subsets(stage):
        plain, planned = twins(chain, Schedule((Keep(0, policy),)), memory_format)
        assert differences(plain, planned, _step(x), steps=2) == [], policy


def _step(x: Tensor) -> Callable[[nn.Module], Tensor]:
    def step(model: nn.Module) -> Tensor:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(leaf)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y * weights).sum().backward()
        assert leaf.grad is not None
        return torch.cat([y.detach().flatten(), leaf.grad.flatten()])

    return step
