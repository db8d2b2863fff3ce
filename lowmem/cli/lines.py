"""What is said of a run in one line, by whoever shows it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.core.reading import shorten
from lowmem.core.units import format_duration, format_size
from lowmem.runs.rows import Event


def describe_epoch(row: Mapping[str, Any], epochs: int | None) -> str:
    """One line for a finished epoch: its row of metrics.csv, and how many there will be."""
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
    return "  ".join(parts)


def clock(event: Event) -> str:
    """The time of day that an event was written down, `?` if it does not say."""
    text = event.time if isinstance(event.time, str) else ""
    return shorten(text[11:19], 8) if text[10:11] == "T" else "?"


def describe_event(event: Event) -> str:
    """A line of events.jsonl in words; of a kind that is not known here, what it says."""
    told = event.detail

    def size(name: str) -> str:
        value = told.get(name)
        return format_size(value) if type(value) is int else "?"

    def text(name: str, longest: int = 120) -> str:
        return shorten(told.get(name, "?"), longest)

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
        "warning": f"warning: {text('what')}{'; ' + text('reason') if 'reason' in told else ''}",
    }
    if event.kind in words:
        return words[event.kind]
    said = ", ".join(f"{shorten(name, 30)} {shorten(value, 40)}" for name, value in told.items())
    return shorten(f"{event.kind} {said}".strip())
