"""One step: accumulation keeps the effective batch's gradient, AMP keeps fp32 master weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import PreflightError
from lowmem.distributed.group import Group, Split
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build
from lowmem.plan.policy import LEAN, SAVE_ALL, uniform
from lowmem.remat import apply_plan, stage_names
from lowmem.runs.checkpoint_state import RunState
from lowmem.step.data_parallel import DataParallelStep
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from lowmem.train.replica import capture


def _without_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def _batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def _step(
    model: nn.Module, micro: int | None, execution: Execution = Execution("cpu", "fp32", "contiguous")
) -> TrainStep:
    return TrainStep(model, make_optimizer(model, OptimConfig(), "cpu"), make_scaler(execution), execution, micro)


@pytest.mark.parametrize("size", [32, 21])  # 21: the last, smaller batch, whose last micro-batch is smaller still
def test_accumulation_has_the_gradient_of_the_mean_over_the_effective_batch(size: int) -> None:
    images, labels = _batch(size)
    whole, cut = _without_batch_norm(), _without_batch_norm()
    loss, wrong = _step(whole, None)(images, labels, 0.1)
    cut_loss, cut_wrong = _step(cut, 8)(images, labels, 0.1)
    assert torch.equal(wrong, cut_wrong)
    torch.testing.assert_close(loss, cut_loss, rtol=1e-6, atol=0)
    for left, right in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_a_step_is_what_the_library_does() -> None:
    images, labels = _batch(16)
    ours, usual = build("res20", width=4), build("res20", width=4)
    optimizer = torch.optim.SGD(usual.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    step = _step(ours, None)
    for _ in range(2):
        loss_sum, wrong = step(images, labels, 0.05)
        optimizer.zero_grad()
        logits = usual(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss_sum.item() / 16, loss.item(), rtol=1e-5, atol=0)
        assert wrong.item() == (logits.argmax(1) != labels).sum().item()
    for left, right in zip(ours.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    for name, buffer in ours.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == 2  # invariant 2


@pytest.mark.parametrize("planned", [False, True])
def test_the_update_reads_gradients_as_they_lie_in_memory(planned: bool) -> None:
    """The library's fused update on the CPU does not look at strides: in channels-last every gradient must lie as its
    parameter does, and momentum too."""
    ours, usual = (build("res20", width=16).to(memory_format=torch.channels_last) for _ in range(2))
    policies = [*[LEAN] * (len(stage_names(ours)) - 1), SAVE_ALL]
    run = apply_plan(ours, uniform(policies)) if planned else ours
    images, labels = _batch(8)
    images = images.contiguous(memory_format=torch.channels_last)
    step = TrainStep(
        run,
        make_optimizer(ours, OptimConfig(), "cpu"),
        make_scaler(Execution("cpu", "fp32", "channels-last")),
        Execution("cpu", "fp32", "channels-last"),
        None,
    )
    optimizer = torch.optim.SGD(usual.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
    for _ in range(2):
        step(images, labels, 0.05)
        optimizer.zero_grad()
        F.cross_entropy(usual(images), labels, reduction="sum").div(8).backward()
        optimizer.step()
    for left, right in zip(ours.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(("smoothing", "share"), [(0.1, None), (0.0, 0.75), (0.1, 0.75), (0.0, 0.3), (0.0, 0.5)])
def test_smoothed_and_mixed_labels_have_the_bits_of_a_plain_loop(
    smoothing: float, share: float | None, planned: bool, micro: int | None
) -> None:
    """The papers' loops: `lam * criterion(out, y_a) + (1 - lam) * criterion(out, y_b)`."""
    ours, usual = (build("res20", width=4) for _ in range(2))
    run = apply_plan(ours, uniform([*[LEAN] * (len(stage_names(ours)) - 1), SAVE_ALL])) if planned else ours
    images, first = _batch(12)
    labels = first if share is None else torch.stack([first, first.roll(5)], 1)
    step = _step(run, micro)
    step.label_smoothing = smoothing
    gradients: list[torch.Tensor] = []
    loss_sum, wrong = step(
        images, labels, 0.1, lambda: gradients.extend(one.grad for one in ours.parameters()), share=share or 1.0
    )
    expected, missed = torch.zeros((), dtype=torch.float64), 0
    for x, y in zip(images.split(micro or 12), labels.split(micro or 12), strict=True):
        out = usual(x)
        options = {"reduction": "sum", "label_smoothing": smoothing}
        if share is None:
            loss = F.cross_entropy(out, y, **options)
        else:
            loss = share * F.cross_entropy(out, y[:, 0], **options)
            loss = loss + (1 - share) * F.cross_entropy(out, y[:, 1], **options)
        (loss / 12).backward()
        expected += loss.detach().double()
        missed += (out.argmax(1) != (y if share is None else y[:, int(share < 0.5)])).sum().item()
    assert all(torch.equal(one, two.grad) for one, two in zip(gradients, usual.parameters(), strict=True))
    assert len(gradients) == len(list(usual.parameters()))
    assert (loss_sum.item(), wrong.item()) == (expected.item(), missed)


def test_dense_outputs_are_smoothed_and_mixed_at_every_position() -> None:
    images, first = _batch(6)
    labels = torch.stack([first, first.roll(1)], 1)
    ours, usual = (nn.Conv2d(3, 10, 3, stride=9) for _ in range(2))
    usual.load_state_dict(ours.state_dict())
    step = _step(ours, None)
    step.label_smoothing = 0.2
    step(images, labels, 0.1, share=0.6)
    out, options = usual(images), {"reduction": "sum", "label_smoothing": 0.2}
    both = [F.cross_entropy(out, one.view(-1, 1, 1).expand(-1, 4, 4), **options) for one in labels.unbind(1)]
    ((0.6 * both[0] + (1 - 0.6) * both[1]) / 6).backward()
    make_optimizer(usual, OptimConfig(), "cpu").step()
    assert torch.equal(ours.weight, usual.weight)


def test_gradients_are_gone_after_the_step() -> None:
    model = build("res20", width=4)
    _step(model, None)(*_batch(8), 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
def test_amp_on_the_cpu_is_bf16_with_fp32_weights(memory_format: str) -> None:
    execution = Execution("cpu", "amp", memory_format)
    model = build("res20", width=8).to(memory_format=execution.torch_memory_format)
    seen: set[torch.dtype] = set()
    model.layer1.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    images, labels = _batch(16)
    before = model.conv1.weight.detach().clone()
    loss_sum, _ = _step(model, 8, execution)(images.to(memory_format=execution.torch_memory_format), labels, 0.1)
    assert seen == {torch.bfloat16}
    assert model.conv1.weight.dtype is torch.float32
    assert not torch.equal(before, model.conv1.weight)
    assert torch.isfinite(loss_sum)


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(kind="adamw", decay_norms=False, ema=0.9)])
def test_the_update_allocates_nothing(optim: OptimConfig) -> None:
    """So that a step which runs out of memory does so before anything was changed."""
    model = build("res20", width=4)
    optimizer = make_optimizer(model, optim, "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.conv1.weight.detach().clone()
    with TensorMeter() as meter:
        meter.adopt([*model.parameters(), *optimizer_tensors(optimizer)])
        held = meter.live_bytes
        optimizer.step()
    assert meter.peak_bytes == held > 0
    assert not torch.equal(model.conv1.weight, before)


def test_frozen_parameters_stay() -> None:
    model = build("res20", width=4)
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    _step(model, None)(*_batch(8), 0.1)
    assert torch.equal(model.conv1.weight, before)


def test_momentum_is_there_from_the_start() -> None:
    """So that the first checkpoint is as large as every later one, and the first step as the others."""
    model = build("res20", width=4)
    saved = capture(RunState(), model, _step(model, None), {})
    assert set(saved.optimizer) == {f"momentum_buffer/{name}" for name, _ in model.named_parameters()}
    assert not any(tensor.any() for tensor in saved.optimizer.values())


def test_without_momentum_there_is_none() -> None:
    model = build("res20", width=4)
    optimizer = make_optimizer(model, OptimConfig(momentum=0.0), "cpu")
    execution = Execution("cpu", "fp32", "contiguous")
    step = TrainStep(model, optimizer, make_scaler(execution), execution, None)
    before = model.conv1.weight.detach().clone()
    assert not isinstance(Undo(step, model).attempt(lambda: step(*_batch(8), 0.1)), Failure)
    assert not torch.equal(before, model.conv1.weight)
    assert not any(slots.get("momentum_buffer") is not None for slots in optimizer.state.values())


def test_several_processes_refuse_a_hook_on_a_gradient() -> None:
    model = build("res20", width=2)
    run = apply_plan(model, uniform([SAVE_ALL] * len(stage_names(model))))
    split = Split((4,), micro_batches=(4,))
    DataParallelStep(run, Group(), split, "cpu", sync_bn=False)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(model.layer2[0].conv1.weight, register)(lambda gradient: None)
        with pytest.raises(PreflightError, match=r"^layer2\.0\.conv1\.weight has a hook on its gradient"):
            DataParallelStep(run, Group(), split, "cpu", sync_bn=False)
        handle.remove()
    DataParallelStep(run, Group(), split, "cpu", sync_bn=False)
