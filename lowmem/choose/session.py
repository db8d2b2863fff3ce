"""From a run's settings to what is to be planned: which budget, which rates."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowmem.calibrate.calibration import Calibration
from lowmem.calibrate.calibrator import Calibrator, Progress
from lowmem.calibrate.card_probe import describe_card
from lowmem.calibrate.device import CONTEXT, DeviceFacts, ask_device, cpu_identity
from lowmem.choose.budget import (
    ASSUMED_CONTEXT_BYTES,
    Budget,
    of_card,
    of_device,
    tensors_only,
    with_communicators,
)
from lowmem.choose.execution import batch_norm_of, calibrates, numerics_of, refuse_unsafe
from lowmem.choose.planning import REFERENCE_CARD
from lowmem.choose.precision_choice import by_kind, by_measurement
from lowmem.choose.request import Request, card_rates
from lowmem.config.cards import Card, Platform, find_card, load_card
from lowmem.config.schema import Config, for_process
from lowmem.core.errors import UsageError
from lowmem.models import skeleton
from lowmem.remat.libraries import (
    blas_workspace_bytes,
    convolutions_in_tf32,
    prepare_libraries,
    workspace_cap_bytes,
)

_PICTURE_BYTES = 3 * 32 * 32  # uint8


def wants_plan(config: Config) -> bool:
    """Whether there is anything to fit into: a budget, a card, or a CUDA device that has what it has."""
    memory = config.memory
    return memory.vram is not None or memory.card is not None or config.train.device == "cuda"


def budget_of(
    config: Config, train_pictures: int = 0, calibrator: Calibrator | None = None
) -> tuple[Budget, Card | None]:
    """The budget for the step's tensors and, where it is known, the card whose rates predict time. `calibrator`: of the
    device at hand, if predictions are to follow what is measured on it.

    Raises UsageError for an unknown card or where there is nothing to fit into, Infeasible for too small a card,
    PreflightError for a CUDA device that does not answer.
    """
    config = for_process(config, 0, 1)
    memory = config.memory
    pictures_bytes = train_pictures * _PICTURE_BYTES
    if memory.card is not None:
        card = load_card(memory.card)
        deterministic = config.train.deterministic
        return of_card(card, memory.vram, pictures_bytes, _platform(config), deterministic=deterministic), card
    if config.train.device == "cuda" and torch.cuda.is_available():
        numerics = numerics_of(config.train)
        prepare_libraries(numerics)
        facts = (calibrator.facts if calibrator is not None else None) or ask_device(numerics)
        blas, measured = facts.blas_workspace_bytes, facts.blas_workspace_bytes is not None
        if blas is None:
            blas = blas_workspace_bytes(facts.capability, deterministic=numerics.deterministic)
        budget = of_device(
            facts.free_bytes,
            facts.total_bytes,
            memory.vram,
            name=facts.name,
            pictures_bytes=pictures_bytes,
            context_bytes=facts.context_bytes,
            # Measured workspaces are a part of the simulated step.
            workspace_bytes=workspace_cap_bytes() if calibrator is None else 0,
            blas_bytes=blas,
            blas_measured=measured,
        )
        return budget, card_of(facts, calibrator)
    if memory.vram is None:
        raise UsageError("there is nothing to fit into: give --vram, like --vram 6G, or --card, like --card gtx1060-6g")
    return tensors_only(memory.vram), None


def card_of(facts: DeviceFacts, calibrator: Calibrator | None) -> Card | None:
    """The shipped profile of a device; else one made of what its driver tells and what is measured; None without."""
    known = find_card(facts.name, facts.total_bytes)
    rates = None if known is not None or calibrator is None else calibrator.rates()
    if rates is None:
        return known
    return describe_card(
        facts.name,
        memory_bytes=facts.total_bytes,
        capability=facts.capability,
        context_bytes=ASSUMED_CONTEXT_BYTES if facts.context_bytes is None else facts.context_bytes,
        rates=rates,
        link=facts.link,
    )


def _platform(config: Config) -> Platform | None:
    chosen = config.memory.platform
    if chosen == "auto":
        return None
    return "linux_display" if chosen == "linux-display" else chosen


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
    calibration.put_size(CONTEXT, facts.context_bytes)
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
