"""The acceptance suite's account: what is set up, what each cell found, and how that stands to what was predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem.choose.request import Choice
from lowmem.config.settings import Settings, gather
from lowmem.core.units import format_size
from lowmem.trial.trial import TrialResult, waits_for_host

NO_TIME = "not run: time"
KINDS = ("memory", "time", "gradients", "out of memory", "largest", "format")
DEFAULT_MINUTES = 6.0
# What is to be reached on a card, as shares of the prediction and as points of overhead.
ALLOCATED_TARGET, RESERVED_TARGET, OVERHEAD_TARGET_POINTS = 0.03, 0.05, 5.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the suite is run on. `card_bytes`: of the card at hand, None on the CPU, where `vram_bytes` bounds the
    tensors of the step and nothing is emulated. `pictures`: training pictures held on the card.
    `tries`: plans, or trials, in the search for a largest batch. `cells`: the kinds that are run, of KINDS."""

    arch: str
    block: str
    width: int
    batch: int
    vram_bytes: int
    device: str
    card_bytes: int | None = None
    minutes: float = DEFAULT_MINUTES
    steps: int = 10
    pictures: int = 50_000
    tries: int = 5
    cells: tuple[str, ...] = KINDS

    @property
    def name(self) -> str:
        return f"{self.arch} ({self.block}, width {self.width})"

    def emulates(self, vram_bytes: int) -> bool:
        """Whether the card is larger than what is planned for (a card's own memory reads a little under its name)."""
        return self.card_bytes is not None and self.card_bytes > 1.02 * vram_bytes

    def settings(self, vram_bytes: int, batch: int, precision: str, memory_format: str) -> Settings:
        """Those of a run that would be planned like this."""
        flags = {
            "model.arch": self.arch,
            "model.block": self.block,
            "model.width": self.width,
            "train.batch": batch,
            "train.precision": precision,
            "train.memory_format": memory_format,
            "train.device": self.device,
            "memory.vram": vram_bytes,
        }
        # On the CPU too: without its own times nothing would be predicted of them.
        return gather(flags=flags, sets=["memory.allow_accumulation=false", "memory.calibrate=always"])


@dataclass(kw_only=True)
class Row:
    """A cell: what was done, predicted and measured; bytes and seconds, None where it is not known.

    `overhead`: time beyond the save-all step of the same batch, precision and format, as a share. `busy_share`: how
    much of a plain step the card computes, `plain_busy_share`: of that save-all step. `facts`: what only this kind of
    cell has.
    """

    kind: str  # of KINDS
    name: str
    batch: int | None = None
    precision: str | None = None
    memory_format: str | None = None
    vram_bytes: int | None = None
    emulated: bool = False
    refused: str | None = None
    predicted_allocated_bytes: int | None = None
    allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    reserved_bytes: int | None = None
    predicted_device_bytes: int | None = None
    device_bytes: int | None = None
    context_bytes: int | None = None
    eval_allocated_bytes: int | None = None
    predicted_step_seconds: float | None = None
    step_seconds: float | None = None
    least_seconds: float | None = None
    most_seconds: float | None = None
    predicted_overhead: float | None = None
    overhead: float | None = None
    busy_share: float | None = None
    plain_busy_share: float | None = None
    alloc_retries: int | None = None
    budget: list[tuple[str, int]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    cell_seconds: float | None = None

    def predict(self, choice: Choice, on_card: bool) -> None:
        """What the plan says; of time only what was measured on this device, not what a datasheet says of another."""
        predicted = choice.plan.predicted
        self.budget = choice.budget.rows()
        self.predicted_allocated_bytes = predicted.peak_allocated_bytes
        if on_card:
            self.predicted_reserved_bytes = predicted.peak_reserved_bytes
            if predicted.device_bytes is not None:
                self.predicted_device_bytes = predicted.device_bytes + choice.budget.pictures_bytes
        if on_card or choice.timed:
            self.predicted_step_seconds = predicted.step_seconds
            self.predicted_overhead = predicted.overhead

    def measure(self, result: TrialResult, on_card: bool) -> None:
        """What the trial says."""
        self.allocated_bytes = result.peak_allocated_bytes
        self.reserved_bytes = result.peak_reserved_bytes
        self.eval_allocated_bytes = result.eval_peak_allocated_bytes
        self.device_bytes = result.device_used_bytes if on_card else None
        self.context_bytes = result.context_bytes
        self.step_seconds = result.step_seconds
        self.least_seconds, self.most_seconds = result.least_seconds, result.most_seconds
        self.alloc_retries = result.alloc_retries
        self.busy_share = result.busy_share

    @property
    def allocated_error(self) -> float | None:
        return _off(self.allocated_bytes, self.predicted_allocated_bytes)

    @property
    def reserved_error(self) -> float | None:
        return _off(self.reserved_bytes, self.predicted_reserved_bytes)

    @property
    def device_error(self) -> float | None:
        return _off(self.device_bytes, self.predicted_device_bytes)

    @property
    def seconds_error(self) -> float | None:
        return _off(self.step_seconds, self.predicted_step_seconds)

    @property
    def overhead_points(self) -> float | None:
        """Measured less predicted, in percentage points."""
        if self.overhead is None or self.predicted_overhead is None:
            return None
        return 100 * (self.overhead - self.predicted_overhead)

    def record(self) -> dict[str, Any]:
        """Plain values, the errors among them."""
        errors = ("allocated_error", "reserved_error", "device_error", "seconds_error", "overhead_points")
        return {**asdict(self), **{name: getattr(self, name) for name in errors}}


@dataclass(frozen=True, kw_only=True)
class Target:
    """`met`: None if there is nothing to judge."""

    what: str
    wanted: str
    found: str
    met: bool | None


def plain_at(rows: list[Row], batch: int, precision: str = "fp32", memory_format: str = "contiguous") -> Row | None:
    """The save-all step that was timed there."""
    mode = (batch, precision, memory_format)
    timed = (row for row in rows if row.facts.get("save_all") and row.step_seconds)
    return next((row for row in timed if (row.batch, row.precision, row.memory_format) == mode), None)


def set_overheads(rows: list[Row]) -> None:
    """Of everything that was timed like a save-all step."""
    for row in rows:
        if row.batch is None or row.precision is None or row.memory_format is None or not row.step_seconds:
            continue
        plain = plain_at(rows, row.batch, row.precision, row.memory_format)
        if plain is not None and plain is not row and plain.step_seconds:
            row.overhead = row.step_seconds / plain.step_seconds - 1
            row.plain_busy_share = plain.busy_share


def targets(rows: list[Row]) -> list[Target]:
    """The three of the suite, each over all cells of the network under its two budgets. Overheads are judged where the
    card is not known to wait for its launches: at the usual batch, or at the larger one."""
    planned = [row for row in rows if row.kind == "memory"]
    larger = [row for row in rows if row.kind == "time" and row.overhead_points is not None]
    overheads = [row.overhead_points for row in (*planned, *larger) if not waits_for_host(row.plain_busy_share)]
    wanted = "overhead measured less predicted"
    return [
        _target("allocated against predicted", [row.allocated_error for row in planned], ALLOCATED_TARGET, "{:.0%}"),
        _target("reserved against predicted", [row.reserved_error for row in planned], RESERVED_TARGET, "{:.0%}"),
        _target(wanted, overheads, OVERHEAD_TARGET_POINTS, "{:.0f} points", _NOT_BUSY if planned else ""),
    ]


_NOT_BUSY = "the card waits for its launches at every batch that was measured"


def _target(what: str, found: list[float | None], most: float, form: str, nothing: str = "") -> Target:
    """`nothing`: what to say if there is none to judge."""
    known = [one for one in found if one is not None]
    shown = ", ".join(f"{one:+.1f} points" if "points" in form else f"{one:+.1%}" for one in known)
    met = None if len(known) < len(found) or not known else all(abs(one) <= most for one in known)
    if any(abs(one) > most for one in known):
        met = False  # whatever the others would be
    return Target(
        what=what,
        wanted=f"within {form.format(most)}",
        found=shown or (nothing if not found else "") or "not measured",
        met=met,
    )


def _off(measured: float | None, predicted: float | None) -> float | None:
    return None if measured is None or not predicted else measured / predicted - 1


def vram_words(row: Row) -> str:
    """`6.0 GiB (emulated)`."""
    return f"{format_size(row.vram_bytes)}{' (emulated)' if row.emulated else ''}" if row.vram_bytes else "no limit"
