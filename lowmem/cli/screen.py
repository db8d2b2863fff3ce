"""The picture that `lowmem watch` draws of a run: a few lines that fit a narrow terminal. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowmem.cli.lines import clock, describe_event
from lowmem.config.schema import Config
from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_size
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


def describe_state(live: Live) -> str:
    """`training (process 12 on host since 2026-11-25 08:34)`, or how it ended."""
    words, who = _STATE_WORDS[live.state], live.writer
    since = "" if who is None else who.since[:16].replace("T", " ")
    return words if who is None else f"{words} (process {who.pid} on {who.host} since {since})"


def describe_settings(config: Config) -> str:
    """What is trained on what, in one line."""
    model, train, source = config.model, config.train, config.data.source
    if source.startswith("folder:"):
        source = f"folder {Path(source.removeprefix('folder:')).name}"
    return shorten(
        f"{model.arch} ({model.block}, width {model.width}) on {source}, batch {train.batch}, {train.precision}, "
        f"{train.device}"
    )


def describe_progress(live: Live) -> str:
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


def describe_memory(live: Live) -> str:
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
    found = {"train": last.train_error_pct, "val": last.val_error_pct, "test": last.test_error_pct}
    parts = [f"{kind} {error:.2f} %" for kind, error in found.items() if error is not None]
    on = "val" if last.val_error_pct is not None else "test"
    errors = [(error, row.epoch) for row in live.rows if (error := _error(row, on)) is not None]
    if errors:
        best, epoch = min(errors)
        parts.append(f"best {on} {best:.2f} % (epoch {epoch})")
    return "  ".join(parts)


def _error(row: Any, on: str) -> float | None:
    value = getattr(row, f"{on}_error_pct")
    return value if value is not None and math.isfinite(value) else None


def facts(live: Live) -> list[tuple[str, str]]:
    """(label, text) of everything that is known, in the order of the screen."""
    found = [("state", describe_state(live))]
    if live.config is not None:
        found.append(("run", describe_settings(live.config)))
    found.append(("epoch", describe_progress(live)))
    if live.losses or live.rows:
        loss = f"{live.losses[-1]:.4f}" if live.losses else f"{live.rows[-1].train_loss}"
        found.append(("loss", loss + ("" if live.lr is None else f"  lr {live.lr:g}")))
    if errors := describe_errors(live):
        found.append(("error", errors))
    if live.images_per_second is not None:
        found.append(("speed", f"{live.images_per_second:,.0f} images/s"))
    if memory := describe_memory(live):
        found.append(("memory", memory))
    if live.checkpoint is not None:
        found.append(("saved", f"step {shorten(live.checkpoint.detail.get('step'), 20)} at {clock(live.checkpoint)}"))
    if live.running and live.quiet_seconds is not None and live.quiet_seconds >= _QUIET_FROM_SECONDS:
        found.append(("quiet", f"nothing came for {format_duration(live.quiet_seconds)}"))
    return found


def screen(live: Live, console: Console) -> RenderableType:
    """The whole picture, for this console's width."""
    ascii_only = not console.encoding.lower().startswith("utf")
    room = max(10, console.width - _LABEL_COLUMNS - 1)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL_COLUMNS, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    curves = {"loss": live.losses, "error": [e for row in live.rows if (e := _error(row, "test")) is not None]}
    for label, text in facts(live):
        style = _STATE_STYLES.get(live.state, "bold yellow") if label == "state" else ""
        grid.add_row(label, Text(text, style=style))
        curve = [value for value in curves.get(label, ()) if not math.isnan(value)]
        if len(curve) > 1:
            grid.add_row("", Text(sparkline(curve, min(room, 60), ascii_only=ascii_only), style="cyan"))
        if label == "epoch" and live.epochs and live.steps_per_epoch:
            total = live.epochs * live.steps_per_epoch
            grid.add_row("", ProgressBar(total=total, completed=min(live.step, total), width=min(room, 60)))
        if label == "memory" and live.peak_bytes is not None and live.budget_bytes is not None:
            taken = min(live.peak_bytes, live.budget_bytes)
            grid.add_row("", ProgressBar(total=live.budget_bytes, completed=taken, width=min(room, 60)))
    told = [event for event in live.events if event.kind != "checkpoint"][-_EVENTS_SHOWN:]
    for index, event in enumerate(told):
        bold = "yellow" if event.kind in {"warning", "rollback", "out-of-memory", "stuck", "pressure"} else ""
        grid.add_row("events" if index == 0 else "", Text(f"{clock(event)}  {describe_event(event)}", style=bold))
    return Group(Text(shorten(live.path), style="bold"), grid)
