"""The acceptance suite's account as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from lowmem.bench.acceptance import Row, Setup, Target, targets, vram_words
from lowmem.core.units import MIB, format_size
from lowmem.trial.trial import launch_note

Environment = dict[str, Any]


def to_json(setup: Setup, environment: Environment, rows: Sequence[Row], finished: bool) -> str:
    """Everything; figures that are no numbers become null."""
    record = {
        "suite": "acceptance",
        "finished": finished,
        "setup": asdict(setup),
        "emulated": setup.emulates(setup.vram_bytes),
        "environment": environment,
        "targets": [asdict(target) for target in targets(list(rows))],
        "cells": [row.record() for row in rows],
    }
    return json.dumps(_plain(record), indent=1) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """A row a cell; bytes, seconds and shares as they are, unknown is empty."""
    names = [name for name in (rows[0].record() if rows else {}) if name not in ("budget", "facts")]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.record() for row in rows)
    return out.getvalue()


def to_markdown(setup: Setup, environment: Environment, rows: Sequence[Row], finished: bool) -> str:
    """Readable tables, conditions first."""
    parts = [
        f"# Acceptance: {setup.name}, batch {setup.batch}, {format_size(setup.vram_bytes)}",
        conditions(setup, environment),
        "" if finished else "**Not finished: what follows is what was done before the end.**",
        "## Targets",
        _table(("target", "wanted", "found", "met"), (_target_cells(target) for target in targets(list(rows)))),
        *_sections(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(setup: Setup, environment: Environment) -> str:
    """On what, with what, and what is emulated."""
    versions = f"lowmem {environment['lowmem']}, torch {environment['torch']}, Python {environment['python']}"
    if setup.device != "cuda":
        return (
            f"On the CPU ({environment.get('cpu')}, {environment.get('cpu_threads')} threads); {versions}. Here the "
            "budget bounds the tensors of the step, and they are what is measured: there is no allocator to reserve "
            "anything, and no card whose time was predicted."
        )
    card = (
        f"{environment.get('card')} with {format_size(setup.card_bytes)}, driver {environment.get('driver') or '?'}, "
        f"CUDA {environment.get('cuda')}, cuDNN {environment.get('cudnn')}; {versions}."
    )
    if setup.emulates(setup.vram_bytes):
        card += (
            f" {format_size(setup.vram_bytes)} are **emulated**: the allocator is capped so that tensors and context "
            "stay within them. A real card of that size may choose other convolution algorithms and is slower."
        )
    elif setup.emulates(setup.vram_bytes // 2):
        card += f" The smaller budget of {format_size(setup.vram_bytes // 2)} is **emulated** by capping the allocator."
    return card + f" Steps are medians of {setup.steps} after 2 of warm-up, each cell in a process of its own."


def _sections(rows: Sequence[Row]) -> list[str]:
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in {row.kind for row in rows}}
    parts: list[str] = []
    for kind, title, header, cells in (
        ("memory", "Memory: predicted and measured", _MEMORY, _memory_cells),
        ("time", "Step time", _TIME, _time_cells),
        ("largest", "The largest batch", _LARGEST, _largest_cells),
        ("format", "Mixed precision and channels-last", _FORMAT, _format_cells),
        ("out of memory", "Out of memory in the middle of a run", ("case", "what happened"), _fact_cells),
        ("gradients", "Gradients", ("case", "what was found"), _fact_cells),
    ):
        found = by_kind.get(kind, [])
        if kind in ("time", "format"):  # the planned ones are the first cells
            first = by_kind.get("memory", [])
            found = [*found[:1], *first, *found[1:]] if kind == "time" else [*first[:1], *found]
        if by_kind.get(kind):
            parts += [f"## {title}", _table(header, (cells(row) for row in found))]
        if kind == "time":
            parts += [bound for row in found if (bound := launch_note(row.busy_share, row.batch or 0))]
    budgets = [row for row in by_kind.get("memory", []) if row.budget]
    for row in budgets:
        terms = ((name, f"{size / MIB:,.0f}") for name, size in row.budget)
        parts += [f"## Where {vram_words(row)} go", _table(("term", "MiB"), terms)]
    return parts


_MEMORY = (
    "cell",
    "budget",
    "allocated: predicted",
    "measured",
    "error",
    "reserved: predicted",
    "measured",
    "error",
    "on the card: predicted",
    "measured",
    "error",
    "in evaluation",
    "verdict",
)


def _memory_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        vram_words(row),
        _mib(row.predicted_allocated_bytes),
        _mib(row.allocated_bytes),
        _percent(row.allocated_error),
        _mib(row.predicted_reserved_bytes),
        _mib(row.reserved_bytes),
        _percent(row.reserved_error),
        _mib(row.predicted_device_bytes),
        _mib(row.device_bytes),
        _percent(row.device_error),
        _mib(row.eval_allocated_bytes),
        row.refused or "holds",
    )


_TIME = (
    "way",
    "peak, MiB",
    "step, s (fastest to slowest)",
    "overhead: measured",
    "predicted",
    "difference, points",
    "",
)


def _time_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name + (" (emulated)" if row.emulated else ""),
        _mib(row.allocated_bytes),
        _seconds(row),
        "" if row.facts.get("save_all") else _percent(row.overhead),
        _percent(row.predicted_overhead),
        "–" if row.overhead_points is None else f"{row.overhead_points:+.1f}",
        row.refused or "",
    )


_LARGEST = ("cell", "budget", "largest batch", "pictures a second", "peak, MiB", "predicted", "next", "tried")


def _largest_cells(row: Row) -> tuple[str, ...]:
    held = row.allocated_bytes is not None
    fails = row.facts.get("fails") or row.facts.get("refused_by_the_planner")
    who = "refused by the planner" if "refused_by_the_planner" in row.facts else "does not hold"
    rate = row.batch / row.step_seconds if row.batch and row.step_seconds else None
    return (
        row.name,
        vram_words(row),
        str(row.batch) if held and not row.refused else row.refused or "none found",
        f"{rate:,.0f}" if rate else "–",
        _mib(row.allocated_bytes),
        _mib(row.predicted_allocated_bytes),
        f"{fails} {who}" if fails else "not looked for",
        "; ".join(f"{batch}: {said}" for batch, said in row.facts.get("tried", [])),
    )


_FORMAT = ("precision", "memory format", "budget", "step, s (fastest to slowest)", "peak, MiB", "predicted", "verdict")


def _format_cells(row: Row) -> tuple[str, ...]:
    return (
        row.precision or row.name,
        row.memory_format or "–",
        vram_words(row),
        _seconds(row),
        _mib(row.allocated_bytes),
        _mib(row.predicted_allocated_bytes),
        row.refused or "holds",
    )


def _fact_cells(row: Row) -> tuple[str, ...]:
    said = row.refused or "; ".join(_fact(name, value) for name, value in row.facts.items())
    return f"{row.name}, batch {row.batch}" if row.batch else row.name, said


def _fact(name: str, value: object) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    if isinstance(value, bool):
        return f"{words}: {'yes' if value else 'no'}"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{words}: {format_size(value)}"
    return f"{words}: {value:.2g}" if isinstance(value, float) else f"{words}: {value}"


def _target_cells(target: Target) -> tuple[str, ...]:
    met = {True: "met", False: "NOT met", None: "not judged"}[target.met]
    return target.what, target.wanted, target.found, met


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _seconds(row: Row) -> str:
    if row.step_seconds is None or row.least_seconds is None or row.most_seconds is None:
        return "–"
    return f"{row.step_seconds:.4f} ({row.least_seconds:.4f} to {row.most_seconds:.4f})"


def _mib(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "–"
    return f"{size_bytes / MIB:,.0f}" if size_bytes >= 100 * MIB else f"{size_bytes / MIB:,.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}"


def _plain(value: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
