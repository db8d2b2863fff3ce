"""The acceptance suite's account as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lowmem.bench.acceptance import KINDS, AcceptanceSetup, Record, records, targets
from lowmem.bench.cells import Cell
from lowmem.bench.results import Environment, plain_values
from lowmem.bench.tables import UNKNOWN, csv_text, markdown_table, show_mib
from lowmem.core.units import MIB, format_size
from lowmem.trial import launch_note

STEM = "acceptance"


def to_json(setup: AcceptanceSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> str:
    """Everything; figures that are no numbers become null."""
    rows = records(setup, cells, finished)
    found = {
        "suite": "acceptance",
        "finished": finished,
        "setup": setup.record(),
        "emulated": setup.emulates(setup.vram_bytes),
        "environment": environment,
        "targets": [asdict(target) for target in targets(rows)],
        "cells": rows,
    }
    return json.dumps(plain_values(found), indent=1) + "\n"


def to_csv(setup: AcceptanceSetup, cells: Sequence[Cell]) -> str:
    """A row a cell; bytes, seconds and shares as they are, unknown is empty."""
    rows = records(setup, cells)
    return csv_text([{name: row[name] for name in row if name not in ("budget", "facts")} for row in rows])


def to_markdown(setup: AcceptanceSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> str:
    """Readable tables, conditions first."""
    rows = records(setup, cells, finished)
    judged = [(one.what, one.wanted, one.found, _MET[one.met]) for one in targets(rows)]
    parts = [
        f"# Acceptance: {setup.name}, batch {setup.batch}, {format_size(setup.vram_bytes or 0)}",
        conditions(setup, environment),
        "" if finished else "**Not finished: what follows is what was done before the end.**",
        "## Targets",
        markdown_table(("target", "wanted", "found", "met"), judged),
        *_sections(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_MET = {True: "met", False: "NOT met", None: "not judged"}


def conditions(setup: AcceptanceSetup, environment: Environment) -> str:
    """On what, with what, and what is emulated."""
    versions = f"lowmem {environment['lowmem']}, torch {environment['torch']}, Python {environment['python']}"
    if setup.device != "cuda":
        return (
            f"On the CPU ({environment.get('cpu')}, {environment.get('cpu_threads')} threads); {versions}. Here the "
            "budget bounds the tensors of the step, and they are what is measured: there is no allocator to reserve "
            "anything, and no card whose time was predicted."
        )
    full = setup.vram_bytes or 0
    card = (
        f"{environment.get('card')} with {format_size(setup.card_bytes or 0)}, driver "
        f"{environment.get('driver') or '?'}, CUDA {environment.get('cuda')}, cuDNN {environment.get('cudnn')}; "
        f"{versions}."
    )
    if setup.emulates(full):
        card += (
            f" {format_size(full)} are **emulated**: the allocator is capped so that tensors and context "
            "stay within them. A real card of that size may choose other convolution algorithms and is slower."
        )
    elif setup.emulates(full // 2):
        card += f" The smaller budget of {format_size(full // 2)} is **emulated** by capping the allocator."
    return (
        card
        + f" Steps are medians of {setup.steps} after {setup.warmup} of warm-up, each cell in a process of its own."
    )


def _sections(rows: Sequence[Record]) -> list[str]:
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    memory, time, forms = of["memory"], of["time"], of["format"]
    parts: list[str] = []
    for found, shown, title, columns in (
        (memory, memory, "Memory: predicted and measured", _MEMORY),
        # The planned ones are the first cells.
        (time, [*time[:1], *memory, *time[1:]], "Step time", _TIME),
        (of["largest"], of["largest"], "The largest batch", _LARGEST),
        (forms, [*memory[:1], *forms], "Mixed precision and channels-last", _FORMAT),
        (of["out of memory"], of["out of memory"], "Out of memory in the middle of a run", _facts("what happened")),
        (of["gradients"], of["gradients"], "Gradients", _facts("what was found")),
    ):
        if found:
            cells = [[text(row) for _, text in columns] for row in shown]
            parts += [f"## {title}", markdown_table([header for header, _ in columns], cells)]
        if found is time:
            parts += [bound for row in shown if (bound := launch_note(row["busy_share"], row["batch"]))]
    for row in memory:
        if row["budget"]:
            terms = ((name, f"{size / MIB:,.0f}") for name, size in row["budget"])
            parts += [f"## Where {_vram(row)} go", markdown_table(("term", "MiB"), terms)]
    return parts


# Header and text of a column.
Columns = Sequence[tuple[str, Callable[[Record], str]]]


def _mib(name: str) -> Callable[[Record], str]:
    return lambda row: show_mib(row[name], 2)


def _percent(name: str) -> Callable[[Record], str]:
    return lambda row: UNKNOWN if row[name] is None else f"{row[name]:+.1%}"


def _vram(row: Record) -> str:
    """`6.0 GiB (emulated)`."""
    size = row["vram_bytes"]
    return "no limit" if size is None else f"{format_size(size)}{' (emulated)' if row['emulated'] else ''}"


def _seconds(row: Record) -> str:
    if row["step_seconds"] is None or row["least_seconds"] is None or row["most_seconds"] is None:
        return UNKNOWN
    return f"{row['step_seconds']:.4f} ({row['least_seconds']:.4f} to {row['most_seconds']:.4f})"


def _overhead(row: Record) -> str:
    return "" if row["facts"].get("save_all") else _percent("overhead")(row)


def _points(row: Record) -> str:
    return UNKNOWN if row["overhead_points"] is None else f"{row['overhead_points']:+.1f}"


def _largest(row: Record) -> str:
    held = row["allocated_bytes"] is not None and not row["refused"]
    return str(row["batch"]) if held else row["refused"] or "none found"


def _rate(row: Record) -> str:
    return f"{row['batch'] / row['step_seconds']:,.0f}" if row["step_seconds"] else UNKNOWN


def _next(row: Record) -> str:
    facts = row["facts"]
    fails = facts.get("fails") or facts.get("refused_by_the_planner")
    who = "refused by the planner" if "refused_by_the_planner" in facts else "does not hold"
    return f"{fails} {who}" if fails else "not looked for"


def _tried(row: Record) -> str:
    return "; ".join(f"{batch}: {said}" for batch, said in row["facts"].get("tried", []))


def _holds(row: Record) -> str:
    return row["refused"] or "holds"


_MEMORY: Columns = (
    ("cell", lambda row: row["name"]),
    ("budget", _vram),
    ("allocated: predicted", _mib("predicted_allocated_bytes")),
    ("measured", _mib("allocated_bytes")),
    ("error", _percent("allocated_error")),
    ("reserved: predicted", _mib("predicted_reserved_bytes")),
    ("measured", _mib("reserved_bytes")),
    ("error", _percent("reserved_error")),
    ("on the card: predicted", _mib("predicted_device_bytes")),
    ("measured", _mib("device_bytes")),
    ("error", _percent("device_error")),
    ("in evaluation", _mib("eval_allocated_bytes")),
    ("verdict", _holds),
)
_TIME: Columns = (
    ("way", lambda row: row["name"] + (" (emulated)" if row["emulated"] else "")),
    ("peak, MiB", _mib("allocated_bytes")),
    ("step, s (fastest to slowest)", _seconds),
    ("overhead: measured", _overhead),
    ("predicted", _percent("predicted_overhead")),
    ("difference, points", _points),
    ("", lambda row: row["refused"] or ""),
)
_LARGEST: Columns = (
    ("cell", lambda row: row["name"]),
    ("budget", _vram),
    ("largest batch", _largest),
    ("pictures a second", _rate),
    ("peak, MiB", _mib("allocated_bytes")),
    ("predicted", _mib("predicted_allocated_bytes")),
    ("next", _next),
    ("tried", _tried),
)
_FORMAT: Columns = (
    ("precision", lambda row: row["precision"]),
    ("memory format", lambda row: row["memory_format"]),
    ("budget", _vram),
    ("step, s (fastest to slowest)", _seconds),
    ("peak, MiB", _mib("allocated_bytes")),
    ("predicted", _mib("predicted_allocated_bytes")),
    ("verdict", _holds),
)


def _facts(what: str) -> Columns:
    def case(row: Record) -> str:
        return f"{row['name']}, batch {row['batch']}"

    def said(row: Record) -> str:
        return row["refused"] or "; ".join(_fact(name, value) for name, value in row["facts"].items())

    return (("case", case), (what, said))


def _fact(name: str, value: object) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    if isinstance(value, bool):
        return f"{words}: {'yes' if value else 'no'}"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{words}: {format_size(value)}"
    return f"{words}: {value:.2g}" if isinstance(value, float) else f"{words}: {value}"
