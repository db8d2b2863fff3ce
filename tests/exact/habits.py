"""Small networks, and the comparison of plain PyTorch with a plan, for what people do to modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, uniform
from lowmem.remat import PlannedModule, apply_plan, decompose

CLASSES = 5


class Block(nn.Module):
    def __init__(self, channels: int, dropout: float = 0.0, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = F.dropout(y, self.dropout, self.training)
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """Stem, two blocks with functional dropout, head."""

    def __init__(self, classes: int = CLASSES, dropout: float = 0.25, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace))
        self.blocks = nn.ModuleList([Block(8, dropout, inplace), Block(8, dropout, inplace)])
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def pictures(count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """[count, 3, 12, 12] and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator), torch.arange(count) % 3


def schedules(model: nn.Module) -> Iterator[tuple[str, Schedule]]:
    """Everything kept, what is dear kept, inputs kept, and all but the first stage in a segment."""
    count = len(decompose(model))
    for policy in (SAVE_ALL, LEAN, INPUT_ONLY):
        yield policy.name, uniform([policy] * count)
    if count > 2:
        inner = Schedule(tuple(Keep(at, LEAN) for at in range(1, count)))
        yield "segment", Schedule((Keep(0, SAVE_ALL), Segment(1, count - 1, inner)))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def train(model: nn.Module, steps: int = 2) -> list[Tensor]:
    """SGD -> losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return [one_step(model, optimizer, seed) for seed in range(steps)]


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> Tensor:
    x, labels = pictures(seed=seed)
    x = x.to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def compared(
    build: Callable[[], nn.Module],
    use: Callable[[nn.Module], Any],
    plan_first: Callable[[nn.Module], Any] | None = None,
) -> list[str]:
    """What differs between plain PyTorch and each schedule: what `use` of the module returns (tensors in it by their
    bits), gradients, parameters and buffers afterwards. `plan_first`: done to both after planning, before `use`; left
    out, there is nothing done."""
    wrong: list[str] = []
    plain = made(build)
    wanted = _used(plain, plain, use, plan_first)
    for name, schedule in schedules(made(build)):
        model = made(build)
        planned = apply_plan(model, schedule)
        got = _used(model, planned, use, plan_first)
        wrong += [f"{name}: {what}" for what in unequal(wanted, got)]
        wrong += [f"{name}: {what}" for what in state_differs(plain, model)]
    return wrong


def _used(model: nn.Module, module: nn.Module, use: Any, plan_first: Any) -> Any:
    torch.manual_seed(7)
    if plan_first is not None:
        plan_first(model)
    return use(module)


def unequal(wanted: Any, got: Any) -> list[str]:
    a, b = (torch.utils._pytree.tree_leaves(one) for one in (wanted, got))
    if len(a) != len(b):
        return [f"{len(a)} results, {len(b)} of the planned one"]
    return [
        f"result {at}: {one!s:.60} and {other!s:.60}"
        for at, (one, other) in enumerate(zip(a, b, strict=True))
        if not (torch.equal(one, other) if isinstance(one, Tensor) else one == other)
    ]


def state_differs(plain: nn.Module, model: nn.Module) -> Iterator[str]:
    for (name, p), (other, q) in itertools.zip_longest(plain.named_parameters(), model.named_parameters()):
        if name != other or not torch.equal(p, q):
            yield name
        elif (p.grad is None) != (q.grad is None) or (p.grad is not None and not torch.equal(p.grad, q.grad)):
            yield f"{name}.grad"
    for (name, p), (other, q) in itertools.zip_longest(plain.named_buffers(), model.named_buffers()):
        if name != other or not torch.equal(p, q):
            yield name


def planned(build: Callable[[], nn.Module] = Net) -> PlannedModule:
    model = made(build)
    return apply_plan(model, uniform([LEAN] * len(decompose(model))))
