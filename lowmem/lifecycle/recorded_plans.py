"""The plans in a run's folder: plan.json, and one for each further process that trains the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem.choose.decide import RecordedRun
from lowmem.choose.session import wants_plan
from lowmem.config.schema import Config
from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import PLAN_LIMIT_BYTES, read_json, shorten
from lowmem.distributed.group import Group
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.remat import stage_names
from lowmem.runs.store import PLAN, RunFolder, plan_file
from lowmem.train.observer import Observer


def read_plan(run: Path, config: Config, name: str = PLAN) -> Plan | None:
    """The plan in a run's plan.json, or in that of another of its processes; None if there is none. Raises
    CorruptCheckpoint if it is damaged or does not belong to these settings."""
    path = run / name
    if not path.is_file():
        return None
    try:
        plan = Plan.from_json(read_json(path, PLAN_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} holds no plan ({shorten(error)}): restore it, or start another run") from None
    model, train = config.model, config.train
    names = stage_names(skeleton(model.arch, model.block, width=model.width))
    ours = (names, train.batch, train.precision, train.memory_format)
    if (plan.stages, plan.effective_batch, plan.precision, plan.memory_format) != ours:
        raise CorruptCheckpoint(f"{path} is the plan of another run: restore this run's own, or start another run")
    return plan


def read_plans(run: Path, config: Config) -> list[Plan]:
    """Of all processes that last trained the run of these recorded settings, as far as they are there; none for a run
    without plans. Raises CorruptCheckpoint."""
    first = read_plan(run, config)
    if first is None:
        if wants_plan(config):
            raise CorruptCheckpoint(f"{run / PLAN} is missing, which this run was planned by: restore it")
        return []
    others = (read_plan(run, config, plan_file(rank)) for rank in range(1, len(first.shares)))
    return [first, *(plan for plan in others if plan is not None)]


def recorded_run(group: Group, run: Path, config: Config) -> RecordedRun:
    """What is recorded of a run that is resumed, read by rank 0, in all processes. Raises CorruptCheckpoint."""
    plans: list[Any] = group.lead(lambda: [plan.to_json() for plan in read_plans(run, config)], [])
    return RecordedRun(config, group.together(lambda: [Plan.from_json(plan) for plan in group.share(plans)]))


def forked_run(run: Path, config: Config, observer: Observer) -> RecordedRun:
    """What is recorded of a run that another forks off from, which can do without its plans."""
    try:
        return RecordedRun(config, read_plans(run, config), fork=True)
    except CorruptCheckpoint as error:
        observer.warning(f"{error}; the fork is planned anew")
        return RecordedRun(config, fork=True)


def record_plans(group: Group, plan: Plan | None, folder: RunFolder) -> None:
    """Writes every process's plan into the run's folder. Raises DiskError."""
    if plan is None:
        return
    plans = group.gather(plan.to_json())

    def write() -> None:
        for rank, each in enumerate(plans):
            folder.write_plan(each, rank)
        folder.forget_plans(after=group.size)

    group.lead(write, None)
