"""What a run looks like in a terminal: a live line there, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowmem.cli.lines import describe_epoch
from lowmem.cli.printed import printable
from lowmem.core.units import format_duration, format_size
from lowmem.distributed.launch import is_led
from lowmem.report import ReportResult
from lowmem.train.observer import Observer, Progress

_PLAIN_EVERY_SECONDS = 30.0  # progress bars flood log files; a line now and then does not


def describe_progress(progress: Progress) -> str:
    """`epoch 3/164 [120/391] loss 1.234 error 45.6 % 184 images/s 1,200 MiB 1:02:03 left`."""
    parts = [f"epoch {progress.epoch}/{progress.epochs} [{progress.step_in_epoch}/{progress.steps_per_epoch}]"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.error_pct is not None:
        parts.append(f"error {progress.error_pct:.2f} %")
    parts.append(f"lr {progress.lr:g}")
    if progress.images_per_second is not None:
        parts.append(f"{progress.images_per_second:,.0f} images/s")
    if progress.memory_bytes is not None:
        parts.append(format_size(progress.memory_bytes))
    if progress.seconds_left is not None:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    if progress.job is not None:
        parts.append(progress.job)
    return "  ".join(parts)


class PlainObserver(Observer):
    """Whole lines, no cursor movement."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        try:
            print(printable(text), flush=True)
        except OSError:
            # Whoever read this left (`| head`, a closed terminal): no reason to stop a run.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def warning(self, text: str) -> None:
        try:
            print(printable(f"warning: {text}"), file=sys.stderr, flush=True)
        except OSError:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def progress(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self.note(describe_progress(progress))

    def data_progress(self, what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self.note(f"{what}: {done:,} of {total:,}")

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._last = time.monotonic()
        self.note(describe_epoch(row, epochs))


class LiveObserver(Observer):
    """One line that is redrawn, with finished epochs above it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def note(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._console.print(Text(printable(text)))

    def warning(self, text: str) -> None:
        with suppress(OSError):
            self._console.print(Text(printable(f"warning: {text}"), style="bold yellow"))

    def progress(self, progress: Progress) -> None:
        with suppress(OSError):
            self._live.update(Text(describe_progress(progress)))

    def data_progress(self, what: str, done: int, total: int) -> None:
        self._live.update(Text(f"{what}: {done:,} of {total:,}"))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self.note(describe_epoch(row, epochs))

    def close(self) -> None:
        with suppress(OSError):
            self._live.stop()


@contextmanager
def observer() -> Iterator[Observer]:
    """The observer that fits standard output."""
    if is_led():  # another process of the run talks
        if os.environ.get("LOCAL_RANK") == "0":  # the first on a machine that would say nothing at all
            print(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: process 0 tells how it goes", flush=True
            )
        yield Observer()
        return
    shown: Observer = LiveObserver() if sys.stdout.isatty() else PlainObserver()
    try:
        yield shown
    finally:
        shown.close()


def show_report(result: ReportResult) -> None:
    """The report's table, and where the rest is."""
    console = Console(highlight=False)
    for written in result.tables:
        table = Table(*written.header)
        for column in table.columns[:2]:
            column.overflow = "fold"  # a name that is cut off names no run
        for cells_ in written.rows:
            table.add_row(*(Text(cell) for cell in cells_))
        console.print(table)
    print("against the published setting:")
    for runs, differs in result.departures:
        console.print(Text(f"{runs}: {differs}"))
    page = "" if result.page is None else f", and all of it in {result.page}"
    print(printable(f"written: {result.markdown} and {len(result.figures)} figures beside it{page}"))
    if result.event_files is not None:
        print(f"curves for TensorBoard: tensorboard --logdir {result.event_files}")
