"""Which precision and memory format `auto` means on a device: as measured there, or by what is known of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from torch import nn

from lowmem.calibrate.calibration import Mode
from lowmem.calibrate.calibrator import Calibrator
from lowmem.choose.request import precision_order
from lowmem.config.cards import has_tensor_cores
from lowmem.config.schema import Config
from lowmem.core.errors import PreflightError
from lowmem.models.memory_format import is_safe

# Mixed precision changes the arithmetic: it must be worth it by more than the measurement's noise.
_WORTH_IT = 1.05


@dataclass(frozen=True)
class Modes:
    """Precisions in the order they are to be tried, a memory format for each, and why (setting -> words)."""

    precisions: tuple[str, ...]
    formats: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)


def by_kind(config: Config, tensor_cores: bool) -> Modes:
    """Without measurements: mixed precision and channels-last pay with tensor cores."""
    precisions = precision_order(config.train.precision, tensor_cores)
    layout = config.train.memory_format
    if layout == "auto":
        layout = "channels-last" if tensor_cores else "contiguous"
    return Modes(precisions, dict.fromkeys(precisions, layout))


def by_measurement(config: Config, model: nn.Module, calibrator: Calibrator) -> Modes:
    """Measured on the device, as far as settings leave it open. Raises PreflightError if what was asked for gives
    values that are not finite.

    On the CPU `auto` stays with fp32, which trains exactly, and takes amp only where nothing else fits.
    """
    train, device = config.train, calibrator.device
    asked, layout = train.precision, train.memory_format
    precisions = ("fp32", "amp") if asked == "auto" else (asked,)
    layouts = ("contiguous", "channels-last") if layout == "auto" else (layout,)
    if asked == "fp32" and layout != "auto":
        return Modes(precisions, {asked: layout})  # nothing to choose, and nothing to doubt
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
    return Modes(order, {precision: layout for precision, (layout, _) in chosen.items()}, reasons)


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
