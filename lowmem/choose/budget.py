"""Where a card's memory goes before the first tensor of the step: named terms, in bytes, and what they leave."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from lowmem.calibrate.calibrator import Calibrator
from lowmem.calibrate.device import DeviceFacts, ask_device, describe_card
from lowmem.choose.execution import numerics_of
from lowmem.config.cards import Card, Platform, find_card, load_card
from lowmem.config.schema import Config, for_process
from lowmem.core.errors import Infeasible, UsageError
from lowmem.core.units import MIB
from lowmem.remat.libraries import (
    ASSUMED_WORKSPACE_BYTES,
    blas_workspace_bytes,
    prepare_libraries,
    workspace_cap_bytes,
)

# Assumed where nothing was measured, and printed as assumed with every plan; the margin is for whatever no model
# foresees.
ASSUMED_CONTEXT_BYTES = 400 * MIB
# Of one of NCCL's communicators, with the few channels that PCIe can use (`lowmem.distributed.group` holds it to them):
# about 10 MiB for each channel and connection, of which a ring has two and a tree up to three (NVIDIA/nccl#986, #1685).
ASSUMED_COMMUNICATOR_BYTES = 200 * MIB
MARGIN_SHARE = 0.02
_PICTURE_BYTES = 3 * 32 * 32  # uint8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`total_bytes` = the other terms + `tensor_bytes`. On the CPU, and for a bare `--vram` without a card, the budget
    bounds the tensors of the step and nothing else: all other terms are 0.

    `workspace_bytes` is room left for the convolution library; 0 where its workspace was measured, which makes it a
    part of the step. `blas_workspace_bytes`: cuBLAS's and cublasLt's. `emulated`: a larger card made to behave like one
    of `total_bytes`.
    """

    total_bytes: int
    others_bytes: int = 0  # the driver, the desktop, other processes
    context_bytes: int = 0
    context_measured: bool = False
    workspace_bytes: int = 0
    blas_workspace_bytes: int = 0
    blas_workspace_measured: bool = False
    communicator_bytes: int = 0  # of one process among several, on CUDA
    pictures_bytes: int = 0  # the data set, where it is held on the card
    margin_bytes: int = 0
    source: str  # of the total, in words
    emulated: bool = False

    def __post_init__(self) -> None:
        if self.tensor_bytes <= 0:
            raise Infeasible(
                self.total_bytes,
                self.total_bytes - self.tensor_bytes + 1,
                "the card's own needs before any tensor: context, workspace, margin",
                "give more with --vram, or choose another --card",
            )

    @property
    def tensor_bytes(self) -> int:
        """What is left for parameters, momentum, gradients, activations and temporaries."""
        beside = self.others_bytes + self.process_bytes + self.pictures_bytes
        return self.total_bytes - beside - self.margin_bytes

    @property
    def process_bytes(self) -> int:
        """What a process takes beside its tensors: context, workspaces, communicators."""
        workspaces = self.workspace_bytes + self.blas_workspace_bytes
        return self.context_bytes + workspaces + self.communicator_bytes

    @property
    def allocator_bytes(self) -> int | None:
        """The most that the caching allocator may hold for all to stay on the card: tensors, workspaces, pictures and
        the margin; None where only tensors count. The context and NCCL's communicators are not in it."""
        if not self.on_card:
            return None
        return self.total_bytes - self.others_bytes - self.context_bytes - self.communicator_bytes

    @property
    def on_card(self) -> bool:
        """Whether the caching allocator's segments count, not just the tensors in them."""
        return self.context_bytes > 0

    def terms(self) -> list[tuple[str, int]]:
        """(term, bytes) of what is gone before the step's first tensor; terms that are 0 are left out."""
        how = "measured" if self.context_measured else "assumed"
        told = "measured" if self.blas_workspace_measured else "assumed"
        named = [
            ("others: driver, desktop, processes", self.others_bytes),
            (f"CUDA context ({how})", self.context_bytes),
            ("convolution workspace (at most)", self.workspace_bytes),
            (f"cuBLAS workspace ({told})", self.blas_workspace_bytes),
            ("NCCL communicators (assumed)", self.communicator_bytes),
            ("training pictures", self.pictures_bytes),
            (f"margin ({MARGIN_SHARE:.0%})", self.margin_bytes),
        ]
        return [row for row in named if row[1]]

    def rows(self) -> list[tuple[str, int]]:
        """(term, bytes) in the order of subtraction: the total, what is gone, what is left."""
        gone = [(name, -size) for name, size in self.terms()]
        return [(self.source, self.total_bytes), *gone, ("for the step's tensors", self.tensor_bytes)]


def tensors_only(total_bytes: int, source: str = "memory budget") -> Budget:
    """A budget for tensors alone. Raises Infeasible for nothing at all."""
    return Budget(total_bytes=total_bytes, source=source)


def with_communicators(budget: Budget, count: int = 1) -> Budget:
    """Of a process that sums gradients with others: on a card NCCL takes its part. Raises Infeasible."""
    return replace(budget, communicator_bytes=count * ASSUMED_COMMUNICATOR_BYTES) if budget.on_card else budget


def this_platform() -> Platform:
    """Without a display: a machine for training. A desktop is `linux_display`, by memory.platform."""
    return "windows" if sys.platform == "win32" else "linux"


def of_card(
    card: Card,
    vram_bytes: int | None = None,
    pictures_bytes: int = 0,
    platform: Platform | None = None,
    *,
    deterministic: bool = True,
) -> Budget:
    """The budget of a card's profile, or of a card like it with another memory. `deterministic`: of the run. Raises
    Infeasible."""
    total = card.memory_bytes if vram_bytes is None else vram_bytes
    usable = int(total * getattr(card.usable, platform or this_platform()))
    return Budget(
        total_bytes=total,
        others_bytes=total - usable,
        context_bytes=card.context_bytes,
        workspace_bytes=ASSUMED_WORKSPACE_BYTES,
        blas_workspace_bytes=blas_workspace_bytes(card.capability_pair, deterministic=deterministic),
        pictures_bytes=pictures_bytes,
        margin_bytes=int(total * MARGIN_SHARE),
        source=card.name if total == card.memory_bytes else f"{card.name} with another memory",
    )


def of_device(
    facts: DeviceFacts,
    vram_bytes: int | None = None,
    pictures_bytes: int = 0,
    *,
    workspace_bytes: int = ASSUMED_WORKSPACE_BYTES,
    deterministic: bool = True,
) -> Budget:
    """The budget of the CUDA device at hand. Its context exists already: what is free is without it.

    With less `vram_bytes` than the device has the card is emulated: others count as far as they leave less than that.
    `pictures_bytes`: of the data set, which is held on the card. `deterministic`: of the run. Raises Infeasible.
    """
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
    )


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
        # Measured workspaces are a part of the simulated step.
        workspace = workspace_cap_bytes() if calibrator is None else 0
        deterministic = numerics.deterministic
        budget = of_device(facts, memory.vram, pictures_bytes, workspace_bytes=workspace, deterministic=deterministic)
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
    return describe_card(facts, rates, ASSUMED_CONTEXT_BYTES)


def _platform(config: Config) -> Platform | None:
    chosen = config.memory.platform
    if chosen == "auto":
        return None
    return "linux_display" if chosen == "linux-display" else chosen
