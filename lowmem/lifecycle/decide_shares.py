"""What several processes train a run with: planned together, or as the run has recorded it for as many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.choose.batch_split import Planner, describe, divide, divide_auto
from lowmem.choose.explain import explain, explain_ladder, inexact, memory_lines
from lowmem.choose.ladder import with_ladder
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.choose.session import calibrator_of, follow_batch, plan_run, request_of, settle_modes, wants_plan
from lowmem.config.schema import Config, for_process
from lowmem.config.settings import Settings
from lowmem.core.errors import CorruptCheckpoint
from lowmem.data import Dataset
from lowmem.distributed.group import Group
from lowmem.distributed.split import Split, even_shares
from lowmem.lifecycle.decide import decide, plan_of, read_plan
from lowmem.plan.record import Plan
from lowmem.runs.store import PLAN, RunFolder, plan_file
from lowmem.train.observer import Observer
from lowmem.trial.plan_trial import Confirmed, confirm_run, wants_confirmation


@dataclass(frozen=True)
class Decided:
    """The settings with what was decided, this process's plan (None: unplanned) with the trials that confirmed it, and
    everybody's part of the batch."""

    settings: Settings
    plan: Plan | None
    split: Split
    confirmed: Confirmed | None = None


def undivided(group: Group, config: Config) -> Split:
    """Even shares, for a run without a plan."""
    shares = even_shares(config.train.batch, group.size)
    micro = config.train.micro_batch
    return Split(shares, group.rank, tuple(min(share, micro or share) for share in shares))


def split_of(group: Group, plan: Plan) -> Split:
    """By the shares in the plans of all processes."""
    return Split(plan.shares, group.rank, tuple(group.gather(plan.micro_batch)))


def decide_jointly(group: Group, settings: Settings, dataset: Dataset, observer: Observer) -> Decided:
    """What a new run is trained with. Raises Infeasible, UsageError, PreflightError."""
    if not wants_plan(settings.config):
        return Decided(settings, None, undivided(group, settings.config))
    if not group.alone:
        return decide_shares(group, settings, dataset, observer)
    for_process(settings.config, 0, 1)
    settings, plan, confirmed = decide(settings, dataset, observer)
    return Decided(settings, plan, Split((plan.batch,)), confirmed)


def plan_again(
    group: Group, folder: RunFolder, recorded: Config, settings: Settings, dataset: Dataset, observer: Observer
) -> tuple[Decided, bool]:
    """What a run goes on with: as it is recorded for as many processes, else planned anew; then (…, True).

    With another budget the same number of processes keeps its shares and micro-batches: what is computed stays. Raises
    CorruptCheckpoint, Infeasible, UsageError."""
    config = settings.config
    recorded_plans = group.share(group.lead(lambda: _recorded_plans(folder, recorded, config), None))
    plans = group.together(lambda: [Plan.from_json(plan) for plan in recorded_plans])
    planned_for = len(plans[0].shares) if plans and plans[0].shares else 1
    if group.alone and planned_for == 1:
        plan, replanned = plan_of(folder, recorded, config, dataset, observer)
        return Decided(settings, plan, undivided(group, config)), replanned
    same_memory = (recorded.memory.vram, recorded.memory.card) == (config.memory.vram, config.memory.card)
    if not plans and (same_memory or not wants_plan(config)):
        return Decided(settings, None, undivided(group, config)), False
    whole = planned_for == group.size and _belong_together(plans)
    if plans and planned_for == group.size and not whole:
        observer.warning("the plans of the processes do not belong together: they are made anew")
    if whole and same_memory:
        return Decided(settings, plans[group.rank], split_of(group, plans[group.rank])), False
    if group.alone:
        settings, choice = plan_run(settings, len(dataset.classes), len(dataset.train.labels))
        _say(group, choice, observer)
        return Decided(settings, with_ladder(choice).plan, undivided(group, config)), True
    if whole:
        return _replan_own(group, settings, plans[group.rank], dataset, observer), True
    return decide_shares(group, settings, dataset, observer, plans[0] if plans else None), True


def _belong_together(plans: Sequence[Plan]) -> bool:
    """Whether these are the plans of all processes, made at once: a kill may have come between writing two of them."""
    shares = plans[0].shares if plans else ()
    return len(plans) == len(shares) and all(
        plan.shares == shares and plan.batch == max(1, share) for plan, share in zip(plans, shares, strict=True)
    )


def _replan_own(group: Group, settings: Settings, plan: Plan, dataset: Dataset, observer: Observer) -> Decided:
    """For another budget, what this process's plan computes."""
    local = group.together(lambda: for_process(settings.config, group.rank, group.size))

    def again() -> Choice:
        request = replace(
            _request(local, dataset, observer, plan), batch=plan.batch, micro_batch=plan.micro_batch, settled=True
        )
        return with_ladder(choose(request))

    choice = group.together(again)
    _say(group, choice, observer)
    observer.note(explain_ladder(choice.plan))
    ladder = tuple(replace(rung, shares=plan.shares) for rung in choice.plan.ladder)
    own = replace(choice.plan, shares=plan.shares, ladder=ladder)
    return Decided(settings, own, split_of(group, own))


def _recorded_plans(folder: RunFolder, recorded: Config, config: Config) -> list[dict[str, Any]]:
    """Of all processes that last trained the run; none for a run without plans. Raises CorruptCheckpoint."""
    first = read_plan(folder.path, config)
    if first is None:
        if wants_plan(recorded):
            raise CorruptCheckpoint(f"{folder.path / PLAN} is missing, which this run was planned by: restore it")
        return []
    others = (read_plan(folder.path, config, plan_file(rank)) for rank in range(1, len(first.shares)))
    return [plan.to_json() for plan in (first, *others) if plan is not None]


def record_plans(group: Group, plan: Plan | None, folder: RunFolder) -> None:
    """Writes every process's plan into the run's folder. Raises DiskError."""
    if plan is None:
        return
    plans = group.gather(plan.to_json())

    def write() -> None:
        for rank, one in enumerate(plans):
            folder.write_plan(one, rank)
        folder.forget_plans(after=group.size)

    group.lead(write, None)


def decide_shares(
    group: Group, settings: Settings, dataset: Dataset, observer: Observer, settled: Plan | None = None
) -> Decided:
    """Plans of all processes and their shares. `settled`: a plan of a run that has begun, whose batch, precision and
    memory format stay. Raises Infeasible, UsageError, PreflightError, in all processes the same."""
    if not wants_plan(settings.config):
        return Decided(settings, None, undivided(group, settings.config))
    local = group.together(lambda: for_process(settings.config, group.rank, group.size))
    pictures = len(dataset.train.labels)
    request = group.together(lambda: _request(local, dataset, observer, settled))
    planner = Planner({group.rank: request}, group.size, lambda values: _gathered(group, values))
    recipe_batch = settings.config.train.batch
    auto = settings.config.memory.auto_batch and settled is None
    with group.alike():
        divided = divide_auto(planner, recipe_batch, pictures) if auto else divide(planner, recipe_batch)
    choice, shares = divided.choices[group.rank], divided.shared.shares
    if auto:
        settings = follow_batch(settings, sum(shares))
    settings = settle_modes(settings, choice.plan, request.reasons)
    for line in describe(divided.shared, group.gather(choice.budget.source)):
        observer.note(line)
    _say(group, choice, observer)
    confirmed = None
    if wants_confirmation(local):
        confirmed = group.together(lambda: _confirm(settings.config, request, choice, dataset, observer))
        choice = replace(confirmed.choice, plan=replace(confirmed.choice.plan, shares=shares))
    choice = group.together(lambda: with_ladder(choice))
    observer.note(explain_ladder(choice.plan))
    return Decided(settings, choice.plan, split_of(group, choice.plan), confirmed)


def _request(local: Config, dataset: Dataset, observer: Observer, settled: Plan | None) -> Request:
    calibrator = calibrator_of(local, observer.note)
    request = request_of(local, len(dataset.classes), len(dataset.train.labels), calibrator, joint=True)
    if settled is None:
        return request
    formats: dict[str, str] = {settled.precision: settled.memory_format}
    return replace(request, precisions=(settled.precision,), formats=formats)


def _confirm(config: Config, request: Request, choice: Choice, dataset: Dataset, observer: Observer) -> Confirmed:
    """Of this process's share, on its own card; the sums over the processes are not a part of it."""
    share = choice.plan.batch
    local = config.model_copy(update={"train": config.train.model_copy(update={"batch": share, "micro_batch": None})})
    return confirm_run(
        local,
        replace(
            request,
            batch=share,
            precisions=(choice.plan.precision,),
            formats={choice.plan.precision: choice.plan.memory_format},
        ),
        [choice],
        num_classes=len(dataset.classes),
        train_pictures=len(dataset.train.labels),
        tell=observer.note,
    )


def _gathered(group: Group, values: Mapping[int, Any]) -> Sequence[Any]:
    return group.gather(values[group.rank])


def _say(group: Group, choice: Choice, observer: Observer) -> None:
    for line in (*memory_lines(choice), *explain(choice)):
        observer.note(line)
    if any(group.gather(not choice.plan.exact)):
        observer.warning(inexact(choice.plan) if not choice.plan.exact else "another process accumulates gradients")


def norm_words(group: Group, config: Config, split: Split) -> str:
    """What batch norm sees, which several processes must say."""
    shares = " + ".join(map(str, split.shares))
    head = f"{group.size} processes: a batch of {split.batch} is {shares} pictures"
    if config.train.sync_bn:
        return f"{head}; batch norm is over all of them (train.sync_bn), as in one process"
    return f"{head}; each one's batch norm sees its own only, as is usual (--sync-bn: all of them, as in one process)"


def changed_words(before: int, group: Group, config: Config) -> str:
    """What a resume on another number of processes must say."""
    stays = "the same pictures in the same order, the same batch and learning rates"
    told = f"saved by {_count(before)}, going on with {_count(group.size)}: {stays}"
    if config.train.sync_bn:
        return f"{told}; sums have another rounding, so that from here on it is not bit for bit the run that it was"
    sees = "the whole batch at once" if group.alone else "each process's own pictures"
    return (
        f"{told}; but batch norm now sees {sees}, so that from here on gradients are not those that the run would have "
        "had"
    )


def _count(size: int) -> str:
    return "1 process" if size == 1 else f"{size} processes"
