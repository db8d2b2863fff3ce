"""Stages that are not of the family: kept whole or run again, with the same bits, randomness and buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowmem.models.resnet import BasicBlock
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, keep
from lowmem.remat import apply_plan, decompose
from lowmem.remat.block import ConvBlock
from lowmem.remat.stage import OpaqueStage
from tests.exact.compare import differences, twins


def _mixed_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.3)),
        BasicBlock(8, 8),
        nn.Sequential(nn.GroupNorm(2, 8), nn.Dropout2d(0.5)),
        BasicBlock(8, 16, stride=2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


SCHEDULES = {
    "save-all": Schedule(tuple(Keep(i, SAVE_ALL) for i in range(5))),
    "again": Schedule(tuple(Keep(i, INPUT_ONLY) for i in range(5))),
    "mixed": Schedule(
        (Keep(0, INPUT_ONLY), Keep(1, LEAN), Keep(2, SAVE_ALL), Keep(3, keep("conv1")), Keep(4, INPUT_ONLY))
    ),
    "segment": Schedule((Segment(0, 4, Schedule(tuple(Keep(i, SAVE_ALL if i < 4 else FUSED) for i in range(5)))),)),
    "nested": Schedule(
        (
            Segment(
                0,
                3,
                Schedule(
                    (
                        Segment(0, 2, Schedule((Keep(0, SAVE_ALL), Keep(1, LEAN), Keep(2, FUSED)))),
                        Keep(3, INPUT_ONLY),
                    )
                ),
            ),
            Keep(4, SAVE_ALL),
        )
    ),
}


def _step(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    x = torch.randn(4, 3, 8, 8).requires_grad_()
    torch.manual_seed(8)
    loss = model(x).square().sum()
    after = torch.rand(1)  # the stream outside goes on alike
    loss.backward()
    assert x.grad is not None
    return torch.cat([loss.detach().view(1), after, x.grad.flatten()])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bits(schedule: str) -> None:
    plain, planned = twins(_mixed_chain(), SCHEDULES[schedule], torch.contiguous_format)
    assert differences(plain, planned, _step, steps=3) == []


def test_one_module_is_one_stage() -> None:
    model = nn.GRU(3, 4)
    (stage,) = decompose(model)
    assert isinstance(stage, OpaqueStage)


def test_policies_of_the_family_are_refused() -> None:
    for policy in (LEAN, keep("conv1")):
        with pytest.raises(ValueError, match="not a block of the family"):
            apply_plan(nn.Sequential(nn.Linear(2, 2)), Schedule((Keep(0, policy),)))


def test_changing_the_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    planned = apply_plan(model, Schedule((Keep(0, SAVE_ALL), Keep(1, INPUT_ONLY))))
    with pytest.raises(ValueError, match="changes its input in place"):
        planned(torch.randn(3, 2))


@pytest.mark.parametrize(
    "pair",
    [
        (nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 3, bias=False, padding_mode="circular", padding=1), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 3, bias=False, padding="same"), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.InstanceNorm2d(4)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4).bfloat16()),
    ],
)
def test_what_the_kernels_do_not_cover_is_not_recognised(pair: tuple[nn.Module, nn.Module]) -> None:
    block = nn.Module()
    block.conv1, block.bn1 = pair
    block.shortcut = None  # type: ignore[assignment]
    (stage,) = decompose(nn.Sequential(block))
    assert isinstance(stage, OpaqueStage)


def test_dilated_and_grouped_convolutions_are_covered() -> None:
    block = BasicBlock(8, 8)
    block.conv1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
    plain, planned = twins(nn.Sequential(block), Schedule((Keep(0, keep("conv1")),)), torch.contiguous_format)
    assert isinstance(planned.lowmem.stages[0], ConvBlock)

    def step(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        loss = model(torch.randn(2, 8, 6, 6)).square().sum()
        loss.backward()
        return loss.detach()

    assert differences(plain, planned, step) == []
