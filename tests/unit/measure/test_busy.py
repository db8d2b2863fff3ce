"""What a profiler's events cover; nothing here depends on how fast the machine is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from lowmem.measure.busy import busy_seconds, covered_seconds


def _event(start: float, end: float, kind: DeviceType = DeviceType.CUDA, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        device_type=kind, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation
    )


@pytest.mark.parametrize(
    ("events", "microseconds"),
    [
        ([_event(10, 20), _event(30, 35)], 15),
        ([_event(30, 35), _event(10, 20)], 15),
        ([_event(10, 20), _event(15, 25), _event(12, 14)], 15),  # two streams
        ([_event(10, 20), _event(0, 100, DeviceType.CPU)], 10),  # what the host does is not the card's work
        ([_event(10, 20), _event(0, 100, annotation=True)], 10),
    ],
)
def test_the_card_is_busy_wherever_a_kernel_runs(events: list[SimpleNamespace], microseconds: float) -> None:
    assert covered_seconds(events, DeviceType.CUDA) == pytest.approx(microseconds / 1e6)


def test_a_profiler_that_tells_nothing_is_not_taken_for_an_idle_card() -> None:
    assert covered_seconds([_event(0, 5, DeviceType.CPU)], DeviceType.CUDA) is None
    assert covered_seconds([], DeviceType.CUDA) is None


def test_the_profiler_sees_what_a_processor_computes() -> None:
    a = torch.randn(100, 100)
    found = busy_seconds(lambda: a @ a, "cpu")
    assert found is not None
    assert found > 0
    assert busy_seconds(lambda: None, "cpu") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_without_a_card_nothing_is_known_of_it() -> None:
    assert busy_seconds(lambda: None, "cuda") is None
