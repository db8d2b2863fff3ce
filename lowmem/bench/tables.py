"""The tables of `lowmem bench`: their cells, and what is told of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lowmem.bench import (
    CHECKPOINT_PER_BLOCK,
    CHECKPOINT_SELECTIVE,
    ENGINE,
    ENGINE_HOST,
    ENGINES,
    FAMILIES,
    FIRST_MODE,
    LEAST,
    PLAIN_DEFAULT,
    PLAIN_FREE,
    PLAIN_FUSED,
    Cell,
    Setup,
    contention,
    plain_of,
    same_as_plain,
)
from lowmem.bench.results import FORMAT, UNKNOWN, Account, Column, Environment, ResultTable, Row, conditions
from lowmem.core.units import counted, format_size
from lowmem.models import make_network
from lowmem.models.resnet import is_safe
from lowmem.trial import excess, launch_note

MODES = (FIRST_MODE, ("fp32", "channels-last"), ("amp", "contiguous"), ("amp", "channels-last"))
Way = tuple[str, int | float | str | None]  # family, budget


@dataclass(frozen=True, kw_only=True)
class TableSetup(Setup):
    """Of the tables. `budgets`: of the engine, each bytes (int), a share of plain's predicted peak (float), or the
    least that can be planned (`LEAST`). No memory given: the card's own, on the CPU half of plain's predicted peak.
    `rounds`, `mode_rounds`: how often each cell of the first and of the third table is measured, in turns."""

    stem: ClassVar[str] = "bench"
    unrecorded: ClassVar[tuple[str, ...]] = ("pictures", "tries")

    budgets: tuple[int | float | str, ...] = (0.95, 0.7, 0.5, 0.35, LEAST)
    rounds: int = 3
    mode_rounds: int = 2
    quick: bool = False

    @property
    def largest_steps(self) -> int:
        return max(1, self.steps // 2)

    def unit(self, batch: int) -> int:
        return max(1, self.batch // (8 if self.quick else 16))


# -- cells -------------------------------------------------------------------------------------------------------------


def step_cells(setup: TableSetup, modes: Sequence[tuple[str, str]]) -> list[Cell]:
    """Of the first table, and of the third where the mode is another; in `FIRST_MODE` they are the same."""
    cells = []
    for precision, layout in modes:
        ways, rounds = mode_ways(setup), setup.mode_rounds
        if (precision, layout) == FIRST_MODE:
            library = (one for one in FAMILIES if one not in ENGINES and (one != PLAIN_FREE or setup.on_card))
            engine = [(ENGINE, one) for one in setup.budgets]
            engine += [(ENGINE_HOST, one) for one in setup.budgets if setup.host is not None]
            ways, rounds = [*((one, None) for one in library), *engine], setup.rounds
        for family, budget in ways:
            how: dict[str, Any] = {"precision": precision, "memory_format": layout, "budget": budget}
            cells.append(Cell(kind="step", family=family, batch=setup.batch, rounds=rounds, **how))
    return cells


def mode_ways(setup: TableSetup) -> list[Way]:
    """In the table of modes; the engine under that of its budgets which is nearest to half of plain's memory, and is
    measured for the first table anyway."""
    shares = [one for one in setup.budgets if isinstance(one, float)]
    middle = min(shares, key=lambda share: abs(share - 0.5)) if shares else setup.budgets[len(setup.budgets) // 2]
    library = [PLAIN_DEFAULT, *([] if setup.quick else [CHECKPOINT_SELECTIVE]), CHECKPOINT_PER_BLOCK]
    return [*((family, None) for family in library), (ENGINE, middle)]


def largest_cells(setup: TableSetup) -> list[Cell]:
    """Of the second table."""
    precisions = ("fp32",) if setup.quick else ("fp32", "amp")
    families = [family for family in FAMILIES if family not in (PLAIN_FUSED, PLAIN_FREE, ENGINE_HOST)]
    return [
        Cell(kind="largest", family=family, precision=precision, batch=setup.batch, weight=3)
        for precision in precisions
        for family in families
    ]


def table_cells(setup: TableSetup, known: Mapping[str, Cell]) -> list[Cell]:
    """Of all tables, but for the modes that corrupt memory (see `lowmem.models.resnet`); `known`: by their keys,
    with what a results file has of them."""
    model = make_network(setup.model)
    modes = [mode for mode in MODES if is_safe(model, setup.device, *mode)]
    cells = [*step_cells(setup, modes), *largest_cells(setup)]
    return [replace(known.get(cell.key, cell), rounds=cell.rounds, weight=cell.weight) for cell in cells]


# -- what is told of them ----------------------------------------------------------------------------------------------


def account(setup: TableSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> Account:
    """`record` is what `Results.load` goes on from."""
    first = plain_of(cells, Cell(kind="step", family=PLAIN_DEFAULT, batch=setup.batch))
    rows = [_row(cell, plain_of(cells, cell), first) for cell in cells]
    return Account(
        title=f"{setup.name}, batch {setup.batch}",
        conditions=conditions(environment) + contention(cells),
        unfinished=""
        if finished
        else "Not finished: what is marked as not run is measured by the same command, given again.",
        tables=_tables(setup, cells, rows),
        rows=rows,
        record={
            "bench": FORMAT,
            "finished": finished,
            "settings": setup.record(),
            "environment": environment,
            "cells": [cell.record() for cell in cells],
        },
    )


def _row(cell: Cell, plain: Cell | None, first: Cell | None) -> Row:
    """`plain`: its step in the same mode, `first`: in fp32, contiguous; `*ratios`: times these, round by round."""
    plain = plain if cell.kind == "step" else None
    ratios = cell.ratios(plain)
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
        "device_used_bytes": None if cell.predicted_device_bytes is None else cell.most("device_used_bytes"),
        "resident_growth_bytes": cell.most("resident_growth_bytes"),
        "host_bytes": cell.host_bytes or None,
        "hidden_share": cell.hidden_share,
        "rounds": len(cell.known("step_seconds")),
        "contended": any(one is not None and one.contended for one in (cell, plain, first)),
        "step_seconds": cell.step_seconds,
        "least_seconds": min(cell.known("least_seconds"), default=None),
        "most_seconds": cell.most("most_seconds"),
        "images_per_second": cell.batch / cell.step_seconds if cell.step_seconds else None,
        "times_plain": statistics.median(ratios) if ratios else None,
        "least_times_plain": min(ratios, default=None),
        "most_times_plain": max(ratios, default=None),
        "predicted_overhead": cell.predicted_overhead,
        "busy_share": cell.first("busy_share"),
        "flops": cell.first("flops"),
        "extra_flops": None if plain is None else excess(cell.first("flops"), plain.first("flops")),
        "norm_updates": cell.first("norm_updates"),
        "as_plain": same_as_plain(cell, plain) if cell is not plain else None,
        "ratios": ratios,
        "first_ratios": cell.ratios(first),
        "facts": cell.facts,
    }


def _ratio(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        ratios = row[name]
        if not ratios or set(ratios) == {1.0}:  # nothing, or plain itself
            return "1" if ratios else UNKNOWN
        middle, ends = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"
        if row["contended"]:
            return f"unsure ({middle if len(ratios) == 1 else ends})"
        return middle if len(ratios) == 1 else f"{middle} ({ends})"

    return text


def _tables(setup: TableSetup, cells: Sequence[Cell], rows: Sequence[Row]) -> list[ResultTable]:
    """The three of them; of the third the rows way by way, so that a column compares the modes."""
    steps = [(cell, row) for cell, row in zip(cells, rows, strict=True) if cell.kind == "step"]
    largest = [row for row in rows if row["kind"] == "largest"]
    size = next((format_size(row["budget_bytes"]) for row in largest if row["budget_bytes"]), "the memory")
    unit = next((row["facts"]["unit"] for row in largest if row["facts"]), UNKNOWN)
    way, images = Column("way", "way"), Column.rate("images/s")
    predicted, measured, *others = _memory_columns(setup)
    there = [Column.mib("MiB on the host", "host_bytes"), Column.figure("transfer hidden", "hidden_share", "{:.0%}")]
    there = [] if setup.host is None else there
    return [
        ResultTable(
            f"A batch of {setup.batch} in every way, fp32, contiguous",
            [
                *(way, predicted, measured, *others, *there, images, Column.seconds(3)),
                Column("times plain", _ratio("ratios")),
                Column.figure("extra FLOPs", "extra_flops", none="none"),
                Column("as plain", _verdict),
            ],
            [row for cell, row in steps if cell.mode == FIRST_MODE],
            _step_note(setup, [cell for cell, _ in steps if cell.mode == FIRST_MODE]),
        ),
        ResultTable(
            f"The largest batch in {size}{'' if setup.on_card else ' of tensors'}",
            [
                *(way, Column("precision", "precision")),
                Column("largest batch", lambda row: row["refused"] or str(row["batch"])),
                Column("does not fit", lambda row: str(row["facts"].get("fails") or UNKNOWN)),
                *(predicted, measured, images),
            ],
            largest,
            f"In steps of {unit}: where the prediction points, then tried by real "
            "training steps and an evaluation. `does not fit` is a prediction.",
        ),
        ResultTable(
            f"Precision, memory format and way, a batch of {setup.batch}",
            [
                *(way, Column("precision, memory format", lambda row: f"{row['precision']}, {row['memory_format']}")),
                *(predicted._replace(brief=False), measured, images),
                Column("times plain in this mode", _ratio("ratios")),
                Column("times plain in fp32, contiguous", _ratio("first_ratios"), brief=False),
                Column("as plain in this mode", _verdict),
            ],
            [row for wanted in mode_ways(setup) for cell, row in steps if (cell.family, cell.budget) == wanted],
        ),
    ]


def _verdict(row: Row) -> str:
    """A refusal, or what was found of the bits."""
    return row["refused"] or row["as_plain"] or UNKNOWN


def _memory_columns(setup: TableSetup) -> list[Column]:
    measured = Column.mib("measured", "peak_allocated_bytes")
    if not setup.on_card:
        grown = Column.mib("resident, grown by", "resident_growth_bytes", brief=False)
        return [Column.mib("MiB of tensors, predicted", "predicted_allocated_bytes"), measured, grown]
    return [
        *(Column.mib("MiB allocated, predicted", "predicted_allocated_bytes"), measured),
        Column.mib("MiB reserved, predicted", "predicted_reserved_bytes", brief=False),
        Column.mib("measured", "peak_reserved_bytes", brief=False),
        Column.mib("MiB on the card, predicted", "predicted_device_bytes", brief=False),
        Column.mib("measured", "device_used_bytes", brief=False),
    ]


def _step_note(setup: TableSetup, cells: Sequence[Cell]) -> str:
    said = (
        f"Each measurement is a process of its own; a step is the median of {setup.steps} after {setup.warmup} of "
        f"warm-up, in {counted(setup.rounds, 'round')} in which all ways take turns. `times plain` is to plain's "
        "step of the same round: the median and the range. "
        "`extra FLOPs` are counted in a real step, as a share of plain's. `as plain` "
        "compares gradients and buffers of the first step by SHA-256. `checkpoint` is `torch.utils.checkpoint` around "
        "every block; selective: convolutions are saved. Plain PyTorch and its checkpointing have the optimizer as one "
        "gets it (`torch.optim.SGD(parameters, lr, …)`), lowmem has its fused form. "
    )
    if setup.host is not None:
        said += (
            "With host memory: what waits there goes out and comes back once a step; `transfer hidden` is the "
            "predicted share of that transfer's time beside which the step computes. "
        )
    twice = next((times for cell in cells if (times := cell.first("norm_updates") or 1) > 1), None)
    if twice is not None:
        said += f"`gradients only`: batch norm's running statistics were moved {twice} times in the step. "
    if not setup.on_card:
        return said + (
            "On the CPU a budget bounds the tensors of the step, and they are what is predicted; `resident` is by how "
            "much the process grew at its peak, with the library's own buffers and what the allocator of C keeps."
        )
    of = {cell.family: cell for cell in cells if cell.family in (PLAIN_DEFAULT, PLAIN_FREE)}
    plain = of.get(PLAIN_DEFAULT)
    if plain is not None and (ratios := plain.ratios(of.get(PLAIN_FREE))):
        said += (
            "Deterministic kernels (`train.deterministic`), which all rows but one have, make plain PyTorch's step "
            f"{statistics.median(ratios) - 1:+.1%} longer. "
        )
    said += "The allocator of a planned cell is capped at its budget, the others' is not."
    bound = launch_note(None if plain is None else plain.first("busy_share"), setup.batch)
    return said if bound is None else f"{said} {bound}"
