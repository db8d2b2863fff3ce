"""What is to be planned and what comes of it: where a card's memory goes before the first tensor of the step, in named
terms of bytes; a step, and the memory, precisions and rates it is planned for; a plan with what it was chosen from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal, TypeVar

from torch import nn

from lowmem.calibrate.calibrator import Calibrator
from lowmem.calibrate.device import DeviceFacts
from lowmem.config.cards import Card
from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import Infeasible
from lowmem.core.phases import Phase, untold
from lowmem.core.units import KIB, MIB
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.evaluate import Solution
from lowmem.plan.hosting import HostTerms
from lowmem.plan.record import Plan, Predicted
from lowmem.plan.solver import Solver
from lowmem.remat.libraries import ASSUMED_WORKSPACE_BYTES, blas_workspace_bytes
from lowmem.simulate import Simulated, StepShape, StepSimulator
from lowmem.simulate.trace import Estimate

_T = TypeVar("_T")
# Assumed where nothing was measured, and printed as assumed with every plan; the margin is for whatever no model
# foresees.
ASSUMED_CONTEXT_BYTES = 400 * MIB
# Of one of NCCL's communicators, with the few channels that PCIe can use (`lowmem.distributed.group` holds it to them):
# about 10 MiB for each channel and connection, of which a ring has two and a tree up to three (NVIDIA/nccl#986, #1685).
ASSUMED_COMMUNICATOR_BYTES = 200 * MIB
MARGIN_SHARE = 0.02
# Where no card is named nor there: its rates predict time, and its terms say what `--vram` leaves for tensors. The card
# that this project is aimed at.
REFERENCE_CARD = "gtx1060-6g"
INSIDE = "planned inside"  # how candidates begin that say what runs as a whole


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`total_bytes` = the other terms + `tensor_bytes`; all other terms are 0 where the tensors of the step are bounded
    and nothing else. Raises Infeasible where nothing is left."""

    total_bytes: int
    others_bytes: int = 0  # the driver, the desktop, other processes
    context_bytes: int = 0
    context_measured: bool = False
    workspace_bytes: int = 0  # room for the convolution library's; 0 where that is measured, and a part of the step
    blas_workspace_bytes: int = 0  # cuBLAS's and cublasLt's
    blas_workspace_measured: bool = False
    communicator_bytes: int = 0  # of one process among several, on CUDA
    pictures_bytes: int = 0  # the data set, where it is held on the card
    margin_bytes: int = 0
    source: str = "memory budget"  # of the total, in words
    emulated: bool = False  # a larger card made to behave like one of `total_bytes`
    flag: str | None = "--tensors"  # what gives more; None: the card has no more
    most_bytes: int | None = None  # that can be given by `flag`; None: without a limit

    def __post_init__(self) -> None:
        if self.tensor_bytes <= 0:
            raise Infeasible(
                self.total_bytes,
                self.total_bytes - self.tensor_bytes + 1,
                "the card's own needs before any tensor: others, context, workspace, margin",
                self.more(1, "and on top of it what the step's tensors take"),
                "before any tensor of a step the card itself takes {least}, and it has {budget}",
            )

    def more(self, tensor_bytes: int, then: str = "or more") -> str:
        """How to get so much for tensors, in words; `others_bytes` and `margin_bytes` grow with the card."""
        of_tensors = self.flag == "--tensors"
        share = 0.0 if of_tensors else (self.others_bytes + self.margin_bytes) / self.total_bytes
        fixed = 0 if of_tensors else self.process_bytes + self.pictures_bytes
        if self.flag is not None and share < 1:
            unit, letter = (MIB, "M") if tensor_bytes >= MIB or fixed else (KIB, "K")
            size = ceil((tensor_bytes + fixed) / (1 - share) / unit)
            if self.most_bytes is None or size * unit <= self.most_bytes:
                return f"give {self.flag} {size}{letter} {then}"
        return "free what others use on the card" if self.at_hand else "give a larger --card"

    def for_tensors(self, tensor_bytes: int, source: str) -> Budget:
        """On the same card so much for a step's tensors, whatever others use; the allocator of the one at hand is
        capped."""
        return replace(
            self,
            total_bytes=tensor_bytes + self.process_bytes + self.pictures_bytes,
            others_bytes=0,
            margin_bytes=0,
            source=source,
            emulated=self.at_hand,
            flag="--tensors",
            most_bytes=self.tensor_bytes if self.on_card else None,
        )

    @property
    def tensor_bytes(self) -> int:
        """What is left for parameters, what the optimizer keeps, gradients, activations and temporaries."""
        return self.total_bytes - self.others_bytes - self.process_bytes - self.pictures_bytes - self.margin_bytes

    @property
    def process_bytes(self) -> int:
        """What a process takes beside its tensors: context, workspaces, communicators."""
        return self.context_bytes + self.workspace_bytes + self.blas_workspace_bytes + self.communicator_bytes

    @property
    def allocator_bytes(self) -> int | None:
        """The most that the caching allocator may hold for all to stay on the card: tensors, workspaces, pictures and
        the margin; None where only tensors count. The context and NCCL's communicators are not in it."""
        if not self.on_card:
            return None
        return self.total_bytes - self.others_bytes - self.context_bytes - self.communicator_bytes

    @property
    def at_hand(self) -> bool:
        """Whether it is of the CUDA device at hand, or of a part of it."""
        return self.emulated or self.flag is None

    @property
    def on_card(self) -> bool:
        """Whether the caching allocator's segments count, not just the tensors in them."""
        return self.context_bytes > 0

    def counted_bytes(self, taken: Estimate) -> int:
        """What a step's tensors are charged: on a card the allocator's segments with them."""
        return taken.peak_reserved_bytes if self.on_card else taken.peak_allocated_bytes

    def terms(self) -> list[tuple[str, int]]:
        """(term, bytes) of what is gone before the step's first tensor; terms that are 0 are left out."""
        how = {True: "measured", False: "assumed"}
        named = [
            ("others: driver, desktop, processes", self.others_bytes),
            (f"CUDA context ({how[self.context_measured]})", self.context_bytes),
            ("convolution workspace (at most)", self.workspace_bytes),
            (f"cuBLAS workspace ({how[self.blas_workspace_measured]})", self.blas_workspace_bytes),
            ("NCCL communicators (assumed)", self.communicator_bytes),
            ("training pictures", self.pictures_bytes),
            (f"margin ({MARGIN_SHARE:.0%})", self.margin_bytes),
        ]
        return [row for row in named if row[1]]

    def rows(self) -> list[tuple[str, int]]:
        """(term, bytes) in the order of subtraction: the total, what is gone, what is left."""
        gone = [(name, -size) for name, size in self.terms()]
        return [(self.source, self.total_bytes), *gone, ("for the step's tensors", self.tensor_bytes)]


def with_communicators(budget: Budget, count: int = 1) -> Budget:
    """Of a process that sums gradients with others: on a card NCCL takes its part. Raises Infeasible."""
    return replace(budget, communicator_bytes=count * ASSUMED_COMMUNICATOR_BYTES) if budget.on_card else budget


def of_card(
    card: Card,
    vram_bytes: int | None = None,
    pictures_bytes: int = 0,
    platform: str | None = None,
    *,
    deterministic: bool = True,
) -> Budget:
    """The budget of a card's profile, or of a card like it with another memory. `platform`: see
    `lowmem.config.cards`; None: this machine without a display, as one for training is. `deterministic`: of the run.
    Raises Infeasible."""
    total = card.memory_bytes if vram_bytes is None else vram_bytes
    here = "windows" if sys.platform == "win32" else "linux"
    usable = int(total * getattr(card.usable, platform or here))
    return Budget(
        total_bytes=total,
        others_bytes=total - usable,
        context_bytes=card.context_bytes,
        workspace_bytes=ASSUMED_WORKSPACE_BYTES,
        blas_workspace_bytes=blas_workspace_bytes(card.capability_pair, deterministic=deterministic),
        pictures_bytes=pictures_bytes,
        margin_bytes=int(total * MARGIN_SHARE),
        source=card.name if total == card.memory_bytes else f"{card.name} with another memory",
        flag="--vram",
    )


def of_device(
    facts: DeviceFacts,
    vram_bytes: int | None = None,
    pictures_bytes: int = 0,
    *,
    workspace_bytes: int = ASSUMED_WORKSPACE_BYTES,
    deterministic: bool = True,
) -> Budget:
    """The budget of the CUDA device at hand. Its context exists already: what is free is without it. With less
    `vram_bytes` than the device has the card is emulated: others count as far as they leave less than that.
    `pictures_bytes`: of the data set, which is held on the card. `deterministic`: of the run. Raises Infeasible."""
    total = facts.total_bytes if vram_bytes is None else min(vram_bytes, facts.total_bytes)
    context = ASSUMED_CONTEXT_BYTES if facts.context_bytes is None else facts.context_bytes
    blas = facts.blas_workspace_bytes
    assumed = blas_workspace_bytes(facts.capability, deterministic=deterministic)
    return Budget(
        total_bytes=total,
        others_bytes=max(0, total - facts.free_bytes - context),
        context_bytes=context,
        context_measured=facts.context_bytes is not None,
        workspace_bytes=workspace_bytes,
        blas_workspace_bytes=assumed if blas is None else blas,
        blas_workspace_measured=blas is not None,
        pictures_bytes=pictures_bytes,
        margin_bytes=int(total * MARGIN_SHARE),
        source=facts.name if total == facts.total_bytes else f"emulated card on {facts.name}",
        emulated=total < facts.total_bytes,
        flag="--vram" if total < facts.total_bytes else None,
        most_bytes=facts.free_bytes + context,  # with more than that, all of it is others'
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned. `modes`: candidates in order of preference, a precision with its memory format.
    `calibrator`: the device at hand, whose measured times and workspaces are used; None: seconds come from `rates`
    alone."""

    model: nn.Module
    batch: int
    budget: Budget
    rates: Callable[[str], Rates]
    modes: Mapping[str, str] = field(default_factory=lambda: {"fp32": "contiguous"}, hash=False)
    calibrator: Calibrator | None = None
    micro_batch: int | None = None
    allow_accumulation: bool = True
    settled: bool = False  # a run that has begun: batch, precision and accumulation cannot change
    image_shape: tuple[int, int, int] = (3, 32, 32)
    optim: OptimConfig = field(default_factory=OptimConfig)
    joint: bool = False  # one of several processes that train the run; `batch` is its own share
    sync_bn: bool = False
    label_smoothing: bool = False
    mixup: bool = False
    host: HostTerms | None = None  # of the memory in which tensors may wait; None: they may not
    stages: tuple[str, ...] | None = None  # modules that are the links of the chain; None: as it is traced
    batch_norm: Literal["library", "native"] = "native"
    tf32: bool | None = False  # of convolutions in fp32, on the card that is planned for; None: nobody tells
    rates_from: str = "a card's datasheet"
    reasons: Mapping[str, str] = field(default_factory=dict, hash=False)  # setting -> why it was decided so
    phase: Phase = field(default=untold, repr=False, compare=False)  # hears what goes on
    # What was simulated and chosen already: shared by all requests made from this one for other budgets and batches.
    known: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def shape(self, precision: str, micro_batch: int) -> StepShape:
        return StepShape(
            model=self.model,
            image_shape=self.image_shape,
            batch=self.batch,
            micro_batch=micro_batch,
            precision=precision,
            memory_format=self.modes[precision],
            optim=self.optim,
            library_norm=self.batch_norm == "library",
            joint=self.joint,
            sync_bn=self.sync_bn,
            label_smoothing=self.label_smoothing,
            mixup=self.mixup,
            stages=self.stages,
        )

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        if key not in self.known:
            self.known[key] = make()
        found: _T = self.known[key]
        return found


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan with what it was chosen from: for explaining, drawing, and its ladder. `seconds_from`: where predicted
    seconds come from, in words."""

    plan: Plan
    budget: Budget
    solver: Solver  # of all smaller budgets too
    shape: StepShape
    rates: Rates
    steps: StepSimulator = field(repr=False, compare=False)  # of this shape, under any schedule
    simulated: Simulated
    plain: Simulated
    seconds_from: str
    timed: bool  # seconds were measured on this device

    @property
    def chain(self) -> ChainCost:
        return self.solver.chain

    @property
    def plain_seconds(self) -> float:
        """Of the step under autograd. Measured seconds are of stages, so a step takes their sum; the roofline saw every
        operation of the whole one."""
        if not self.timed:
            return self.plain.seconds
        assert self.chain.plain_seconds is not None
        return self.chain.plain_seconds * self.shape.accumulation + self.chain.outside_seconds

    @property
    def images_per_second(self) -> float:
        """Predicted."""
        seconds = self.plan.predicted.step_seconds
        assert seconds is not None
        return self.plan.batch / seconds

    def predicted(self, solution: Solution, simulated: Simulated) -> Predicted:
        """What a plan of this chain is written down to take."""
        taken, outside, seconds = simulated.estimate, self.chain.outside_seconds, simulated.seconds
        if self.timed:
            seconds = (solution.seconds - outside) * self.shape.accumulation + outside
        else:
            seconds += solution.waiting_seconds * self.shape.accumulation
        device_bytes = taken.peak_reserved_bytes + self.budget.process_bytes
        return Predicted(
            peak_allocated_bytes=taken.peak_allocated_bytes,
            peak_reserved_bytes=taken.peak_reserved_bytes,
            device_bytes=device_bytes if self.budget.on_card else None,
            step_seconds=seconds,
            overhead=seconds / self.plain_seconds - 1,
            extra_flops=simulated.flops - self.plain.flops,
            host_bytes=solution.host_bytes,
            waiting_seconds=solution.waiting_seconds * self.shape.accumulation,
            hidden_share=solution.hidden_share,
        )


def card_rates(card: Card) -> Callable[[str], Rates]:
    """Precision -> attainable rates by the card's datasheet (see `Rates.roofline` for the shares)."""

    def rates(precision: str) -> Rates:
        flops = card.fp32_flops_per_second if precision == "fp32" else card.amp_flops_per_second
        return Rates.roofline(flops, card.bandwidth_bytes_per_second)

    return rates
