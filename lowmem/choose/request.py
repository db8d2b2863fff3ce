"""What is to be planned, from a run's settings, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from lowmem.calibrate.calibration import Calibration
from lowmem.calibrate.calibrator import Calibrator, Progress
from lowmem.calibrate.device import CONTEXT, DeviceFacts, ask_device, cpu_identity
from lowmem.choose.budget import Budget, budget_of, with_communicators
from lowmem.choose.execution import batch_norm_of, by_kind, by_measurement, calibrates, numerics_of, refuse_unsafe
from lowmem.config.cards import Card, load_card
from lowmem.config.schema import Config
from lowmem.core.errors import UsageError
from lowmem.models import skeleton
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.record import Plan
from lowmem.plan.solver import Solver
from lowmem.remat.libraries import convolutions_in_tf32, prepare_libraries
from lowmem.simulate import Call, Simulated, StepShape

# The rates that time is predicted with where no card is named: the card this project is aimed at.
REFERENCE_CARD = "gtx1060-6g"


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
    solver: Solver  # of all smaller budgets too
    shape: StepShape
    rates: Rates
    workspace: Callable[[Call], int] | None
    simulated: Simulated
    plain: Simulated
    seconds_from: str
    timed: bool  # seconds were measured on this device
    plain_seconds: float

    @property
    def chain(self) -> ChainCost:
        return self.solver.chain

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


def calibrator_of(config: Config, progress: Progress = lambda text: None, *, fresh: bool = False) -> Calibrator | None:
    """What measures the device at hand, if predictions are to follow it. `fresh`: measure everything again.

    Raises PreflightError for a CUDA device that does not answer."""
    device = config.train.device
    if not calibrates(config, device) or (device == "cuda" and not torch.cuda.is_available()):
        return None
    numerics = numerics_of(config.train)
    if device == "cuda":
        prepare_libraries(numerics)
        facts = ask_device(numerics)
        calibration = Calibration(facts.identity(numerics), Calibration.usual_folder())
        facts = _with_context(facts, calibration)
    else:
        facts, calibration = None, Calibration(cpu_identity(), Calibration.usual_folder())
    if fresh:
        calibration.clear()
    return Calibrator(device, calibration, progress, facts=facts, numerics=numerics)


def _with_context(facts: DeviceFacts, calibration: Calibration) -> DeviceFacts:
    """What could not be told now was perhaps told before."""
    if facts.context_bytes is None:
        return replace(facts, context_bytes=calibration.size_bytes(CONTEXT))
    calibration.put("bytes", CONTEXT, facts.context_bytes)
    calibration.save()
    return facts


def request_of(
    config: Config,
    num_classes: int = 10,
    train_pictures: int = 0,
    calibrator: Calibrator | None = None,
    *,
    joint: bool = False,
) -> Request:
    """What `choose` needs to know of a run. `joint`: of one process among several that train it. Raises as `budget_of`
    does, UsageError for settings at odds, PreflightError for those that `refuse_unsafe` refuses."""
    _check_micro_batch(config)
    if config.memory.card is None:  # else the step is another machine's
        refuse_unsafe(config)
    if config.memory.platform != "auto" and config.memory.card is None:
        raise UsageError("memory.platform says what machine a --card is in: give the card, or leave it out")
    budget, card = budget_of(config, train_pictures, calibrator)
    if joint:  # batch norm over all of them has a communicator of its own
        budget = with_communicators(budget, 1 + config.train.sync_bn)
    spec = config.model
    model = skeleton(spec.arch, spec.block, width=spec.width, num_classes=num_classes)
    if calibrator is not None:
        modes = by_measurement(config, model, calibrator)
    else:
        modes = by_kind(config, card is not None and card.tensor_cores)
    rated = card or load_card(REFERENCE_CARD)
    return Request(
        model=model,
        batch=config.train.batch,
        budget=budget,
        rates=card_rates(rated),
        rates_from=f"by the datasheet of a {rated.name}",
        precisions=modes.precisions,
        formats=modes.formats,
        reasons=modes.reasons,
        calibrator=calibrator,
        micro_batch=config.train.micro_batch,
        allow_accumulation=config.memory.allow_accumulation,
        momentum=config.optim.momentum > 0,
        joint=joint,
        sync_bn=config.train.sync_bn,
        batch_norm=batch_norm_of(config),
        tf32=_tf32(config, card),
    )


def _tf32(config: Config, card: Card | None) -> bool | None:
    if card is None:  # the processor, or a card that is neither shipped nor measured
        return None if config.train.device == "cuda" and config.train.tf32 != "never" else False
    return convolutions_in_tf32(card.capability_pair, config.train.tf32)


def _check_micro_batch(config: Config) -> None:
    micro_batch = config.train.micro_batch
    if micro_batch is not None and config.memory.auto_batch:
        raise UsageError("--batch auto chooses a batch that fits in one piece: leave --micro-batch out")
    if micro_batch is not None and micro_batch < config.train.batch and not config.memory.allow_accumulation:
        raise UsageError(
            f"--micro-batch {micro_batch} accumulates up to the batch of {config.train.batch}, and "
            "memory.allow_accumulation=false forbids it: leave one of them out"
        )
