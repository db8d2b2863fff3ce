"""The simulated step is the real one: its peak is what a step of `lowmem.step` takes, to the byte (invariant 5)."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.config.optimization import OptimConfig
from lowmem.measure.out_of_memory import Failure
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, uniform
from lowmem.remat import apply_plan, stage_names
from lowmem.simulate import Kind, StepShape, StepSimulator, simulate_step
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, optimizer_tensors
from lowmem.step.undo import Undo
from tests.step_shapes import shape_of

BATCH = 16


# Of the quick ones each value is in half.
CASES = list(product(["fp32", "amp"], ["contiguous", "channels-last"], [16, 6], [False, True]))
QUICK = {
    ("fp32", "contiguous", 6, True),
    ("fp32", "channels-last", 16, False),
    ("amp", "contiguous", 16, True),
    ("amp", "channels-last", 6, False),
}


@pytest.mark.parametrize(
    ("precision", "memory_format", "micro_batch", "undone"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_peak(precision: str, memory_format: str, micro_batch: int, undone: bool) -> None:
    """Under autograd, and under a plan with what undoes the step."""
    execution = Execution("cpu", precision, memory_format)
    model = build("res20", width=16).to(memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
    schedule = uniform([LEAN] * (len(stage_names(model)) - 1) + [SAVE_ALL]) if undone else None
    shape = StepShape(
        model=model,
        image_shape=(3, 32, 32),
        batch=BATCH,
        micro_batch=micro_batch,
        precision=precision,
        memory_format=memory_format,
    )
    simulated = simulate_step(shape, schedule, card_rates(load_card("gtx1060-6g"))("fp32"))
    assert simulated.estimate.peak_tensor_bytes == _measured(model, schedule, execution, micro_batch)


@pytest.mark.parametrize("micro_batch", [16, 6])
@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_the_peak_of_a_loss_of_smoothed_or_mixed_labels(precision: str, micro_batch: int) -> None:
    """Of a network whose outputs are larger than all else."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1000, 1))
    execution, peaks = Execution("cpu", precision, "contiguous"), set()
    schedule = uniform([LEAN] * (len(stage_names(model)) - 1) + [SAVE_ALL])
    for smoothing, mixed in product([0.0, 0.1], [False, True]):
        shape = StepShape(
            model=model,
            image_shape=(3, 8, 8),
            batch=BATCH,
            micro_batch=micro_batch,
            precision=precision,
            memory_format="contiguous",
            label_smoothing=smoothing > 0,
            mixup=mixed,
        )
        for way in (schedule, None):
            found = simulate_step(shape, way, card_rates(load_card("gtx1060-6g"))("fp32")).estimate.peak_tensor_bytes
            assert found == _measured(model, way, execution, micro_batch, 8, smoothing, mixed)
            peaks.add((way is None, found))
    assert len(peaks) == 8  # each of them takes more


# Tensors of a parameter's size that are kept, and the optimizer that keeps them.
OPTIMIZERS = [
    (0, OptimConfig(momentum=0.0)),
    (1, OptimConfig(clip_norm=0.1, decay_norms=False)),
    (1, OptimConfig(momentum=0.0, ema=0.9)),
    (2, OptimConfig(kind="adamw")),
    (2, OptimConfig(ema=0.9, nesterov=True)),
    (3, OptimConfig(kind="adamw", ema=0.9, clip_norm=0.1, decay_norms=False)),
]


@pytest.mark.parametrize(("copies", "optim"), OPTIMIZERS)
@pytest.mark.parametrize("planned", [False, True])
def test_peak_with_what_the_optimizer_keeps(copies: int, optim: OptimConfig, planned: bool) -> None:
    model = build("res20", width=16)
    schedule = uniform([INPUT_ONLY] * (len(stage_names(model)) - 1) + [SAVE_ALL]) if planned else None
    shape = shape_of(model, BATCH, optim=optim)
    simulated = simulate_step(shape, schedule, card_rates(load_card("gtx1060-6g"))("fp32")).estimate
    assert simulated.peak_tensor_bytes == _measured(model, schedule, shape.execution, BATCH, optim=optim)
    parameters = list(model.parameters())
    counts = 4 * len(parameters) if optim.kind == "adamw" else 0
    kept = copies * sum(parameter.nbytes for parameter in parameters)
    assert simulated.at_peak_bytes[Kind.OPTIMIZER] == kept + counts
    assert optim.copies == copies


def _measured(
    model: torch.nn.Module,
    schedule: Schedule | None,
    execution: Execution,
    micro_batch: int,
    side: int = 32,
    smoothing: float = 0.0,
    mixed: bool = False,
    optim: OptimConfig = OptimConfig(),
) -> int:
    run = model if schedule is None else apply_plan(model, schedule)
    optimizer = make_optimizer(model, optim, "cpu")
    step = TrainStep(run, optimizer, make_scaler(execution), execution, micro_batch, clip_norm=optim.clip_norm)
    step.label_smoothing = smoothing
    images = torch.randn(BATCH, 3, side, side).contiguous(memory_format=execution.torch_memory_format)
    labels = torch.randint(10, (BATCH, 2) if mixed else (BATCH,))
    undo = Undo(step, model) if schedule is not None else None
    copies = () if undo is None else undo.copies
    with TensorMeter() as meter:
        meter.adopt((*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer), *copies, images, labels))
        if undo is None:
            step(images, labels, 0.1)
        else:
            assert not isinstance(undo.attempt(lambda: step(images, labels, 0.1)), Failure)
    return meter.peak_bytes


@pytest.mark.parametrize("joint", [False, True], ids=["alone", "joint"])
@pytest.mark.parametrize("micro_batch", [16, 6])
@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_steps_on_the_same_outlines_are_those_that_begin_anew(precision: str, micro_batch: int, joint: bool) -> None:
    shape = StepShape(
        model=build("res20", width=16),
        image_shape=(3, 32, 32),
        batch=BATCH,
        micro_batch=micro_batch,
        precision=precision,
        memory_format="contiguous",
        joint=joint,
    )
    count = len(stage_names(shape.model))
    inner = Schedule((*(Keep(at, LEAN) for at in range(count - 1)), Keep(count - 1, SAVE_ALL)))
    schedules = [
        uniform([SAVE_ALL] * count),
        uniform([INPUT_ONLY] * (count - 1) + [SAVE_ALL]),
        Schedule((Segment(0, count - 1, inner),)),
    ]
    rates, steps = card_rates(load_card("gtx1060-6g"))("fp32"), StepSimulator(shape)
    for schedule in (*schedules, *reversed(schedules)):
        for capacity in (None, 24 << 20):
            found = steps.simulate(schedule, rates, capacity)
            assert found == simulate_step(shape, schedule, rates, capacity)
