"""The executor says when a stage's gradients are complete, under every schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import Bottleneck
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, PolicyKind, Schedule, Segment, keep
from lowmem.remat import PlannedModule, apply_plan, decompose
from lowmem.remat.stage import Stage
from tests.exact.compare import pictures, small_net
from tests.exact.schedules import alternating, segments, uniform


def _nested(stages: Sequence[Stage]) -> Schedule:
    inner = Segment(2, 4, Schedule((Keep(2, LEAN), Keep(3, INPUT_ONLY), Keep(4, FUSED))))
    return Schedule(
        (Segment(0, 5, Schedule((Keep(0, LEAN), Keep(1, SAVE_ALL), inner, Keep(5, FUSED)))), Keep(6, SAVE_ALL))
    )


DROPPED = BlockPolicy(PolicyKind.LEAN, drop_output=True)
SCHEDULES: dict[str, Callable[[Sequence[Stage]], Schedule]] = {
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "lean": lambda stages: uniform(stages, LEAN),
    "input only": lambda stages: uniform(stages, INPUT_ONLY),
    "dropped outputs": lambda stages: alternating(stages, DROPPED, keep("conv2")),
    "segments": lambda stages: segments(stages, 3, LEAN),
    "nested": _nested,
}
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def _calls(planned: PlannedModule) -> list[tuple[int, list[Tensor | None]]]:
    """A step's calls: the stage, and copies of its parameters' gradients at that moment."""
    calls: list[tuple[int, list[Tensor | None]]] = []

    def done(index: int) -> None:
        grads = [parameter.grad for parameter in planned.lowmem.stages[index].parameters()]
        calls.append((index, [None if grad is None else grad.clone() for grad in grads]))

    planned.lowmem.stage_done = done
    x, labels = pictures(2)
    loss = F.cross_entropy(planned(x), labels)
    assert not calls
    loss.backward()
    return calls


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@by_schedule
def test_a_stage_is_done_once_and_for_good(schedule: str) -> None:
    model = small_net(Bottleneck)
    planned = apply_plan(model, SCHEDULES[schedule](decompose(model)))
    for _ in range(2):  # the second adds to gradients that exist
        calls = _calls(planned)
        assert [index for index, _ in calls] == [6, 5, 4, 3, 2, 1, 0]
        for index, then in calls:
            now = [parameter.grad for parameter in planned.lowmem.stages[index].parameters()]
            assert all(grad is not None and _same(grad, other) for grad, other in zip(now, then, strict=True))


@by_schedule
def test_stages_without_a_gradient_are_not_called(schedule: str) -> None:
    model = small_net(Bottleneck)
    for name, parameter in model.named_parameters():
        if name.startswith(("conv1", "bn1", "layer1", "layer2.0")):
            parameter.requires_grad_(False)
    assert [index for index, _ in _calls(apply_plan(model, SCHEDULES[schedule](decompose(model))))] == [6, 5, 4, 3]


def test_frozen_stages_in_between_are_called() -> None:
    model = small_net(Bottleneck)
    model.get_submodule("layer2").requires_grad_(False)
    calls = _calls(apply_plan(model, SCHEDULES["lean"](decompose(model))))
    assert [index for index, _ in calls] == [6, 5, 4, 3, 2, 1, 0]


def test_it_changes_no_bit() -> None:
    grads = []
    for hook in (None, lambda index: None):
        model: nn.Module = small_net(Bottleneck)
        planned = apply_plan(model, SCHEDULES["nested"](decompose(model)))
        planned.lowmem.stage_done = hook
        x, labels = pictures(2)
        F.cross_entropy(planned(x), labels).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(_same(one, other) for one, other in zip(*grads, strict=True))
