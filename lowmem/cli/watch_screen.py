"""What `lowmem watch` says of a run: a picture that fits a narrow terminal, lines, JSON. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowmem.config.schema import Config
from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_size
from lowmem.runs.rows import EpochRow, Event
from lowmem.runs.watch import Live

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"
_LABEL_COLUMNS = 10
_EVENTS_SHOWN = 5
_QUIET_FROM_SECONDS = 60.0
_STATE_WORDS = {
    "starting": "getting ready",
    "training": "training",
    "finished": "finished",
    "stopped": "stopped as asked (train.max_steps)",
    "interrupted": "interrupted, saved",
    "diverged": "diverged, stopped",
    "stuck": "learns nothing, stopped",
    "ended": "nobody trains it",
    "died": "died: its process ended without leaving it (killed, or the machine went down)",
}
_STATE_STYLES = {"starting": "cyan", "training": "bold green", "finished": "bold blue", "stopped": "bold blue"}
_EVENT_STYLES = dict.fromkeys(("warning", "rollback", "out-of-memory", "stuck", "pressure"), "yellow")


# -- words -------------------------------------------------------------------------------------------------------------


def facts(live: Live) -> list[tuple[str, str]]:
    """(label, text) of everything that is known, in the order of the screen."""
    known = [("state", describe_state(live))]
    if live.config is not None:
        known.append(("run", _settings(live.config)))
    known.append(("epoch", _position(live)))
    if live.losses or live.rows:
        loss = f"{live.losses[-1]:.4f}" if live.losses else f"{live.rows[-1].train_loss}"
        known.append(("loss", loss + ("" if live.lr is None else f"  lr {live.lr:g}")))
    if errors := describe_errors(live):
        known.append(("error", errors))
    if live.images_per_second is not None:
        known.append(("speed", f"{live.images_per_second:,.0f} images/s"))
    if memory := _memory(live):
        known.append(("memory", memory))
    if live.checkpoint is not None:
        known.append(("saved", f"step {shorten(live.checkpoint.detail.get('step'), 20)} at {clock(live.checkpoint)}"))
    if live.running and live.quiet_seconds is not None and live.quiet_seconds >= _QUIET_FROM_SECONDS:
        known.append(("quiet", f"nothing came for {format_duration(live.quiet_seconds)}"))
    return known


def describe_state(live: Live) -> str:
    """`training (process 12 on host since 2026-11-25 08:34)`, or how it ended."""
    words, who = _STATE_WORDS[live.state], live.writer
    if who is None:
        return words
    return f"{words} (process {who.pid} on {who.host} since {who.since[:16].replace('T', ' ')})"


def _settings(config: Config) -> str:
    """What is trained on what, in one line."""
    model, train, source = config.model, config.train, config.data.source
    if source.startswith("folder:"):
        source = f"folder {Path(source.removeprefix('folder:')).name}"
    return shorten(
        f"{model.arch} ({model.block}, width {model.width}) on {source}, batch {train.batch}, {train.precision}, "
        f"{train.device}"
    )


def _position(live: Live) -> str:
    """Epoch and step, and the time left."""
    epochs = "?" if live.epochs is None else live.epochs
    done = live.epochs is not None and live.epoch >= live.epochs
    parts = [f"{live.epoch}/{epochs} done" if done or not live.running else f"{live.epoch + 1}/{epochs}"]
    within = live.step_in_epoch
    if within is not None and not done and (live.running or within):
        parts.append(f"step {within}/{live.steps_per_epoch}")
        if live.running and within == live.steps_per_epoch:
            parts.append("evaluating")
    elif within is None:
        parts.append(f"step {live.step}")
    if live.elapsed_seconds is not None and not live.running:
        parts.append(f"in {format_duration(live.elapsed_seconds)}")
    if live.seconds_left is not None:
        parts.append(f"{format_duration(live.seconds_left)} left")
    return "  ".join(parts)


def _memory(live: Live) -> str:
    """Tensors against the budget, and what is in use on the device."""
    parts = []
    if live.peak_bytes is not None:
        of = "" if live.budget_bytes is None else f" of {format_size(live.budget_bytes)}"
        parts.append(f"{format_size(live.peak_bytes)}{of} at the peak")
    elif live.budget_bytes is not None:
        parts.append(f"budget {format_size(live.budget_bytes)}")
    if live.device_bytes is not None:
        where = "by the process" if live.config is not None and live.config.train.device == "cpu" else "on the card"
        parts.append(f"{format_size(live.device_bytes)} in use {where}")
    return ", ".join(parts)


def describe_errors(live: Live) -> str:
    """Of the last epoch, and the best so far."""
    if not live.rows:
        return ""
    last = live.rows[-1]
    each = {"train": last.train_error_pct, "val": last.val_error_pct, "test": last.test_error_pct}
    parts = [f"{kind} {error:.2f} %" for kind, error in each.items() if error is not None]
    on = "val" if last.val_error_pct is not None else "test"
    if errors := [(error, row.epoch) for row in live.rows if (error := _error(row, on)) is not None]:
        best, epoch = min(errors)
        parts.append(f"best {on} {best:.2f} % (epoch {epoch})")
    return "  ".join(parts)


def _error(row: EpochRow, on: str) -> float | None:
    value = row.val_error_pct if on == "val" else row.test_error_pct
    return value if value is not None and math.isfinite(value) else None


def clock(event: Event) -> str:
    """The time of day that an event was written down, `?` if it does not say."""
    text = event.time if isinstance(event.time, str) else ""
    return shorten(text[11:19], 8) if text[10:11] == "T" else "?"


def describe_event(event: Event) -> str:
    """A line of events.jsonl in words; of a kind that is not known here, what it says."""
    detail = event.detail

    def size(name: str) -> str:
        value = detail.get(name)
        return format_size(value) if type(value) is int else "?"

    def text(name: str) -> str:
        return shorten(detail.get(name, "?"), 120)

    words = {
        "start": "started",
        "resume": f"resumed from step {text('step')}",
        "checkpoint": f"saved at step {text('step')}",
        "done": "finished",
        "stop": f"stopped as asked at step {text('step')}",
        "signal": f"{text('signal')}: saved at step {text('step')}",
        "fork": f"forked from {text('source')} at step {text('step')}",
        "out-of-memory": f"out of memory in {text('phase')} at step {text('step')}",
        "replan": f"another plan: {size('budget_bytes')} for the step's tensors",
        "pressure": f"memory is short: {text('what')}",
        "measured": f"a step takes {size('measured_peak_bytes')}, predicted {size('predicted_peak_bytes')}",
        "confirmed": "the plan was confirmed by real steps",
        "rollback": f"{text('what')} at step {text('step')}: back to {text('checkpoint')}, "
        f"{text('lr_scale')} of the learning rate",
        "diverged": f"diverged at step {text('step')}: {text('what')}",
        "stuck": f"learns nothing: at chance up to epoch {text('epoch')}",
        "warning": f"warning: {text('what')}{'; ' + text('reason') if 'reason' in detail else ''}",
    }
    if event.kind in words:
        return words[event.kind]
    said = ", ".join(f"{shorten(name, 30)} {shorten(value, 40)}" for name, value in detail.items())
    return shorten(f"{event.kind} {said}".strip())


# -- the picture -------------------------------------------------------------------------------------------------------


def screen(live: Live, console: Console) -> RenderableType:
    """All of it, for this console's width."""
    ascii_only = not console.encoding.lower().startswith("utf")
    room = min(max(10, console.width - _LABEL_COLUMNS - 1), 60)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL_COLUMNS, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    curves = {"loss": live.losses, "error": [e for row in live.rows if (e := _error(row, "test")) is not None]}
    steps = live.epochs * live.steps_per_epoch if live.epochs and live.steps_per_epoch else None
    bars = {"epoch": (live.step, steps), "memory": (live.peak_bytes, live.budget_bytes)}
    for label, text in facts(live):
        style = _STATE_STYLES.get(live.state, "bold yellow") if label == "state" else ""
        grid.add_row(label, Text(text, style=style))
        curve = [value for value in curves.get(label, ()) if not math.isnan(value)]
        if len(curve) > 1:
            grid.add_row("", Text(sparkline(curve, room, ascii_only=ascii_only), style="cyan"))
        done, total = bars.get(label, (None, None))
        if done is not None and total is not None:
            grid.add_row("", ProgressBar(total=total, completed=min(done, total), width=room))
    shown = [event for event in live.events if event.kind != "checkpoint"][-_EVENTS_SHOWN:]
    for index, event in enumerate(shown):
        line = Text(f"{clock(event)}  {describe_event(event)}", style=_EVENT_STYLES.get(event.kind, ""))
        grid.add_row("events" if index == 0 else "", line)
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
    "peak_bytes", "device_bytes", "budget_bytes", "elapsed_seconds", "seconds_left", "quiet_seconds",
)  # fmt: skip


def to_json(live: Live) -> dict[str, Any]:
    """Plain values; unknown is None, and so is what is no finite number, which JSON has none for."""
    return {
        "path": str(live.path),
        **{name: _finite(getattr(live, name)) for name in _AS_IT_IS},
        "writer": None if live.writer is None else asdict(live.writer),
        "settings": None if live.config is None else _settings(live.config),
        "loss": _finite(live.losses[-1]) if live.losses else None,
        "last_epoch": {name: _finite(value) for name, value in asdict(live.rows[-1]).items()} if live.rows else None,
        "checkpoint_step": None if live.checkpoint is None else live.checkpoint.detail.get("step"),
        "events": [{"time": event.time, "event": event.kind, "says": describe_event(event)} for event in live.events],
    }


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None
