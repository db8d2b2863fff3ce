"""What a run is trained with: planned, confirmed by real steps where that is wanted, and given its ladder; or what the
run has recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowmem.choose.explain import explain, explain_ladder, inexact, memory_lines
from lowmem.choose.ladder import with_ladder
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice
from lowmem.choose.session import calibrator_of, plan_run, ranked, replan, request_of, settle, wants_plan
from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import PLAN_LIMIT_BYTES, read_json, shorten
from lowmem.data import Dataset
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.remat import stage_names
from lowmem.runs.store import PLAN, RunFolder
from lowmem.train.observer import Observer
from lowmem.trial.plan_trial import Confirmed, confirm_run, wants_confirmation


def decide(settings: Settings, dataset: Dataset, observer: Observer) -> tuple[Settings, Plan, Confirmed | None]:
    """The settings with what the plan decided, the plan, and the trials by which it was confirmed, if it was to be."""
    classes, pictures = len(dataset.classes), len(dataset.train.labels)
    calibrator = calibrator_of(settings.config, observer.note)
    request = request_of(settings.config, classes, pictures, calibrator)
    choices = ranked(request, settings.config, pictures)
    choice, confirmed = choices[0], None
    _say(choice, observer)
    if wants_confirmation(settings.config):
        settled = settle(settings, choice, request.reasons).config
        confirmed = confirm_run(
            settled, request, choices, num_classes=classes, train_pictures=pictures, tell=observer.note
        )
        choice = confirmed.choice
        if choice.plan.schedule != choices[0].plan.schedule or choice.plan.batch != choices[0].plan.batch:
            observer.note("another plan is taken, by what was measured:")
            _say(choice, observer)
    return settle(settings, choice, request.reasons), _laddered(choice, observer).plan, confirmed


def _say(choice: Choice, observer: Observer) -> None:
    for line in (*memory_lines(choice), *explain(choice)):
        observer.note(line)
    if not choice.plan.exact:
        observer.warning(inexact(choice.plan))


def forked_plan(
    source: Path, old: Config, settings: Settings, dataset: Dataset, observer: Observer
) -> tuple[Settings, Plan | None]:
    """The source's plan, if nothing changes that it depends on; else a new one if the fork wants any."""
    new = settings.config
    if (old.memory, old.train.batch, old.train.micro_batch, old.train.precision, old.train.memory_format) == (
        (new.memory, new.train.batch, new.train.micro_batch, new.train.precision, new.train.memory_format)
    ):
        plan = read_plan(source, new)
        if plan is None or not plan.shares:  # else it is one process's part of the batch, and a fork is made by one
            return settings, plan
    if not wants_plan(new):
        return settings, None
    settings, choice = plan_run(settings, len(dataset.classes), len(dataset.train.labels), progress=observer.note)
    _say(choice, observer)
    return settings, _laddered(choice, observer).plan


def _laddered(choice: Choice, observer: Observer) -> Choice:
    """The choice with its ladder, and the observer told of it."""
    choice = with_ladder(choice)
    observer.note(explain_ladder(choice.plan))
    return choice


def plan_of(
    folder: RunFolder, old: Config, new: Config, dataset: Dataset, observer: Observer
) -> tuple[Plan | None, bool]:
    """The plan the run recorded; another only if another memory is asked for (invariant 7): then (plan, True).

    Raises CorruptCheckpoint for a plan.json that is damaged or another run's, Infeasible.
    """
    plan = read_plan(folder.path, new)
    if plan is None and wants_plan(old):
        raise CorruptCheckpoint(f"{folder.path / 'plan.json'} is missing, which this run was planned by: restore it")
    if (old.memory.vram, old.memory.card) == (new.memory.vram, new.memory.card) or not wants_plan(new):
        return plan, False
    pictures = len(dataset.train.labels)
    if plan is None:
        # The run was unplanned: what it computes is the plain step at its own micro-batch.
        request = request_of(new, len(dataset.classes), pictures)
        choice = choose(replace(request, settled=True, precisions=(new.train.precision,)))
    else:
        choice = replan(new, plan, len(dataset.classes), pictures, observer.note)
    _say(choice, observer)
    return _laddered(choice, observer).plan, True


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
