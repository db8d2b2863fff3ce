"""The acceptance suite: a network planned for a card, and everything that was promised of it held against real steps.
Its cells are measured as those of the tables are (`lowmem.bench.run`); here are which there are, the targets that they
are held to, and what is told of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lowmem.bench import (
    CHECKPOINT_PER_BLOCK,
    CHECKPOINT_SELECTIVE,
    ENGINE,
    PLAIN_DEFAULT,
    Cell,
    Setup,
    contention,
    plain_of,
)
from lowmem.bench.results import Account, Column, Environment, ResultTable, Row, conditions
from lowmem.core.units import MIB, format_size
from lowmem.trial import excess, launch_note, waits_for_host

KINDS = ("memory", "time", "gradients", "out of memory", "largest", "format")
# What is to be reached on a card, of the prediction and of overhead.
ALLOCATED_TARGET_PERCENT, RESERVED_TARGET_PERCENT, OVERHEAD_TARGET_POINTS = 3.0, 5.0, 5.0
# Times the usual batch: where a fast card waits for its launches at the usual one, times are compared there, under
# twice the memory, which leaves as much room for it as half the memory does for the usual one.
_LARGER = 4
_SAID = {"fp32": "fp32", "amp": "AMP"}


@dataclass(frozen=True, kw_only=True)
class AcceptanceSetup(Setup):
    """Of the suite; on the CPU nothing is emulated. `card_bytes`: of the card at hand, None on the CPU. `minutes`: the
    limit of time. `cells`: the kinds that are run, of KINDS."""

    stem: ClassVar[str] = "acceptance"
    fused: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    unrecorded: ClassVar[tuple[str, ...]] = ("warmup", "host")

    card_bytes: int | None = None
    minutes: float = 6.0
    steps: int = 10
    pictures: int = 50_000
    tries: int = 5
    cells: tuple[str, ...] = KINDS

    def unit(self, batch: int) -> int:
        """Or, where that is more, 3 % of them."""
        unit = super().unit(batch)
        return max(unit, batch // 32 // unit * unit)

    def emulates(self, memory_bytes: int | None) -> bool:
        """Whether the card is larger than what is planned for (a card's own memory reads a little under its name)."""
        return memory_bytes is not None and (self.card_bytes or 0) > 1.02 * memory_bytes


# -- cells -------------------------------------------------------------------------------------------------------------


def acceptance_cells(setup: AcceptanceSetup) -> list[Cell]:
    """Those of the kinds asked for, the ones that tell most for their time first: a short limit leaves out the last."""
    full, larger = setup.memory_bytes, _LARGER * setup.batch
    assert full is not None

    def cell(kind: str, title: str, family: str = ENGINE, batch: int = setup.batch, **more: Any) -> Cell:
        return Cell(kind=kind, title=title, family=family, batch=batch, **more)

    def planned(kind: str, memory_bytes: int, how: str = "", batch: int = setup.batch, **more: Any) -> Cell:
        title = f"{how}planned for {setup.memory(memory_bytes)}{f', batch {batch}' if batch != setup.batch else ''}"
        return cell(kind, title, batch=batch, memory_bytes=memory_bytes, **more)

    def form(precision: str, layout: str) -> Cell:
        return planned("format", full, f"{_SAID[precision]}, {layout}, ", precision=precision, memory_format=layout)

    def largest(precision: str, family: str) -> Cell:
        plain = family != ENGINE
        title = f"largest batch in {setup.memory(full)}, {_SAID[precision]}, {'plain' if plain else 'planned'}"
        more: dict[str, Any] = {"weight": 3 if plain else 1, "by_trials": plain, "memory_bytes": full}
        return cell("largest", title, family, precision=precision, **more)

    save_all, survived = "save-all (plain PyTorch)", partial(cell, "out of memory", weight=2, memory_bytes=full)
    waits, timed = partial(_not_needed, setup), partial(_without_plain, larger)
    cells = [
        planned("memory", full),
        planned("memory", full // 2),
        cell("time", f"{save_all}, no limit", PLAIN_DEFAULT),
        cell("time", f"{save_all}, batch {larger}, no limit", PLAIN_DEFAULT, larger, unless=waits),
        planned("time", 2 * full, batch=larger, unless=timed),
        cell("gradients", "gradients, planned against untouched"),
        survived("out of memory, injected, survived"),
        survived("out of memory, real, survived", real=True),
        cell("time", "the library's checkpointing per block, no limit", CHECKPOINT_PER_BLOCK),
        cell("time", "the library's selective checkpointing, no limit", CHECKPOINT_SELECTIVE),
        *(largest("fp32", ENGINE), largest("fp32", PLAIN_DEFAULT)),
        *(form("amp", "channels-last"), form("fp32", "channels-last"), form("amp", "contiguous")),
        *(largest("amp", ENGINE), largest("amp", PLAIN_DEFAULT)),
    ]
    # The CPU waits for no launches, and its memory is not taken away.
    return [one for one in cells if one.kind in setup.cells and (setup.on_card or not (one.unless or one.real))]


def _not_needed(setup: AcceptanceSetup, cells: Sequence[Cell]) -> str | None:
    """Why plain PyTorch is not timed at a larger batch: the card does not wait for its launches at the usual one."""
    usual = plain_of(cells, Cell(kind="time", family=PLAIN_DEFAULT, batch=setup.batch))
    share = None if usual is None else usual.first("busy_share")
    if share is None:
        return f"not run: how much of a step the card computes at batch {setup.batch} is not known"
    if waits_for_host(share):
        return None
    return f"not needed: the card computes {share:.0%} of a plain step at batch {setup.batch}"


def _without_plain(batch: int, cells: Sequence[Cell]) -> str | None:
    plain = plain_of(cells, Cell(kind="time", family=PLAIN_DEFAULT, batch=batch))
    timed = plain is not None and plain.step_seconds
    return None if timed else f"not run: there is no plain step of batch {batch} to hold it against"


# -- against what was predicted ----------------------------------------------------------------------------------------


def account(setup: AcceptanceSetup, environment: Environment, cells: Sequence[Cell], finished: bool) -> Account:
    """Of all cells; before the end, of those that were measured."""
    rows = [_row(setup, cell, plain_of(cells, cell)) for cell in cells if finished or cell.seconds is not None]
    judged = targets(rows)
    return Account(
        title=f"Acceptance: {setup.name}, batch {setup.batch}, {setup.memory(setup.memory_bytes)}",
        conditions=conditions(environment, setup.card_bytes),
        how=f"{_how(setup)}{contention(cells)}",
        unfinished="" if finished else "Not finished: what follows is what was done before the end.",
        tables=[ResultTable("Targets", _TARGETS, judged), *_tables(rows)],
        rows=rows,
        record={
            "suite": "acceptance",
            "finished": finished,
            "setup": setup.record(),
            "emulated": setup.emulates(setup.memory_bytes),
            "environment": environment,
            "targets": judged,
            "cells": rows,
        },
    )


def _row(setup: AcceptanceSetup, cell: Cell, plain: Cell | None) -> Row:
    """`*_error`: the share by which what was measured is more than predicted. `overhead`: time beyond plain PyTorch's
    step of the same batch, precision and format, as a share; `overhead_points`: how far off its prediction;
    `busy_share`: how much of a plain step the card computes, `plain_busy_share`: of that step."""
    trial = next(iter(cell.trials.values()), {})
    row: Row = {"kind": cell.kind, "name": cell.title}
    row |= {name: getattr(cell, name) for name in ("batch", "precision", "memory_format")}
    row |= {"vram_bytes": None, "tensors_bytes": None}
    row["vram_bytes" if setup.tensors_bytes is None else "tensors_bytes"] = cell.memory_bytes
    row |= {"emulated": setup.emulates(cell.memory_bytes), "refused": cell.refusal}
    device = trial.get("device_used_bytes") if setup.on_card else None
    for name, measured, predicted in (
        ("allocated", trial.get("peak_allocated_bytes"), cell.predicted_allocated_bytes),
        ("reserved", trial.get("peak_reserved_bytes"), cell.predicted_reserved_bytes),
        ("device", device, cell.predicted_device_bytes),
    ):
        row |= {f"predicted_{name}_bytes": predicted, f"{name}_bytes": measured}
        row[f"{name}_error"] = excess(measured, predicted)
    row |= {"context_bytes": trial.get("context_bytes"), "eval_allocated_bytes": trial.get("eval_peak_allocated_bytes")}
    row["predicted_step_seconds"] = cell.predicted_step_seconds
    row |= {name: trial.get(name) for name in ("step_seconds", "least_seconds", "most_seconds")}
    row["seconds_error"] = excess(trial.get("step_seconds"), cell.predicted_step_seconds)
    ratios = [] if plain is cell or cell.kind == "largest" else cell.ratios(plain)
    overhead, hoped = ratios[0] - 1 if ratios else None, cell.predicted_overhead
    points = None if overhead is None or hoped is None else 100 * (overhead - hoped)
    row |= {"predicted_overhead": hoped, "overhead": overhead, "overhead_points": points}
    row |= {"busy_share": trial.get("busy_share"), "alloc_retries": trial.get("alloc_retries")}
    row["plain_busy_share"] = plain.first("busy_share") if plain is not None and ratios else None
    facts = cell.facts
    if cell.kind == "largest" and cell.family == ENGINE:
        names = {"predicted": "planned", "fails": "refused_by_the_planner"}
        facts = {names.get(name, name): value for name, value in facts.items()}
    if cell.kind == "time" and cell.family == PLAIN_DEFAULT and cell.prepared:
        facts = {"save_all": True, **facts}
    return {**row, "budget": cell.terms, "facts": facts, "cell_seconds": cell.seconds}


def targets(rows: Sequence[Row]) -> list[Row]:
    """The three of the suite, each over all cells of the network under its two budgets; `met`: None if there is nothing
    to judge. Overheads are judged where the card is not known to wait for its launches: at the usual batch, or at the
    larger one."""
    planned = [row for row in rows if row["kind"] == "memory"]
    larger = [row for row in rows if row["kind"] == "time" and row["overhead_points"] is not None]
    overheads = [row["overhead_points"] for row in (*planned, *larger) if not waits_for_host(row["plain_busy_share"])]
    idle = "the card waits for its launches at every batch that was measured" if planned and not overheads else ""

    def errors(name: str) -> list[float | None]:
        return [None if row[name] is None else 100 * row[name] for row in planned]

    judged = []
    for what, values, most, unit, nothing in (
        ("allocated against predicted", errors("allocated_error"), ALLOCATED_TARGET_PERCENT, "%", ""),
        ("reserved against predicted", errors("reserved_error"), RESERVED_TARGET_PERCENT, "%", ""),
        ("overhead measured less predicted", overheads, OVERHEAD_TARGET_POINTS, " points", idle),
    ):
        known = [one for one in values if one is not None]
        off = any(abs(one) > most for one in known)  # whatever the others would be
        found = ", ".join(f"{one:+.1f}{unit}" for one in known) or nothing or "not measured"
        met = False if off else True if known and len(known) == len(values) else None
        judged.append({"what": what, "wanted": f"within {most:.0f}{unit}", "found": found, "met": met})
    return judged


# -- tables ------------------------------------------------------------------------------------------------------------


def _how(setup: AcceptanceSetup) -> str:
    """What is emulated, and how is measured."""
    if not setup.on_card:
        by = "" if setup.tensors_bytes else " (by what a card of that memory would leave for them)"
        return (
            f"Here tensors are what is bounded{by} and measured: there "
            "is no allocator to reserve anything, and no card whose time was predicted."
        )
    said = f"Steps are medians of {setup.steps} after {setup.warmup} of warm-up, each cell in a process of its own."
    full = setup.memory_bytes or 0
    if setup.emulates(full):
        return (
            f"{setup.memory(full)} are **emulated**: the allocator is capped so that what is counted stays within "
            f"them. A real card of that size may choose other convolution algorithms and is slower. {said}"
        )
    if setup.emulates(full // 2):
        return f"The smaller budget of {setup.memory(full // 2)} is **emulated** by capping the allocator. {said}"
    return said


def _tables(rows: Sequence[Row]) -> list[ResultTable]:
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    memory, time = of["memory"], of["time"]
    timed = [*time[:1], *memory, *time[1:]]  # the planned ones are the first cells
    bound = [note for row in timed if (note := launch_note(row["busy_share"], row["batch"]))]
    tables = [
        (memory, ResultTable("Memory: predicted and measured", _MEMORY, memory)),
        (time, ResultTable("Step time", _TIME, timed, "\n\n".join(bound))),
        (of["largest"], ResultTable("The largest batch", _LARGEST, of["largest"])),
        (of["format"], ResultTable("Mixed precision and channels-last", _FORMAT, [*memory[:1], *of["format"]])),
        (of["out of memory"], ResultTable("Out of memory in the middle of a run", _HAPPENED, of["out of memory"])),
        (of["gradients"], ResultTable("Gradients", _FOUND, of["gradients"])),
    ]
    return [
        *(table for found, table in tables if found),
        *(ResultTable(f"Where {_budget(row)} go", _TERMS, row["budget"]) for row in memory if row["budget"]),
    ]


def _budget(row: Row) -> str:
    """`6,144 MiB (emulated)`, `2,700 MiB of tensors`."""
    size = row["vram_bytes"] or row["tensors_bytes"]
    if size is None:
        return "no limit"
    return f"{format_size(size)}{'' if row['tensors_bytes'] is None else ' of tensors'}{_emulated(row)}"


def _emulated(row: Row) -> str:
    return " (emulated)" if row["emulated"] else ""


def _largest(row: Row) -> str:
    held = row["allocated_bytes"] is not None and not row["refused"]
    return str(row["batch"]) if held else row["refused"] or "none found"


def _next(row: Row) -> str:
    facts = row["facts"]
    fails = facts.get("fails") or facts.get("refused_by_the_planner")
    who = "refused by the planner" if "refused_by_the_planner" in facts else "does not hold"
    return f"{fails} {who}" if fails else "not looked for"


def _facts(row: Row) -> str:
    return row["refused"] or "; ".join(_fact(name, value) for name, value in row["facts"].items())


def _fact(name: str, value: object) -> str:
    words = name.removesuffix("_bytes").replace("_", " ")
    if isinstance(value, bool):
        return f"{words}: {'yes' if value else 'no'}"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{words}: {format_size(value)}"
    return f"{words}: {value:.2g}" if isinstance(value, float) else f"{words}: {value}"


_CELL, _CASE = Column("cell", "name"), Column("case", lambda row: f"{row['name']}, batch {row['batch']}")
_BUDGET, _VERDICT = Column("budget", _budget), Column("verdict", lambda row: row["refused"] or "holds")
_PEAK = Column.mib("peak, MiB", "allocated_bytes", 2), Column.mib("predicted", "predicted_allocated_bytes", 2)
_HAPPENED, _FOUND = (_CASE, Column("what happened", _facts)), (_CASE, Column("what was found", _facts))
_MEMORY = [_CELL, _BUDGET]
for _header, _name in (("allocated", "allocated"), ("reserved", "reserved"), ("on the card", "device")):
    _MEMORY.append(Column.mib(f"{_header}: predicted", f"predicted_{_name}_bytes", 2))
    _MEMORY.append(Column.mib("measured", f"{_name}_bytes", 2))
    _MEMORY.append(Column.figure("error", f"{_name}_error"))
_MEMORY += [Column.mib("in evaluation", "eval_allocated_bytes", 2), _VERDICT]
_TIME = (
    *(Column("way", lambda row: row["name"] + _emulated(row)), _PEAK[0], Column.seconds(4)),
    *(Column.figure("overhead: measured", "overhead"), Column.figure("predicted", "predicted_overhead")),
    Column.figure("difference, points", "overhead_points", "{:+.1f}"),
    Column("", lambda row: row["refused"] or ""),
)
_LARGEST = (
    *(_CELL, _BUDGET, Column("largest batch", _largest), Column.rate("pictures a second"), *_PEAK),
    Column("next", _next),
    Column("tried", lambda row: "; ".join(f"{batch}: {said}" for batch, said in row["facts"].get("tried", []))),
)
_MODE = Column("precision", "precision"), Column("memory format", "memory_format")
_FORMAT = (*_MODE, _BUDGET, Column.seconds(4), *_PEAK, _VERDICT)
_TERMS = Column("term", lambda term: term[0]), Column("MiB", lambda term: f"{term[1] / MIB:,.0f}")
_MET = {True: "met", False: "NOT met", None: "not judged"}
_TARGETS = (
    *(Column("target", "what"), Column("wanted", "wanted"), Column("found", "found")),
    Column("met", lambda target: _MET[target["met"]]),
)
