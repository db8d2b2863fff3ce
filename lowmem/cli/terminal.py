"""What a run looks like in a terminal: a live line there, plain lines anywhere else. No torch here."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem.cli.streams import unread_is_well
from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_loss, format_size
from lowmem.distributed.launch import is_led
from lowmem.runs.rows import Event
from lowmem.train.observer import Observer, Progress

_PLAIN_EVERY_SECONDS = 30.0  # progress bars flood log files; a line now and then does not
_EVENT_WORDS = {
    "start": "started",
    "resume": "resumed from step {step}",
    "checkpoint": "saved at step {step}",
    "progress": "{device_used_bytes} in use at step {step}",
    "done": "finished",
    "stop": "stopped as asked at step {step}",
    "signal": "{signal}: saved at step {step}",
    "fork": "forked from {source} at step {step}",
    "out-of-memory": "out of memory in {phase} at step {step}",
    "replan": "another plan: {budget_bytes} for the step's tensors",
    "pressure": "memory is short: {what}",
    "measured": "a step takes {measured_peak_bytes}, predicted {predicted_peak_bytes}",
    "confirmed": "the plan was confirmed by real steps",
    "rollback": "{what} at step {step}: back to {checkpoint}, {lr_scale} of the learning rate",
    "diverged": "diverged at step {step}: {what}",
    "stuck": "learns nothing: at chance up to epoch {epoch}",
    "warning": "warning: {what}",
}


def printable(text: str) -> str:
    """What may go to a terminal of a text that is not ours, for a folder's name may hold anything: one line, since a
    terminal obeys control characters, and a line end in a name makes a line of its own."""
    return "".join(character if character.isprintable() else "?" for character in text)


def say(text: str, stream: str = "stdout") -> None:
    """A line to whoever reads it (`stderr`: beside what may be piped into something)."""
    print(printable(text), file=getattr(sys, stream), flush=True)


def describe_progress(progress: Progress) -> str:
    """`epoch 3/164 [120/391]  loss 1.2340  error 45.60 %  lr 0.1  184 images/s  1,200 MiB  1:02:03 left`."""
    at, left = progress, progress.seconds_left
    return joined(
        f"epoch {at.epoch}/{at.epochs} [{at.step_in_epoch}/{at.steps_per_epoch}]",
        at.loss is not None and f"loss {format_loss(at.loss)}",
        at.error_pct is not None and f"error {at.error_pct:.2f} %",
        f"lr {at.lr:g}",
        at.images_per_second is not None and f"{at.images_per_second:,.0f} images/s",
        at.memory_bytes is not None and format_size(at.memory_bytes),
        left is not None and f"{format_duration(left)} left",
        at.job,
    )


def describe_epoch(row: Mapping[str, Any], epochs: int | None) -> str:
    """One line for a finished epoch: its row of metrics.csv, how many there will be, and under `job` where in a job of
    several runs that is."""
    errors = {kind: row.get(f"{kind}_error_pct") for kind in ("train", "val", "test")}
    loss, lr, speed, elapsed = map(row.get, ("train_loss", "lr", "images_per_second", "elapsed_seconds"))
    return joined(
        f"epoch {row['epoch']}/{'?' if epochs is None else epochs}",
        loss is not None and f"train loss {format_loss(loss)}",
        *(error is not None and f"{kind} error {error:.2f} %" for kind, error in errors.items()),
        lr is not None and f"lr {lr:g}",
        speed and f"{speed:,.0f} images/s",
        elapsed is not None and format_duration(elapsed),
        row.get("job"),
    )


def clock(event: Event) -> str:
    """The time of day that an event was written down, `?` if it does not say."""
    text = event.time if isinstance(event.time, str) else ""
    return shorten(text[11:19], 8) if text[10:11] == "T" else "?"


def describe_event(event: Event) -> str:
    """A line of events.jsonl in words; of a kind that is not known here, what it says."""
    detail = event.detail
    if event.kind not in _EVENT_WORDS:
        said = ", ".join(f"{shorten(name, 30)} {shorten(value, 40)}" for name, value in detail.items())
        return shorten(f"{event.kind} {said}".strip())
    known = defaultdict(lambda: "?")
    for name, value in detail.items():
        size = format_size(value) if type(value) is int else "?"
        known[name] = size if name.endswith("_bytes") else shorten(value, 120)
    why = f"; {known['reason']}" if event.kind == "warning" and "reason" in detail else ""
    return _EVENT_WORDS[event.kind].format_map(known) + why


def event_line(event: Event) -> str:
    """`08:34:12  saved at step 782`."""
    return f"{clock(event)}  {describe_event(event)}"


def joined(*parts: str | float | None, between: str = "  ") -> str:
    """What is known of it, in one line."""
    return between.join(str(part) for part in parts if part)


class TerminalObserver(Observer):
    """Whole lines; and where a run is, as one line below them that is redrawn, or where that cannot be (a file, a pipe)
    as a line now and then."""

    def __init__(self) -> None:
        self._last, self._line = time.monotonic(), None
        if sys.stdout.isatty():
            self._line = Live(console=Console(highlight=False), refresh_per_second=4, transient=True)
            self._line.start()

    def note(self, text: str) -> None:
        self._print(text)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}", "stderr", "bold yellow")

    def progress(self, progress: Progress) -> None:
        self._now(describe_progress(progress))

    def data_progress(self, what: str, done: int, total: int) -> None:
        self._now(f"{what}: {done:,} of {total:,}", always=done == total)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._last = time.monotonic()
        self._print(describe_epoch(row, epochs))

    def close(self) -> None:
        if self._line is not None:
            self._line.stop()

    def _print(self, text: str, stream: str = "stdout", style: str = "") -> None:
        if self._line is None:
            say(text, stream)
            return
        self._line.console.print(Text(printable(text), style=style))

    def _now(self, text: str, *, always: bool = False) -> None:
        if self._line is not None:
            self._line.update(Text(text))
        elif always or time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            say(text)


@contextmanager
def observer() -> Iterator[Observer]:
    """The observer that fits standard output, which nobody has to read."""
    unread_is_well()
    if is_led():  # another process of the run talks
        if os.environ.get("LOCAL_RANK") == "0":  # the first on a machine that would say nothing at all
            say(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: process 0 tells how it goes")
        yield Observer()
        return
    with closing(TerminalObserver()) as shown:
        yield shown
