"""What each run took: time, speed, memory, and how often it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from lowmem.core.units import format_duration, format_size
from lowmem.report.naming import run_names
from lowmem.report.tables import UNKNOWN
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView

HEADER = ("Run", "Time", "Images/s", "Planned", "Allocated", "Reserved", "Device", "Resumed")
EXPLAINED = (
    "Time is that in which the run was worked on, evaluation and saving included. Images/s: in training, median over "
    "epochs. Memory is the peak. Planned: of a step's tensors, as the plan predicts it, if the run has one. Allocated: "
    "what tensors took. Reserved: what the allocator held for them. Device: the card with everything on it, or without "
    "a card the process. Resumed: how often the run was interrupted and gone on with."
)


def resource_rows(histories: Sequence[RunView]) -> list[tuple[str, ...]]:
    """The texts under HEADER, a row a run, in the order given."""
    return [_row(history, name) for history, name in zip(histories, run_names(histories), strict=True)]


def _row(history: RunView, name: str) -> tuple[str, ...]:
    rates = [row.images_per_second for row in history.epochs if row.images_per_second is not None]
    elapsed = None if history.last is None else history.last.elapsed_seconds
    resumed = history.times_resumed
    allocated = largest(history.epochs, lambda row: row.peak_allocated_bytes)
    if allocated == UNKNOWN:  # on the CPU nobody counts but the check of the plan
        allocated = _checked(history, "measured_peak_bytes")
    return (
        name,
        UNKNOWN if elapsed is None else format_duration(elapsed),
        f"{median(rates):,.0f}" if rates else UNKNOWN,
        _checked(history, "predicted_peak_bytes"),
        allocated,
        largest(history.epochs, lambda row: row.peak_reserved_bytes),
        largest(history.epochs, lambda row: row.device_used_bytes),
        "no" if resumed == 0 else "once" if resumed == 1 else f"{resumed} times",
    )


def largest(rows: Iterable[EpochRow], value: Callable[[EpochRow], int | None]) -> str:
    """Of all epochs, for humans; a dash if it is not known of any."""
    known = [found for row in rows if (found := value(row)) is not None]
    return format_size(max(known)) if known else UNKNOWN


def _checked(history: RunView, name: str) -> str:
    """Of the plan in force at last: its first steps are held against the prediction."""
    found = [event.detail.get(name) for event in history.events if event.kind == "measured"]
    known = [size for size in found if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 60]
    return format_size(known[-1]) if known else UNKNOWN
