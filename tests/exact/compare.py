"""Runs a step of the untouched model and one under a schedule, and compares bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import SAFE_CHANNELS, BasicBlock, Bottleneck, ResNet
from lowmem.plan.policy import Schedule
from lowmem.remat import PlannedModule, apply_plan
from lowmem.remat.links import HostLink

FORMATS = [torch.contiguous_format, torch.channels_last]
BLOCKS: list[type[BasicBlock] | type[Bottleneck]] = [BasicBlock, Bottleneck]
FORMAT_NAMES = ["contiguous", "channels-last"]


def small_net(block: Any, residual: bool = True, layout: tuple[int, ...] = (1, 2, 1, 1)) -> ResNet:
    """Stem, five blocks of which four have projections (basic: three), head: seven stages. As thin as it may be in
    channels-last."""
    torch.manual_seed(0)
    return ResNet(block, layout, width=max(8, SAFE_CHANNELS // block.expansion), residual=residual)


def pictures(count: int = 3, memory_format: Any = torch.contiguous_format, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 32, 32, generator=generator).contiguous(memory_format=memory_format)
    return x, torch.randint(0, 10, (count,), generator=generator)


def twins(model: nn.Module, schedule: Schedule, memory_format: Any) -> tuple[nn.Module, PlannedModule]:
    """Two copies: one untouched, one under the schedule."""
    plain = copy.deepcopy(model).to(memory_format=memory_format)
    return plain, apply_plan(copy.deepcopy(plain), schedule)


def differences(
    plain: nn.Module,
    planned: PlannedModule,
    step: Callable[[nn.Module], Tensor],
    *,
    steps: int = 2,
    clear: bool = True,
) -> list[str]:
    """Names of whatever is not equal, after each of `steps` steps: what `step` returns, gradients (and
    their memory layout), buffers. `step` does forward and backward."""
    wrong: list[str] = []
    for number in range(steps):
        outputs = []
        for model in (plain, planned):
            if clear:
                model.zero_grad(set_to_none=True)
            outputs.append(step(model))
        if not torch.equal(*outputs):
            wrong.append(f"output {number}")
        wrong += [f"{name} {number}" for name in _unequal(plain, planned)]
    return wrong


def _unequal(plain: nn.Module, planned: nn.Module) -> Iterator[str]:
    assert list(plain.state_dict()) == list(planned.state_dict())
    for (name, p), q in zip(plain.named_parameters(), planned.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            if p.grad is not q.grad:
                yield f"{name}: one has no gradient"
        elif not torch.equal(p.grad, q.grad):
            yield f"{name}.grad"
        elif p.grad.stride() != q.grad.stride():
            yield f"{name}.grad: layout"
    for (name, ours), theirs in zip(plain.named_buffers(), planned.buffers(), strict=True):
        if not torch.equal(ours, theirs):
            yield name


def in_use(link: HostLink) -> int:
    """Bytes of host memory that tensors of some step have."""
    return link.arena.bytes - sum(slab.size for free in link.arena._free.values() for slab in free)


def training(x: Tensor, labels: Tensor, low: torch.dtype | None = None) -> Callable[[nn.Module], Tensor]:
    """A step: forward, cross-entropy, backward -> loss."""

    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", low, enabled=low is not None):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return loss.detach()

    return step
