"""What a step is executed with, `auto` resolved: device, precision and memory format, each with its reason, as measured
on the device or by what is known of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import nn

from lowmem.calibrate.calibration import Mode
from lowmem.calibrate.calibrator import Calibrator
from lowmem.config.cards import has_tensor_cores
from lowmem.config.schema import Config, TrainConfig
from lowmem.config.settings import Settings
from lowmem.core.errors import PreflightError
from lowmem.models import skeleton
from lowmem.models.resnet import ResNet, check_memory_format, is_safe
from lowmem.remat.libraries import Numerics

# Mixed precision changes the arithmetic: it must be worth it by more than the measurement's noise.
_WORTH_IT = 1.05


def wants_plan(config: Config) -> bool:
    """Whether there is anything to fit into: a budget, a card, or a CUDA device that has what it has."""
    memory = config.memory
    return memory.vram is not None or memory.card is not None or config.train.device == "cuda"


def resolve_execution(settings: Settings, *, planned: bool = False) -> Settings:
    """The settings with every `auto` of the train section replaced; the reason stands where the source stood.

    `planned`: a plan will decide the precision and, where the device is measured, the memory format.

    Raises PreflightError if CUDA is asked for and there is none.
    """
    train = settings.config.train
    device, why_device = _device(train)
    chosen: dict[str, tuple[str, str]] = {}
    if train.device == "auto":
        chosen["train.device"] = (device, f"auto: {why_device}")
    if train.precision == "auto" and not planned:
        precision, why = _precision(device)
        chosen["train.precision"] = (precision, f"auto: {why}")
    if train.memory_format == "auto" and not (planned and calibrates(settings.config, device)):
        memory_format, why = _memory_format(device, settings.config)
        chosen["train.memory_format"] = (memory_format, f"auto: {why}")
    for key, (value, why) in chosen.items():
        settings = settings.replace({key: value}, why)
    return settings


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
    return "library" if config.train.device == "cuda" or config.memory.card is not None else "native"


def require_device(device: str) -> None:
    """Raises PreflightError unless the device is there."""
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        raise PreflightError(
            f"device cuda was asked for, but torch {torch.__version__} (built for {built}) sees no CUDA device: "
            "check the driver with nvidia-smi, or use --device cpu"
        )


def _device(train: TrainConfig) -> tuple[str, str]:
    if train.device != "auto":
        require_device(train.device)
        return train.device, "asked for"
    return ("cuda", "a CUDA device is there") if torch.cuda.is_available() else ("cpu", "no CUDA device")


def _tensor_cores() -> bool:
    """Of the current CUDA device."""
    return has_tensor_cores(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _precision(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "fp32", "the CPU trains exactly unless asked otherwise"
    if _tensor_cores():
        return "amp", "the card has tensor cores"
    return "fp32", "the card has no tensor cores, halves would only save memory"


def _memory_format(device: str, config: Config) -> tuple[str, str]:
    if device == "cpu" and not is_safe(_network(config), device, "fp32", "channels-last"):
        return "contiguous", "channels-last is not safe on the CPU in a network that is so thin"
    if device == "cpu":
        return "channels-last", "the faster one on the CPU"
    if _tensor_cores():
        return "channels-last", "the card has tensor cores"
    return "contiguous", "without tensor cores channels-last can be far slower"


def refuse_unsafe(config: Config) -> None:
    """Raises PreflightError for settings under which the library is known to corrupt memory."""
    train = config.train
    check_memory_format(_network(config), train.device, train.precision, train.memory_format)


def _network(config: Config) -> ResNet:
    """Without storage, and with any number of classes: they make no difference here."""
    return skeleton(config.model.arch, config.model.block, width=config.model.width)


# -- before a plan -----------------------------------------------------------------------------------------------------


def precision_order(precision: str, tensor_cores: bool) -> tuple[str, ...]:
    """`auto`: mixed precision first on tensor cores; elsewhere fp32, and mixed only where nothing else fits."""
    if precision != "auto":
        return (precision,)
    return ("amp", "fp32") if tensor_cores else ("fp32", "amp")


@dataclass(frozen=True)
class PrecisionChoice:
    """Precisions in the order they are to be tried, a memory format for each, and why (setting -> words)."""

    precisions: tuple[str, ...]
    formats: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)


def by_kind(config: Config, tensor_cores: bool) -> PrecisionChoice:
    """Without measurements: mixed precision and channels-last pay with tensor cores."""
    precisions = precision_order(config.train.precision, tensor_cores)
    layout = config.train.memory_format
    if layout == "auto":
        layout = "channels-last" if tensor_cores else "contiguous"
    return PrecisionChoice(precisions, dict.fromkeys(precisions, layout))


def by_measurement(config: Config, model: nn.Module, calibrator: Calibrator) -> PrecisionChoice:
    """Measured on the device, as far as settings leave it open. Raises PreflightError if what was asked for gives
    values that are not finite.

    On the CPU `auto` stays with fp32, which trains exactly, and takes amp only where nothing else fits.
    """
    train, device = config.train, calibrator.device
    asked, layout = train.precision, train.memory_format
    precisions = ("fp32", "amp") if asked == "auto" else (asked,)
    layouts = ("contiguous", "channels-last") if layout == "auto" else (layout,)
    if asked == "fp32" and layout != "auto":
        return PrecisionChoice(precisions, {asked: layout})  # nothing to choose, and nothing to doubt
    batch = train.micro_batch or train.batch
    pairs = [pair for pair in product(precisions, layouts) if is_safe(model, device, *pair)]
    measured = calibrator.modes(model, (batch, 3, 32, 32), pairs)
    if len(measured) < len(pairs):  # a block alone did not fit: nothing to compare by
        facts = calibrator.facts
        return by_kind(config, facts is not None and has_tensor_cores(facts.name, facts.capability))
    best = {precision: _best(precision, measured) for precision in precisions}
    usable = [precision for precision in precisions if best[precision] is not None]
    if not usable:
        raise PreflightError(
            f"{' and '.join(precisions)} give values that are not finite on this device: try --precision "
            f"{'amp' if asked == 'fp32' else 'fp32'}"
        )
    chosen = {precision: found for precision, found in best.items() if found is not None}
    reasons = _format_reasons(chosen, measured) if layout == "auto" else {}
    order = tuple(usable)
    if asked == "auto":
        order, reasons["train.precision"] = _order(chosen, device)
    return PrecisionChoice(order, {precision: layout for precision, (layout, _) in chosen.items()}, reasons)


def _best(precision: str, measured: Mapping[tuple[str, str], Mode]) -> tuple[str, float] | None:
    """The fastest memory format whose results are finite, and its seconds."""
    finite = [(mode.seconds, layout) for (one, layout), mode in measured.items() if one == precision and mode.finite]
    return (min(finite)[1], min(finite)[0]) if finite else None


def _order(chosen: Mapping[str, tuple[str, float]], device: str) -> tuple[tuple[str, ...], str]:
    if "amp" not in chosen:
        return ("fp32",), "auto: mixed precision gives values that are not finite on this device"
    if "fp32" not in chosen:
        return ("amp",), "auto: fp32 gives values that are not finite on this device"
    factor = chosen["fp32"][1] / chosen["amp"][1]
    said = f"mixed precision is measured at {factor:.2f} times the speed of fp32"
    if device == "cpu":
        return ("fp32", "amp"), f"auto: the CPU trains exactly unless asked otherwise ({said})"
    if factor >= _WORTH_IT:
        return ("amp", "fp32"), f"auto: {said}"
    return ("fp32", "amp"), f"auto: {said}: not worth it unless only that fits"


def _format_reasons(
    chosen: Mapping[str, tuple[str, float]], measured: Mapping[tuple[str, str], Mode]
) -> dict[str, str]:
    """Per precision, joined: the plan decides later which of them it takes."""
    words = []
    for precision, (layout, seconds) in chosen.items():
        others = [mode.seconds for (one, other), mode in measured.items() if one == precision and other != layout]
        if others:
            words.append(f"{layout} is measured at {others[0] / seconds:.2f} times the speed in {precision}")
    return {"train.memory_format": f"auto: {'; '.join(words)}"} if words else {}
