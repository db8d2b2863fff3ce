"""`lowmem watch`: looks at a run every second, draws or prints, leaves when it ends. No torch here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live as Redrawn

from lowmem.cli.terminal import describe_epoch
from lowmem.cli.watch_screen import clock, describe_errors, describe_event, describe_state, facts, screen, to_json
from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten
from lowmem.runs.folder import read_owner, refuse_links, run_folders, writer_of
from lowmem.runs.rows import Event
from lowmem.runs.watch import Live

_NEXT_RUN_SECONDS = 120.0  # between two runs of a job: libraries, pictures, plan
_JOB_OWNER = "job.owner.json"  # beside the runs of `lowmem reproduce`
_DIED_LOOKS = 2  # a lock that is free for one look may be on its way from one process to the next

Show = Callable[[Live], None]


def show_watch(path: Path, *, interval: float, once: bool, as_json: bool) -> None:
    """Follows the run at `path`, or the runs in it one after the other. Raises UsageError if there is none."""
    if as_json and not once:
        raise UsageError("--json is for --once: add --once, or leave --json out")
    if not path.is_dir():
        raise UsageError(f"{path} does not exist: give the folder of a run, like runs/res110, or of several, like runs")
    folders = run_folders(path)
    if not folders and (once or not _conducted(path)):
        raise UsageError(f"there is no run in {path}: give the folder of a run, like runs/res110")
    run = _trained(folders) or max(folders, key=_last_touched, default=None)
    if once:
        assert run is not None
        refuse_links(run)
        live = Live(run).look()
        print(json.dumps(to_json(live), indent=1) if as_json else _summary(live))
        return
    try:
        _follow_all(path, run, interval, alone=folders == [path])
    except KeyboardInterrupt:
        print("left; the run was not touched", file=sys.stderr)


def _follow_all(path: Path, run: Path | None, interval: float, *, alone: bool) -> None:
    """One run; in a folder of runs, then the next one that is trained."""
    following = run if run is not None else _next(path, interval)
    while following is not None:
        refuse_links(following)
        ended = _follow(following, interval)
        print(_closing(ended), flush=True)
        if alone or not (_conducted(path) or ended.state in {"finished", "stopped", "diverged", "stuck"}):
            return
        following = _next(path, interval)


def _next(path: Path, interval: float) -> Path | None:
    """The next run of the folder that is trained. None if its job has ended; where there is none, after some time."""
    a_job = _conducted(path)
    print(f"waiting for the next run in {path}; Ctrl-C leaves", flush=True)
    deadline = time.monotonic() + _NEXT_RUN_SECONDS
    while time.monotonic() < deadline or a_job:
        if (run := _trained(run_folders(path))) is not None:
            return run
        if a_job and not _conducted(path):
            print(f"the job in {path} has ended", flush=True)
            return None
        time.sleep(interval)
    print(f"no run was begun in {path} for {_NEXT_RUN_SECONDS:.0f} s")
    return None


def _conducted(folder: Path) -> bool:
    """Whether a process holds the folder as a job of several runs, as far as can be told from here."""
    owner = read_owner(folder / _JOB_OWNER)
    return owner is not None and owner.may_be_alive


def _trained(folders: list[Path]) -> Path | None:
    """The first that a process holds."""
    return next((run for run in folders if writer_of(run) is not None), None)


def _last_touched(run: Path) -> float:
    files = [run / name for name in ("events.jsonl", "steps.csv", "config.yaml")]
    try:
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    except OSError:
        return 0.0


def _follow(run: Path, interval: float) -> Live:
    """Shows one run until nobody trains it. The last state."""
    watched, without = Live(run), 0
    with _shown() as show:
        while True:
            live = watched.look()
            # What it wrote last came before it let go, and may have been missed by this look.
            without = 0 if live.running else without + 1
            show(live)
            if without >= _DIED_LOOKS or (without and live.state == "finished"):
                return live
            time.sleep(interval if live.running else min(interval, 0.5))


@contextmanager
def _shown() -> Iterator[Show]:
    if not sys.stdout.isatty():
        yield _PlainLines().show
        return
    console = Console(highlight=False)
    with Redrawn(console=console, auto_refresh=False, vertical_overflow="crop") as display:
        yield lambda live: display.update(screen(live, console), refresh=True)


class _PlainLines:
    """A line for each epoch and event, for log files and pipes. What was there before is summed up in the first."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._event: Event | None = None

    def show(self, live: Live) -> None:
        if self._epoch is None:
            print(_summary(live), flush=True)
        else:
            for row in live.rows:
                if row.epoch > min(self._epoch, live.epoch):
                    print(describe_epoch(asdict(row), live.epochs), flush=True)
            for event in _after(live.events, self._event):
                if event.kind != "checkpoint":  # one an epoch, which has its line
                    print(f"{clock(event)}  {describe_event(event)}", flush=True)
        self._epoch = live.epoch
        self._event = live.events[-1] if live.events else None


def _after(events: tuple[Event, ...], last: Event | None) -> tuple[Event, ...]:
    """What comes after `last`; everything if it is not there."""
    at = next((index for index, event in enumerate(events) if event is last), -1)
    return events[at + 1 :]


def _summary(live: Live) -> str:
    return "\n".join([shorten(live.path), *(f"  {label:8}{text}" for label, text in facts(live))])


def _closing(live: Live) -> str:
    """The last words on a run."""
    if not live.path.exists():
        return f"{shorten(live.path)} is gone: a run that takes no step leaves nothing behind"
    words = f"{shorten(live.path)}: {describe_state(live)}"
    if errors := describe_errors(live):
        words += f"; epoch {live.epoch}: {errors}"
    if live.state in {"interrupted", "died", "ended"} and live.config is not None:
        words += f"\ngo on with `lowmem resume {shorten(live.path)}`"
    return words
