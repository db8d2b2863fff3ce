"""`Plan`: the decision that is written to a run's plan.json and replayed when the run is resumed (invariant 7)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import PLAN_LIMIT_BYTES, read_json, shorten
from lowmem.plan.policy import Schedule

FORMAT = 1
Precision = Literal["fp32", "amp", "bf16"]


class _Checked:
    """Raises ValueError for a field that is not what its annotation says: what was recorded is read without trust."""

    def __post_init__(self) -> None:
        kind: Any = self.__class__
        for name, allowed in _allowed_types(kind).items():
            found = getattr(self, name)
            if not any(_is_a(found, one) for one in allowed):
                *most, last = (getattr(one, "__name__", one) for one in allowed)
                wanted = f"{', '.join(map(str, most))} or {last}" if most else last
                raise ValueError(f"{name} is {shorten(repr(found), 100)}, not {wanted}".replace("NoneType", "None"))


@cache
def _allowed_types(kind: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind).items()
    return {name: get_args(hint) if get_origin(hint) in (Literal, UnionType) else (hint,) for name, hint in hints}


def _is_a(value: object, kind: Any) -> bool:
    """Truth is no number, although Python counts with it; a whole number is a float too; and what is larger than 2**62
    is no size or count of anything."""
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 62
    kind = get_origin(kind) or kind
    return isinstance(value, kind) if isinstance(kind, type) else value == kind


@dataclass(frozen=True, kw_only=True)
class Predicted(_Checked):
    """What the plan is expected to take; None where it is not known."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    step_seconds: float | None = None
    overhead: float | None = None  # a share: 0.12 is 12 % more time than plain autograd
    extra_flops: int | None = None  # repeated work per step, in floating-point operations
    host_bytes: int | None = None  # that wait in host memory between forward and backward
    waiting_seconds: float | None = None  # of `step_seconds`, in which the computing stands still for their transfer
    hidden_share: float | None = None  # of that transfer's seconds, both ways: those beside which it computes


@dataclass(frozen=True, kw_only=True)
class Candidate(_Checked):
    """A choice that was looked at: in words, with what it would have taken."""

    what: str
    refused_because: str | None = None  # None: chosen
    peak_bytes: int | None = None
    step_seconds: float | None = None
    measured_peak_bytes: int | None = None  # of real steps in a trial, if there was one
    measured_step_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(_Checked):
    """How a training step is run under a budget. Raises ValueError if numbers and schedule do not fit each other."""

    budget_bytes: int | None  # for all tensors of the step; None: no budget was set
    batch: int  # this process's own share of the effective batch
    micro_batch: int
    accumulation: int
    precision: Precision
    memory_format: Literal["contiguous", "channels-last"]
    batch_norm: Literal["library", "native"] = "native"  # kernels on CUDA, see `lowmem.remat.batch_norm`
    tf32: bool | None = False  # whether fp32 convolutions round to TF32 on its card; None: a card of unknown kind
    allocator_bytes: int | None = None  # on an emulated card the caching allocator's limit; None: all there is
    exact: bool  # the plain step's gradients at the full batch; not under accumulation with batch norm (invariant 4)
    predicted: Predicted = Predicted()
    stages: tuple[str, ...]
    schedule: Schedule
    candidates: tuple[Candidate, ...] = ()
    ladder: tuple[Plan, ...] = ()  # the next smaller plans, already solved, for when memory runs out all the same
    shares: tuple[int, ...] = ()  # pictures of the effective batch by rank; left out: one process takes all

    def __post_init__(self) -> None:
        if not self.shares:
            object.__setattr__(self, "shares", (self.batch,))
        super().__post_init__()
        if not all(_is_a(share, int) and share >= 0 for share in self.shares):
            raise ValueError("shares are counts of pictures")
        if self.batch not in self.shares and 0 not in self.shares:
            raise ValueError(f"the batch of {self.batch} is none of the shares {list(self.shares)}")
        if min(self.batch, self.micro_batch, self.accumulation) < 1:
            raise ValueError("batch, micro_batch and accumulation are at least 1")
        if -(-self.batch // self.micro_batch) != self.accumulation:
            raise ValueError(
                f"batch {self.batch} in micro-batches of {self.micro_batch} is "
                f"{-(-self.batch // self.micro_batch)} of them, not {self.accumulation}"
            )
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("two stages have the same name")
        self.schedule.check_covers(len(self.stages))
        if any(rung.ladder for rung in self.ladder):
            raise ValueError("a plan on a ladder has no ladder of its own")

    def blocks(self) -> dict[str, str]:
        """Stage name -> policy, `in segment: KEEP{z2}` for a stage that runs more than once."""
        policies = self.schedule.policies()
        return {
            name: ("in segment: " if policies[index][0] else "") + policies[index][1].name
            for index, name in enumerate(self.stages)
        }

    @property
    def effective_batch(self) -> int:
        """Of all processes together."""
        return sum(self.shares)

    @property
    def library_norm(self) -> bool:
        return self.batch_norm == "library"

    def next_rung(self) -> Plan | None:
        """The next smaller plan, with what is left of the ladder; None if nothing is."""
        return replace(self.ladder[0], ladder=self.ladder[1:]) if self.ladder else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`; the keys are those of `lowmem plan --json`, in the order of the fields; `blocks` are
        the stages and the schedule in words, `shares` only those of several processes."""
        written = {
            "predicted": asdict(self.predicted),
            "blocks": self.blocks(),
            "schedule": self.schedule.to_json(),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "ladder": [rung.to_json() for rung in self.ladder],
            "shares": list(self.shares),
        }
        names = ["blocks" if field.name == "stages" else field.name for field in fields(self)]
        if len(self.shares) == 1:
            names.remove("shares")
        return {"format": FORMAT, **{name: written.get(name, getattr(self, name)) for name in names}}

    @staticmethod
    def read(file: Path) -> Plan | None:
        """What is recorded there; None if there is no file. Raises CorruptCheckpoint."""
        try:
            return Plan.from_json(read_json(file, PLAN_LIMIT_BYTES)) if file.is_file() else None
        except (OSError, ValueError, RecursionError) as error:
            why = shorten(error)
            raise CorruptCheckpoint(f"{file} holds no plan ({why}): restore it, or start another run") from None

    @staticmethod
    def from_json(values: object) -> Plan:
        """The inverse of `to_json`. Raises ValueError on anything else, an unknown `format` included."""
        if not isinstance(values, dict):
            raise ValueError(f"a plan is a dictionary, not {type(values).__name__}")
        if values.get("format") != FORMAT:
            raise ValueError(f"this plan has format {values.get('format')!r}, this version reads {FORMAT}")
        known = {"format", "blocks"} | {field.name for field in fields(Plan)} - {"stages"} - _LATER
        if odd := set(values) - _LATER ^ known:
            raise ValueError(f"a plan has the keys {sorted(known)}; different here: {sorted(odd)}")
        if not isinstance(shares := values.get("shares", []), list):
            raise ValueError("a plan's shares are a list")
        if not isinstance(blocks := values["blocks"], dict):
            raise ValueError("a plan's blocks are stages with their policies")
        try:
            changed = {
                "predicted": Predicted(**values["predicted"]),
                "stages": tuple(blocks),
                "schedule": Schedule.from_json(values["schedule"]),
                "candidates": tuple(Candidate(**candidate) for candidate in values["candidates"]),
                "ladder": tuple(Plan.from_json(rung) for rung in values["ladder"]),
                "shares": tuple(shares),
            }
            same = {name: value for name, value in values.items() if name not in ("format", "blocks")}
            plan = Plan(**{**same, **changed})
        except TypeError as error:
            raise ValueError(f"this is no plan: {error}") from None
        if plan.blocks() != {name: _in_order(policy) for name, policy in blocks.items()}:
            raise ValueError("the plan's blocks and its schedule say different things: was it edited by hand?")
        return plan


def _in_order(policy: object) -> object:
    """A stage's policy in words, with names in today's order."""
    words = policy if isinstance(policy, str) else ""
    before, kind, names = words.rpartition("KEEP{")
    kept, brace, after = names.partition("}")
    return f"{before}{kind}{','.join(sorted(kept.split(',')))}{brace}{after}" if kind and brace else policy


# What came later: plans from before it ran on native kernels, and none on an emulated card.
_LATER = {"shares", "batch_norm", "tf32", "allocator_bytes"}
