"""What is said of a prediction once the first steps were measured."""

from __future__ import annotations

from lowmem.core.units import MIB
from lowmem.train.watchers import MeasuredPeak


def test_on_the_cpu_only_tensors_are_known() -> None:
    found = MeasuredPeak(1000 * MIB, 1010 * MIB, 1100 * MIB)
    assert found.within
    assert found.line() == (
        "measured: 1,010 MiB of tensors at the peak of a step (predicted 1,000 MiB, +1.0%); within the budget of "
        "1,100 MiB"
    )


def test_on_a_card_each_figure_has_its_own_error() -> None:
    found = MeasuredPeak(
        predicted_peak_bytes=5000 * MIB,
        measured_peak_bytes=5100 * MIB,
        budget_bytes=5050 * MIB,
        predicted_reserved_bytes=5500 * MIB,
        measured_reserved_bytes=5445 * MIB,
        predicted_device_bytes=None,
        measured_device_bytes=5800 * MIB,
    )
    assert not found.within
    assert found.line() == (
        "measured: 5,100 MiB of tensors at the peak of a step (predicted 5,000 MiB, +2.0%), 5,445 MiB held by the "
        "allocator (predicted 5,500 MiB, -1.0%), 5,800 MiB in use on the card by this process; OVER the budget of "
        "5,050 MiB"
    )
    assert found.measured_device_bytes == 5800 * MIB
    assert found.predicted_device_bytes is None
