"""A checkpoint is a copy: training goes on while it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import CorruptCheckpoint
from lowmem.models import build
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.train.replica import ANOTHER_OPTIMIZER, capture, cpu_copy, restore, weights_of


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_was_captured_does_not_move_with_training(layout: torch.memory_format) -> None:
    model = build("res20", width=16).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler, execution = torch.amp.GradScaler("cpu", enabled=False), Execution("cpu", "fp32", "contiguous")
    whole, state = TrainStep(model, optimizer, scaler, execution, None), RunState()

    def step() -> None:
        model(torch.randn(4, 3, 32, 32).to(memory_format=layout)).sum().backward()
        optimizer.step()
        state.step += 1

    step()
    taken = capture(state, model, whole, {})
    before = {name: tensor.clone() for name, tensor in {**taken.model, **taken.optimizer}.items()}
    step()
    now = {**taken.model, **taken.optimizer}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert all(tensor.is_contiguous() for tensor in now.values())
    assert taken.state["run"]["step"] == 1
    assert not torch.equal(now["conv1.weight"], model.state_dict()["conv1.weight"])
    assert len({tensor.untyped_storage().data_ptr() for tensor in now.values()}) == len(now)


def test_a_copy_is_a_copy() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    for one in (tensor, tensor.T, tensor[0], torch.tensor(3)):
        copy = cpu_copy(one)
        assert torch.equal(copy, one)
        assert copy.is_contiguous()
        assert copy.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()
        assert copy.untyped_storage().nbytes() == one.numel() * one.element_size()


def _step(model: nn.Module, optim: OptimConfig) -> TrainStep:
    execution = Execution("cpu", "fp32", "contiguous")
    return TrainStep(model, make_optimizer(model, optim, "cpu"), make_scaler(execution), execution, None)


def _saved(optim: OptimConfig) -> Checkpoint:
    """After two steps."""
    torch.manual_seed(0)
    model = build("res20", width=2)
    step = _step(model, optim)
    for _ in range(2):
        step(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), 0.1)
    return capture(RunState(step=2, step_in_epoch=2, seen=8), model, step, {})


def _restored(saved: Checkpoint, optim: OptimConfig) -> Checkpoint:
    model = build("res20", width=2, seed=1)
    step = _step(model, optim)
    step(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), 0.1)
    return capture(restore(saved, model, step, {}), model, step, {})


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


SGD, ADAMW = OptimConfig(), OptimConfig(kind="adamw", ema=0.9)


@pytest.mark.parametrize("optim", [SGD, ADAMW, OptimConfig(momentum=0.0), OptimConfig(ema=0.5)])
def test_what_was_captured_is_restored(optim: OptimConfig) -> None:
    saved = _saved(optim)
    back = _restored(saved, optim)
    _assert_equal(back.model, saved.model)
    _assert_equal(back.optimizer, saved.optimizer)


def test_another_optimizer_begins_anew() -> None:
    """And the mean of the weights with those that are restored. What the other kept is left out."""
    saved = _saved(SGD)
    back = _restored(replace(saved, state={**saved.state, ANOTHER_OPTIMIZER: {"was": "sgd"}}), ADAMW)
    kinds: dict[str, set[str]] = {}
    for key in back.optimizer:
        slot, _, name = key.partition("/")
        kinds.setdefault(slot, set()).add(name)
    names = {name for name, _ in build("res20", width=2).named_parameters()}
    assert kinds == dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "ema"), names)
    assert not any(tensor.any() for key, tensor in back.optimizer.items() if not key.startswith("ema/"))
    _assert_equal(weights_of(back), saved.model)


@pytest.mark.parametrize(
    "damage",
    [
        {"exp_avg/conv1.weight": None},
        {"exp_avg/conv1.weight": torch.zeros(3)},
        {"exp_avg/conv9.weight": torch.zeros(3)},
        {"velocity/conv1.weight": torch.zeros(3)},
    ],
)
def test_a_state_that_is_not_whole_is_refused(damage: dict[str, Tensor | None]) -> None:
    saved = _saved(ADAMW)
    slots = {name: tensor for name, tensor in {**saved.optimizer, **damage}.items() if tensor is not None}
    with pytest.raises(CorruptCheckpoint, match=next(iter(damage))):
        _restored(replace(saved, optimizer=slots), ADAMW)


@pytest.mark.parametrize("slot", ["exp_avg", "step", "ema"])
def test_a_state_that_lost_all_of_a_kind_is_refused(slot: str) -> None:
    saved = _saved(ADAMW)
    slots = {name: tensor for name, tensor in saved.optimizer.items() if not name.startswith(f"{slot}/")}
    for left in (slots, {}):
        with pytest.raises(CorruptCheckpoint, match="is on one side only"):
            _restored(replace(saved, optimizer=left), ADAMW)


def test_an_older_first_checkpoint_has_no_momentum() -> None:
    back = _restored(replace(_saved(SGD), optimizer={}), SGD)
    assert not any(tensor.any() for tensor in back.optimizer.values())


def test_the_mean_of_weights_with_two_names_is_exported_under_both() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12))
    model[2].weight = model[1].weight
    step = _step(model, OptimConfig(ema=0.5))
    step(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), 0.1)
    saved = capture(RunState(step=1, step_in_epoch=1, seen=4), model, step, {})
    exported = weights_of(saved)
    assert torch.equal(exported["1.weight"], exported["2.weight"])
    assert not torch.equal(exported["1.weight"], saved.model["1.weight"])
    restore(saved, model, step, {})
