"""The tables of a report: final test errors beside the published ones, and what each run took."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from lowmem.core.units import format_duration, format_size
from lowmem.report.naming import NamedRun
from lowmem.report.published import published_error_pct
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView

UNKNOWN = "–"
RESOURCES_EXPLAINED = (
    "Time is that in which the run was worked on, evaluation and saving included. Images/s: in training, median over "
    "epochs. Memory is the peak. Planned: of a step's tensors, as the plan predicts it, if the run has one. Allocated: "
    "what tensors took. Reserved: what the allocator held for them. Device: the card with everything on it, or without "
    "a card the process. Resumed: how often the run was interrupted and gone on with."
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&!^])")


@dataclass(frozen=True)
class ReportTable:
    """Texts under texts, a row a run. The first `names` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int

    def to_markdown(self) -> str:
        rule = "|" + "---|" * self.names + "---:|" * (len(self.header) - self.names)
        rows = [" | ".join(escape(cell) for cell in row) for row in self.rows]
        return "\n".join(["| " + " | ".join(self.header) + " |", rule, *(f"| {row} |" for row in rows)])


def escape(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def percent(value: float | None) -> str:
    """`7.46 %`, or a dash for an unknown value."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def error_table(runs: Sequence[NamedRun]) -> ReportTable:
    """Of final test errors, each beside its published figure; what differs is said by `published.departures`."""
    return ReportTable(
        ("Network", "Run", "Epochs", "Final test error", "Published"), tuple(_error_row(run) for run in runs), 2
    )


def _error_row(run: NamedRun) -> tuple[str, ...]:
    done, asked, last = run.history.epochs_done, run.history.config.train.epochs, run.history.last
    return (
        run.network,
        run.name,
        f"{done}" if done >= asked else f"{done} of {asked}",
        percent(None if last is None else last.test_error_pct),
        percent(published_error_pct(run.history.config)),
    )


def resource_table(runs: Sequence[NamedRun]) -> ReportTable:
    """Of time, speed, memory, and how often each run was interrupted."""
    header = ("Run", "Time", "Images/s", "Planned", "Allocated", "Reserved", "Device", "Resumed")
    return ReportTable(header, tuple(_resource_row(run.name, run.history) for run in runs), 1)


def _resource_row(name: str, history: RunView) -> tuple[str, ...]:
    allocated = largest(history.epochs, lambda row: row.peak_allocated_bytes)
    if allocated == UNKNOWN:  # on the CPU nobody counts but the check of the plan
        allocated = _checked(history, "measured_peak_bytes")
    return (
        name,
        elapsed(history),
        image_rate(history),
        _checked(history, "predicted_peak_bytes"),
        allocated,
        largest(history.epochs, lambda row: row.peak_reserved_bytes),
        largest(history.epochs, lambda row: row.device_used_bytes),
        times(history.times_resumed) if history.times_resumed else "no",
    )


def elapsed(history: RunView) -> str:
    seconds = None if history.last is None else history.last.elapsed_seconds
    return UNKNOWN if seconds is None else format_duration(seconds)


def image_rate(history: RunView) -> str:
    """Pictures a second in training, the median over epochs."""
    rates = [row.images_per_second for row in history.epochs if row.images_per_second is not None]
    return f"{median(rates):,.0f}" if rates else UNKNOWN


def largest(rows: Iterable[EpochRow], value: Callable[[EpochRow], int | None]) -> str:
    """Of all epochs, for humans; a dash if it is not known of any."""
    known = [size for row in rows if (size := value(row)) is not None]
    return format_size(max(known)) if known else UNKNOWN


def _checked(history: RunView, name: str) -> str:
    """Of the plan in force at last: its first steps are held against the prediction."""
    sizes = [event.detail.get(name) for event in history.events if event.kind == "measured"]
    known = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 60]
    return format_size(known[-1]) if known else UNKNOWN
