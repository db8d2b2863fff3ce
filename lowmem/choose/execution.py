"""From a run's settings: what a step is executed with, `auto` resolved (device, precision and memory format, each with
its reason, as measured on the device or by what is known of its kind), and what is to be planned for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import nn

from lowmem.calibrate.calibrator import Calibration, Calibrator, Progress
from lowmem.calibrate.device import CONTEXT, ask_device, cpu_identity, describe_card
from lowmem.choose.host import host_terms_of
from lowmem.choose.request import (
    ASSUMED_CONTEXT_BYTES,
    REFERENCE_CARD,
    Budget,
    Request,
    card_rates,
    of_card,
    of_device,
    with_communicators,
)
from lowmem.config.cards import Card, find_card, has_tensor_cores, load_card, refuse_bf16
from lowmem.config.processes import for_process
from lowmem.config.schema import Config, TrainConfig
from lowmem.config.settings import Settings
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.phases import Phase, untold
from lowmem.core.reading import shorten, user_cache_folder
from lowmem.core.units import format_size
from lowmem.data.pictures import held_bytes
from lowmem.measure.cuda import torch_build
from lowmem.measure.nvml import read_driver
from lowmem.measure.usable import CardFacts, Obstacle
from lowmem.models import check_network, network_of
from lowmem.models.resnet import check_memory_format, is_safe
from lowmem.remat.libraries import Numerics, convolutions_in_tf32, prepare_libraries, workspace_cap_bytes
from lowmem.simulate import StepShape

_TENSORS_ALONE = "the budget for tensors alone"
# Begins the recorded reason where `auto` takes the CPU in spite of a card.
_OBSTRUCTED = "the card is not used, "
# Mixed precision changes the arithmetic: it must be worth it by more than the measurement's noise.
_WORTH_IT = 1.05


def wants_plan(config: Config) -> bool:
    """Whether there is anything to fit into: a budget, a card, or a CUDA device that has what it has."""
    return config.memory.tensors is not None or for_card(config)


def for_card(config: Config) -> bool:
    """Whether the memory that the step must fit into is a card's: one that is named, the device at hand, or one like
    the reference card."""
    memory = config.memory
    return memory.vram is not None or memory.card is not None or config.train.device == "cuda"


def resolve_execution(settings: Settings, *, planned: bool = False) -> Settings:
    """The settings with every `auto` of the train section replaced; the reason stands where the source stood.
    `planned`: a plan will decide the precision and, where the device is measured, the memory format. Raises
    PreflightError if CUDA is asked for and there is none."""
    config, train = settings.config, settings.config.train
    device = train.device
    if device == "auto":
        obstacle = card_obstacle()
        device, why = "cpu", f"{_OBSTRUCTED}{obstacle}" if obstacle else "no CUDA device"
        if obstacle is None and torch.cuda.is_available():
            device, why = "cuda", "a CUDA device is there"
        settings = settings.replace({"train.device": device}, f"auto: {why}")
    require_device(device)
    left = {"precision": planned, "memory_format": planned and calibrates(config, device)}
    wanted = [name for name, to_plan in left.items() if getattr(train, name) == "auto" and not to_plan]
    unplanned = _unplanned(config, device) if wanted else {}
    for name in wanted:
        value, why = unplanned[name]
        settings = settings.replace({f"train.{name}": value}, f"auto: {why}")
    return settings


def _unplanned(config: Config, device: str) -> dict[str, tuple[str, str]]:
    """Precision and memory format where no plan decides, and why."""
    if device == "cpu":
        safe = is_safe(network_of(config), device, "fp32", "channels-last")
        layout = "channels-last", "the faster one on the CPU"
        if not safe:
            layout = "contiguous", "channels-last is not safe on the CPU in a network that is so thin"
        return {"precision": ("fp32", "the CPU trains exactly unless asked otherwise"), "memory_format": layout}
    if has_tensor_cores(torch.cuda.get_device_name(), torch.cuda.get_device_capability()):
        why = "the card has tensor cores"
        return {"precision": ("amp", why), "memory_format": ("channels-last", why)}
    return {
        "precision": ("fp32", "the card has no tensor cores, halves would only save memory"),
        "memory_format": ("contiguous", "without tensor cores channels-last can be far slower"),
    }


def calibrates(config: Config, device: str) -> bool:
    """Whether predictions are to follow what is measured on the device: not for another card than the one at hand."""
    if config.memory.card is not None or config.memory.calibrate == "never":
        return False
    return device == "cuda" or config.memory.calibrate == "always"


def numerics_of(train: TrainConfig) -> Numerics:
    """Which kernels a run with these settings lets CUDA's libraries take."""
    return Numerics(train.deterministic, train.tf32)


def batch_norm_of(config: Config) -> Literal["library", "native"]:
    """The kernels of batch norm in a planned step, `auto` resolved. On the CPU both have the same bits, and the native
    ones work in place."""
    chosen = config.train.batch_norm
    if chosen != "auto":
        return chosen
    return "library" if for_card(config) else "native"


def card_obstacle() -> Obstacle | None:
    """What keeps torch from using a card of this machine, as `doctor` finds it; None too where there is no card."""
    there = torch.cuda.is_available()
    facts = CardFacts(
        system=platform.system(),
        environment=os.environ,
        torch_works=True,
        cuda_available=there,
        driver=read_driver(),
        **torch_build(),
    )
    found = facts.obstacles()
    return found.get("build") if there else next(iter(found.values()), None)


def why_on_cpu(settings: Settings) -> str | None:
    """What is to be said where `auto` came to the CPU although there is a card, or at least a driver."""
    source = settings.sources["train.device"]
    if not source.startswith(f"auto: {_OBSTRUCTED}"):
        return None
    return f"on the CPU: {source.removeprefix(f'auto: {_OBSTRUCTED}')} (`lowmem doctor` says more)"


def require_device(device: str) -> None:
    """Raises PreflightError unless the device is there, and torch can use it."""
    if device != "cuda":
        return
    if (obstacle := card_obstacle()) is not None:
        way_out = "use --device cpu" if obstacle.mend is None else f"{obstacle.mend}, or use --device cpu"
        raise PreflightError(f"device cuda was asked for, but {obstacle.why}: {way_out}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        raise PreflightError(
            f"device cuda was asked for, but torch {torch.__version__} (built for {built}) sees no CUDA device: "
            "check the driver with nvidia-smi, or use --device cpu"
        )


def refuse_unsafe(config: Config) -> None:
    """Raises PreflightError for settings under which the library is known to corrupt memory, and for bf16 on a card at
    hand that has none."""
    train = config.train
    if train.device == "cuda" and torch.cuda.is_available():
        refuse_bf16(train.precision, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    check_memory_format(network_of(config), train.device, train.precision, train.memory_format)


def refuse_size(config: Config) -> None:
    """Raises UsageError unless the network takes pictures of the size that is asked for; of other networks than the
    family's `lowmem.models.check_network` says it."""
    size, model = config.data.image_size, config.model
    if size == SOURCE_SIDE or model.spec is not None:
        return
    try:
        with torch.no_grad():
            network_of(config)(torch.empty(2, *config.data.image_shape, device="meta"))
    except RuntimeError as error:
        raise UsageError(
            f"{model.arch} takes no pictures of {size}x{size} ({shorten(error, 80)}): give another --image-size, like "
            f"{SOURCE_SIDE}, or another network"
        ) from None


# -- before a plan -----------------------------------------------------------------------------------------------------


def by_kind(precision: str, memory_format: str, tensor_cores: bool) -> dict[str, str]:
    """Precisions in the order they are to be tried, with a memory format for each, `auto` resolved without
    measurements: with tensor cores mixed precision and channels-last pay, elsewhere only mixed for want of memory."""
    if memory_format == "auto":
        memory_format = "channels-last" if tensor_cores else "contiguous"
    order = ("amp", "fp32") if tensor_cores else ("fp32", "amp")
    return dict.fromkeys(order if precision == "auto" else (precision,), memory_format)


def by_measurement(config: Config, model: nn.Module, calibrator: Calibrator) -> tuple[dict[str, str], dict[str, str]]:
    """As `by_kind`, by what is measured on the device; and why (setting -> words). On the CPU `auto` stays with fp32,
    which trains exactly, and takes amp only where nothing else fits. Raises PreflightError if what was asked for gives
    values that are not finite."""
    train, device = config.train, calibrator.device
    asked, layout = train.precision, train.memory_format
    precisions = ("fp32", "amp") if asked == "auto" else (asked,)
    layouts = ("contiguous", "channels-last") if layout == "auto" else (layout,)
    if asked == "fp32" and layout != "auto":
        return {asked: layout}, {}  # nothing to choose, and nothing to doubt
    batch = train.micro_batch or train.batch
    step = partial(StepShape, model=model, image_shape=config.data.image_shape, batch=batch, micro_batch=batch)
    pairs = [pair for pair in product(precisions, layouts) if is_safe(model, device, *pair)]
    measured = calibrator.modes([step(precision=one, memory_format=other) for one, other in pairs])
    if len(measured) < len(pairs):  # a block alone did not fit: nothing to compare by
        facts = calibrator.facts
        return by_kind(asked, layout, facts is not None and has_tensor_cores(facts.name, facts.capability)), {}
    best: dict[str, tuple[float, str]] = {}  # the fastest whose results are finite
    words = []
    for precision in precisions:
        of_one = {other: mode for (one, other), mode in measured.items() if one == precision}
        if finite := [(mode.seconds, other) for other, mode in of_one.items() if mode.finite]:
            best[precision] = seconds, chosen = min(finite)
            others = [mode.seconds / seconds for other, mode in of_one.items() if other != chosen]
            words += [f"{chosen} is measured at {times:.2f} times the speed in {precision}" for times in others]
    if not best:
        raise PreflightError(
            f"{' and '.join(precisions)} give values that are not finite on this device: try --precision "
            f"{'amp' if asked == 'fp32' else 'fp32'}"
        )
    # The plan decides later which precision it takes.
    reasons = {"train.memory_format": f"auto: {'; '.join(words)}"} if words else {}
    order = tuple(best)
    if asked == "auto":
        order, why = _order({precision: seconds for precision, (seconds, _) in best.items()}, device)
        reasons["train.precision"] = f"auto: {why}"
    return {precision: best[precision][1] for precision in order}, reasons


def _order(seconds: Mapping[str, float], device: str) -> tuple[tuple[str, ...], str]:
    if "amp" not in seconds:
        return ("fp32",), "mixed precision gives values that are not finite on this device"
    if "fp32" not in seconds:
        return ("amp",), "fp32 gives values that are not finite on this device"
    factor = seconds["fp32"] / seconds["amp"]
    said = f"mixed precision is measured at {factor:.2f} times the speed of fp32"
    if device == "cpu":
        return ("fp32", "amp"), f"the CPU trains exactly unless asked otherwise ({said})"
    if factor >= _WORTH_IT:
        return ("amp", "fp32"), said
    return ("fp32", "amp"), f"{said}: not worth it unless only that fits"


# -- what is to be planned ---------------------------------------------------------------------------------------------


def calibrator_of(
    config: Config, progress: Progress = lambda text: None, phase: Phase = untold, *, fresh: bool = False
) -> Calibrator | None:
    """What measures the device at hand, if predictions are to follow it. `fresh`: measure everything again. Raises
    PreflightError for a CUDA device that does not answer."""
    device = config.train.device
    if not calibrates(config, device) or (device == "cuda" and not torch.cuda.is_available()):
        return None
    numerics = numerics_of(config.train)
    facts, folder = None, user_cache_folder() / "calibration"
    if device == "cuda":
        prepare_libraries(numerics)
        facts = ask_device(numerics)
        calibration = Calibration(facts.identity(numerics), folder)
        if facts.context_bytes is None:  # what could not be told now was perhaps told before
            facts = replace(facts, context_bytes=calibration.size_bytes(CONTEXT))
        else:
            calibration.put("bytes", CONTEXT, facts.context_bytes)
            calibration.save()
    else:
        calibration = Calibration(cpu_identity(), folder)
    if fresh:
        calibration.figures.clear()
    return Calibrator(device, calibration, progress, facts=facts, numerics=numerics, phase=phase)


def budget_of(
    config: Config, train_pictures: int = 0, calibrator: Calibrator | None = None, *, joint: bool = False
) -> tuple[Budget, Card | None]:
    """The budget for the step's tensors and, where it is known, the card whose rates predict time: the shipped profile
    of a device, else one made of what its driver tells and `calibrator` measures. A card that is neither named nor
    there is like the reference card. `joint`: of one process among several that train the run. Raises UsageError for an
    unknown card or where there is nothing to fit into, Infeasible for too small a card, PreflightError if CUDA does not
    answer."""
    config, tensor_bytes = for_process(config, 0, 1), config.memory.tensors
    if tensor_bytes is not None and not for_card(config):
        return Budget(total_bytes=tensor_bytes, source=_TENSORS_ALONE), None
    budget, card = _card_budget(config, train_pictures, calibrator)
    if joint:  # batch norm over all of them has a communicator of its own
        budget = with_communicators(budget, 1 + config.train.sync_bn)
    if tensor_bytes is None:
        return budget, card
    if tensor_bytes <= budget.tensor_bytes:
        return budget.for_tensors(tensor_bytes, _TENSORS_ALONE), card
    source = f"{budget.source}, which leaves less than the {format_size(tensor_bytes)} asked for"
    return replace(budget, source=source), card


def _card_budget(config: Config, train_pictures: int, calibrator: Calibrator | None) -> tuple[Budget, Card | None]:
    memory, numerics = config.memory, numerics_of(config.train)
    pictures_bytes, deterministic = held_bytes(config.data, train_pictures), numerics.deterministic
    if memory.card is not None:
        card = load_card(memory.card)
        platform = None if memory.platform == "auto" else memory.platform.replace("-", "_")
        budget = of_card(card, memory.vram, pictures_bytes, platform, deterministic=deterministic)
        if config.train.device == "cuda" and torch.cuda.is_available():
            there = torch.cuda.get_device_properties("cuda").total_memory
            budget = replace(budget, emulated=budget.total_bytes < there)
        return budget, card
    if config.train.device == "cuda" and torch.cuda.is_available():
        prepare_libraries(numerics)
        facts = (calibrator.facts if calibrator is not None else None) or ask_device(numerics)
        # Measured workspaces are a part of the simulated step.
        workspace = workspace_cap_bytes() if calibrator is None else 0
        budget = of_device(facts, memory.vram, pictures_bytes, workspace_bytes=workspace, deterministic=deterministic)
        known = find_card(facts.name, facts.total_bytes)
        if known is None and calibrator is not None and (rates := calibrator.rates()) is not None:
            known = describe_card(facts, rates, ASSUMED_CONTEXT_BYTES)
        return budget, known
    if memory.vram is None:
        raise UsageError("there is nothing to fit into: give --vram, like --vram 6G, or --card, like --card gtx1060-6g")
    card = load_card(REFERENCE_CARD)
    budget = of_card(card, memory.vram, pictures_bytes, deterministic=deterministic)
    return replace(budget, source=f"a card like the {card.name}, as no --card is given"), card


def request_of(
    config: Config,
    num_classes: int = 10,
    train_pictures: int = 0,
    calibrator: Calibrator | None = None,
    *,
    processes: int = 1,
    on_paper: bool = True,
) -> Request:
    """What `choose` needs to know of a run. `processes`: that train it, of which this is one. `on_paper`: it is not
    trained here. Raises as `budget_of` does, UsageError for settings at odds, PreflightError for those that
    `refuse_unsafe` refuses and for more host memory than is free."""
    _check_micro_batch(config)
    refuse_size(config)
    if config.memory.card is None:  # else the step is another machine's
        refuse_unsafe(config)
    if config.memory.platform != "auto" and config.memory.card is None:
        raise UsageError("memory.platform says what machine a --card is in: give the card, or leave it out")
    budget, card = budget_of(config, train_pictures, calibrator, joint=processes > 1)
    if card is not None and config.memory.card is not None:
        refuse_bf16(config.train.precision, card.name, card.capability_pair)
    check_network(config.model, num_classes, config.data.image_shape)
    model = network_of(config, num_classes)
    if calibrator is not None:
        modes, reasons = by_measurement(config, model, calibrator)
    else:
        modes = by_kind(config.train.precision, config.train.memory_format, card is not None and card.tensor_cores)
        reasons = {}
    rated, measured = card or load_card(REFERENCE_CARD), calibrator is not None and calibrator.device == "cuda"
    return Request(
        model=model,
        batch=config.train.batch,
        image_shape=config.data.image_shape,
        budget=budget,
        rates=card_rates(rated),
        rates_from=f"by the datasheet of a {rated.name}",
        modes=modes,
        reasons=reasons,
        calibrator=calibrator,
        micro_batch=config.train.micro_batch,
        allow_accumulation=config.memory.allow_accumulation,
        optim=config.optim,
        joint=processes > 1,
        sync_bn=config.train.sync_bn,
        label_smoothing=config.train.label_smoothing > 0,
        mixup=config.data.mixup > 0,
        batch_norm=batch_norm_of(config),
        tf32=_tf32(config, card),
        host=host_terms_of(config, rated, processes, on_paper=on_paper, measured=measured),
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
