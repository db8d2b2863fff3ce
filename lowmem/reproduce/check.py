"""Before hours are spent: whether the pictures are there, every network has a plan that fits, and the disk has room for
all runs. A run's plan is decided when it begins (invariant 7); here it is only seen that there is one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from lowmem.choose.decide import DataSize, decide
from lowmem.choose.execution import refuse_unsafe, resolve_execution, wants_plan
from lowmem.config.schema import for_process
from lowmem.core.errors import Infeasible, PreflightError, UsageError
from lowmem.core.units import format_size
from lowmem.data import Dataset, load
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.reproduce.job import Job
from lowmem.reproduce.progress import Standing
from lowmem.runs.setup import kept_epochs, rows_bytes, run_bytes
from lowmem.train.metrics import default_every, measured_weights
from lowmem.train.observer import Observer


@dataclass(frozen=True)
class Outlook:
    """`job`: with what was learned of its pictures and networks. `needed_bytes`: more than is taken already;
    `free_bytes`: on the disk of its folder."""

    job: Job
    runs: tuple[Standing, ...]
    pictures: str
    needed_bytes: int
    free_bytes: int


def look_ahead(job: Job, standings: Sequence[Standing], observer: Observer) -> Outlook:
    """Looks at all runs that are to be trained; nothing is written.

    Raises what `train` would for one of them: DataError, PreflightError, Infeasible naming the network; and UsageError
    if the pictures are others than those of the runs that have begun.
    """
    config = job.settings.config
    dataset = load(config.data, config.seed, progress=observer.data_progress)
    if job.data is not None and job.data != dataset.fingerprint and any(standing.begun for standing in standings):
        raise UsageError(
            f"{dataset.name} holds other pictures than those that the runs in {job.path} are computed with: give the "
            "same ones with --data, or start another job with --out"
        )
    plans = _plans(job, standings, dataset, observer)
    runs = [_look_at(job, standing, plans.get(standing.member.name), dataset) for standing in standings]
    needed = sum(max(0, run.disk_bytes - run.size_bytes) for run in runs)
    free = shutil.disk_usage(job.path).free
    if free < needed:
        raise PreflightError(
            f"the job needs {format_size(needed)} more at the most, {job.path} has {format_size(free)} free: free some "
            "space, keep fewer checkpoints, train fewer runs with --only, or choose another folder with --out"
        )
    learned = replace(
        job, data=dataset.fingerprint, weights={**job.weights, **{run.member.name: run.weight for run in runs}}
    )
    pictures = f"{len(dataset.train):,} pictures of {dataset.name} to train on, {len(dataset.test):,} to test"
    return Outlook(learned, tuple(runs), pictures, needed, free)


def _plans(job: Job, standings: Sequence[Standing], dataset: Dataset, observer: Observer) -> dict[str, Plan]:
    """A plan for each run that is to begin and will have one. Raises Infeasible naming all for which there is none."""
    plans: dict[str, Plan] = {}
    refused: dict[str, Infeasible] = {}
    data = DataSize(len(dataset.classes), len(dataset.train))
    for standing in standings:
        if standing.begun:
            continue
        name, settings = standing.member.name, job.settings_of(standing.member)
        planned = wants_plan(resolve_execution(settings).config)
        settings = resolve_execution(settings, planned=planned)
        refuse_unsafe(settings.config)
        if not planned:
            continue
        for_process(settings.config, 0, 1)  # refuses several cards: a job's runs are trained by one process each
        try:
            plan = decide(settings, data, tell=observer, on_paper=True).plan
        except Infeasible as error:
            refused[name] = error
            continue
        assert plan is not None
        plans[name] = plan
        observer.note(f"{name}: {_in_a_line(plan)}")
    if refused:
        raise _of_all(refused)
    return plans


def _of_all(refused: Mapping[str, Infeasible]) -> Infeasible:
    hardest = max(refused, key=lambda name: refused[name].least_bytes)
    others = ", ".join(name for name in refused if name != hardest)
    error, which = refused[hardest], f"{hardest}, and less for {others}" if others else hardest
    way_out = "give more memory, or train the others with --only"
    return Infeasible(error.budget_bytes, error.least_bytes, f"for {which}; {error.what}", way_out)


def _in_a_line(plan: Plan) -> str:
    """Its run prints all of it."""
    overhead = plan.predicted.overhead or 0.0
    more = f", {overhead:.1%} more time than plain PyTorch" if overhead > 0.0005 else ""
    exact = "" if plan.exact else "; by accumulation, which under batch norm is not the same computation"
    return f"a plan fits: {plan.precision}, {format_size(plan.predicted.peak_allocated_bytes)} of tensors{more}{exact}"


def _look_at(job: Job, standing: Standing, plan: Plan | None, dataset: Dataset) -> Standing:
    """The run with its weight, what it will take on disk, and the time by its plan."""
    config, member = job.settings.config, standing.member
    model = skeleton(member.arch, member.block, width=config.model.width, num_classes=len(dataset.classes))
    weight, seconds, disk = job.weights.get(member.name), None, standing.size_bytes
    if plan is not None or weight is None:
        # Floating-point operations of a picture's forward pass, with what the plan repeats added in proportion.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32, device="meta"))
        weight = counter.get_total_flops() * (1 + ((plan.predicted.overhead if plan is not None else None) or 0.0))
    # Of training alone; a budget on the CPU is planned with the rates of a card that is not there.
    on_card = config.train.device != "cpu" and torch.cuda.is_available() and config.memory.card is None
    if plan is not None and plan.predicted.step_seconds is not None and on_card:
        seconds = standing.epochs * len(dataset.train) / plan.batch * plan.predicted.step_seconds
    if standing.left:
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        kept, epochs, steps = config.checkpoint, standing.epochs, -(-len(dataset.train) // config.train.batch)
        disk = run_bytes(
            checkpoint_bytes=state + (parameters if config.optim.momentum > 0 else 0),
            parameter_bytes=parameters,
            keep=kept.keep,
            kept_epochs=kept_epochs(epochs=epochs, keep_every=kept.keep_every),
            rows_bytes=rows_bytes(
                epochs=epochs,
                steps_per_epoch=steps,
                log_every_steps=config.train.log_every_steps,
                steps_between_saves=kept.steps_between_saves,
                layers=len(measured_weights(model)),
                grad_norms_every=config.train.grad_norms_every or default_every(steps),
            ),
        )
    return replace(standing, weight=weight, planned_seconds=seconds, disk_bytes=disk)
