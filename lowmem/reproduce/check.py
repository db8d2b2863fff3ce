"""What a process of a job does: train one of the runs, with the job's time left beside its own; or before hours are
spent look whether the pictures are there, every network has a plan that fits, and the disk has room for all runs. A
run's plan is decided when it begins (invariant 7); here it is only seen that there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowmem.choose.decide import DataSize, decide
from lowmem.choose.execution import refuse_unsafe, resolve_execution, wants_plan
from lowmem.choose.explain import cost
from lowmem.config.processes import for_process
from lowmem.core.errors import ExitCode, Infeasible, Interrupted, LowmemError, PreflightError, UsageError
from lowmem.core.units import aligned, counted, format_duration, format_size
from lowmem.data import Dataset, load
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.reproduce.job import ALL, Job, read_job
from lowmem.reproduce.progress import JobObserver, Standing, measured_before, seconds_left, seconds_left_of, standing_of
from lowmem.train.metrics import disk_bytes
from lowmem.train.observer import Observer


def work(
    request: Mapping[str, Any], shown: Observer, begin: Callable[..., object], go_on: Callable[..., object]
) -> int:
    """Does what is requested, by `lifecycle.run_training` and `resume_training` -> exit code. Raises LowmemError."""
    job, limit = read_job(Path(request["out"])), request["max_steps"]
    members = [member for member in ALL if member.name in request["names"]]
    standings, measured = [standing_of(job, member, limit) for member in members], measured_before(job, members)
    if "name" not in request:
        look_ahead(job, standings, shown, measured)[0].write()
        return ExitCode.DONE
    number = request["names"].index(request["name"])
    path, told = standings[number].path, JobObserver(shown, standings, number, measured)
    try:
        if standings[number].begun:
            # Always with the limit, be it None: the run may have been begun as a trial.
            go_on(path, {**job.operational, "train.max_steps": limit}, told)
        else:
            settings = job.settings_of(members[number])
            settings = settings if limit is None else settings.replace({"train.max_steps": limit}, "reproduce")
            begin(settings, path, told, dry_run=request["dry_run"])
    except Interrupted as stopped:
        return stopped.exit_code  # whoever conducts the job says what is next
    if not request["dry_run"] and (standing := standing_of(job, members[number], limit)).left:
        # A run that left without an error and is not done must not pass for one that is.
        raise LowmemError(
            f"{path} was left at step {standing.step}, epoch {standing.epochs_done} of {standing.epochs}, without an "
            f"error ({standing.state}): look at it with `lowmem verify {path}`"
        )
    return ExitCode.DONE


def look_ahead(
    job: Job, standings: Sequence[Standing], observer: Observer, measured: Sequence[Standing] = ()
) -> tuple[Job, list[Standing]]:
    """Looks at all runs that are to be trained, and tells the table before the first one; nothing is written. The job
    with what was learned of its pictures and networks, and the runs with what they will take. `measured`: other runs.

    Raises what `train` would for one of them: DataError, PreflightError, Infeasible naming the network; and UsageError
    if the pictures are others than those of the runs that have begun.
    """
    config = job.settings.config
    observer.phase("reading pictures")
    dataset = load(config.data, config.seed, progress=observer.phase)
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
    each = f"of {counted(config.train.epochs, 'epoch')} at width {config.model.width}"
    pictures = f"{counted(len(dataset.train), 'picture')} of {dataset.name} to train on, {len(dataset.test):,} to test"
    rows, time = times_left(runs, measured)
    disk = f"at most {format_size(needed)} more, {format_size(free)} free"
    first, last = (
        f"job {job.path}: {counted(len(runs), 'run')} {each}, {pictures}",
        f"time left in all: {time}; disk: {disk}",
    )
    for line in (first, *rows, last):
        observer.note(line)
    weights = {**job.weights, **{run.member.name: run.weight for run in runs}}
    return replace(job, data=dataset.fingerprint, weights=weights), runs


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
        exact = "" if plan.exact else "; by accumulation, which under batch norm is not the same computation"
        size = format_size(plan.predicted.peak_allocated_bytes)
        # Its run prints all of it.
        observer.note(f"{name}: a plan fits: {plan.precision}, {size} of tensors, {cost(plan)}{exact}")
    if refused:
        hardest = max(refused, key=lambda name: refused[name].least_bytes)
        others = ", ".join(name for name in refused if name != hardest)
        worst, which = refused[hardest], f"{hardest}, and less for {others}" if others else hardest
        way_out = f"{worst.way_out}, or train the others with --only"
        raise Infeasible(worst.budget_bytes, worst.least_bytes, worst.what, way_out, who=which)
    return plans


def _look_at(job: Job, standing: Standing, plan: Plan | None, dataset: Dataset) -> Standing:
    """The run with its weight, what it will take on disk, and the time by its plan."""
    config, member = job.settings.config, standing.member
    sizes = {"width": config.model.width, "num_classes": len(dataset.classes), "in_channels": config.data.channels}
    model = skeleton(member.arch, member.block, **sizes)
    weight, seconds, disk = job.weights.get(member.name), None, standing.size_bytes
    if plan is not None or weight is None:
        from torch.utils.flop_counter import FlopCounterMode  # with triton: of no use to what trains

        # Floating-point operations of a picture's forward pass, with what the plan repeats added in proportion.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *config.data.image_shape, device="meta"))
        weight = counter.get_total_flops() * (1 + ((plan.predicted.overhead if plan is not None else None) or 0.0))
    # Of training alone; a budget on the CPU is planned with the rates of a card that is not there.
    on_card = config.train.device != "cpu" and torch.cuda.is_available() and config.memory.card is None
    if plan is not None and plan.predicted.step_seconds is not None and on_card:
        seconds = standing.epochs * len(dataset.train) / plan.batch * plan.predicted.step_seconds
    if standing.left:
        disk = disk_bytes(config, model, -(-len(dataset.train) // config.train.batch))
    return replace(standing, weight=weight, planned_seconds=seconds, disk_bytes=disk)


def times_left(runs: Sequence[Standing], measured: Sequence[Standing] = ()) -> tuple[list[str], str]:
    """The table before the first run, a line a run, and the time of all together. `measured`: of other runs."""
    rows: list[tuple[str, ...]] = [("run", "state", "epoch", "time left", "on disk")]
    for run in runs:
        seconds = seconds_left_of(run, [*runs, *measured])
        time = "?" if seconds is None else f"about {format_duration(seconds)}"
        what, size = (run.member.name, run.state, f"{run.epochs_done}/{run.epochs}"), format_size(run.disk_bytes)
        rows.append((*what, time, f"at most {size}") if run.left else (*what, "", size))
    total = seconds_left(runs, measured)
    in_all = "known after the first epoch" if total is None else f"about {format_duration(total)}"
    return aligned(rows, right={2, 3, 4}), in_all
