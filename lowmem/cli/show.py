"""What a run looks like in a terminal: a live line there, plain lines anywhere else."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowmem.bench import COLUMNS, cells, measure, to_markdown
from lowmem.choose import resolve_execution
from lowmem.cli.printed import printable
from lowmem.environment import describe
from lowmem.errors import PreflightError
from lowmem.report import ReportResult
from lowmem.report.tables import TABLE_HEADER
from lowmem.runs.atomic import write_text_atomic
from lowmem.settings import gather
from lowmem.train.observer import Observer, Progress
from lowmem.units import format_duration, format_size

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
    return "  ".join(parts)


def describe_epoch(row: Mapping[str, Any], epochs: int) -> str:
    """One line for a finished epoch."""
    val = f"  val error {row['val_error_pct']:.2f} %" if row.get("val_error_pct") is not None else ""
    speed = f"  {row['images_per_second']:,.0f} images/s" if row.get("images_per_second") else ""
    return (
        f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}  train error {row['train_error_pct']:.2f} %"
        f"{val}  test error {row['test_error_pct']:.2f} %  lr {row['lr']:g}{speed}  "
        f"{format_duration(row['elapsed_seconds'])}"
    )


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
    shown: Observer = LiveObserver() if sys.stdout.isatty() else PlainObserver()
    try:
        yield shown
    finally:
        shown.close()


def show_report(result: ReportResult) -> None:
    """The report's table, and where the rest is."""
    console = Console(highlight=False)
    table = Table(*TABLE_HEADER[:-1])
    differing: dict[str, list[str]] = {}
    for row in result.rows:
        *cells_, differs = row.cells()
        table.add_row(*(Text(cell) for cell in cells_))
        differing.setdefault(differs, []).append(row.run)
    console.print(table)
    # Below and not in a column: it is long, and mostly the same for all runs.
    for differs, names in differing.items():
        console.print(Text(f"{', '.join(names)} against the published setting: {differs}"))
    print(printable(f"written: {result.markdown} and {len(result.figures)} figures beside it"))


def show_bench(
    arch: str, block: str | None, width: int, batches: list[int], steps: int, device: str, out: Path | None
) -> None:
    """Measures cell by cell, then prints the table and writes it if asked to."""
    settings = gather(flags={"model.arch": arch, "model.block": block, "model.width": width, "train.device": device})
    config = resolve_execution(settings).config
    if out is not None:
        _make_folder(out)
        _try_writing(out)
    chosen = list(cells(arch, config.model.block, width, batches, config.train.device, steps))
    shown = Table(*COLUMNS)
    measurements = []
    for number, cell in enumerate(chosen, start=1):
        words = f"{cell.batch} {cell.precision} {cell.memory_format}"
        print(f"[{number}/{len(chosen)}] batch {words}", file=sys.stderr, flush=True)
        measurements.append(measure(cell))
        shown.add_row(*measurements[-1].row())
    title = f"{arch} ({config.model.block}, width {width}), median of {steps} training steps on {config.train.device}"
    Console(highlight=False).print(Text(title), shown)
    if out is not None:
        environment = describe(config.train.device)
        write_text_atomic(out / "bench.md", to_markdown(title, measurements))
        recorded = {"environment": environment, "cells": [asdict(measurement) for measurement in measurements]}
        write_text_atomic(out / "bench.json", json.dumps(recorded, indent=1) + "\n")
        print(f"written: {out / 'bench.md'} and {out / 'bench.json'}")


def _try_writing(folder: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        for name in ("bench.md", "bench.json"):
            with open(folder / name, "ab"):
                pass
    except OSError as error:
        raise PreflightError(f"{folder} cannot be written ({error.strerror}): choose another with --out") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"{folder} cannot be written ({error.strerror}): choose another with --out") from None
