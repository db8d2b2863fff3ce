"""`apply_plan`: a module that is the model, and trains under a plan.

The planned module is of the model's class and shares everything with the model: attributes, parameters, buffers,
children, hooks, the flag of training; a change in one is a change in both. Only what a training step does differs. In
evaluation mode it is the model's own forward, under plain PyTorch.

What people do to modules works (copies, state dicts, a head replaced, hooks on modules inside, which make that module
run as a whole), or is refused in a sentence (`DataParallel`). `torch.compile` of what holds a planned module leaves
that uncompiled.

Known limitations: hooks on all modules of the process (`register_module_forward_hook`) fire for the planned module and
for what runs as a whole in it, which is said once. A forward that reads values which are neither attributes of its
module nor made of its input (a global, an entry of a dict) is run with those it had when it was planned.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.core.units import counted
from lowmem.plan.policy import Keep, Schedule
from lowmem.plan.record import Plan
from lowmem.remat.chain import Traced, TracedChain
from lowmem.remat.executor import Run, autocast_dtype
from lowmem.remat.host import link_for
from lowmem.remat.links import HostLink
from lowmem.remat.operation import Total
from lowmem.remat.stage import Stage
from lowmem.remat.tracing import NotTraceable, check_own_forward

Parts = Sequence[tuple[str, Callable[..., Any]]]
Named = Sequence[str | nn.Module]


def traced_chain(model: nn.Module, stages: Named | None = None) -> Traced:
    """The chain of a model as it is now. `stages`: modules of it that are named to be its links, each run as a whole;
    None: as it is traced. Raises NotTraceable (a ValueError) for what is not one tensor in, one out."""
    model = untouched(model)
    return TracedChain(model, None if stages is None else parts_of(model, stages)).now()


def decompose(model: nn.Module, stages: Named | None = None) -> tuple[Stage, ...]:
    """The links of a model's chain: see `traced_chain`."""
    return traced_chain(model, stages).stages


def stage_names(model: nn.Module, stages: Named | None = None) -> tuple[str, ...]:
    """The names of the chain's links, in forward order: `stem`, `layer1.0`, …, `head`."""
    return tuple(stage.name for stage in decompose(model, stages))


class ChainExecution:
    """How a planned module trains: `planned.lowmem`.

    `stages` are the chain's links, `schedule` what is executed; it may be replaced between steps (`set_schedule`), and
    so may `total`, which makes training's batch statistics those of all processes (`lowmem.remat.batch_norm`), and
    `stage_done`, called when a stage's gradients are complete (`lowmem.remat.executor.Run`).
    """

    def __init__(self, model: nn.Module, plan: Plan | Schedule, library_norm: bool, parts: Parts | None = None) -> None:
        self.model, self.library_norm, self.parts = model, library_norm, parts
        self.total: Total | None = None
        self.stage_done: Callable[[int], None] | None = None
        self.link: HostLink | None = None  # to host memory; None: the device's own
        self.warned = False  # of hooks that do not fire
        self._chain = TracedChain(model, parts)
        stages = self.stages
        self._names = tuple(stage.name for stage in stages)
        if isinstance(plan, Plan):
            check_plan(plan, stages)
        self.set_schedule(plan.schedule if isinstance(plan, Plan) else plan)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._chain.now().stages

    def set_schedule(self, schedule: Schedule) -> None:
        """Raises ValueError if the schedule does not cover the chain or a stage does not know its policy."""
        stages = self.stages
        check_schedule(schedule, stages)
        self.schedule = schedule
        self._checked = stages

    def forward(self, x: Tensor) -> Tensor:
        stages = self.stages
        if stages is not self._checked:
            self._check_again(stages)
        link = self.link or link_for(x) if self.schedule.hosts else None
        run = Run(stages, autocast_dtype(x), x.requires_grad, self.library_norm, self.total, self.stage_done, link)
        return run.execute(self.schedule, x)

    def _check_again(self, stages: tuple[Stage, ...]) -> None:
        """Raises RuntimeError if the plan is none for the model as it is now."""
        names = tuple(stage.name for stage in stages)
        try:
            if names != self._names:
                raise ValueError(f"its stages were {list(self._names)}, now they are {list(names)}")
            self.set_schedule(self.schedule)
        except ValueError as error:
            raise RuntimeError(
                f"the network has changed since it was planned: {error}; make a plan for it as it is now (make_plan) "
                "and apply that"
            ) from error


_GLOBAL_HOOKS = tuple(
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)


class PlannedModule(nn.Module):
    """What `apply_plan` returns is this and the model's own class. `lowmem` has a slot, as the model has the same
    `__dict__`; on the class, which is part of a cycle, it would live until the garbage collector comes by."""

    __slots__ = ("lowmem",)
    lowmem: ChainExecution

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one tensor."""
        if not self.training:
            return type(self.lowmem.model).forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ValueError("a planned module takes one tensor; what else its forward takes keeps its default")
        return self.lowmem.forward(args[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lowmem.warned and any(_GLOBAL_HOOKS):
            self.lowmem.warned = True
            warnings.warn(
                "hooks on all modules (register_module_forward_hook and the like) fire only for the planned module and "
                "for what runs as a whole in it: put them on the modules that you want to hear of",
                stacklevel=2,
            )
        if "forward" in self.__dict__ or self._compiled_call_impl is not None:
            try:
                check_own_forward(self.lowmem.model)
            except NotTraceable as error:
                raise RuntimeError(f"the network has changed since it was planned: {error}") from None
        call = super().__call__
        if "torch._dynamo" in sys.modules:  # else its import takes seconds, for nothing
            call = torch.compiler.disable(call)
        return call(*args, **kwargs)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile leaves it as it is

    def compile(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a planned module cannot be compiled in place: torch.compile takes over its whole forward")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self._with(copy.deepcopy(self.lowmem.model, memo), memo)

    def __copy__(self) -> nn.Module:
        return self._with(copy.copy(self.lowmem.model), {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.lowmem.parts is not None:
            raise TypeError("a module planned by named stages cannot be pickled: save its state_dict()")
        return planned, (self.lowmem.model, self.lowmem.schedule, self.lowmem.library_norm)

    def _with(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        parts = self.lowmem.parts
        if parts is not None:
            raise TypeError(
                "a module planned by named stages cannot be copied: copy the model and apply the plan to it"
            )
        return planned(model, self.lowmem.schedule, self.lowmem.library_norm)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "DataParallel makes copies of a network in every step, which no plan survives: use one process per card "
            "(lowmem train --gpus 0,1, or DistributedDataParallel without buckets' views)"
        )


def planned(
    model: nn.Module, plan: Plan | Schedule, library_norm: bool = False, parts: Parts | None = None
) -> PlannedModule:
    """The module, of the model's class, that executes the plan on the model's own parameters."""
    execution = ChainExecution(model, plan, library_norm, parts)
    kind = type(model)
    made = type(f"Planned{kind.__name__}", (PlannedModule, kind), {"__module__": kind.__module__})
    module: PlannedModule = object.__new__(made)
    object.__setattr__(module, "__dict__", model.__dict__)
    object.__setattr__(module, "lowmem", execution)
    return module


def untouched(model: nn.Module) -> nn.Module:
    """The model that a planned module is of; else the module itself."""
    return model.lowmem.model if isinstance(model, PlannedModule) else model


def parts_of(model: nn.Module, stages: Named) -> Parts:
    """Modules that make up a network, by name or themselves, in the order in which its input goes through them. Raises
    ValueError for what the model has not got."""
    names = {id(module): name for name, module in model.named_modules()}
    parts: list[tuple[str, Callable[..., Any]]] = []
    for one in stages:
        try:
            module = model.get_submodule(one) if isinstance(one, str) else one
        except AttributeError as error:
            raise ValueError(f"the network has no module {one!r}: {error}") from None
        if id(module) not in names:
            raise ValueError(f"a {type(module).__name__} that is to be a stage is no module of the network")
        parts.append((names[id(module)], module))
    return parts


def check_plan(plan: Plan, stages: Sequence[Stage]) -> None:
    """Raises ValueError if the plan, or one on its ladder, is none for these stages."""
    names = tuple(stage.name for stage in stages)
    if plan.stages != names:
        wrong = next((pair for pair in zip(plan.stages, names, strict=False) if pair[0] != pair[1]), None)
        detail = f"{wrong[0]!r} where the model has {wrong[1]!r}" if wrong else "another number of them"
        raise ValueError(
            f"the plan has {counted(len(plan.stages), 'stage')}, the model {len(names)}: {detail}; plan again"
        )
    for one in (plan, *plan.ladder):
        check_schedule(one.schedule, stages)


def check_schedule(schedule: Schedule, stages: Sequence[Stage]) -> None:
    """Raises ValueError if the schedule does not cover the chain or a stage does not know its policy."""
    schedule.check_covers(len(stages))
    for _, item in schedule.walk():
        if isinstance(item, Keep):
            stages[item.stage].check(item.policy, item.host)


def apply_plan(
    model: nn.Module,
    plan: Plan | Schedule,
    *,
    library_norm: bool | None = None,
    stages: Named | None = None,
) -> PlannedModule:
    """The module that executes the plan on the model's own parameters.

    Loss, gradients and buffers have the same bits as the model's own (invariant 1): on a CPU always, on CUDA if batch
    norm is the library's choice and the libraries' kernels are deterministic (`lowmem.remat.libraries`). What does not
    work: see `lowmem.remat.executor`. `library_norm`: see `batch_norm.py`; None: as the plan has it, for a bare
    schedule the native kernels. `stages`: as they were named to `make_plan`. Raises ValueError if the plan was made for
    other stages than the model's.
    """
    model = untouched(model)
    parts = None if stages is None else parts_of(model, stages)
    if library_norm is None:
        library_norm = isinstance(plan, Plan) and plan.library_norm
    return planned(model, plan, library_norm, parts)
