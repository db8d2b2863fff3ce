"""What `lowmem bench` measures: the ways of doing a step, a suite's setup, its cells, and what was found of each. The
suites are in `lowmem.bench.tables` and `lowmem.bench.acceptance`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from lowmem.config.schema import ModelConfig
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.units import format_size
from lowmem.plan.record import Plan
from lowmem.trial import PER_BLOCK, PLAIN, PLANNED, SELECTIVE, TrialResult

NO_TIME = "not run: time"
LEAST = "least"
# Families of methods, as tables and pictures call them.
PLAIN_DEFAULT, PLAIN_FUSED = "plain PyTorch", "plain PyTorch, fused optimizer"
# What the promise of equal bits costs on a card; all other rows have kernels that keep it.
PLAIN_FREE = "plain PyTorch, nondeterministic kernels"
CHECKPOINT_SELECTIVE, CHECKPOINT_PER_BLOCK = "checkpoint, selective", "checkpoint per block"
ENGINE = "lowmem"
ENGINE_HOST = "lowmem with host memory"
ENGINES = (ENGINE, ENGINE_HOST)
# family -> (way, whether the optimizer is fused). The library's ways as most people write them: the form that SGD takes
# if one says nothing. The fused one of the engine is there for everybody, hence the row that tells what it brings.
FAMILIES: dict[str, tuple[str, bool]] = {
    PLAIN_DEFAULT: (PLAIN, False),
    PLAIN_FUSED: (PLAIN, True),
    PLAIN_FREE: (PLAIN, False),
    CHECKPOINT_SELECTIVE: (SELECTIVE, False),
    CHECKPOINT_PER_BLOCK: (PER_BLOCK, False),
    ENGINE: (PLANNED, True),
    ENGINE_HOST: (PLANNED, True),
}
FIRST_MODE = ("fp32", "contiguous")  # as most people write it
# Beside nothing else rounds differ by some percent, and a desktop takes some percent of a core.
_UNSTEADY, _TAKEN_CORES = 1.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured: a network, a batch, a device, the memory that largest batches are to fit (of a whole card,
    `vram_bytes`, or what tensors alone may take), and the `steps` of each trial after `warmup`. `image_size`: side
    of what the network sees, enlarged from a source's own; `pictures`: training pictures held on the card; `tries`:
    in the search for a largest batch. `host`: memory.host of the rows with host memory; None: there are none.
    `stem`: of the names of a suite's files. `fused`: the library's ways have the fused optimizer, as the engine has
    it. `timed`: the CPU is timed, too; without that nothing is predicted of time there."""

    stem: ClassVar[str]
    fused: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    unrecorded: ClassVar[tuple[str, ...]] = ()

    arch: str = "res20"
    block: str = "basic"
    width: int = 64
    spec: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    image_size: int = SOURCE_SIDE
    batch: int
    device: str
    vram_bytes: int | None = None
    tensors_bytes: int | None = None
    steps: int = 5
    warmup: int = 2
    pictures: int = 0
    tries: int = 8
    host: int | str | None = None

    @property
    def name(self) -> str:
        size = f" at {self.image_size}x{self.image_size}"
        return self.model.words + (size if self.image_size != SOURCE_SIDE else "")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.model_fields})

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    @property
    def memory_bytes(self) -> int | None:
        return self.vram_bytes if self.tensors_bytes is None else self.tensors_bytes

    def memory(self, size_bytes: int | None) -> str:
        """`6,144 MiB`, `2,700 MiB of tensors`."""
        return format_size(size_bytes) + ("" if self.tensors_bytes is None else " of tensors")

    @property
    def network(self) -> dict[str, Any]:
        """What trials have in common."""
        sides = {"image_size": self.image_size, "stored_side": SOURCE_SIDE}
        return {**self.model.model_dump(), **sides, "device": self.device}

    @property
    def largest_steps(self) -> int:
        """Of a trial of a largest batch."""
        return 2

    def unit(self, batch: int) -> int:
        """Largest batches, of about this size, are told apart to so many pictures."""
        return max(1, self.batch // 16)

    def record(self) -> dict[str, Any]:
        """For a results file; what those of older versions do not have is None where there is nothing of it."""
        known = asdict(self) | {"args": self.args or None, "sha256": self.sha256 or None}
        known["image_size"] = None if self.image_size == SOURCE_SIDE else self.image_size
        return {name: value for name, value in known.items() if name not in self.unrecorded}


@dataclass(kw_only=True)
class Cell:
    """One row of a table; bytes and seconds, None where it is not known.

    `kind`: `step` (the same batch in every way), `largest` (the largest batch in `budget_bytes`), or one of the
    acceptance suite. `budget`: of the engine in the tables, see `TableSetup`; `memory_bytes`: what the suite plans for,
    of the kind that its setup has. `prepared`: prediction and plan are made. `trials`: round ->
    `TrialResult` as a dictionary. `cap_bytes`: what the allocator was allowed to hold. `facts`: of a search for the
    largest batch, of a check.

    What follows `facts` is not in the results file of the tables. `title`: in place of the family. `weight`: about how
    many trials it takes. `unless`: why it need not or cannot be measured, by the cells before it. `by_trials`: its
    largest batch is searched by real steps. `real`: memory is taken away, see `PlanQuestion`. `terms`: of its budget.
    `seconds`: what it took in all.
    """

    kind: str
    family: str
    precision: str = "fp32"
    memory_format: str = "contiguous"
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
    title: str = ""
    memory_bytes: int | None = None
    rounds: int = 1
    weight: int = 1
    unless: Callable[[Sequence[Cell]], str | None] | None = None
    by_trials: bool = False
    real: bool = False
    predicted_step_seconds: float | None = None
    terms: list[tuple[str, int]] = field(default_factory=list)
    seconds: float | None = None

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
        if self.title or self.budget is None:
            return self.title or self.family
        if self.budget == LEAST:
            return f"{self.family}, the least"
        if isinstance(self.budget, float):
            return f"{self.family}, {self.budget:.0%} of plain"
        return f"{self.family}, {format_size(int(self.budget))}"

    # -- what was measured ---------------------------------------------------------------------------------------------

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the rounds in which it ran through and held."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.get("refused") is None]

    @property
    def refusal(self) -> str | None:
        """Why it does not count; the last of its trials' if none held."""
        if self.refused is not None or self.results:
            return self.refused
        tried = [trial["refused"] for _, trial in sorted(self.trials.items())]
        return tried[-1] if tried else None if self.facts else NO_TIME

    def known(self, name: str) -> list[Any]:
        """A figure of every such round that tells it."""
        return [one[name] for one in self.results if one.get(name) is not None]

    def most(self, name: str) -> Any:
        """The largest over the rounds."""
        return max(self.known(name), default=None)

    def first(self, name: str) -> Any:
        """Of the first round that knows it."""
        return next(iter(self.known(name)), None)

    @property
    def step_seconds(self) -> float | None:
        """The median over the rounds of each round's median step."""
        seconds = self.known("step_seconds")
        return statistics.median(seconds) if seconds else None

    @property
    def spread(self) -> float | None:
        """Its slowest round to its fastest; None with fewer than two."""
        seconds = self.known("step_seconds")
        return max(seconds) / min(seconds) if len(seconds) > 1 and min(seconds) > 0 else None

    @property
    def contended(self) -> bool:
        """Whether its times say more about what else the machine did."""
        return (self.spread or 1.0) >= _UNSTEADY or (self.most("taken_cores") or 0.0) >= _TAKEN_CORES

    def ratios(self, plain: Cell | None) -> list[float]:
        """Its step's time to plain's of the same round, for the rounds that both have."""
        of_plain = {} if plain is None else plain.trials
        return [
            mine["step_seconds"] / theirs["step_seconds"]
            for number, mine in sorted(self.trials.items())
            if (theirs := of_plain.get(number)) and mine.get("step_seconds") and theirs.get("step_seconds")
        ]

    @property
    def host_bytes(self) -> int | None:
        """Of its plan, that wait in host memory."""
        return None if self.plan is None else self.plan["predicted"].get("host_bytes")

    @property
    def hidden_share(self) -> float | None:
        """Of the seconds of their transfer, as predicted: those beside which the plan computes."""
        return None if self.plan is None else self.plan["predicted"].get("hidden_share")

    # -- its file ------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Plain values; of a cell that could not be prepared no refusal, so that the same command tries it again."""
        values = {name: getattr(self, name) for name in _RECORDED}
        return values if self.prepared else {**values, "refused": None}

    @staticmethod
    def from_record(values: dict[str, Any]) -> Cell:
        """The inverse of `record`. Raises ValueError or TypeError for anything else."""
        if not isinstance(values, dict) or set(values) != set(_RECORDED):
            raise ValueError("a cell has other keys")
        if not all(isinstance(values[name], dict) for name in ("trials", "facts")):
            raise ValueError("a cell's trials and facts are dictionaries")
        cell = Cell(**values)
        if cell.plan is not None:
            Plan.from_json(cell.plan)
        for trial in cell.trials.values():
            TrialResult(**trial)
        return cell


_RECORDED = tuple(itertools.takewhile(lambda name: name != "title", (one.name for one in fields(Cell))))


def plain_of(cells: Iterable[Cell], cell: Cell) -> Cell | None:
    """Plain PyTorch's step of the same batch, in the same precision and memory format."""
    plain = (one for one in cells if one.kind in ("step", "time") and one.family == PLAIN_DEFAULT)
    return next((one for one in plain if (one.mode, one.batch) == (cell.mode, cell.batch)), None)


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
        same = set(cell.known("buffers")) == set(plain.known("buffers"))
        return "same bits" if same else "gradients only"
    return "as plain's own runs" if len(theirs) > 1 else "no"


def contention(cells: Iterable[Cell]) -> str:
    """What is to be said where others had a part of the processor while it was measured; else nothing."""
    disturbed = [cell for cell in cells if cell.contended]
    taken = max((cell.most("taken_cores") or 0.0 for cell in disturbed), default=0.0)
    spread = max((cell.spread or 1.0 for cell in disturbed), default=1.0)
    signs = [f"other programs kept {taken:.1f} of the cores busy that this needs"] if taken >= _TAKEN_CORES else []
    signs += [f"the same steps took up to {spread:.1f} times as long in one round as in another"] * (
        spread >= _UNSTEADY
    )
    if not signs:
        return ""
    return (
        f" The machine was not alone: {', and '.join(signs)}. Times and their ratios are unsure, memory and bits are "
        "not: end the other programs, and measure again into another --out."
    )
