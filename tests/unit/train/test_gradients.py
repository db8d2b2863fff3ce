"""Gradient norms: those of the mean loss over the effective batch, at the price of nothing that is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem.config.optimization import OptimConfig
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build
from lowmem.plan.policy import LEAN, SAVE_ALL, uniform
from lowmem.remat import apply_plan, stage_names
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.step.undo import Undo
from lowmem.train.metrics import GradientNorms, default_every

FP32 = Execution("cpu", "fp32", "contiguous")


def _batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def _step(
    model: nn.Module, run: nn.Module | None = None, micro: int | None = None, execution: Execution = FP32
) -> TrainStep:
    return TrainStep(
        run or model, make_optimizer(model, OptimConfig(), "cpu"), make_scaler(execution), execution, micro
    )


def _norms(model: nn.Module, step: TrainStep) -> dict[str, float]:
    """Of one step, recorded."""
    norms = GradientNorms(model, step, every=1)
    step(*_batch(), 0.1, norms.measure)
    values = norms.take()
    assert values is not None
    assert norms.take() is None
    return dict(zip(norms.names, values.tolist(), strict=True))


def _expected(model: nn.Module) -> dict[str, float]:
    images, labels = _batch()
    F.cross_entropy(model(images), labels).backward()
    weights = {name: one for name, one in model.named_parameters() if one.dim() > 1}
    return {name: float(one.grad.double().norm()) for name, one in weights.items() if one.grad is not None}


@pytest.mark.parametrize("planned", [False, True])
def test_they_are_the_librarys_in_the_order_of_the_layers(planned: bool) -> None:
    ours, usual = build("res20", width=4), build("res20", width=4)
    policies = [*[LEAN] * (len(stage_names(ours)) - 1), SAVE_ALL]
    found = _norms(ours, _step(ours, apply_plan(ours, uniform(policies)) if planned else ours))
    expected = _expected(usual)
    assert list(found) == list(expected)
    assert next(iter(found)) == "conv1.weight"
    assert list(found)[-1] == "linear.weight"
    assert "layer2.0.shortcut.0.weight" in found
    assert found == pytest.approx(expected, rel=1e-5)


def test_accumulation_has_the_norm_of_the_whole_batch() -> None:
    def plain() -> nn.Module:  # without batch norm the micro-batches do not matter
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    cut, usual = plain(), plain()
    assert _norms(cut, _step(cut, micro=5)) == pytest.approx(_expected(usual), rel=1e-5)


def test_the_scalers_factor_is_taken_out() -> None:
    """fp16 scales on CUDA only; the library's scaler is the same on the CPU, and its factor is a power of two."""
    scaled, usual = build("res20", width=4), build("res20", width=4)
    step = _step(scaled)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    assert _norms(scaled, step) == pytest.approx(_expected(usual), rel=1e-5)
    assert step.scaler.get_scale() == 2.0**12


def test_an_overflow_is_no_number_and_the_step_is_skipped() -> None:
    model = build("res20", width=4)
    model.linear.weight.data *= 1e6  # so that gradients overflow at the largest scale
    before = model.conv1.weight.detach().clone()
    step = _step(model)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    found = _norms(model, step)
    assert not all(torch.isfinite(torch.tensor(list(found.values()))))
    assert torch.equal(model.conv1.weight, before)


def test_bf16() -> None:
    execution = Execution("cpu", "amp", "contiguous")
    ours, usual = build("res20", width=4), build("res20", width=4)
    assert _norms(ours, _step(ours, execution=execution))["linear.weight"] == pytest.approx(
        _expected(usual)["linear.weight"], rel=0.1
    )


def test_frozen_layers_have_none() -> None:
    model = build("res20", width=4)
    model.conv1.weight.requires_grad_(False)
    assert "conv1.weight" not in _norms(model, _step(model))


def test_the_step_is_the_same_with_and_without() -> None:
    looked, plain = build("res20", width=4), build("res20", width=4)
    totals = _step(plain)(*_batch(), 0.1)
    step = _step(looked)
    assert torch.equal(step(*_batch(), 0.1, GradientNorms(looked, step, 1).measure), totals)
    for left, right in zip(looked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)


def test_it_takes_next_to_nothing_and_not_at_the_peak() -> None:
    peaks = []
    for look in (False, True):
        model = build("res20", width=8)
        step = _step(model)
        norms = GradientNorms(model, step, 1)
        images, labels = _batch()
        with TensorMeter() as meter:
            meter.adopt([*model.parameters(), *model.buffers(), images, labels])
            step(images, labels, 0.1, norms.measure if look else None)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1] > 0


def test_out_of_memory_in_it_is_undone() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has no more.")

    model, plain = build("res20", width=4), build("res20", width=4)
    step = _step(model)
    undo = Undo(step, model)
    failure = undo.attempt(lambda: step(*_batch(), 0.1, fail))
    assert isinstance(failure, Failure)
    assert (failure.phase, failure.final) == ("gradient norms", False)
    assert all(one.grad is None for one in model.parameters())
    assert not isinstance(undo.attempt(lambda: step(*_batch(), 0.1)), Failure)
    _step(plain)(*_batch(), 0.1)
    for left, right in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_when() -> None:
    assert [default_every(steps) for steps in (1, 9, 10, 391, 5000)] == [1, 1, 1, 39, 100]
    model = build("res20", width=4)
    norms = GradientNorms(model, _step(model), every=40)
    assert [step for step in range(1, 121) if norms.due(step)] == [1, 40, 80, 120]


def test_a_step_that_was_not_measured_has_none() -> None:
    model = build("res20", width=4)
    step = _step(model)
    norms = GradientNorms(model, step, every=1)
    step(*_batch(), 0.1)
    assert norms.take() is None
