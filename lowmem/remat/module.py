"""`apply_plan`: a module that trains like the model it was made from, and executes a plan."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lowmem.plan.policy import Keep, Schedule
from lowmem.plan.record import Plan
from lowmem.remat.chain import decompose
from lowmem.remat.executor import execute
from lowmem.remat.stage import Stage
from lowmem.remat.sync_batch_norm import Total


class PlannedModule(nn.Module):
    """Shares children, parameters and buffers with the model: state dict, `to`, `train` and optimizers see no
    difference, and changes show in both.

    `stages` are the chain's links, `schedule` what is executed; it may be replaced (`set_schedule`) between steps.
    Two attributes may be set at any time: `total` makes training's batch statistics those of all processes
    (`lowmem.remat.sync_batch_norm`); `stage_done` is called in the backward with the number of each stage whose
    parameters' gradients are complete (`lowmem.remat.executor.Run`).
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
        return execute(
            self.stages,
            self.schedule,
            x,
            library_norm=self.library_norm,
            total=self.total,
            stage_done=self.stage_done,
        )


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the chain's links, in forward order: `stem`, `layer1.0`, …, `head`."""
    return tuple(stage.name for stage in decompose(model))


def apply_plan(model: nn.Module, plan: Plan | Schedule, *, library_norm: bool | None = None) -> PlannedModule:
    """The module that executes the plan on the model's own parameters.

    Loss, gradients and buffers have the same bits as the model's own (invariant 1): on a CPU always, on CUDA if batch
    norm is the library's choice and the libraries' kernels are deterministic (`lowmem.remat.libraries`). Gradients are
    added to `.grad` as they are computed; see `lowmem.remat.executor` for what does not work because of
    that. `library_norm`: see `lowmem.remat.kernels`; None: as the plan has it, for a bare schedule the native kernels.
    Raises ValueError if the plan was made for other stages than the model's.
    """
    if isinstance(plan, Schedule):
        return PlannedModule(model, plan, library_norm=bool(library_norm))
    names = stage_names(model)
    if plan.stages != names:
        wrong = next((pair for pair in zip(plan.stages, names, strict=False) if pair[0] != pair[1]), None)
        detail = f"{wrong[0]!r} where the model has {wrong[1]!r}" if wrong else "another number of them"
        raise ValueError(f"the plan has {len(plan.stages)} stages, the model {len(names)}: {detail}; plan again")
    library_norm = plan.library_norm if library_norm is None else library_norm
    return PlannedModule(model, plan.schedule, library_norm=library_norm)
