"""A checkpoint is a copy: training goes on while it is written."""

from __future__ import annotations

import pytest
import torch

from lowmem.models import build
from lowmem.runs.checkpoint_state import RunState
from lowmem.step.train_step import Execution, TrainStep
from lowmem.train.replica import capture, cpu_copy


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
