"""A network that cannot be traced, planned by the modules that are named to be its stages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lowmem.choose.planning import make_plan
from lowmem.core.units import MIB
from lowmem.remat import apply_plan, stage_names
from tests.exact.compare import differences, pictures, training


class _Block(nn.Module):
    def __init__(self, before: int, planes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, planes, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class _Untraceable(nn.Module):
    """Its forward loops over a number that tracing does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(3 if k == 0 else 16, 16) for k in range(4)])
        self.head = _Head()

    def forward(self, x: Tensor) -> Tensor:
        for k in range(int(x.dim() + 0 * len(x))):
            x = self.blocks[k](x)
        return self.head(x)


STAGES = ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]


def test_it_is_one_stage_unless_stages_are_named() -> None:
    model = _Untraceable()
    assert stage_names(model) == ("model",)
    assert stage_names(model, STAGES) == tuple(STAGES)
    assert stage_names(model, [*model.blocks, model.head]) == tuple(STAGES)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.6])
def test_plan_and_execution_agree(share: float) -> None:
    torch.manual_seed(0)
    model = _Untraceable()
    ample = make_plan(model, batch=8, budget=64 * MIB, stages=STAGES).predicted.peak_allocated_bytes
    assert ample is not None
    budget = int(ample * share)
    plan = make_plan(model, batch=8, budget=budget, stages=[*model.blocks, model.head])
    assert plan.stages == tuple(STAGES)
    assert plan.predicted.peak_allocated_bytes is not None
    assert plan.predicted.peak_allocated_bytes <= budget
    assert (plan.predicted.extra_flops == 0) == (share == 1.0)
    planned = apply_plan(copy.deepcopy(model), plan, stages=STAGES)
    assert differences(model, planned, training(*pictures(8))) == []
    with pytest.raises(ValueError, match="plan again"):
        apply_plan(copy.deepcopy(model), plan)


def test_stages_that_the_network_has_not_got_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no module 'blocks\.9'"):
        make_plan(_Untraceable(), batch=8, budget=64 * MIB, stages=["blocks.9"])
    with pytest.raises(ValueError, match=r"a _Head .* is no module of the network"):
        make_plan(_Untraceable(), batch=8, budget=64 * MIB, stages=[_Head()])
