from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from lowmem.core.errors import PreflightError
from lowmem.remat.same_forward import check_same_forward
from tests.exact.habits import CLASSES, Block, Net, made, state_differs

SHAPE = (3, 12, 12)


class AsksForTheType(Net):
    """Which a stand-in for a tensor has not got."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and isinstance(x, Tensor):
                x = x * 2
        return self.head(x.mean((2, 3)))


class Skips(Block):
    """Layer drop, by a generator that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else super().forward(x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_what_is_not_followed_is_an_error_that_names_the_stage() -> None:
    with pytest.raises(PreflightError, match=r"something else than by itself, from stage blocks\.1 on"):
        check_same_forward(made(AsksForTheType), SHAPE)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_touched(training: bool) -> None:
    model = made(lambda: nn.Sequential(Counts(), Net(dropout=0.5)))
    model[1].blocks[0].bn1.eval()
    model.train(training)
    before, flags = copy.deepcopy(model), [one.training for one in model.modules()]
    torch.manual_seed(5)
    check_same_forward(model, SHAPE)
    drawn = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(3))
    assert list(state_differs(before, model)) == []
    assert [one.training for one in model.modules()] == flags


def test_random_numbers_that_are_not_torchs() -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), *(Skips(8) for _ in range(8)), nn.Flatten()))
    random.seed(0)
    for _ in range(3):
        check_same_forward(model, SHAPE)


def test_a_network_that_fails_by_itself() -> None:
    with pytest.raises(PreflightError, match=r"fails on pictures of \[5, 12, 12\] in training \(RuntimeError"):
        check_same_forward(made(Net), (5, 12, 12))


def test_nobody_can_tell_of_a_model_without_values() -> None:
    with torch.device("meta"):
        check_same_forward(AsksForTheType(CLASSES), SHAPE)
