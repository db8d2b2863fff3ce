"""Accumulation, mixed precision, evaluation, frozen parameters: whatever is around the step, the bits are
autograd's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import Bottleneck
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, PolicyKind, keep
from lowmem.remat import apply_plan, decompose
from tests.exact.compare import (
    BLOCKS,
    FORMAT_NAMES,
    FORMATS,
    differences,
    pictures,
    small_net,
    training,
    twins,
)
from tests.exact.schedules import alternating, hosting, segments, uniform

SCHEDULES = {
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "lean": lambda stages: uniform(stages, LEAN),
    "conv2": lambda stages: uniform(stages, keep("conv2")),
    "dropped": lambda stages: alternating(stages, keep("conv1"), BlockPolicy(PolicyKind.LEAN, drop_output=True)),
    "segments": lambda stages: segments(stages, 3, INPUT_ONLY),
    "host": lambda stages: hosting(stages, 3),
}
by_format = pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)
by_block = pytest.mark.parametrize("block", BLOCKS)
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def test_tensors_wait_on_the_host() -> None:
    assert all(SCHEDULES["host"](decompose(small_net(block))).hosts for block in BLOCKS)


def _twins(block: Any, schedule: str, memory_format: Any, prepare: Callable[[nn.Module], Any] | None = None) -> Any:
    model = small_net(block)
    if prepare is not None:
        prepare(model)
    return twins(model, SCHEDULES[schedule](decompose(model)), memory_format)


@by_format
@by_block
@by_schedule
def test_accumulation(schedule: str, block: Any, memory_format: Any) -> None:
    micro = [pictures(2, memory_format, seed) for seed in range(3)]

    def step(model: nn.Module) -> Tensor:
        losses = []
        for x, labels in micro:
            loss = F.cross_entropy(model(x), labels) / len(micro)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    plain, planned = _twins(block, schedule, memory_format)
    assert differences(plain, planned, step) == []


@by_format
@by_block
@by_schedule
@pytest.mark.parametrize("low", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_mixed_precision(low: torch.dtype, schedule: str, block: Any, memory_format: Any) -> None:
    """Equal to autograd under autocast, and so between policies."""
    plain, planned = _twins(block, schedule, memory_format)
    assert differences(plain, planned, training(*pictures(3, memory_format), low)) == []


def test_double_precision() -> None:
    model = small_net(Bottleneck).double()
    plain, planned = twins(model, uniform(decompose(model), keep("conv2")), torch.contiguous_format)
    x, labels = pictures(2)
    assert differences(plain, planned, training(x.double(), labels)) == []


@by_format
@by_schedule
def test_evaluation_mode(schedule: str, memory_format: Any) -> None:
    """With gradients: running statistics are used and nothing moves."""

    def prepare(model: nn.Module) -> None:
        training(*pictures(3))(model)  # statistics that are not the initial ones
        model.eval()

    plain, planned = _twins(Bottleneck, schedule, memory_format, prepare)
    assert differences(plain, planned, training(*pictures(3, memory_format))) == []


@by_format
@by_block
@pytest.mark.parametrize("train", [True, False])
def test_without_gradients(train: bool, block: Any, memory_format: Any) -> None:
    x, _ = pictures(3, memory_format)
    plain, planned = _twins(block, "conv2", memory_format)
    plain.train(train)
    planned.train(train)

    def step(model: nn.Module) -> Tensor:
        with torch.no_grad():
            y = model(x)
        assert not y.requires_grad
        return y

    assert differences(plain, planned, step) == []


FROZEN: dict[str, Callable[[str], bool]] = {
    "stem and first block": lambda name: name.startswith(("conv1", "bn1", "layer1")),
    "head": lambda name: name.startswith("linear"),
    "norms": lambda name: "bn" in name or "shortcut.1" in name,
    "convolutions": lambda name: "conv" in name or "shortcut.0" in name,
    "middle": lambda name: name.startswith("layer2"),
    "second half of a block": lambda name: "conv1" in name or "bn1" in name,
    "norm biases": lambda name: name.endswith("bias"),
    "all but the last norm": lambda name: name != "layer4.0.bn2.weight",
    "all": lambda name: True,
}


@by_block
@by_schedule
@pytest.mark.parametrize("which", FROZEN)
def test_frozen_parameters(which: str, schedule: str, block: Any) -> None:
    def prepare(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[which](name))

    def step(model: nn.Module) -> Tensor:
        loss = F.cross_entropy(model(x), labels)
        assert loss.requires_grad == (which != "all")
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    x, labels = pictures(2)
    plain, planned = _twins(block, schedule, torch.contiguous_format, prepare)
    assert differences(plain, planned, step, steps=1) == []


@by_schedule
def test_frozen_norms_in_evaluation_mode(schedule: str) -> None:
    def prepare(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "layer2" in name:
                module.eval()

    plain, planned = _twins(Bottleneck, schedule, torch.contiguous_format, prepare)
    assert differences(plain, planned, training(*pictures(3))) == []


@by_schedule
def test_input_gradient(schedule: str) -> None:
    x, labels = pictures(2)

    def step(model: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        F.cross_entropy(model(leaf), labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    plain, planned = _twins(Bottleneck, schedule, torch.contiguous_format)
    assert differences(plain, planned, step) == []


@by_schedule
def test_cumulative_statistics(schedule: str) -> None:
    """Momentum None: the average over all batches so far."""

    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None

    plain, planned = _twins(Bottleneck, schedule, torch.contiguous_format, prepare)
    assert differences(plain, planned, training(*pictures(3)), steps=3) == []


def test_training_run() -> None:
    """Ten optimizer steps later the weights are the same bits."""
    plain, planned = _twins(Bottleneck, "segments", torch.contiguous_format)
    final = []
    for model in (plain, planned):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
        for seed in range(10):
            optimizer.zero_grad(set_to_none=True)
            training(*pictures(4, seed=seed))(model)
            optimizer.step()
        final.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_two_passes_before_their_backwards() -> None:
    """Each forward has its own activations."""

    def step(model: nn.Module) -> Tensor:
        losses = [F.cross_entropy(model(x), labels) for x, labels in (pictures(2, seed=1), pictures(3, seed=2))]
        (losses[0] + 2 * losses[1]).backward()
        return torch.stack(losses).detach()

    model = small_net(Bottleneck)
    plain, planned = twins(model, segments(decompose(model), 2, LEAN), torch.contiguous_format)
    # autograd's own order of the two backwards is its business: sums of two are the same either way
    assert differences(plain, planned, step) == []


def test_a_second_backward_is_refused() -> None:
    model = small_net(Bottleneck)
    planned = apply_plan(model, uniform(decompose(model), LEAN))
    x, labels = pictures(2)
    loss = F.cross_entropy(planned(x), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="went backward already"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    model = small_net(Bottleneck)
    planned = apply_plan(model, uniform(decompose(model), LEAN))
    x = pictures(2)[0].requires_grad_()
    (grad,) = torch.autograd.grad(planned(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_one_value_per_channel_is_refused() -> None:
    """As `F.batch_norm` does."""
    model = small_net(Bottleneck)
    planned = apply_plan(model, uniform(decompose(model), LEAN))
    with pytest.raises(ValueError, match="more than one value per channel"):
        planned(torch.randn(1, 3, 8, 8))


@by_schedule
@pytest.mark.parametrize("which", ["weights", "inputs"])
def test_mixed_memory_formats(which: str, schedule: str) -> None:
    """Only the weights, or only the pictures, in channels-last."""
    formats = (torch.channels_last, torch.contiguous_format)
    weights, inputs = formats if which == "weights" else formats[::-1]
    plain, planned = _twins(Bottleneck, schedule, weights)
    assert differences(plain, planned, training(*pictures(3, inputs))) == []


@by_format
@by_schedule
def test_batch_norm_on_the_librarys_choice_of_kernel(schedule: str, memory_format: Any) -> None:
    plain, planned = _twins(Bottleneck, schedule, memory_format)
    planned.lowmem.library_norm = True
    assert differences(plain, planned, training(*pictures(3, memory_format))) == []


@pytest.mark.parametrize("library_norm", [False, True], ids=["native", "library"])
@pytest.mark.parametrize("kind", ["frozen", "cumulative"])
@by_schedule
def test_batch_norms_that_are_frozen_or_average_cumulatively(schedule: str, kind: str, library_norm: bool) -> None:
    plain, planned = _twins(Bottleneck, schedule, torch.contiguous_format)
    planned.lowmem.library_norm = library_norm
    for model in (plain, planned):
        for number, norm in enumerate(one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
            if kind == "cumulative":
                norm.momentum = None
            elif number % 2:
                norm.eval()
    assert differences(plain, planned, training(*pictures(3))) == []
