"""What goes on, in a terminal: a live line there, with a bar where the length is known; plain lines anywhere else. No
torch here."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lowmem.cli.interrupts import interruptible, leaves_at_once
from lowmem.cli.streams import unread_is_well
from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_loss, format_size
from lowmem.distributed.launch import is_led
from lowmem.runs.rows import Event
from lowmem.train.observer import Observer, Progress

_PLAIN_EVERY_SECONDS = 30.0  # progress bars flood log files; a line now and then does not
_DRAWN_PER_SECOND = 5
_BAR_COLUMNS = 20
_PATIENCE_SECONDS = 2.0  # from then on a phase without a length says how long it has taken
_EVENT_WORDS = {
    "start": "started",
    "resume": "resumed from step {step}",
    "checkpoint": "saved at step {step}",
    "progress": "{device_used_bytes} in use at step {step}",
    "hours": "{epochs} epochs fit into {hours} hours",
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
    """`epoch 3/164 [120/391]  step loss 1.1870  epoch so far: loss 1.2340, error 45.60 %  lr 0.1  184 images/s  …`."""
    at, left = progress, progress.seconds_left
    means = joined(
        at.loss is not None and f"loss {format_loss(at.loss)}",
        at.error_pct is not None and f"error {at.error_pct:.2f} %",
        between=", ",
    )
    return joined(
        f"epoch {at.epoch}/{at.epochs} [{at.step_in_epoch}/{at.steps_per_epoch}]",
        at.step_loss is not None and f"step loss {at.step_loss:.4f}",
        means and f"epoch so far: {means}",
        f"lr {at.lr:g}",
        at.images_per_second is not None and f"{at.images_per_second:,.0f} images/s",
        at.memory_bytes is not None and format_size(at.memory_bytes),
        left is not None and f"{format_duration(left)} left",
        at.job,
    )


def describe_phase(what: str, done: int | None, total: int | None) -> str:
    """`decoding pictures: 256 of 60,000`."""
    return what if done is None or total is None else f"{what}: {done:,} of {total:,}"


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
    why = f"; {known['reason']}" if event.kind in ("warning", "done") and "reason" in detail else ""
    return _EVENT_WORDS[event.kind].format_map(known) + why


def event_line(event: Event) -> str:
    """`08:34:12  saved at step 782`."""
    return f"{clock(event)}  {describe_event(event)}"


def joined(*parts: str | float | None, between: str = "  ") -> str:
    """What is known of it, in one line."""
    return between.join(str(part) for part in parts if part)


class TerminalObserver(Observer):
    """Whole lines; and what goes on now, as one line below them that is redrawn, or where that cannot be (a file, a
    pipe) as a line now and then. `stream`: `stderr` beside a result on standard output; there what is quick is not
    worth a line in a file."""

    def __init__(self, stream: str = "stdout") -> None:
        self._stream, self._line = stream, None
        self._last = time.monotonic()
        self._said: set[str] = set()  # kinds of phases that had their line in a file, each once before training
        self._trains = False
        self._now: Progress | tuple[str, int | None, int | None] | None = None
        self._began, self._spinner = self._last, Spinner("line")  # in ASCII, which every terminal has
        console = Console(stderr=stream == "stderr", highlight=False)
        if getattr(sys, stream).isatty() and not console.is_dumb_terminal:
            self._line = Live(
                self,
                console=console,
                refresh_per_second=_DRAWN_PER_SECOND,
                transient=True,
                redirect_stdout=stream == "stdout",
            )
            self._line.start()

    def note(self, text: str) -> None:
        self._print(text, self._stream)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}", "stderr", "bold yellow")

    def phase(self, what: str, done: int | None = None, total: int | None = None) -> None:
        if self._line is None:
            kind = what.partition(":")[0]
            first = kind not in self._said and self._stream == "stdout" and not self._trains
            self._said.add(kind)
            self._plain(describe_phase(what, done, total), at_once=first)
            return
        same = isinstance(self._now, tuple) and self._now[0] == what
        self._now = what, done, total
        if not same:  # drawn now: what comes may hold Python up, and with it who draws
            self._began = time.monotonic()
            self.draw()

    @contextmanager
    def loading(self, library: str) -> Iterator[None]:
        if self._line is not None:
            self.phase(f"loading {library}")
        with leaves_at_once(self.close), _lasting():
            yield

    def step(self, progress: Progress) -> None:
        self._now, self._trains = progress, True

    def progress(self, progress: Progress) -> None:
        self._now = progress
        if self._line is None:
            self._plain(describe_progress(progress))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._last, self._now = time.monotonic(), None
        self._print(describe_epoch(row, epochs), self._stream)

    def close(self) -> None:
        self._now = None
        if self._line is not None:
            self._line.stop()

    def _print(self, text: str, stream: str, style: str = "") -> None:
        if isinstance(self._now, tuple):  # a phase is over, or has become another; training goes on
            self._now = None
        if self._line is None:
            say(text, stream)
            return
        self._line.console.print(Text(printable(text), style=style))

    def _plain(self, text: str, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._last >= _PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            say(text, self._stream)

    def draw(self) -> None:
        """The live line as it is now."""
        if self._line is not None:
            self._line.refresh()

    def __rich__(self) -> RenderableType:
        """The live line. Called from the thread that redraws it, too."""
        match self._now:
            case Progress() as at:
                return _bar(describe_progress(at), at.step_in_epoch, at.steps_per_epoch)
            case (what, int(done), int(total)):
                return _bar(describe_phase(what, done, total), done, total)
            case (what, _, _):
                took = time.monotonic() - self._began
                self._spinner.update(text=Text(joined(what, took >= _PATIENCE_SECONDS and format_duration(took))))
                return self._spinner
        return Text("")


def _bar(text: str, done: int, total: int) -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(ProgressBar(total=max(total, 1), completed=done, width=_BAR_COLUMNS), Text(printable(text)))
    return row


class _Led(Observer):
    """Of a process that says nothing."""

    def loading(self, library: str) -> AbstractContextManager[None]:
        return leaves_at_once()


@contextmanager
def _lasting() -> Iterator[None]:
    """What is made inside lives as long as the process: the garbage collector is spared going through the hundreds of
    thousands of objects of an imported torch again and again (0.5 s of `lowmem plan`)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def observer(stream: str = "stdout") -> Iterator[Observer]:
    """The observer that fits standard output, or (`stderr`, beside a result) standard error."""
    interruptible()
    if stream == "stdout":
        unread_is_well()
    if is_led():  # another process of the run talks
        if os.environ.get("LOCAL_RANK") == "0":  # the first on a machine that would say nothing at all
            say(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: process 0 tells how it goes")
        yield _Led()
        return
    with closing(TerminalObserver(stream)) as shown:
        yield shown


@contextmanager
def loading_torch() -> Iterator[None]:
    """Around what imports it, for a command whose result goes to standard output."""
    with observer("stderr") as shown, shown.loading("torch"):
        yield
