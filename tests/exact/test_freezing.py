"""Networks of which a part is frozen: the bits of plain PyTorch with the same flags, under any schedule; nothing kept
by what comes before the first parameter that is trained; and bytes predicted to the last one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowmem.choose.costs import measure_costs, price
from lowmem.choose.planning import choose
from lowmem.choose.request import Budget, Request, card_rates
from lowmem.config.cards import load_card
from lowmem.config.schema import ModelConfig, OptimConfig
from lowmem.core.errors import Infeasible
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.models import make_network
from lowmem.models.freezing import freeze
from lowmem.models.resnet import Bottleneck
from lowmem.plan.evaluate import evaluate
from lowmem.plan.hosting import HostTerms, LinkRates
from lowmem.plan.policy import SAVE_ALL, Schedule, Segment
from lowmem.plan.policy import uniform as of_policies
from lowmem.remat import PlannedModule, apply_plan, decompose
from lowmem.simulate import simulate_step
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from tests.exact.compare import FORMATS, differences, pictures, small_net, training, twins
from tests.exact.schedules import hosting, schedules
from tests.step_shapes import shape_of

RATES = card_rates(load_card("gtx1060-6g"))
# Whole stages at the beginning, parts of stages, in the middle, only norms, all but the head, single biases.
PATTERNS = {
    "first": ("conv1", "bn1", "layer1*"),
    "part of a stage": ("conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer2.0.bn2.weight"),
    "middle": ("layer2.*",),
    "norms": ("*bn*", "*shortcut.1"),
    "backbone": ("conv1", "bn1", "layer*"),
    "weights": ("*.weight", "conv1"),
    "head": ("linear",),
}


def _net(patterns: tuple[str, ...], *, evaluated: bool = True) -> nn.Module:
    """`evaluated`: as the settings freeze it; else its batch norms stay in training, as plain PyTorch leaves them."""
    model = small_net(Bottleneck)
    if evaluated:
        freeze(model, patterns)
        return model
    twin = small_net(Bottleneck)
    freeze(twin, patterns)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.requires_grad_(other.requires_grad)
    return model


def _wrong(model: nn.Module, schedule: Schedule, layout: torch.memory_format, low: torch.dtype | None) -> list[str]:
    plain, planned = twins(model, schedule, layout)
    return differences(plain, planned, training(*pictures(3, layout), low))


@pytest.mark.parametrize("name", PATTERNS)
def test_bits_of_plain_pytorch(name: str) -> None:
    stages = decompose(small_net(Bottleneck))
    for seed, (evaluated, layout, low) in enumerate(product((True, False), FORMATS, (None, torch.bfloat16))):
        model = _net(PATTERNS[name], evaluated=evaluated)
        for schedule in (of_policies([SAVE_ALL] * len(stages)), hosting(stages, seed)):
            assert _wrong(model, schedule, layout, low) == [], (evaluated, layout, low)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bits_under_any_schedule(data: st.DataObject) -> None:
    model = _net(PATTERNS[data.draw(st.sampled_from(sorted(PATTERNS)))])
    schedule = data.draw(schedules(decompose(model)))
    assert _wrong(model, schedule, torch.contiguous_format, None) == []


def test_frozen_norms_stay_in_evaluation_and_nothing_frozen_moves() -> None:
    model = _net(PATTERNS["first"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = apply_plan(model, of_policies([SAVE_ALL] * len(decompose(model))))
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1), "cpu")
    step = TrainStep(
        run,
        optimizer,
        make_scaler(Execution("cpu", "fp32", "contiguous")),
        Execution("cpu", "fp32", "contiguous"),
        None,
    )
    run.train()
    for _ in range(2):
        step(*pictures(4), 0.1)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith(("conv1", "bn1", "layer1"))}
    assert len(optimizer.state) == sum(one.requires_grad for one in model.parameters())


# -- bytes -------------------------------------------------------------------------------------------------------------


def _counted(model: nn.Module, schedule: Schedule | None, batch: int) -> int:
    """The most that tensors take in a real step."""
    execution = Execution("cpu", "fp32", "contiguous")
    run = model if schedule is None else apply_plan(model, schedule)
    optimizer = make_optimizer(model, OptimConfig(), "cpu")
    step = TrainStep(run, optimizer, make_scaler(execution), execution, batch)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    undo = Undo(step, model) if isinstance(run, PlannedModule) else None
    with TensorMeter() as meter:
        held = (*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer), images, labels)
        meter.adopt((*held, *(() if undo is None else undo.copies)))
        if undo is None:
            step(images, labels, 0.1)
        else:
            assert not isinstance(undo.attempt(lambda: step(images, labels, 0.1)), Failure)
    return meter.peak_bytes


def _seeded(step: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """With the same dropout in both."""

    def seeded(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return step(model)

    return seeded


NETWORKS = {
    "family": (ModelConfig(arch="res20", width=8), ("conv1", "bn1", "layer1", "layer2.0")),
    "part": (ModelConfig(arch="res20", width=8), ("conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1")),
    "norms": (ModelConfig(arch="res20", width=8), ("*bn*",)),
    "torchvision": (ModelConfig(spec="torchvision:resnet18"), ("conv1", "bn1", "layer[123]*")),
    "its head": (ModelConfig(spec="torchvision:mobilenet_v3_small"), ("features",)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_is_counted(name: str) -> None:
    config, patterns = NETWORKS[name]
    batch = 16
    model = make_network(config, seed=0, freeze=patterns)
    request = Request(model=model, batch=batch, budget=Budget(total_bytes=1 << 40), rates=RATES)
    roomy = choose(request)
    assert roomy.plain.estimate.peak_tensor_bytes == _counted(model, None, batch)
    least, most = roomy.solver.least().peak_bytes, roomy.simulated.estimate.peak_allocated_bytes
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(least + share * (most - least)) + (1 << 18)  # the loss, and rounding to blocks
        choice = choose(Request(model=model, batch=batch, budget=Budget(total_bytes=budget), rates=RATES))
        assert choice.plan.exact
        assert choice.simulated.estimate.peak_allocated_bytes <= budget
        assert choice.simulated.estimate.peak_tensor_bytes == _counted(model, choice.plan.schedule, batch)
        believed = evaluate(choice.plan.schedule, choice.chain).peak_bytes
        assert believed == pytest.approx(choice.simulated.estimate.peak_tensor_bytes, rel=0.01)
        plain, planned = twins(model, choice.plan.schedule, torch.contiguous_format)
        assert differences(plain, planned, _seeded(training(*pictures(batch))), steps=1) == []


def test_with_host_memory() -> None:
    """Tensors of the trained stages wait there; bytes and bits stay."""
    config, patterns = NETWORKS["family"]
    model, terms = make_network(config, seed=0, freeze=patterns), HostTerms(LinkRates(12e9, 12e9), 1 << 30)
    roomy = choose(Request(model=model, batch=16, budget=Budget(total_bytes=1 << 40), rates=RATES))
    budget = (roomy.solver.least().peak_bytes + roomy.simulated.estimate.peak_allocated_bytes) // 2
    request = Request(model=model, batch=16, budget=Budget(total_bytes=budget), rates=RATES, host=terms)
    choice = choose(request)
    assert choice.plan.schedule.hosts
    assert min(item.start for item in choice.plan.schedule.items if item.host) >= choice.chain.unreached
    assert choice.simulated.estimate.peak_tensor_bytes == _counted(model, choice.plan.schedule, 16)
    plain, planned = twins(model, choice.plan.schedule, torch.contiguous_format)
    assert differences(plain, planned, training(*pictures(16))) == []


def test_the_stages_before_the_first_that_is_trained_keep_nothing() -> None:
    frozen = make_network(ModelConfig(arch="res20", width=8), freeze=("conv1", "bn1", "layer1", "layer2"))
    chain = price(measure_costs(shape_of(frozen, 16)), RATES("fp32"))
    assert [stage.reached for stage in chain.stages] == [False] * 5 + [True] * 6
    kept = [stage.options[0].kept_bytes for stage in chain.stages[:5]]
    assert kept == [0, 0, 0, 0, chain.stages[5].input_bytes]
    assert chain.stages[5].input_grad_bytes == 0
    # No plan checkpoints an input that nobody holds; and more stages frozen never take more.
    request = Request(model=frozen, batch=16, budget=Budget(total_bytes=1 << 40), rates=RATES)
    for solution in choose(request).solver.curve():
        starts = [item.start for _, item in solution.schedule.walk() if isinstance(item, Segment)]
        assert not set(starts) & {1, 2, 3, 4}
    peaks = []
    for count in (0, 1, 3, 6):
        patterns = ("conv1", "bn1", "layer1.0", "layer1.1", "layer2", "layer3")[:count]
        model = make_network(ModelConfig(arch="res20", width=8), freeze=patterns)
        peaks.append(simulate_step(shape_of(model, 16), None, RATES("fp32")).estimate.peak_tensor_bytes)
    assert peaks == sorted(peaks, reverse=True)


def test_what_frozen_parameters_do_not_take_is_not_refused() -> None:
    """All but the head: less than parameters, gradients and momentum of the whole network would take."""
    model = make_network(ModelConfig(spec="torchvision:resnet18"), freeze=("conv1", "bn1", "layer*"))
    size = 4 * sum(one.numel() for one in model.parameters())
    plan = choose(Request(model=model, batch=8, budget=Budget(total_bytes=int(1.4 * size)), rates=RATES)).plan
    assert plan.predicted.peak_allocated_bytes is not None
    whole = make_network(ModelConfig(spec="torchvision:resnet18"))
    with pytest.raises(Infeasible):
        choose(Request(model=whole, batch=8, budget=Budget(total_bytes=int(1.4 * size)), rates=RATES))
