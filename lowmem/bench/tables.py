"""The tables of `lowmem bench`: as texts for the terminal and Markdown, as values for CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.bench.cells import (
    ENGINE,
    FIRST_MODE,
    PLAIN_DEFAULT,
    PLAIN_FREE,
    Cell,
    TableSetup,
    mode_budget,
    mode_families,
    plain_of,
    same_as_plain,
)
from lowmem.bench.results import FORMAT, Environment, plain_values
from lowmem.core.units import MIB, format_size
from lowmem.trial import launch_note

STEM = "bench"
UNKNOWN = "–"


@dataclass(frozen=True)
class ResultTable:
    """Texts under texts. `brief`: the columns that a narrow terminal shows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    brief: tuple[int, ...]
    note: str = ""


def tables(setup: TableSetup, cells: Sequence[Cell]) -> list[ResultTable]:
    """The three tables."""
    steps = [cell for cell in cells if cell.kind == "step"]
    first = [cell for cell in steps if cell.mode == FIRST_MODE]
    largest = [cell for cell in cells if cell.kind == "largest"]
    size = next((format_size(cell.budget_bytes) for cell in largest if cell.budget_bytes), "the memory")
    unit = next((cell.facts["unit"] for cell in largest if cell.facts), UNKNOWN)
    plain = plain_of(cells, Cell(kind="step", family=PLAIN_DEFAULT, batch=setup.batch))
    header = _step_header(setup)
    last = len(header) - 1
    return [
        ResultTable(
            f"A batch of {setup.batch} in every way, fp32, contiguous",
            header,
            tuple(_step_row(setup, cell, cells) for cell in first),
            (0, 1, 2, last - 4, last - 2, last - 1, last),
            _step_note(setup, first),
        ),
        ResultTable(
            f"The largest batch in {size}{'' if setup.on_card else ' of tensors'}",
            ("way", "precision", "largest batch", "does not fit", *_memory_header(setup)[:2], "images/s"),
            tuple(_largest_row(cell) for cell in largest),
            tuple(range(7)),
            f"In steps of {unit}: where the prediction points, then tried by real "
            "training steps and an evaluation. `does not fit` is a prediction.",
        ),
        ResultTable(
            f"Precision, memory format and way, a batch of {setup.batch}",
            (
                *("way", "precision, memory format", *_memory_header(setup)[:2], "images/s"),
                *("times plain in this mode", "times plain in fp32, contiguous", "as plain in this mode"),
            ),
            tuple(_mode_row(cell, cells, plain) for cell in _mode_cells(setup, steps)),
            (0, 1, 3, 4, 5, 7),
        ),
    ]


def _mode_cells(setup: TableSetup, steps: Sequence[Cell]) -> list[Cell]:
    """Way by way, so that a column compares the modes."""
    shown = (*mode_families(setup), ENGINE)
    wanted = [
        cell for cell in steps if cell.family in shown and (cell.family != ENGINE or cell.budget == mode_budget(setup))
    ]
    return sorted(wanted, key=lambda cell: shown.index(cell.family))


# -- rows --------------------------------------------------------------------------------------------------------------


def _memory_header(setup: TableSetup) -> tuple[str, ...]:
    if not setup.on_card:
        return ("MiB of tensors, predicted", "measured", "resident, grown by")
    return (
        *("MiB allocated, predicted", "measured"),
        *("MiB reserved, predicted", "measured"),
        *("MiB on the card, predicted", "measured"),
    )


def _step_header(setup: TableSetup) -> tuple[str, ...]:
    time = ("images/s", "step, s (fastest to slowest)", "times plain")
    return ("way", *_memory_header(setup), *time, "extra FLOPs", "as plain")


def _step_row(setup: TableSetup, cell: Cell, cells: Sequence[Cell]) -> tuple[str, ...]:
    plain = plain_of(cells, cell)
    memory = [cell.predicted_allocated_bytes, cell.most("peak_allocated_bytes")]
    if setup.on_card:
        memory += [cell.predicted_reserved_bytes, cell.most("peak_reserved_bytes")]
        memory += [cell.predicted_device_bytes, cell.most("device_used_bytes")]
    else:
        memory.append(cell.most("resident_growth_bytes"))
    return (
        cell.label,
        *(show_mib(size) for size in memory),
        _rate(cell),
        show_seconds(cell),
        _ratio(cell.ratios(plain)) if cell is not plain else "1",
        _extra(cell, plain),
        _verdict(cell, plain),
    )


def _mode_row(cell: Cell, cells: Sequence[Cell], first: Cell | None) -> tuple[str, ...]:
    plain = plain_of(cells, cell)
    return (
        cell.label,
        ", ".join(cell.mode),
        show_mib(cell.predicted_allocated_bytes),
        show_mib(cell.most("peak_allocated_bytes")),
        _rate(cell),
        _ratio(cell.ratios(plain)) if cell is not plain else "1",
        _ratio(cell.ratios(first)) if cell is not first else "1",
        _verdict(cell, plain),
    )


def _largest_row(cell: Cell) -> tuple[str, ...]:
    fails = cell.facts.get("fails")
    refusal = cell.refusal
    return (
        cell.label,
        cell.precision,
        refusal or str(cell.batch),
        str(fails) if fails else UNKNOWN,
        show_mib(cell.predicted_allocated_bytes),
        show_mib(cell.most("peak_allocated_bytes")),
        _rate(cell),
    )


def _verdict(cell: Cell, plain: Cell | None) -> str:
    """A refusal, or what was found of the bits."""
    if cell.refusal is not None:
        return cell.refusal
    if cell is plain:
        return UNKNOWN
    return same_as_plain(cell, plain) or UNKNOWN


def _step_note(setup: TableSetup, cells: Sequence[Cell]) -> str:
    said = (
        f"Each measurement is a process of its own; a step is the median of {setup.steps} after {setup.warmup} of "
        f"warm-up, in {setup.rounds} rounds in which all ways take turns. `times plain` is to plain's step of the same "
        "round: the median and the range. `extra FLOPs` are counted in a real step, as a share of plain's. `as plain` "
        "compares gradients and buffers of the first step by SHA-256. `checkpoint` is `torch.utils.checkpoint` around "
        "every block; selective: convolutions are saved. Plain PyTorch and its checkpointing have the optimizer as one "
        "gets it (`torch.optim.SGD(parameters, lr, …)`), lowmem has its fused form. "
    )
    twice = next((times for cell in cells if (times := cell.first("norm_updates") or 1) > 1), None)
    if twice is not None:
        said += f"`gradients only`: batch norm's running statistics were moved {twice} times in the step. "
    if setup.on_card:
        said += _determinism(cells) + "The allocator of a planned cell is capped at its budget, the others' is not."
        plain = plain_of(cells, cells[0]) if cells else None
        bound = launch_note(None if plain is None else plain.first("busy_share"), setup.batch)
        return said if bound is None else f"{said} {bound}"
    return said + (
        "On the CPU a budget bounds the tensors of the step, and they are what is predicted; `resident` is by how much "
        "the process grew at its peak, with the library's own buffers and what the allocator of C keeps."
    )


def _determinism(cells: Sequence[Cell]) -> str:
    """What kernels that give the same bits every time cost, as measured; empty where it was not."""
    plain = next((cell for cell in cells if cell.family == PLAIN_DEFAULT), None)
    free = next((cell for cell in cells if cell.family == PLAIN_FREE), None)
    ratios = [] if plain is None else plain.ratios(free)
    if not ratios:
        return ""
    return (
        f"Deterministic kernels (`train.deterministic`), which all rows but one have, make plain PyTorch's step "
        f"{statistics.median(ratios) - 1:+.1%} longer. "
    )


# -- texts -------------------------------------------------------------------------------------------------------------


def show_mib(size_bytes: int | None, digits: int = 1) -> str:
    """`digits` behind the point of what is small."""
    if size_bytes is None:
        return UNKNOWN
    return f"{size_bytes / MIB:,.{digits if size_bytes < 100 * MIB else 0}f}"


def _rate(cell: Cell) -> str:
    rate = cell.images_per_second
    return UNKNOWN if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def show_seconds(cell: Cell, digits: int = 3) -> str:
    if cell.step_seconds is None or cell.step_range is None:
        return UNKNOWN
    middle, low, high = (f"{one:.{digits}f}" for one in (cell.step_seconds, *cell.step_range))
    return f"{middle} ({low} to {high})"


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return UNKNOWN
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f}–{max(ratios):.2f})"


def _extra(cell: Cell, plain: Cell | None) -> str:
    share = extra_flops(cell, plain)
    return UNKNOWN if share is None else f"{share:+.1%}" if share else "none"


def extra_flops(cell: Cell, plain: Cell | None) -> float | None:
    """Counted, as a share of plain's."""
    mine, theirs = cell.first("flops"), None if plain is None else plain.first("flops")
    return None if mine is None or not theirs else mine / theirs - 1


# -- files -------------------------------------------------------------------------------------------------------------


def to_json(setup: TableSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> str:
    """Everything: what `Results.load` goes on from."""
    found = {
        "bench": FORMAT,
        "finished": finished,
        "settings": setup.record(),
        "environment": environment,
        "cells": [cell.record() for cell in cells],
    }
    return json.dumps(plain_values(found), indent=1) + "\n"


def to_markdown(setup: TableSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> str:
    """Readable tables, conditions first."""
    parts = [f"# {setup.name}, batch {setup.batch}", conditions(environment)]
    if not finished:
        parts.append("**Not finished: what is marked as not run is measured by the same command, given again.**")
    for table in tables(setup, cells):
        parts += [f"## {table.title}", markdown_table(table.header, table.rows)]
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def conditions(environment: dict[str, Any]) -> str:
    """On what, with what."""
    versions = f"lowmem {environment['lowmem']}, torch {environment['torch']}, Python {environment['python']}"
    if environment["device"] != "cuda":
        return f"On the CPU ({environment.get('cpu')}, {environment.get('cpu_threads')} threads); {versions}."
    return (
        f"{environment.get('card')}, driver {environment.get('driver') or '?'}, CUDA {environment.get('cuda')}, cuDNN "
        f"{environment.get('cudnn')}{', fp32 convolutions in TF32' if environment.get('tf32') else ''}; {versions}."
    )


def to_csv(setup: TableSetup, cells: Sequence[Cell]) -> str:
    """A row a cell; bytes, seconds and shares as they are, unknown is empty."""
    return csv_text([_values(cell, cells) for cell in cells])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _values(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any]:
    plain = plain_of(cells, cell) if cell.kind == "step" else None
    ratios = cell.ratios(plain)
    low, high = cell.step_range or (None, None)
    return {
        "kind": cell.kind,
        "way": cell.label,
        "precision": cell.precision,
        "memory_format": cell.memory_format,
        "batch": cell.batch,
        "budget_bytes": cell.budget_bytes,
        "refused": cell.refusal,
        "predicted_allocated_bytes": cell.predicted_allocated_bytes,
        "peak_allocated_bytes": cell.most("peak_allocated_bytes"),
        "predicted_reserved_bytes": cell.predicted_reserved_bytes,
        "peak_reserved_bytes": cell.most("peak_reserved_bytes"),
        "predicted_device_bytes": cell.predicted_device_bytes,
        "device_used_bytes": cell.most("device_used_bytes") if cell.predicted_device_bytes is not None else None,
        "resident_growth_bytes": cell.most("resident_growth_bytes"),
        "rounds": len(cell.results),
        "step_seconds": cell.step_seconds,
        "least_seconds": low,
        "most_seconds": high,
        "images_per_second": cell.images_per_second,
        "times_plain": statistics.median(ratios) if ratios else None,
        "least_times_plain": min(ratios, default=None),
        "most_times_plain": max(ratios, default=None),
        "predicted_overhead": cell.predicted_overhead,
        "busy_share": cell.first("busy_share"),
        "flops": cell.first("flops"),
        "extra_flops": extra_flops(cell, plain),
        "norm_updates": cell.first("norm_updates"),
        "as_plain": same_as_plain(cell, plain) if cell is not plain else None,
    }
