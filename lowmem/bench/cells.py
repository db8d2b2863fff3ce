"""What `lowmem bench` compares: the ways of doing a step, the cells of its tables, and what was found of each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from lowmem.core.units import format_size
from lowmem.plan.record import Plan
from lowmem.trial.trial import TrialResult
from lowmem.trial.ways import PER_BLOCK, PLAIN, PLANNED, SELECTIVE

NO_TIME = "not run: time"
LEAST = "least"
# Families of methods, as tables and pictures call them.
PLAIN_DEFAULT, PLAIN_FUSED = "plain PyTorch", "plain PyTorch, fused optimizer"
# What the promise of equal bits costs on a card; all other rows have kernels that keep it.
PLAIN_FREE = "plain PyTorch, nondeterministic kernels"
CHECKPOINT_SELECTIVE, CHECKPOINT_PER_BLOCK = "checkpoint, selective", "checkpoint per block"
ENGINE = "lowmem"
# family -> (way, form of the optimizer). The library's ways as most people write them: the form that SGD takes if one
# says nothing. The fused one of the engine is there for everybody, hence the row that tells what it brings.
FAMILIES: dict[str, tuple[str, str]] = {
    PLAIN_DEFAULT: (PLAIN, "default"),
    PLAIN_FUSED: (PLAIN, "fused"),
    PLAIN_FREE: (PLAIN, "default"),
    CHECKPOINT_SELECTIVE: (SELECTIVE, "default"),
    CHECKPOINT_PER_BLOCK: (PER_BLOCK, "default"),
    ENGINE: (PLANNED, "fused"),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured. `budgets`: of the engine, each bytes (int), a share of plain's predicted peak (float), or the
    least that can be planned (`LEAST`). `vram_bytes`: the memory of the table of largest batches, None: the card's
    own, on the CPU half of plain's predicted peak. `rounds`, `mode_rounds`: how often each cell of the first and of
    the third table is measured, in turns. `steps` of each trial, after `warmup`."""

    arch: str
    block: str
    width: int
    batch: int
    device: str
    budgets: tuple[int | float | str, ...] = (0.95, 0.7, 0.5, 0.35, LEAST)
    vram_bytes: int | None = None
    rounds: int = 3
    mode_rounds: int = 2
    steps: int = 5
    warmup: int = 2
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.arch} ({self.block}, width {self.width})"

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"


@dataclass(kw_only=True)
class Cell:
    """One row of a table; bytes and seconds, None where it is not known.

    `kind`: `step` (the same batch in every way) or `largest` (the largest batch in `budget_bytes`). `budget`: of the
    engine, see `Setup`. `prepared`: prediction and plan are made. `trials`: round -> `TrialResult` as a dictionary.
    `cap_bytes`: what the allocator was allowed to hold. `facts`: of a search for the largest batch.
    """

    kind: str
    family: str
    precision: str
    memory_format: str
    batch: int
    budget: int | float | str | None = None
    budget_bytes: int | None = None
    prepared: bool = False
    refused: str | None = None
    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    predicted_device_bytes: int | None = None
    predicted_flops: int | None = None
    predicted_overhead: float | None = None
    cap_bytes: int | None = None
    plan: dict[str, Any] | None = None
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What a cell is known by in a results file."""
        return " / ".join((self.kind, self.precision, self.memory_format, self.label))

    @property
    def mode(self) -> tuple[str, str]:
        return self.precision, self.memory_format

    @property
    def label(self) -> str:
        """`lowmem, 50% of plain` (of its memory)."""
        if self.budget is None:
            return self.family
        if self.budget == LEAST:
            return f"{self.family}, the least"
        if isinstance(self.budget, float):
            return f"{self.family}, {self.budget:.0%} of plain"
        return f"{self.family}, {format_size(int(self.budget))}"

    # -- what was measured ---------------------------------------------------------------------------------------------

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the rounds in which it ran through."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.get("refused") is None]

    @property
    def refusal(self) -> str | None:
        """Why there is nothing to show; the last of its trials' if none ran through."""
        if self.refused is not None or self.results:
            return self.refused
        tried = [trial["refused"] for _, trial in sorted(self.trials.items())]
        return tried[-1] if tried else NO_TIME

    def most(self, name: str) -> int | None:
        """The largest over the rounds."""
        return max((one[name] for one in self.results if one.get(name) is not None), default=None)

    def first(self, name: str) -> Any:
        """Of the first round that knows it."""
        return next((one[name] for one in self.results if one.get(name) is not None), None)

    @property
    def step_seconds(self) -> float | None:
        """The median over the rounds of each round's median step."""
        seconds = [one["step_seconds"] for one in self.results if one.get("step_seconds")]
        return statistics.median(seconds) if seconds else None

    @property
    def step_range(self) -> tuple[float, float] | None:
        """The fastest and the slowest step of all rounds."""
        found = self.results
        if not found or any(one.get("least_seconds") is None or one.get("most_seconds") is None for one in found):
            return None
        return min(one["least_seconds"] for one in found), max(one["most_seconds"] for one in found)

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.step_seconds if self.step_seconds else None

    def ratios(self, plain: Cell | None) -> list[float]:
        """Its step's time to plain's of the same round, for the rounds that both have."""
        if plain is None:
            return []
        return [
            mine["step_seconds"] / theirs["step_seconds"]
            for number, mine in sorted(self.trials.items())
            if (theirs := plain.trials.get(number)) and mine.get("step_seconds") and theirs.get("step_seconds")
        ]

    @staticmethod
    def from_record(values: dict[str, Any]) -> Cell:
        """The inverse of `asdict`. Raises ValueError or TypeError for anything else."""
        known = {one.name for one in fields(Cell)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError("a cell has other keys")
        if not all(isinstance(values[name], dict) for name in ("trials", "facts")):
            raise ValueError("a cell's trials and facts are dictionaries")
        cell = Cell(**values)
        if cell.plan is not None:
            Plan.from_json(cell.plan)
        for trial in cell.trials.values():
            TrialResult(**trial)
        return cell


def step_cells(setup: Setup, modes: Sequence[tuple[str, str]]) -> list[Cell]:
    """Of the first table, and of the third where the mode is another; in `FIRST_MODE` they are the same."""
    cells = []
    for precision, layout in modes:
        cell = partial(Cell, kind="step", precision=precision, memory_format=layout, batch=setup.batch)
        first = (precision, layout) == FIRST_MODE
        shown = first_families(setup) if first else mode_families(setup)
        cells += [cell(family=family) for family in shown]
        budgets = setup.budgets if first else (mode_budget(setup),)
        cells += [cell(family=ENGINE, budget=budget) for budget in budgets]
    return cells


FIRST_MODE = ("fp32", "contiguous")  # as most people write it
MODES = (FIRST_MODE, ("fp32", "channels-last"), ("amp", "contiguous"), ("amp", "channels-last"))


def first_families(setup: Setup) -> tuple[str, ...]:
    """The library's ways in the first table."""
    return tuple(one for one in FAMILIES if one != ENGINE and (one != PLAIN_FREE or setup.on_card))


def mode_families(setup: Setup) -> tuple[str, ...]:
    """The library's ways in the table of modes."""
    rest = (CHECKPOINT_PER_BLOCK,) if setup.quick else (CHECKPOINT_SELECTIVE, CHECKPOINT_PER_BLOCK)
    return (PLAIN_DEFAULT, *rest)


def mode_budget(setup: Setup) -> int | float | str:
    """The engine's in the table of modes: of its budgets that nearest to half of plain's memory, which is measured for
    the first table anyway."""
    shares = [one for one in setup.budgets if isinstance(one, float)]
    return min(shares, key=lambda share: abs(share - 0.5)) if shares else setup.budgets[len(setup.budgets) // 2]


def largest_cells(setup: Setup) -> list[Cell]:
    """Of the second table."""
    precisions = ("fp32",) if setup.quick else ("fp32", "amp")
    families = [family for family in FAMILIES if family not in (PLAIN_FUSED, PLAIN_FREE)]
    return [
        Cell(kind="largest", family=family, precision=precision, memory_format="contiguous", batch=setup.batch)
        for precision in precisions
        for family in families
    ]


def plain_of(cells: Iterable[Cell], cell: Cell) -> Cell | None:
    """Plain PyTorch in the same precision and memory format."""
    return next((one for one in cells if (one.kind, one.family, one.mode) == ("step", PLAIN_DEFAULT, cell.mode)), None)


def record(cell: Cell) -> dict[str, Any]:
    """Plain values."""
    return asdict(cell)


def same_as_plain(cell: Cell, plain: Cell | None) -> str | None:
    """What the digests of the first step say: `same bits` of gradients and buffers, `gradients only`, `no`, or that
    plain itself does not compute the same twice; None if there is nothing to compare."""
    if plain is None:
        return None
    mine, theirs = (
        {(one["gradients"], one["losses"][0]) for one in which.results if one.get("gradients")}
        for which in (cell, plain)
    )
    if not mine or not theirs:
        return None
    if mine == theirs and len(mine) == 1:
        if {one["buffers"] for one in cell.results if one.get("buffers")} == {
            one["buffers"] for one in plain.results if one.get("buffers")
        }:
            return "same bits"
        return "gradients only"
    if len(theirs) > 1:
        return "as plain's own runs"
    return "no"
