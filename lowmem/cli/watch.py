"""`lowmem watch`: looks at a run every second, draws or prints what is known of it, leaves when it ends. No torch."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as Redrawn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowmem.cli.layout import fold, room
from lowmem.cli.terminal import clock, describe_epoch, describe_event, event_line, joined
from lowmem.config.schema import Config
from lowmem.config.sources import OWN, path_in
from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_loss, format_size
from lowmem.measure.nvml import throttled_by
from lowmem.runs.folder import refuse_links, run_folders
from lowmem.runs.lock import lock_decides, read_owner, writer_of
from lowmem.runs.rows import Event
from lowmem.runs.view import NEXT_COMMANDS, errors_of
from lowmem.runs.watch import Live, quiet_seconds

_NEXT_RUN_SECONDS = 120.0  # between two runs of a job: libraries, pictures, plan
_JOB_OWNER = "job.owner.json"  # beside the runs of `lowmem reproduce`
_DIED_LOOKS = 2  # a lock that is free for one look may be on its way from one process to the next
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_UNSAID = {"checkpoint", "progress"}  # what they say is on the screen, or in an epoch's line
_LABEL_COLUMNS, _EVENTS_SHOWN = 10, 5
_QUIET_FROM_SECONDS = 60.0
_STATE_WORDS = {
    "starting": "getting ready",
    "training": "training",
    "finished": "finished",
    "finished early": "finished early: no better error (train.patience)",
    "stopped": "stopped as asked (train.max_steps)",
    "out of time": "stopped as asked (train.hours)",
    "interrupted": "interrupted, saved",
    "diverged": "diverged, stopped",
    "stuck": "learns nothing, stopped",
    "ended": "nobody trains it",
    "died": "died: its process ended without leaving it (killed, or the machine went down)",
}
_AS_ASKED = ("finished", "finished early", "stopped", "out of time")
_STATE_STYLES = {"starting": "cyan", "training": "bold green", **dict.fromkeys(_AS_ASKED, "bold blue")}
_EVENT_STYLES = dict.fromkeys(("warning", "rollback", "out-of-memory", "stuck", "pressure"), "yellow")


# -- following a run ---------------------------------------------------------------------------------------------------


def show_watch(path: Path, *, interval: float, once: bool, as_json: bool) -> None:
    """Follows the run at `path`, or the runs in it one after the other. Raises UsageError if there is none."""
    if as_json and not once:
        raise UsageError("--json is for --once: add --once, or leave --json out")
    if not path.is_dir():
        raise UsageError(f"{path} does not exist: give the folder of a run, like runs/res110, or of several, like runs")
    folders = run_folders(path)
    if not folders and (once or not _conducted(path)):
        raise UsageError(f"there is no run in {path}: give the folder of a run, like runs/res110")
    run = _trained(folders) or min(folders, key=quiet_seconds, default=None)
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
    while run is not None or (run := _next(path, interval)) is not None:
        refuse_links(run)
        ended = _follow(run, interval)
        print(_closing(ended), flush=True)
        if alone or not (_conducted(path) or ended.state in {*_AS_ASKED, "diverged", "stuck"}):
            return
        run = None


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
    if owner is None or owner.here or not lock_decides(owner):
        return owner is not None and owner.may_be_alive
    return writer_of(folder, "job") is not None


def _trained(folders: list[Path]) -> Path | None:
    """The first that a process holds."""
    return next((run for run in folders if writer_of(run) is not None), None)


def _follow(run: Path, interval: float) -> Live:
    """Shows a run until nobody trains it: drawn on a terminal, else (a file, a pipe) line by line -> last state."""
    watched, without, told = Live(run), 0, None
    console = Console(highlight=False)
    drawn = Redrawn(console=console, auto_refresh=False, vertical_overflow="crop")
    with drawn if sys.stdout.isatty() else nullcontext() as display:
        while True:
            live = watched.look()
            # What it wrote last came before it let go, and may have been missed by this look.
            without = 0 if live.running else without + 1
            if display is not None:
                display.update(screen(live, console), refresh=True)
            else:
                for line in [_summary(live)] if told is None else _news(live, *told):
                    print(line, flush=True)
            if without >= _DIED_LOOKS or (without and live.state.startswith("finished")):
                return live
            told = live.epoch, live.events[-1] if live.events else None
            time.sleep(interval if live.running else min(interval, 0.5))


def _news(live: Live, epoch: int, last: Event | None) -> list[str]:
    """A line for each epoch and event since those."""
    rows = [row for row in live.rows if row.epoch > min(epoch, live.epoch)]
    # What comes after the last; everything if that is gone.
    at = next((index for index, event in enumerate(live.events) if event is last), -1)
    events = [event for event in live.events[at + 1 :] if event.kind not in _UNSAID]
    return [*(describe_epoch(asdict(row), live.epochs) for row in rows), *map(event_line, events)]


def _summary(live: Live) -> str:
    return "\n".join(fold([shorten(live.path), *(f"  {label:8}{text}" for label, text in facts(live))], room()))


def _closing(live: Live) -> str:
    """The last words on a run."""
    if not live.path.exists():
        return f"{shorten(live.path)} is gone: a run that takes no step leaves nothing behind"
    errors = describe_errors(live)
    words = f"{shorten(live.path)}: {describe_state(live)}" + (f"; epoch {live.epoch}: {errors}" if errors else "")
    if live.config is None or live.state not in NEXT_COMMANDS:
        return words
    return f"{words}\n{NEXT_COMMANDS[live.state].format(run=shorten(live.path))}"


# -- words -------------------------------------------------------------------------------------------------------------


def facts(live: Live) -> list[tuple[str, str]]:
    """(label, text) of everything that is known, in the order of the screen."""
    saved, quiet = live.checkpoint, live.quiet_seconds
    mean = live.rows[-1].train_loss if live.rows else None
    loss = "" if mean is None else f"{format_loss(mean)} (mean of epoch {live.rows[-1].epoch})"
    loss = f"{format_loss(live.losses[-1])} (of one step)" if live.losses else loss
    known = {
        "state": describe_state(live),
        "run": live.config and _settings(live.config),
        "epoch": _position(live),
        "loss": loss and loss + ("" if live.lr is None else f"  lr {live.lr:g}"),
        "error": describe_errors(live),
        "speed": None if live.images_per_second is None else f"{live.images_per_second:,.0f} images/s",
        "memory": _memory(live),
        "host": live.host_bytes and _host(live.host_bytes, live.hidden_share),
        "card": describe_card(live.card),
        "saved": saved and f"step {shorten(saved.detail.get('step'), 20)} at {clock(saved)}",
    }
    if live.running and quiet is not None and quiet >= _QUIET_FROM_SECONDS:
        known["quiet"] = f"nothing came for {format_duration(quiet)}"
    return [(label, text) for label, text in known.items() if text]


def describe_state(live: Live) -> str:
    """`training (process 12 on host since 2026-11-25 08:34)`, or how it ended."""
    words, who = _STATE_WORDS[live.state], live.writer
    if who is None:
        return words
    return f"{words} (process {who.pid} on {who.host} since {who.since[:16].replace('T', ' ')})"


def _settings(config: Config) -> str:
    """What is trained on what, in one line."""
    model, train, source = config.model, config.train, config.data.source
    if source.startswith(OWN):
        source = f"{source.partition(':')[0]} {Path(path_in(source)).name}"
    seen = f"{source} at {config.data.image_size}x{config.data.image_size}{' in grey' * (config.data.channels == 1)}"
    return shorten(f"{model.words} on {seen}, batch {train.batch}, {train.precision}, {train.device}")


def _position(live: Live) -> str:
    """Epoch and step, and the time left."""
    epochs, within = "?" if live.epochs is None else live.epochs, live.step_in_epoch
    done = live.epochs is not None and live.epoch >= live.epochs
    in_epoch = within is not None and not done and (live.running or within > 0)
    elapsed, left = live.elapsed_seconds, live.seconds_left
    return joined(
        f"{live.epoch}/{epochs} done" if done or not live.running else f"{live.epoch + 1}/{epochs}",
        in_epoch and f"step {within}/{live.steps_per_epoch}",
        in_epoch and live.running and within == live.steps_per_epoch and "evaluating",
        within is None and f"step {live.step}",
        in_epoch and live.end is not None and f"{live.step} of {live.end} steps in all",
        elapsed is not None and not live.running and f"in {format_duration(elapsed)}",
        left is not None and f"{format_duration(left)} left",
    )


def _memory(live: Live) -> str:
    """Tensors against the budget, and what is in use on the device."""
    budget, peak = live.budget_bytes, live.peak_bytes
    of = "" if budget is None else f" of {format_size(budget)}"
    where = "by the process" if live.config is not None and live.config.train.device == "cpu" else "on the card"
    return joined(
        peak is not None and f"{format_size(peak)}{of} at the peak",
        peak is None and budget is not None and f"budget {format_size(budget)}",
        live.device_bytes is not None and f"{format_size(live.device_bytes)} in use {where}",
        between=", ",
    )


def _host(size: int, hidden: float | None) -> str:
    """What waits in host memory."""
    share = "" if hidden is None else f"; {hidden:.0%} of the transfer hidden (predicted)"
    return f"{format_size(size)} wait in host memory, moved out and back each step{share}"


def describe_card(load: Mapping[str, float]) -> str:
    """How it works, from the columns of metrics.csv that are known."""
    units = {"temperature_c": "°C", "power_watts": "W", "clock_mhz": "MHz", "utilization_pct": "% busy"}
    known = [f"{load[f'gpu_{name}']:,.0f} {unit}" for name, unit in units.items() if f"gpu_{name}" in load]
    if throttled := load.get("gpu_throttled_pct"):
        why = ", ".join(throttled_by(int(load.get("gpu_throttle_reasons", 0)))) or "?"
        known.append(f"held back {throttled:.0f} % of the time ({why})")
    return ", ".join(known)


def describe_errors(live: Live) -> str:
    """Of the last epoch, and the best so far."""
    if not live.rows:
        return ""
    last = {kind: getattr(live.last, f"{kind}_error_pct") for kind in ("train", "val", "test")}
    known = errors_of(live.rows, live.events)
    best = known["best_error_pct"]
    return joined(
        *(error is not None and f"{kind} {error:.2f} %" for kind, error in last.items()),
        best is not None and f"best {known['error_on']} {best:.2f} % (epoch {known['best_epoch']})",
    )


# -- the picture -------------------------------------------------------------------------------------------------------


def screen(live: Live, console: Console) -> RenderableType:
    """All of it, for this console's width."""
    ascii_only = not console.encoding.lower().startswith("utf")
    room = min(max(10, console.width - _LABEL_COLUMNS - 1), 60)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL_COLUMNS, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    errors = [row.test_error_pct for row in live.rows if row.test_error_pct is not None]
    curves = {"loss": live.losses, "error": errors}
    steps = live.epochs * live.steps_per_epoch if live.epochs and live.steps_per_epoch else None
    bars = {"epoch": (live.step, steps), "memory": (live.peak_bytes, live.budget_bytes)}
    for label, text in facts(live):
        grid.add_row(label, Text(text, style=_STATE_STYLES.get(live.state, "bold yellow") if label == "state" else ""))
        curve = [value for value in curves.get(label, ()) if not math.isnan(value)]
        if len(curve) > 1:
            grid.add_row("", Text(sparkline(curve, room, ascii_only=ascii_only), style="cyan"))
        done, total = bars.get(label, (None, None))
        if done is not None and total is not None:
            grid.add_row("", ProgressBar(total=total, completed=min(done, total), width=room))
    shown = [event for event in live.events if event.kind not in _UNSAID][-_EVENTS_SHOWN:]
    for index, event in enumerate(shown):
        grid.add_row("" if index else "events", Text(event_line(event), style=_EVENT_STYLES.get(event.kind, "")))
    return Group(Text(shorten(live.path), style="bold"), grid)


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The values from left to right in `width` characters at most, between their least and largest; means where there
    are more values than characters, `!` for what is no finite number."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    groups = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [fmean(group) if all(map(math.isfinite, group)) else math.nan for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] if math.isfinite(mean) else "!" for mean in means)


# -- JSON --------------------------------------------------------------------------------------------------------------

_AS_IT_IS = (
    "state", "running", "epoch", "epochs", "step", "step_in_epoch", "steps_per_epoch", "lr", "images_per_second",
    "peak_bytes", "device_bytes", "budget_bytes", "host_bytes", "hidden_share", "elapsed_seconds", "seconds_left",
    "quiet_seconds", "card",
)  # fmt: skip


def to_json(live: Live) -> dict[str, Any]:
    """Plain values; unknown is None, and so is what is no finite number, which JSON has none for."""
    values = {
        "path": str(live.path),
        **{name: getattr(live, name) for name in _AS_IT_IS},
        "writer": live.writer and live.writer.model_dump(),
        "settings": live.config and _settings(live.config),
        "loss": live.losses[-1] if live.losses else None,
        "last_epoch": asdict(live.rows[-1]) if live.rows else None,
        "checkpoint_step": live.checkpoint and live.checkpoint.detail.get("step"),
        "events": [{"time": event.time, "event": event.kind, "says": describe_event(event)} for event in live.events],
    }
    known: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda name: None)
    return known
