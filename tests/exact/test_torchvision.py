"""Networks of torchvision, planned for much memory, for half as much as could be saved, and for the least there is:
loss, gradients and buffers bit for bit those of plain PyTorch, and as many bytes at the peak as predicted.

At torchvision's own sizes for 224x224 these would take hours; pictures are as small as a network takes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.choose.planning import make_plan
from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import Infeasible
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.plan.hosting import HostTerms
from lowmem.plan.record import Plan
from lowmem.plan.timeline import LinkRates
from lowmem.remat import apply_plan
from lowmem.simulate import StepShape, simulate_step
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo

BATCH = 2
RATES = card_rates(load_card("gtx1060-6g"))("fp32")
# network -> side of the pictures
QUICK = {"squeezenet1_1": 64}
SLOW = {
    **dict.fromkeys(("resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_large"), 64),
    **dict.fromkeys(("efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mnasnet1_0", "shufflenet_v2_x1_0"), 64),
    **dict.fromkeys(("densenet121", "googlenet", "squeezenet1_0", "regnet_y_400mf", "regnet_x_400mf"), 64),
    **dict.fromkeys(("resnet18", "mobilenet_v3_small", "vgg11_bn", "vgg11", "convnext_tiny", "swin_t"), 64),
    **{"alexnet": 96, "inception_v3": 96, "vit_b_32": 224},
}
WAITING = ("densenet121", "efficientnet_b0")  # planned with host memory too
MORE: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def network(name: str) -> nn.Module:
    """With a head that is not zero, as some are to begin with: it would hide every difference."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **MORE.get(name, {}))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def plans(model: nn.Module, side: int) -> dict[str, Plan]:
    """By what there is: ample, half, least."""

    def plan(budget: int) -> Plan:
        return make_plan(
            model, batch=BATCH, budget=budget, image_shape=(3, side, side), allow_accumulation=False, precision="fp32"
        )

    ample = plan(1 << 40)
    with pytest.raises(Infeasible) as refused:
        plan(1)
    least = refused.value.least_bytes
    assert ample.predicted.peak_allocated_bytes is not None
    half = plan((least + ample.predicted.peak_allocated_bytes) // 2)
    return {"ample": ample, "half": half, "least": plan(least)}


def one_step(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def different(plain: nn.Module, planned: nn.Module) -> list[str]:
    wrong = []
    for (name, p), q in zip(plain.named_parameters(), planned.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None) or (p.grad is not None and not torch.equal(p.grad, q.grad)):
            wrong.append(name)
    for (name, ours), theirs in zip(plain.named_buffers(), planned.buffers(), strict=True):
        if not torch.equal(ours, theirs):
            wrong.append(name)
    return wrong


def step_shape(model: nn.Module, side: int, batch: int) -> StepShape:
    return StepShape(
        model=model,
        image_shape=(3, side, side),
        batch=batch,
        micro_batch=batch,
        precision="fp32",
        memory_format="contiguous",
    )


def counted_peak_bytes(model: nn.Module, plan: Plan, side: int, channels: int = 3) -> int:
    """Of storages, in a real step."""
    run = apply_plan(copy.deepcopy(model), plan)
    optimizer, execution = make_optimizer(run, OptimConfig(), "cpu"), Execution("cpu", "fp32", plan.memory_format)
    step = TrainStep(run, optimizer, make_scaler(execution), execution, plan.batch)
    images, labels = torch.randn(plan.batch, channels, side, side), torch.zeros(plan.batch, dtype=torch.int64)
    undo = Undo(step, run)
    there = (*run.parameters(), *run.buffers(), *optimizer_tensors(optimizer), *undo.copies, images, labels)
    with TensorMeter() as meter:
        meter.adopt(there)
        assert not isinstance(undo.attempt(lambda: step(images, labels, 0.1)), Failure)
    return meter.peak_bytes


@pytest.mark.parametrize(
    ("name", "side"),
    [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
    ids=[*QUICK, *SLOW],
)
def test_bits_and_bytes(name: str, side: int) -> None:
    model = network(name)
    torch.manual_seed(1)
    x, labels = torch.randn(BATCH, 3, side, side), torch.randint(0, 10, (BATCH,))
    plain = copy.deepcopy(model)
    wanted = one_step(plain, x, labels)
    shape = step_shape(model, side, BATCH)
    for budget, plan in plans(model, side).items():
        planned = apply_plan(copy.deepcopy(model), plan)
        assert torch.equal(one_step(planned, x, labels), wanted), budget
        assert different(plain, planned) == [], budget
        predicted = simulate_step(shape, plan.schedule, RATES).estimate
        assert predicted.peak_allocated_bytes == plan.predicted.peak_allocated_bytes, budget
        assert counted_peak_bytes(model, plan, side) == predicted.peak_tensor_bytes, budget


@pytest.mark.parametrize("name", ["mobilenet_v2", *(pytest.param(one, marks=pytest.mark.slow) for one in WAITING)])
def test_bits_and_bytes_with_host_memory(name: str) -> None:
    """At half of plain PyTorch's memory."""
    side, batch, model = 64, 16, network(name)
    torch.manual_seed(1)
    x, labels = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    shape = step_shape(model, side, batch)
    half = simulate_step(shape, None, RATES).estimate.peak_allocated_bytes // 2
    host = HostTerms(LinkRates(12e9, 12e9), 1 << 40)
    plan = make_plan(model, batch=batch, budget=half, image_shape=(3, side, side), allow_accumulation=False, host=host)
    assert plan.schedule.hosts
    plain, planned = copy.deepcopy(model), apply_plan(copy.deepcopy(model), plan)
    assert torch.equal(one_step(planned, x, labels), one_step(plain, x, labels))
    assert different(plain, planned) == []
    predicted = simulate_step(shape, plan.schedule, RATES).estimate
    assert predicted.peak_allocated_bytes == plan.predicted.peak_allocated_bytes
    assert counted_peak_bytes(model, plan, side) == predicted.peak_tensor_bytes


def test_there_are_enough() -> None:
    assert len(QUICK) + len(SLOW) >= 24
