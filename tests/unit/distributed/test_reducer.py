"""Messages and buffers of the sums, without any other process. With others: tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.scaling_model import pack
from lowmem.distributed.reducer import ALONE_BYTES, PACK_BYTES, Reducer, Wait
from lowmem.models import build, skeleton
from lowmem.remat import decompose


class Sums:
    """Keeps what it is to sum."""

    def __init__(self, factor: float = 1.0) -> None:
        self.sent: list[Tensor] = []
        self.factor = factor

    def start(self, tensor: Tensor) -> Wait:
        assert tensor.dim() == 1
        assert tensor.is_contiguous()
        self.sent.append(tensor.clone())
        tensor.mul_(self.factor)
        return lambda: None


def stages_of(model: nn.Module) -> list[list[Tensor]]:
    return [list(stage.parameters()) for stage in decompose(model)]


def with_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
        parameter.grad[(0,) * parameter.dim()] = 0.5
        gradients[name] = parameter.grad.clone()
    return gradients


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_gradient_is_summed_once_in_its_place(layout: torch.memory_format) -> None:
    model = build("res20", width=32).to(memory_format=layout)  # type: ignore[call-overload]
    gradients, sums = with_gradients(model), Sums(factor=2.0)
    reducer = Reducer(stages_of(model), [], sums.start)
    reducer.arm()
    for index in reversed(range(len(stages_of(model)))):
        reducer.stage_done(index)
    reducer.finish(1.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, 2 * gradients[name]), name
    assert sum(one.numel() for one in sums.sent) == sum(one.numel() for one in model.parameters())
    assert any(one.numel() * 4 >= ALONE_BYTES for one in sums.sent)


def test_messages_are_those_that_predictions_reckon_with() -> None:
    model = skeleton("res110", "bottleneck")
    stages = stages_of(model)
    reducer = Reducer(stages, [], Sums().start)
    expected = pack([[4 * one.numel() for one in stage] for stage in stages])
    assert [(one.size_bytes, one.packed) for one in reducer.messages] == [
        (one.size_bytes, one.packed) for one in expected
    ]
    assert all(one.size_bytes <= PACK_BYTES for one in reducer.messages if one.packed)


def test_nothing_is_sent_before_the_last_micro_batch() -> None:
    model, sums = build("res20", width=4), Sums()
    with_gradients(model)
    reducer = Reducer(stages_of(model), [], sums.start)
    for index in reversed(range(len(stages_of(model)))):
        reducer.stage_done(index)
    assert not sums.sent


def test_what_has_no_gradient_counts_as_zeros() -> None:
    model, sums = build("res20", width=4), Sums()
    reducer = Reducer(stages_of(model), [], sums.start)
    reducer.arm()
    reducer.finish(0.0)
    assert sum(one.numel() for one in sums.sent) == sum(one.numel() for one in model.parameters())
    assert not any(one.any() for one in sums.sent)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_running_statistics_are_weighted() -> None:
    model, sums = build("res20", width=4), Sums()
    buffers = [one for one in model.buffers() if one.is_floating_point()]
    for buffer in buffers:
        buffer.fill_(3.0)
    reducer = Reducer(stages_of(model), list(model.buffers()), sums.start)
    reducer.arm()
    reducer.finish(0.25)
    assert all(bool((buffer == 0.75).all()) for buffer in buffers)
    assert sums.sent[-1].numel() == sum(one.numel() for one in buffers)


@pytest.mark.parametrize("done", [0, 1, 4, 100])
def test_a_process_that_fails_sends_what_is_missing(done: int) -> None:
    """After any number of stages: as many messages, of the same sizes in the same order."""
    model, whole = build("res20", width=32), Sums()
    reducer = Reducer(stages_of(model), list(model.buffers()), whole.start)
    with_gradients(model)
    reducer.arm()
    reducer.finish(1.0)
    failed = Sums()
    reducer = Reducer(stages_of(model), list(model.buffers()), failed.start)
    with_gradients(model)
    if done:
        reducer.arm()
    for index in list(reversed(range(len(stages_of(model)))))[:done]:
        reducer.stage_done(index)
    reducer.give_up()
    assert [one.numel() for one in failed.sent] == [one.numel() for one in whole.sent]
    reducer.arm()  # and the step again
    with_gradients(model)
    reducer.finish(1.0)
    assert len(failed.sent) == 2 * len(whole.sent)


def test_frozen_parameters_are_left_out() -> None:
    model, sums = build("res20", width=4), Sums()
    model.conv1.weight.requires_grad_(False)
    reducer = Reducer(stages_of(model), [], sums.start)
    reducer.arm()
    reducer.finish(1.0)
    trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert sum(one.numel() for one in sums.sent) == trainable
    assert model.conv1.weight.grad is None
