"""Resolves `auto`: device, precision and memory format, each with its reason."""

from __future__ import annotations

from typing import Literal

import torch

from lowmem.config.cards import has_tensor_cores
from lowmem.config.schema import Config, TrainConfig
from lowmem.config.settings import Settings
from lowmem.core.errors import PreflightError
from lowmem.models import skeleton
from lowmem.models.memory_format import check_memory_format, is_safe
from lowmem.models.resnet import ResNet
from lowmem.remat.libraries import Numerics


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
