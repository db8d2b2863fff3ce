"""The count of operations: the library's own figure, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowmem.measure.flops import FlopMeter
from lowmem.measure.tensors import TensorMeter
from lowmem.models import build
from lowmem.trial.ways import PER_BLOCK, PLAIN, SELECTIVE, executed


def step(run: nn.Module) -> None:
    F.cross_entropy(run(torch.zeros(8, 3, 32, 32)), torch.zeros(8, dtype=torch.int64)).backward()
    run.zero_grad()


@pytest.mark.parametrize("way", [PLAIN, SELECTIVE, PER_BLOCK])
def test_it_counts_what_the_library_counts(way: str) -> None:
    run = executed(build("res20", width=4), way)
    step(run)
    with FlopMeter() as meter:
        step(run)
    with FlopCounterMode(display=False) as counter:
        step(run)
    assert meter.flops == counter.get_total_flops() > 0


def test_it_holds_no_memory() -> None:
    run = executed(build("res20", width=4), PER_BLOCK)
    step(run)
    peaks = []
    for modes in ((), (FlopMeter(),)):
        meter = TensorMeter()
        with meter:
            for mode in modes:
                mode.__enter__()
            step(run)
            for mode in modes:
                mode.__exit__(None, None, None)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1] > 0


def test_a_convolution() -> None:
    with FlopMeter() as meter:
        F.conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), padding=1)
    assert meter.flops == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
