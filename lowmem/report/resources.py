"""What each run took: time, speed, memory, and how often it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from lowmem.report.naming import run_names
from lowmem.report.tables import UNKNOWN
from lowmem.runs.history import EpochRow, History
from lowmem.units import format_duration, format_size

HEADER = ("Run", "Time", "Images/s", "Peak allocated", "Peak reserved", "Device used", "Resumed")
EXPLAINED = (
    "Time is that in which the run was worked on, evaluation and saving included. Images/s: in training, median over "
    "epochs. Peak allocated is what tensors took, peak reserved what the allocator held for them; device used is the "
    "card with everything on it, or without a card the memory of the process. Each is the largest of any epoch. "
    "Resumed is how often the run was interrupted and gone on with."
)


def resource_rows(histories: Sequence[History]) -> list[tuple[str, ...]]:
    """The texts under HEADER, a row a run, in the order given."""
    return [_row(history, name) for history, name in zip(histories, run_names(histories), strict=True)]


def _row(history: History, name: str) -> tuple[str, ...]:
    rates = [row.images_per_second for row in history.epochs if row.images_per_second is not None]
    elapsed = None if history.last is None else history.last.elapsed_seconds
    resumed = history.times_resumed
    return (
        name,
        UNKNOWN if elapsed is None else format_duration(elapsed),
        f"{median(rates):,.0f}" if rates else UNKNOWN,
        largest(history.epochs, lambda row: row.peak_allocated_bytes),
        largest(history.epochs, lambda row: row.peak_reserved_bytes),
        largest(history.epochs, lambda row: row.device_used_bytes),
        "no" if resumed == 0 else "once" if resumed == 1 else f"{resumed} times",
    )


def largest(rows: Iterable[EpochRow], value: Callable[[EpochRow], int | None]) -> str:
    known = [found for row in rows if (found := value(row)) is not None]
    return format_size(max(known)) if known else UNKNOWN
