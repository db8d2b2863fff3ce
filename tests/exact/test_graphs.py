"""Random networks under random schedules: outputs, gradients and buffers have plain PyTorch's bits (invariant 1)."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule
from lowmem.remat import apply_plan, decompose
from tests.exact.graphs import RandomNet, random_schedule

QUICK, ALL = 150, 1500
# Plain PyTorch's own step ends the process there, in channels-last, for some of these tiny convolutions.
OLD = torch.__version__.startswith("2.7.")


def _steps(model: nn.Module, x: Tensor, low: bool, asked: bool) -> tuple[list[Tensor], Tensor | None]:
    """Two steps whose gradients add up: outputs, and the gradient of x if it is asked for."""
    torch.manual_seed(3)
    outputs = []
    x = x.clone().requires_grad_(asked)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = model(x)
        (y.float() * torch.linspace(-1, 1, 5)).pow(2).sum().backward()
        outputs.append(y.detach())
    return outputs, x.grad


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # Steps along dimensions of size one mean nothing, and what a kernel writes there is not always the same.
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return torch.equal(one, other) and one.dtype == other.dtype and all(a == b for size, a, b in pairs if size > 1)


def _check(seed: int) -> bool:
    """False: the network is none that autograd itself can train (it changes in place what autograd has saved)."""
    numbers = random.Random(seed)
    model = RandomNet(seed, numbers.randint(2, 14))
    asked, low = numbers.random() < 0.3, numbers.random() < 0.25
    x = torch.randn(numbers.choice([2, 3]), 4, 8, 8)
    if not low and numbers.random() < 0.15:
        model, x = model.double(), x.double()
    if numbers.random() < 0.5 and not OLD:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    try:
        outputs, grad_x = _steps(plain, x, low, asked)
    except RuntimeError as error:
        if not any(known in str(error) for known in ("inplace", "in-place", "does not require grad")):
            raise
        return False
    stages = decompose(model)
    fixed = [Schedule(tuple(Keep(i, policy) for i in range(len(stages)))) for policy in (SAVE_ALL, LEAN, INPUT_ONLY)]
    for schedule in [numbers.choice(fixed), random_schedule(stages, numbers), random_schedule(stages, numbers)]:
        planned = apply_plan(copy.deepcopy(model), schedule)
        found, found_x = _steps(planned, x, low, asked)
        wrong = [f"output {i}" for i, pair in enumerate(zip(outputs, found, strict=True)) if not _same(*pair)]
        pairs = zip(plain.named_parameters(), planned.parameters(), strict=True)
        wrong += [name for (name, p), q in pairs if not _same(p.grad, q.grad)]
        buffers = zip(plain.named_buffers(), planned.buffers(), strict=True)
        wrong += [name for (name, a), b in buffers if not _same(a, b)]
        wrong += [] if _same(grad_x, found_x) else ["the input's gradient"]
        assert not wrong, f"seed {seed}, {schedule}: {wrong}"
    return True


@pytest.mark.parametrize("first", range(0, QUICK, 25))
def test_random_networks_have_the_same_bits(first: int) -> None:
    assert sum(_check(seed) for seed in range(first, first + 25)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, ALL, 50))
def test_many_random_networks_have_the_same_bits(first: int) -> None:
    assert sum(_check(seed) for seed in range(first, first + 50)) > 16
