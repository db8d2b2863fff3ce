"""Operations that run under autograd by themselves: kept with their graph or run again, with the same bits, random
numbers and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import BasicBlock
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, keep
from lowmem.remat import apply_plan, decompose
from lowmem.remat.autograd_operation import AutogradOperation, Operand
from lowmem.remat.operation import PassState
from lowmem.remat.stage import Stage
from tests.exact.compare import differences, twins
from tests.exact.schedules import alternating, segments, uniform


class Whole(nn.Module):
    """Cannot be traced, as its way depends on values; moves buffers and draws random numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.bn(self.conv(x)), 0.3, self.training)
        return F.gelu(y) if x.sum() < 1e9 else y


def _mixed_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Whole(8),
        BasicBlock(8, 8),
        nn.Sequential(nn.GroupNorm(2, 8), nn.Dropout2d(0.5), nn.Conv2d(8, 8, 1), nn.Dropout(0.2), nn.Softplus()),
        BasicBlock(8, 16, stride=2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def _nested(stages: Sequence[Stage]) -> Schedule:
    last = len(stages) - 1
    inner = Segment(0, 1, Schedule((Keep(0, SAVE_ALL), Keep(1, FUSED))))
    rest = tuple(Keep(i, INPUT_ONLY) for i in range(2, last))
    return Schedule((Segment(0, last - 1, Schedule((inner, *rest))), Keep(last, SAVE_ALL)))


SCHEDULES: dict[str, Callable[[Sequence[Stage]], Schedule]] = {
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "lean": lambda stages: uniform(stages, LEAN),
    "again": lambda stages: uniform(stages, INPUT_ONLY),
    "dropped": lambda stages: alternating(stages, keep(drop_output=True), SAVE_ALL),
    "segments": lambda stages: segments(stages, 2, SAVE_ALL),
    "nested": _nested,
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
    model = _mixed_chain()
    stages = decompose(model)
    assert [stage.name for stage in stages] == ["stem", "1", "2", "3", "head"]
    plain, planned = twins(model, SCHEDULES[schedule](stages), torch.contiguous_format)
    assert differences(plain, planned, _step, steps=3) == []


def _operation(function: Callable[..., Tensor], **known: bool) -> AutogradOperation:
    return AutogradOperation("f", (0,), function, (Operand(0),), **known)  # type: ignore[arg-type]


def test_the_graph_holds_neither_operand_nor_result() -> None:
    """Only what the function's own backward saves: here nothing of any size."""
    x = torch.randn(4, 4)
    result, graph = _operation(lambda value: value.sum(0)).with_graph([x], PassState(), (True,))
    of_operand, of_result = weakref.ref(x), weakref.ref(result)
    del x, result
    assert of_operand() is None
    assert of_result() is None
    (grad,) = graph.backward(torch.ones(4), (True,)).operands
    assert torch.equal(grad, torch.ones(4, 4))


def test_random_numbers_are_drawn_once() -> None:
    """A run again has the first run's numbers, and leaves the stream where it was."""
    operation, state, x = _operation(lambda value: F.dropout(value, 0.5)), PassState(), torch.ones(100)
    torch.manual_seed(0)
    first = operation.forward([x], state)
    expected = torch.rand(3)
    torch.manual_seed(0)
    F.dropout(x, 0.5)
    assert torch.equal(operation.forward([x], state), first)
    assert torch.equal(torch.rand(3), expected)


def test_several_results_and_an_integer_operand() -> None:
    """A function that makes a tuple; what is not floating gets no gradient."""

    class Topmost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            values, indices = torch.topk(self.linear(x), 3, dim=1)
            return values * indices

    torch.manual_seed(0)
    model = Topmost()
    for policy in (SAVE_ALL, LEAN, INPUT_ONLY):
        plain, planned = twins(model, uniform(decompose(model), policy), torch.contiguous_format)

        def step(model: nn.Module) -> Tensor:
            torch.manual_seed(1)
            loss = model(torch.randn(5, 6)).square().sum()
            loss.backward()
            return loss.detach()

        assert differences(plain, planned, step) == [], policy


def test_one_module_is_one_stage() -> None:
    (stage,) = decompose(Whole(4))
    assert [type(one) for one in stage.operations] == [AutogradOperation]
    assert stage.name == "model"


def test_policies_that_it_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stage model has no conv1: it has all"):
        apply_plan(Whole(4), Schedule((Keep(0, keep("conv1")),)))


def test_changing_the_input_is_refused() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 1e9:
                x.add_(1)
            return x * 2

    model = nn.Sequential(nn.Linear(2, 2), Changes())
    for policy in (SAVE_ALL, INPUT_ONLY):
        planned = apply_plan(model, uniform(decompose(model), policy))
        with pytest.raises(ValueError, match="changes its input in place"):
            planned(torch.ones(3, 2))
