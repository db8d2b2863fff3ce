"""What a run looks like in a terminal: a live line there, plain lines anywhere else. No torch here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.live import Live as Redrawn
from rich.text import Text

from lowmem.core.units import format_duration, format_size
from lowmem.distributed.launch import is_led
from lowmem.train.observer import Observer, Progress

_PLAIN_EVERY_SECONDS = 30.0  # progress bars flood log files; a line now and then does not


# -- lines -------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """What may go to a terminal of a text that is not ours, for a folder's name may hold anything: one line, since a
    terminal obeys control characters, and a line end in a name makes a line of its own."""
    return "".join(character if character.isprintable() else "?" for character in text)


def say(text: str, stream: str = "stdout") -> None:
    """A line to whoever reads it (`stderr`: beside what may be piped into something). That nobody does any more
    (`| head`, a closed terminal) is no reason to stop a run."""
    try:
        print(printable(text), file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines of aligned cells; `right`: columns that are aligned at their end. They are as wide as they are: what reads
    them from a pipe has no width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


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


def describe_epoch(row: Mapping[str, Any], epochs: int | None) -> str:
    """One line for a finished epoch: its row of metrics.csv, how many there will be, and under `job` where in a job of
    several runs that is."""
    known = {name: value for name, value in row.items() if value is not None}
    parts = [f"epoch {row['epoch']}/{'?' if epochs is None else epochs}"]
    parts += [f"train loss {known['train_loss']:.4f}"] if "train_loss" in known else []
    parts += [
        f"{kind} error {known[f'{kind}_error_pct']:.2f} %"
        for kind in ("train", "val", "test")
        if f"{kind}_error_pct" in known
    ]
    parts += [f"lr {known['lr']:g}"] if "lr" in known else []
    parts += [f"{known['images_per_second']:,.0f} images/s"] if known.get("images_per_second") else []
    parts += [format_duration(known["elapsed_seconds"])] if "elapsed_seconds" in known else []
    parts += [known["job"]] if "job" in known else []
    return "  ".join(parts)


# -- observers ---------------------------------------------------------------------------------------------------------


class PlainObserver(Observer):
    """Whole lines, no cursor movement."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        say(text)

    def warning(self, text: str) -> None:
        say(f"warning: {text}", "stderr")

    def progress(self, progress: Progress) -> None:
        self._now_and_then(describe_progress(progress))

    def data_progress(self, what: str, done: int, total: int) -> None:
        self._now_and_then(f"{what}: {done:,} of {total:,}", always=done == total)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._now_and_then(describe_epoch(row, epochs), always=True)

    def _now_and_then(self, text: str, *, always: bool = False) -> None:
        if always or time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            say(text)


class LiveObserver(Observer):
    """One line that is redrawn, with finished epochs above it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._line = Redrawn(console=self._console, refresh_per_second=4, transient=True)
        self._line.start()

    def note(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._console.print(Text(printable(text)))

    def warning(self, text: str) -> None:
        with suppress(OSError):
            self._console.print(Text(printable(f"warning: {text}"), style="bold yellow"))

    def progress(self, progress: Progress) -> None:
        with suppress(OSError):
            self._line.update(Text(describe_progress(progress)))

    def data_progress(self, what: str, done: int, total: int) -> None:
        with suppress(OSError):
            self._line.update(Text(f"{what}: {done:,} of {total:,}"))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self.note(describe_epoch(row, epochs))

    def close(self) -> None:
        with suppress(OSError):
            self._line.stop()


@contextmanager
def observer() -> Iterator[Observer]:
    """The observer that fits standard output."""
    if is_led():  # another process of the run talks
        if os.environ.get("LOCAL_RANK") == "0":  # the first on a machine that would say nothing at all
            say(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: process 0 tells how it goes")
        yield Observer()
        return
    shown: Observer = LiveObserver() if sys.stdout.isatty() else PlainObserver()
    try:
        yield shown
    finally:
        shown.close()
