"""The simulated peak against the peak measured on real tensors by the CPU allocator's own records: within
1 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule, Segment, keep
from lowmem.simulate import estimate, trace_steps
from tests.exact.schedules import alternating, segments, uniform
from tests.unit.simulate.loops import MakeSchedule, Setup
from tests.unit.simulate.tracker import measured_peak_bytes


def _mixed(stages: Any) -> Schedule:
    """Segments in segments, dropped outputs, every kind of policy."""
    inner = Segment(2, 3, Schedule((Keep(2, LEAN), Keep(3, FUSED))))
    middle = Segment(1, 4, Schedule((Keep(1, keep("conv1", drop_output=True)), inner, Keep(4, FUSED))))
    return Schedule((Keep(0, INPUT_ONLY), middle, Keep(5, keep("conv1", "relu")), Keep(6, SAVE_ALL)))


SCHEDULES: dict[str, MakeSchedule | None] = {
    "plain autograd": None,
    "lean": lambda stages: uniform(stages, LEAN),
    "conv1": lambda stages: uniform(stages, keep("conv1")),
    "segments": lambda stages: segments(stages, 2, LEAN),
    "dropped": lambda stages: alternating(stages, LEAN, keep("conv1", drop_output=True)),
    "mixed": _mixed,
}
BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
QUICK = (0, 3, 5, 6)  # of the eight kinds of block; each two of block, residual and precision occur together


def _configurations() -> list[Any]:
    """Not the full product: every pair of choices occurs."""
    found = []
    number = 0
    for block in BLOCKS:
        for residual in (True, False):
            for low in (None, torch.bfloat16):
                for offset in range(4):
                    name = list(SCHEDULES)[(number + offset) % len(SCHEDULES)]
                    memory_format = (torch.contiguous_format, torch.channels_last)[(number + offset // 2) % 2]
                    accumulation, steps = (1, 2)[offset == 3], (3, 2, 1, 2)[offset]
                    setup = Setup(
                        schedule=SCHEDULES[name],
                        block=BLOCKS[block],
                        residual=residual,
                        low=low,
                        memory_format=memory_format,
                        accumulation=accumulation,
                        library_norm=bool(number % 2),
                    )
                    norm = "library" if setup.library_norm else "native"
                    label = f"{block}-{residual}-{low}-{memory_format}-{name}-x{accumulation}-{steps}steps-{norm}"
                    marks = [] if number in QUICK else [pytest.mark.slow]
                    found.append(pytest.param(setup, steps, marks=marks, id=label.replace("torch.", "")))
                number += 1
    return found


CONFIGURATIONS = _configurations()


@pytest.mark.parametrize(("setup", "steps"), CONFIGURATIONS)
def test_peak_within_one_percent(setup: Setup, steps: int) -> None:
    def work() -> None:
        step = setup.build(fake=False)
        for _ in range(steps):
            step.run()

    measured = measured_peak_bytes(work)
    simulated = estimate(trace_steps(setup.build, steps)).peak_tensor_bytes
    assert simulated == pytest.approx(measured, rel=0.01)


def test_enough_configurations() -> None:
    assert len(CONFIGURATIONS) >= 24
