"""Undoing a step that ran out of memory, the gradient scaler's share of it above all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.optimization import OptimConfig
from lowmem.measure.out_of_memory import Failure
from lowmem.models import build
from lowmem.step.train_step import Execution, TrainStep, make_optimizer
from lowmem.step.undo import Before, Undo
from tests.faults.injection import Scarce


class Rig:
    """A step with the scaler on, which on the CPU nobody needs, and a batch."""

    def __init__(self, optim: OptimConfig = OptimConfig()) -> None:
        self.model = build("res20", width=4)
        optimizer = make_optimizer(self.model, optim, "cpu")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        execution = Execution("cpu", "fp32", "contiguous")
        self.step = TrainStep(self.model, optimizer, self.scaler, execution, None, clip_norm=optim.clip_norm)
        self.undo = Undo(self.step, self.model)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(8, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (8,), generator=generator)

    def go(self) -> Tensor | Failure:
        return self.undo.attempt(lambda: self.step(self.images, self.labels, 0.1))

    def state(self) -> dict[str, Any]:
        slots = [slot for kept in self.step.optimizer.state.values() for slot in kept.values()]
        state = {"model": self.model.state_dict(), "optimizer": slots}
        return copy.deepcopy({**state, "scaler": self.step.scaler.state_dict()})


def _assert_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            _assert_same(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            _assert_same(one, other)
    else:
        assert left == right


class At(Scarce):
    """Fails at one operation by its name, after its `count`-th time; small tensors count too. 0: before the first."""

    def __init__(self, name: str, count: int = 1) -> None:
        super().__init__()
        self.name, self.left = name, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.name not in str(func):
            return func(*args, **(kwargs or {}))
        if self.left == 0 and not self.failures:
            self._fail(4)
        result = func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0:
            self._fail(4)
        return result


# In the order of a first step with a scaler: its scale and growth count are made, the loss is scaled, gradients are
# checked for overflow, the checks are summed.
@pytest.mark.parametrize(
    ("name", "count", "phase"),
    [
        ("native_batch_norm", 3, "forward"),
        ("aten.full.default", 1, "backward"),
        ("aten.full.default", 2, "backward"),
        ("convolution_backward", 4, "backward"),
        ("aten.full.default", 3, "update"),
        ("_amp_foreach_non_finite_check_and_unscale_", 1, "update"),
        ("_fused_sgd_", 0, "update"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_the_scaler_is_undone_too(name: str, count: int, phase: str, steps_before: int) -> None:
    ours, theirs = Rig(), Rig()
    for _ in range(steps_before):
        ours.go()
        theirs.go()
    if steps_before and name == "aten.full.default":
        count = max(1, count - 2)  # scale and growth count are there
        phase = "update"
    before = ours.state()
    mode = At(name, count)
    with mode:
        failure = ours.go()
    assert isinstance(failure, Failure)
    assert (failure.phase, failure.final) == (phase, False)
    _assert_same(ours.state(), before)
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    for _ in range(3):
        _assert_same(ours.go(), theirs.go())
    _assert_same(ours.state(), theirs.state())
    assert ours.state()["scaler"]["scale"] == 2048.0 * (2 if steps_before else 1)


EVERYTHING = OptimConfig(kind="adamw", decay_norms=False, clip_norm=0.1, ema=0.9)


@pytest.mark.parametrize(
    ("name", "count", "phase"),
    [
        ("convolution_backward", 4, "backward"),
        ("_amp_foreach_non_finite_check_and_unscale_", 1, "gradient norms"),
        ("_foreach_norm", 1, "gradient norms"),
        ("_foreach_mul_", 1, "gradient norms"),  # they are clipped
        ("_fused_adamw_", 0, "update"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_adamw_clipping_and_the_mean_weights_are_undone_too(
    name: str, count: int, phase: str, steps_before: int
) -> None:
    ours, theirs = Rig(EVERYTHING), Rig(EVERYTHING)
    for _ in range(steps_before):
        ours.go()
        theirs.go()
    before = ours.state()
    with At(name, count):
        failure = ours.go()
    assert isinstance(failure, Failure)
    assert failure.phase == phase
    if phase == "update":  # steps are counted before the parameters are changed: seen, and final
        assert failure.final
        return
    assert not failure.final
    _assert_same(ours.state(), before)
    for _ in range(3):
        _assert_same(ours.go(), theirs.go())
    _assert_same(ours.state(), theirs.state())


def test_mean_weights_that_do_not_move_are_final() -> None:
    rig = Rig(EVERYTHING)
    with At("_foreach_lerp_", 0):
        failure = rig.go()
    assert isinstance(failure, Failure)
    assert failure.final


def test_an_update_that_began_is_final() -> None:
    rig = Rig()

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rig.step.optimizer.register_step_post_hook(fail)
    failure = rig.go()
    assert isinstance(failure, Failure)
    assert failure.final


def test_a_run_that_has_diverged_can_be_undone_like_any_other() -> None:
    rig = Rig()
    with torch.no_grad():
        rig.model.conv1.weight.fill_(float("nan"))
    with At("native_batch_norm", 3):
        failure = rig.go()
    assert isinstance(failure, Failure)
    assert not failure.final


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_step_made_on_trial_is_undone_with_its_update(steps_before: int) -> None:
    rig = Rig()
    for _ in range(steps_before):
        rig.go()
    kept, tensors = rig.state(), list(rig.model.parameters())
    before = Before(rig.step)
    assert not isinstance(rig.undo.attempt(lambda: rig.step(rig.images, rig.labels, 0.7)), Failure)
    assert not torch.equal(rig.model.conv1.weight, kept["model"]["conv1.weight"])
    before.restore()
    _assert_same(rig.state(), kept)
    assert all(now is then for now, then in zip(rig.model.parameters(), tensors, strict=True))
    assert rig.step.optimizer.param_groups[0]["lr"] == 0.1
    assert all(parameter.grad is None for parameter in rig.model.parameters())
