"""The acceptance suite: a network planned for a card, and everything that was promised of it held against real steps.
Its cells are measured as those of the tables are (`lowmem.bench.run`); here are which there are, what each found, and
the targets that they are held to. The account is written by `lowmem.bench.acceptance_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lowmem.bench.cells import (
    CHECKPOINT_PER_BLOCK,
    CHECKPOINT_SELECTIVE,
    ENGINE,
    PLAIN_DEFAULT,
    Cell,
    Setup,
    plain_of,
)
from lowmem.core.units import format_size
from lowmem.trial import excess, waits_for_host

KINDS = ("memory", "time", "gradients", "out of memory", "largest", "format")
DEFAULT_MINUTES = 6.0
FINISH_SECONDS = 10.0  # for the last tables and the picture
# What is to be reached on a card, as shares of the prediction and as points of overhead.
ALLOCATED_TARGET, RESERVED_TARGET, OVERHEAD_TARGET_POINTS = 0.03, 0.05, 5.0
# Times the usual batch: where a fast card waits for its launches at the usual one, times are compared there, under
# twice the memory, which leaves as much room for it as half the memory does for the usual one.
_LARGER = 4
Record = dict[str, Any]  # of a cell, as the account has it


@dataclass(frozen=True, kw_only=True)
class AcceptanceSetup(Setup):
    """Of the suite. `vram_bytes`: of the card that is planned for; on the CPU it bounds the tensors of the step, and
    nothing is emulated. `card_bytes`: of the card at hand, None on the CPU. `minutes`: the limit of time. `cells`: the
    kinds that are run, of KINDS."""

    fused: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    unrecorded: ClassVar[tuple[str, ...]] = ("warmup",)

    card_bytes: int | None = None
    minutes: float = DEFAULT_MINUTES
    steps: int = 10
    pictures: int = 50_000
    tries: int = 5
    cells: tuple[str, ...] = KINDS

    def unit(self, batch: int) -> int:
        """Or, where that is more, 3 % of them."""
        unit = super().unit(batch)
        return max(unit, batch // 32 // unit * unit)

    def emulates(self, vram_bytes: int | None) -> bool:
        """Whether the card is larger than what is planned for (a card's own memory reads a little under its name)."""
        return None not in (self.card_bytes, vram_bytes) and (self.card_bytes or 0) > 1.02 * (vram_bytes or 0)


def acceptance_cells(setup: AcceptanceSetup) -> list[Cell]:
    """Those of the kinds that are asked for, the ones that tell most for their time first: a short limit leaves out the
    last."""
    assert setup.vram_bytes is not None
    full, half, batch, larger = setup.vram_bytes, setup.vram_bytes // 2, setup.batch, _LARGER * setup.batch
    size = format_size(full)

    def cell(kind: str, title: str, family: str = ENGINE, batch: int = batch, **more: Any) -> Cell:
        return Cell(kind=kind, title=title, family=family, batch=batch, **more)

    def planned(kind: str, vram_bytes: int, how: str = "", batch: int = batch, **more: Any) -> Cell:
        title = f"{how}planned for {format_size(vram_bytes)}{f', batch {batch}' if batch != setup.batch else ''}"
        return cell(kind, title, batch=batch, vram_bytes=vram_bytes, **more)

    def form(precision: str, layout: str) -> Cell:
        how = f"{'AMP' if precision == 'amp' else precision}, {layout}, "
        return planned("format", full, how, precision=precision, memory_format=layout)

    def largest(precision: str, family: str) -> Cell:
        who = "planned" if family == ENGINE else "plain"
        title = f"largest batch in {size}, {'AMP' if precision == 'amp' else precision}, {who}"
        plain = family != ENGINE
        more = {"weight": 3 if plain else 1, "by_trials": plain, "vram_bytes": full}
        return cell("largest", title, family, precision=precision, **more)

    where_busy = [
        cell(
            "time",
            f"save-all (plain PyTorch), batch {larger}, no limit",
            PLAIN_DEFAULT,
            larger,
            unless=partial(_not_needed, setup),
        ),
        planned("time", 2 * full, batch=larger, unless=partial(_without_plain, larger)),
    ]
    real = [cell("out of memory", "out of memory, real, survived", weight=2, real=True, vram_bytes=full)]
    cells = [
        planned("memory", full),
        planned("memory", half),
        cell("time", "save-all (plain PyTorch), no limit", PLAIN_DEFAULT),
        *(where_busy if setup.on_card else []),
        cell("gradients", "gradients, planned against untouched"),
        cell("out of memory", "out of memory, injected, survived", weight=2, vram_bytes=full),
        *(real if setup.on_card else []),
        cell("time", "the library's checkpointing per block, no limit", CHECKPOINT_PER_BLOCK),
        cell("time", "the library's selective checkpointing, no limit", CHECKPOINT_SELECTIVE),
        largest("fp32", ENGINE),
        largest("fp32", PLAIN_DEFAULT),
        form("amp", "channels-last"),
        form("fp32", "channels-last"),
        form("amp", "contiguous"),
        largest("amp", ENGINE),
        largest("amp", PLAIN_DEFAULT),
    ]
    return [one for one in cells if one.kind in setup.cells]


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
    if plain is not None and plain.step_seconds:
        return None
    return f"not run: there is no plain step of batch {batch} to hold it against"


# -- against what was predicted ----------------------------------------------------------------------------------------


def _record(setup: AcceptanceSetup, cell: Cell, cells: Sequence[Cell]) -> Record:
    """Plain values, the errors among them. `overhead`: time beyond plain PyTorch's step of the same batch, precision
    and format, as a share; `busy_share`: how much of a plain step the card computes, `plain_busy_share`: of that
    step."""
    plain = plain_of(cells, cell)
    plain = None if plain is cell or cell.kind == "largest" else plain
    ratios = cell.ratios(plain)
    overhead = ratios[0] - 1 if ratios else None
    # What was refused is shown as it was measured.
    trial = next(iter(cell.trials.values()), {})
    figures = {
        "predicted_allocated_bytes": cell.predicted_allocated_bytes,
        "allocated_bytes": trial.get("peak_allocated_bytes"),
        "predicted_reserved_bytes": cell.predicted_reserved_bytes,
        "reserved_bytes": trial.get("peak_reserved_bytes"),
        "predicted_device_bytes": cell.predicted_device_bytes,
        "device_bytes": trial.get("device_used_bytes") if setup.on_card else None,
        "context_bytes": trial.get("context_bytes"),
        "eval_allocated_bytes": trial.get("eval_peak_allocated_bytes"),
        "predicted_step_seconds": cell.predicted_step_seconds,
        "step_seconds": trial.get("step_seconds"),
        "least_seconds": trial.get("least_seconds"),
        "most_seconds": trial.get("most_seconds"),
        "predicted_overhead": cell.predicted_overhead,
        "overhead": overhead,
        "busy_share": trial.get("busy_share"),
        "plain_busy_share": plain.first("busy_share") if plain is not None and ratios else None,
        "alloc_retries": trial.get("alloc_retries"),
    }
    facts = cell.facts
    if cell.kind == "largest" and cell.family == ENGINE:
        names = {"predicted": "planned", "fails": "refused_by_the_planner"}
        facts = {names.get(name, name): value for name, value in facts.items()}
    if cell.kind == "time" and cell.family == PLAIN_DEFAULT and cell.prepared:
        facts = {"save_all": True, **facts}
    points = None if overhead is None or cell.predicted_overhead is None else 100 * (overhead - cell.predicted_overhead)
    return {
        "kind": cell.kind,
        "name": cell.title,
        "batch": cell.batch,
        "precision": cell.precision,
        "memory_format": cell.memory_format,
        "vram_bytes": cell.vram_bytes,
        "emulated": setup.emulates(cell.vram_bytes),
        "refused": cell.refusal,
        **figures,
        "budget": cell.terms,
        "facts": facts,
        "cell_seconds": cell.seconds,
        "allocated_error": excess(figures["allocated_bytes"], figures["predicted_allocated_bytes"]),
        "reserved_error": excess(figures["reserved_bytes"], figures["predicted_reserved_bytes"]),
        "device_error": excess(figures["device_bytes"], figures["predicted_device_bytes"]),
        "seconds_error": excess(figures["step_seconds"], figures["predicted_step_seconds"]),
        "overhead_points": points,
    }


def records(setup: AcceptanceSetup, cells: Sequence[Cell], finished: bool = True) -> list[Record]:
    """Of all cells; before the end, of those that were measured."""
    return [_record(setup, cell, cells) for cell in cells if finished or cell.seconds is not None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`met`: None if there is nothing to judge."""

    what: str
    wanted: str
    found: str
    met: bool | None


def targets(rows: Sequence[Record]) -> list[Target]:
    """The three of the suite, each over all cells of the network under its two budgets. Overheads are judged where the
    card is not known to wait for its launches: at the usual batch, or at the larger one."""
    planned = [row for row in rows if row["kind"] == "memory"]
    larger = [row for row in rows if row["kind"] == "time" and row["overhead_points"] is not None]
    overheads = [row["overhead_points"] for row in (*planned, *larger) if not waits_for_host(row["plain_busy_share"])]
    idle = "the card waits for its launches at every batch that was measured" if planned and not overheads else ""
    points = OVERHEAD_TARGET_POINTS
    return [
        _target("allocated against predicted", [row["allocated_error"] for row in planned], ALLOCATED_TARGET),
        _target("reserved against predicted", [row["reserved_error"] for row in planned], RESERVED_TARGET),
        _target("overhead measured less predicted", overheads, points, "{:.0f} points", "{:+.1f} points", idle),
    ]


def _target(
    what: str,
    found: Sequence[float | None],
    most: float,
    wanted: str = "{:.0%}",
    shown: str = "{:+.1%}",
    nothing: str = "",
) -> Target:
    known = [one for one in found if one is not None]
    off = any(abs(one) > most for one in known)  # whatever the others would be
    return Target(
        what=what,
        wanted=f"within {wanted.format(most)}",
        found=", ".join(map(shown.format, known)) or nothing or "not measured",
        met=False if off else True if known and len(known) == len(found) else None,
    )
