"""A model as a chain of stages, and `apply_plan`: a module that trains like the model, and executes a plan.

The family is recognised by its structure (names and types of children), so that this room knows no model of its own:

- a network has exactly the children `conv1`, `bn1`, `layer1`, `layer2`, … (sequences) and `linear`; its head averages
  over 4x4 and flattens;
- a block has exactly `conv1`, `bn1`, `conv2`, `bn2`, … and `shortcut`, which is None, an empty sequence (identity) or a
  sequence of convolution and batch norm, and ReLUs after every batch norm but the last, and after the sum.

A module whose children look like this but whose forward does something else must not be given to `decompose`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.core.units import counted
from lowmem.plan.policy import Keep, Schedule
from lowmem.plan.record import Plan
from lowmem.remat.batch_norm import Total
from lowmem.remat.block import ConvBlock, Pair
from lowmem.remat.executor import Run, autocast_dtype
from lowmem.remat.stage import OpaqueStage, Stage

_LAYER = re.compile(r"layer\d+")


def decompose(model: nn.Module) -> tuple[Stage, ...]:
    """A network of the family -> stem, blocks, head. An `nn.Sequential` -> its children, blocks of the family
    recognised. Anything else is one stage."""
    if (family := _family(model)) is not None:
        return family
    if isinstance(model, nn.Sequential) and len(model):
        return tuple(_stage(name, child) for name, child in model.named_children())
    return (OpaqueStage("model", model, model),)


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the chain's links, in forward order: `stem`, `layer1.0`, …, `head`."""
    return tuple(stage.name for stage in decompose(model))


class PlannedModule(nn.Module):
    """Shares children, parameters and buffers with the model: state dict, `to`, `train` and optimizers see no
    difference, and changes show in both.

    `stages` are the chain's links, `schedule` what is executed; it may be replaced between steps (`set_schedule`), and
    so may `total`, which makes training's batch statistics those of all processes (`lowmem.remat.batch_norm`), and
    `stage_done`, called when a stage's gradients are complete (`lowmem.remat.executor.Run`).
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, library_norm: bool = False) -> None:
        super().__init__()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.training = model.training
        self.library_norm = library_norm
        self.total: Total | None = None
        self.stage_done: Callable[[int], None] | None = None
        self.stages: tuple[Stage, ...] = decompose(model)
        self.set_schedule(schedule)

    def set_schedule(self, schedule: Schedule) -> None:
        """Raises ValueError if the schedule does not cover the chain or a stage does not know its policy."""
        schedule.check_covers(len(self.stages))
        for _, item in schedule.walk():
            if isinstance(item, Keep):
                self.stages[item.stage].check(item.policy)
        self.schedule = schedule

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for x: [N, 3, 32, 32] float -> [N, classes] for the family."""
        run = Run(self.stages, autocast_dtype(x), x.requires_grad, self.library_norm, self.total, self.stage_done)
        return run.execute(self.schedule, x)


def apply_plan(model: nn.Module, plan: Plan | Schedule, *, library_norm: bool | None = None) -> PlannedModule:
    """The module that executes the plan on the model's own parameters.

    Loss, gradients and buffers have the same bits as the model's own (invariant 1): on a CPU always, on CUDA if batch
    norm is the library's choice and the libraries' kernels are deterministic (`lowmem.remat.libraries`). What does not
    work: see `lowmem.remat.executor`. `library_norm`: see `batch_norm.py`; None: as the plan has it, for a bare
    schedule the native kernels. Raises ValueError if the plan was made for other stages than the model's.
    """
    if isinstance(plan, Schedule):
        return PlannedModule(model, plan, library_norm=bool(library_norm))
    names = stage_names(model)
    if plan.stages != names:
        wrong = next((pair for pair in zip(plan.stages, names, strict=False) if pair[0] != pair[1]), None)
        detail = f"{wrong[0]!r} where the model has {wrong[1]!r}" if wrong else "another number of them"
        raise ValueError(
            f"the plan has {counted(len(plan.stages), 'stage')}, the model {len(names)}: {detail}; plan again"
        )
    library_norm = plan.library_norm if library_norm is None else library_norm
    return PlannedModule(model, plan.schedule, library_norm=library_norm)


def _family(model: nn.Module) -> tuple[Stage, ...] | None:
    children = dict(model.named_children())
    layers = [name for name in children if _LAYER.fullmatch(name)]
    if set(children) != {"conv1", "bn1", "linear", *layers} or not layers:
        return None
    stem = _pair(children["conv1"], children["bn1"])
    linear = children["linear"]
    if stem is None or not isinstance(linear, nn.Linear) or list(model.parameters(recurse=False)):
        return None
    blocks = [_stage(f"{layer}.{name}", child) for layer in layers for name, child in children[layer].named_children()]
    head = OpaqueStage("head", linear, lambda x: linear(F.avg_pool2d(x, 4).flatten(1)))
    return (ConvBlock("stem", (stem,)), *blocks, head)


def _stage(name: str, module: nn.Module) -> Stage:
    return _block(name, module) or OpaqueStage(name, module, module)


def _block(name: str, module: nn.Module) -> ConvBlock | None:
    children = dict(module.named_children())
    shortcut = children.pop("shortcut", getattr(module, "shortcut", "absent"))
    count = len(children) // 2
    if not count or set(children) != {f"{kind}{k}" for k in range(1, count + 1) for kind in ("conv", "bn")}:
        return None
    pairs = [_pair(children[f"conv{k}"], children[f"bn{k}"]) for k in range(1, count + 1)]
    known = tuple(pair for pair in pairs if pair is not None)
    if len(known) < count or list(module.parameters(recurse=False)):
        return None
    if shortcut is None:
        return ConvBlock(name, known)
    if not isinstance(shortcut, nn.Sequential) or len(shortcut) not in (0, 2):
        return None
    projection = _pair(*shortcut) if len(shortcut) else None
    if len(shortcut) and projection is None:
        return None
    return ConvBlock(name, known, projection, identity=not len(shortcut))


def _pair(conv: nn.Module | None, bn: nn.Module | None) -> Pair | None:
    """None unless both are exactly what the kernels cover: no bias, zero padding, affine, running statistics."""
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        return None
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if not bn.affine or bn.running_mean is None or bn.weight.dtype not in (torch.float32, torch.float64):
        return None
    return Pair(conv, bn)
