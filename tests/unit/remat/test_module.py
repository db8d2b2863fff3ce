"""The planned module stands for its model: names, sharing, checks; and it lets go of its activations."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from lowmem.choose.planning import make_plan
from lowmem.config.cards import load_card
from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, keep
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan, decompose, stage_names
from lowmem.remat.elementwise import Add
from lowmem.remat.executor import Run
from tests.exact.compare import pictures, small_net
from tests.exact.schedules import segments, uniform


def test_a_plan_says_which_batch_norm_and_the_caller_may_differ() -> None:
    model = small_net(BasicBlock)
    plan = make_plan(model, batch=4, budget="1G", batch_norm="library")
    assert apply_plan(model, plan).lowmem.library_norm
    assert not apply_plan(model, plan, library_norm=False).lowmem.library_norm
    assert not apply_plan(model, plan.schedule).lowmem.library_norm
    assert make_plan(model, batch=4, budget="1G").batch_norm == "native"  # on the CPU, where they are the same
    assert make_plan(model, batch=4, card=load_card("gtx1060-6g")).batch_norm == "library"


def test_the_chain_of_a_network() -> None:
    model = small_net(Bottleneck)
    assert stage_names(model) == ("stem", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0", "head")
    stages = decompose(model)
    blocks = stages[:-1]
    adds = [any(isinstance(one, Add) for one in stage.operations) for stage in blocks]
    projections = [any(one.name == "shortcut.0" for one in stage.operations) for stage in blocks]
    assert (adds, projections) == ([False, *[True] * 5], [False, True, True, False, True, True])
    assert sum(p.numel() for s in stages for p in s.parameters()) == sum(p.numel() for p in model.parameters())
    assert blocks[3].tensors == {"conv1", "conv2", "conv3", "relu", "relu_2"}
    assert [stage.tail is not None for stage in stages] == [*[True] * 5, False, False]  # pooling follows the last ReLU
    plain = decompose(small_net(Bottleneck, False))
    assert not any(isinstance(one, Add) or "shortcut" in one.name for stage in plain for one in stage.operations)


def test_everything_is_shared() -> None:
    model = small_net(BasicBlock)
    planned = apply_plan(model, uniform(decompose(model), LEAN))
    assert list(planned.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(model.parameters(), planned.parameters(), strict=True))
    planned.eval()
    assert not model.layer1[0].bn1.training
    planned.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert not model.conv1.weight.any()
    planned.double()
    assert model.conv1.weight.dtype == torch.float64


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    model = small_net(BasicBlock)
    with pytest.raises(ValueError, match="stages"):
        apply_plan(model, Schedule((Keep(0, LEAN),)))
    wrong = uniform(decompose(model), LEAN).items
    with pytest.raises(ValueError, match=r"stage layer1\.0 has no conv3"):
        apply_plan(model, Schedule((wrong[0], Keep(1, keep("conv3")), *wrong[2:])))


def test_a_plan_for_another_model_is_refused() -> None:
    model, other = small_net(BasicBlock), small_net(BasicBlock, layout=(2, 1, 1, 1))
    plan = Plan(
        budget_bytes=None,
        batch=4,
        micro_batch=4,
        accumulation=1,
        precision="fp32",
        memory_format="contiguous",
        exact=True,
        stages=stage_names(model),
        schedule=uniform(decompose(model), LEAN),
    )
    apply_plan(model, plan)
    with pytest.raises(ValueError, match=r"'layer2\.0' where the model has 'layer1\.1'"):
        apply_plan(other, plan)


def test_schedules_can_be_exchanged_between_steps() -> None:
    model = small_net(Bottleneck)
    planned = apply_plan(model, uniform(decompose(model), SAVE_ALL))
    x, labels = pictures(2)
    losses = []
    for policy in (SAVE_ALL, LEAN, INPUT_ONLY):
        planned.lowmem.set_schedule(uniform(planned.lowmem.stages, policy))
        losses.append(F.cross_entropy(planned(x), labels).item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("backward", [True, False])
def test_activations_die_without_the_garbage_collector(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the backward, or when the loss is thrown away: no cycles."""
    runs: list[weakref.ref[Run]] = []
    original = Run.__init__

    def spy(self: Run, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        runs.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", spy)
    model = small_net(Bottleneck)
    planned = apply_plan(model, segments(decompose(model), 2, LEAN))
    x, labels = pictures(2)
    gc.disable()
    try:
        loss = F.cross_entropy(planned(x), labels)
        if backward:
            loss.backward()
        del loss
        assert runs[0]() is None
    finally:
        gc.enable()


def test_a_chain_that_ends_in_a_relu_has_no_cycle() -> None:
    planned = apply_plan(torch.nn.Sequential(BasicBlock(4, 4)), Schedule((Keep(0, LEAN),)))
    gc.disable()
    try:
        y = planned(torch.randn(2, 4, 4, 4))
        reference = weakref.ref(y.grad_fn.run)  # type: ignore[union-attr]
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_gradients_are_added_in_place() -> None:
    """Accumulation holds no second copy."""
    model = small_net(BasicBlock)
    planned = apply_plan(model, uniform(decompose(model), LEAN))
    x, labels = pictures(2)
    F.cross_entropy(planned(x), labels).backward()
    before = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    F.cross_entropy(planned(x), labels).backward()
    assert before == {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
