"""What is to be planned, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lowmem.calibrate.calibrator import Calibrator
from lowmem.choose.budget import Budget
from lowmem.config.cards import Card
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.record import Plan
from lowmem.simulate import Call, Simulated, StepShape


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned. `precisions` are candidates in order of preference; `formats`: a memory format for those
    that do not take `memory_format`. `calibrator`: the device at hand, whose measured times and workspaces are used;
    None: seconds come from `rates` alone."""

    model: nn.Module
    batch: int
    budget: Budget
    rates: Callable[[str], Rates]
    precisions: tuple[str, ...] = ("fp32",)
    memory_format: str = "contiguous"
    formats: Mapping[str, str] = field(default_factory=dict)
    calibrator: Calibrator | None = None
    micro_batch: int | None = None
    allow_accumulation: bool = True
    settled: bool = False  # a run that has begun: batch, precision and accumulation cannot change
    image_shape: tuple[int, int, int] = (3, 32, 32)
    momentum: bool = True
    joint: bool = False  # one of several processes that train the run; `batch` is its own share
    sync_bn: bool = False
    batch_norm: Literal["library", "native"] = "native"
    tf32: bool | None = False  # of convolutions in fp32, on the card that is planned for; None: nobody tells
    rates_from: str = "a card's datasheet"
    reasons: Mapping[str, str] = field(default_factory=dict)  # setting -> why it was decided so
    # What was simulated already, by shape: shared by all requests made from this one for other budgets and batches.
    known: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def shape(self, precision: str, micro_batch: int) -> StepShape:
        return StepShape(
            model=self.model,
            image_shape=self.image_shape,
            batch=self.batch,
            micro_batch=micro_batch,
            precision=precision,
            memory_format=self.formats.get(precision, self.memory_format),
            momentum=self.momentum,
            library_norm=self.batch_norm == "library",
            joint=self.joint,
            sync_bn=self.sync_bn,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan with what it was chosen from: for explaining, drawing, and its ladder. `seconds_from`: where predicted
    seconds come from, in words. `workspace`: see `lowmem.simulate.Recorder`."""

    plan: Plan
    budget: Budget
    chain: ChainCost
    shape: StepShape
    rates: Rates
    workspace: Callable[[Call], int] | None
    simulated: Simulated
    plain: Simulated
    seconds_from: str
    timed: bool  # seconds were measured on this device
    plain_seconds: float

    @property
    def images_per_second(self) -> float:
        """Predicted."""
        seconds = self.plan.predicted.step_seconds
        assert seconds is not None
        return self.plan.batch / seconds


def card_rates(card: Card) -> Callable[[str], Rates]:
    """Precision -> attainable rates by the card's datasheet (see `Rates.roofline` for the shares)."""

    def rates(precision: str) -> Rates:
        flops = card.amp_flops_per_second if precision == "amp" else card.fp32_flops_per_second
        return Rates.roofline(flops, card.bandwidth_bytes_per_second)

    return rates


def precision_order(precision: str, tensor_cores: bool) -> tuple[str, ...]:
    """`auto`: mixed precision first on tensor cores; elsewhere fp32, and mixed only where nothing else fits."""
    if precision != "auto":
        return (precision,)
    return ("amp", "fp32") if tensor_cores else ("fp32", "amp")
