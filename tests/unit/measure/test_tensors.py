"""Bytes of real tensors, and operations by the library's own figure, without its memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowmem.measure.tensors import TensorMeter
from lowmem.models import build
from lowmem.trial import PER_BLOCK, PLAIN, SELECTIVE, executed


def test_storages_are_counted_once_and_until_their_end() -> None:
    meter = TensorMeter()
    before = torch.zeros(1000)
    meter.adopt([before])
    with meter:
        a = torch.zeros(500)
        b = a.view(5, 100)[2:]
        assert meter.live_bytes == 6000
        c = torch.ones(250)
        del a
        assert meter.live_bytes == 7000  # the view keeps the storage
        del b, c
    assert meter.live_bytes == 4000
    assert meter.peak_bytes == 7000


def test_it_changes_no_bits() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    plain = layer(x)
    with TensorMeter() as meter:
        metered = layer(x)
    assert torch.equal(plain, metered)
    assert meter.peak_bytes >= metered.numel() * 4


def step(run: nn.Module) -> None:
    F.cross_entropy(run(torch.zeros(8, 3, 32, 32)), torch.zeros(8, dtype=torch.int64)).backward()
    run.zero_grad()


@pytest.mark.parametrize("way", [PLAIN, SELECTIVE, PER_BLOCK])
def test_it_counts_what_the_library_counts(way: str) -> None:
    run = executed(build("res20", width=4), way)
    step(run)
    with TensorMeter() as meter:
        step(run)
    with FlopCounterMode(display=False) as counter:
        step(run)
    assert meter.flops == counter.get_total_flops() > 0


def test_it_holds_no_memory() -> None:
    run = executed(build("res20", width=4), PER_BLOCK)
    step(run)
    peaks = []
    for inner in (nullcontext(), TensorMeter()):
        with TensorMeter() as meter, inner:
            step(run)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1] > 0


def test_a_convolution() -> None:
    with TensorMeter() as meter:
        F.conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), padding=1)
    assert meter.flops == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
