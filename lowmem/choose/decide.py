"""`decide`: the one way from the settings of a run to what it is trained with, for new runs, resumes and forks, for
`lowmem plan` and for looking ahead, by one process or by several (invariants 7 and 12).

What a run has recorded is kept if nothing that it depends on has changed and as many processes go on. With another
budget, or where the plan names parts of the network as an older version did, what is computed is kept: shares,
micro-batches, precision and memory format. Everything else is planned anew. A batch is chosen
(`--batch auto`) when a run begins, and never again: the settings that come out say which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lowmem.choose.batch_size import BatchSplit, Planner, describe_split
from lowmem.choose.execution import batch_norm_of, calibrator_of, for_card, request_of, wants_plan
from lowmem.choose.explain import explain, explain_ladder, inexact, memory_lines
from lowmem.choose.host import shortage
from lowmem.choose.planning import choose, with_ladder
from lowmem.choose.request import Choice, Request
from lowmem.config.processes import cards_of, for_process
from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.distributed.group import Group, Split, even_shares
from lowmem.models import network_of
from lowmem.plan.record import Plan
from lowmem.remat import check_plan, decompose


@dataclass(frozen=True)
class DataSize:
    """What a plan needs to know of the pictures."""

    classes: int = 10
    train_pictures: int | None = None  # None: not known


@dataclass(frozen=True)
class RecordedRun:
    """What a run has recorded: its settings, and the plans of all processes that trained it last, by rank."""

    config: Config
    plans: Sequence[Plan] = ()  # none of a run without plans
    fork: bool = False  # another run goes on from it, which may compute something else


class Confirmation(Protocol):
    """What came of trying choices by real steps (`lowmem.trial`): the one that is taken, and an event's fields."""

    @property
    def choice(self) -> Choice: ...

    @property
    def event(self) -> dict[str, Any]: ...


# Tries what was planned, the first one preferred. Raises Infeasible, PreflightError.
Confirm = Callable[[Config, Request, list[Choice]], Confirmation]


class Listener(Protocol):
    """Who is told what is decided, a line at a time."""

    def note(self, text: str) -> None:
        return

    def warning(self, text: str) -> None:
        return

    def phase(self, what: str, done: int | None = None, total: int | None = None) -> None:
        return


class Silence(Listener):
    """Nobody."""


@dataclass(frozen=True)
class Decision:
    """The settings with what was decided, this process's plan with its ladder (None: unplanned), and everybody's part
    of the batch. `changed`: not as it was recorded; `why`, if not for what was asked. `planned`: the choices behind
    plans on paper (they hold much that a run does not need). `confirmed`: the plan's trials, as an event's fields."""

    settings: Settings
    plan: Plan | None
    split: Split
    changed: bool = False
    why: str | None = None
    planned: BatchSplit | None = None
    confirmed: Mapping[str, Any] | None = None


def decide(
    settings: Settings,
    data: DataSize = DataSize(),
    group: Group | None = None,
    *,
    recorded: RecordedRun | None = None,
    confirm: Confirm | None = None,
    tell: Listener = Silence(),
    on_paper: bool = False,
    recalibrate: bool = False,
) -> Decision:
    """What a run with these settings is trained with.

    `group`: the processes that train it, all of which call this; by default one. `recorded`: of a run that has begun.
    `confirm`: tries the plan of a new run, or of one that goes on with another number of processes. `on_paper`: nothing
    is trained; plans are made here for one process on each of the cards in `memory.card`, without ladders, and only
    what takes long is told. `recalibrate`: measure the device again.

    Raises Infeasible, UsageError, PreflightError; in all processes alike.
    """
    group, config = group or Group(), settings.config
    plans = () if recorded is None else _plans_of_as_many(recorded, group.size, tell)
    holds = recorded is not None and plans and _still_holds(recorded, config)
    outdated = (_outdated(plans, config, data.classes) or _crowded(plans, group)) if holds else None
    if holds and outdated is None:
        return Decision(settings, plans[group.rank], _split(group, config, plans[group.rank]))
    if not (holds or wants_plan(config) or on_paper):
        return Decision(settings, None, _split(group, config, None), changed=recorded is not None)

    if outdated is not None:
        tell.note(outdated)
    tell.phase("planning")
    auto = config.memory.auto_batch and recorded is None
    anew = recorded is None or not plans or (recorded.fork and outdated is None)
    within = _bounded(config, recorded)
    if recorded is not None and not recorded.fork:
        within = _in_free_host_memory(within, tell)
    requests = _requests(within, data, group, tell, on_paper=on_paper, recalibrate=recalibrate)
    first = min(requests)
    own = requests[first]
    if anew:
        splits = _divided(config, data, Planner(requests, group), auto=auto)
    else:
        splits = [_same_computation(config, plans[group.rank], own, group)]
    choice = splits[0].choices[first]
    settled = _settled(settings, choice.plan, own.reasons, auto=auto)
    if on_paper:
        return Decision(settled, choice.plan, Split(splits[0].shares), planned=splits[0])
    _say_split(splits[0], choice, group, tell)
    event = None
    # A run that goes on keeps what it computes; its parts on other processes are new to their cards.
    if confirm is not None and (recorded is None or (anew and not recorded.fork and not group.alone)):
        choice, event = _confirmed(confirm, settled.config, splits, own, group, tell)
    choice = group.together(lambda: with_ladder(choice, tell.phase))
    tell.note(explain_ladder(choice.plan))
    return Decision(
        settings=_settled(settings, choice.plan, own.reasons, auto=auto),
        plan=choice.plan,
        split=_split(group, config, choice.plan),
        changed=recorded is not None,
        why=outdated,
        confirmed=event,
    )


def _requests(
    config: Config, data: DataSize, group: Group, tell: Listener, *, on_paper: bool, recalibrate: bool
) -> dict[int, Request]:
    """By rank: of this process; on paper of one process on each of the cards."""
    size = max(1, len(cards_of(config))) if on_paper else group.size

    def request(rank: int) -> Request:
        local = for_process(config, rank, size)
        calibrator = calibrator_of(local, tell.note, tell.phase, fresh=recalibrate)
        pictures = data.train_pictures or 0
        request = request_of(local, data.classes, pictures, calibrator, processes=size, on_paper=on_paper)
        return replace(request, phase=tell.phase)

    return group.together(lambda: {rank: request(rank) for rank in (range(size) if on_paper else (group.rank,))})


def _divided(config: Config, data: DataSize, planner: Planner, *, auto: bool) -> list[BatchSplit]:
    """Shares and plans made anew; with `auto` of every batch that fits, the preferred one first."""
    with planner.group.alike():
        if auto:
            return planner.divide_auto(config.train.batch, data.train_pictures)
        return [planner.divide(config.train.batch, may_accumulate=config.memory.allow_accumulation)]


def _confirmed(
    confirm: Confirm, config: Config, splits: Sequence[BatchSplit], request: Request, group: Group, tell: Listener
) -> tuple[Choice, Mapping[str, Any]]:
    """What is taken of what was planned, by real steps, and an event's fields. Of one process among several only its
    own part is tried: what all have agreed on stays."""
    choices = [split.choices[group.rank] for split in splits]
    if not group.alone:
        del choices[1:]
        plan = choices[0].plan
        request = replace(request, batch=plan.batch, modes={plan.precision: plan.memory_format})
    confirmed = group.together(lambda: confirm(config, request, choices))
    first, choice = choices[0].plan, confirmed.choice
    if not group.alone:
        choice = replace(choice, plan=replace(choice.plan, shares=first.shares))
    if any(group.gather((choice.plan.schedule, choice.plan.batch) != (first.schedule, first.batch))):
        tell.note("another plan is taken, by what was measured:")
        _say(choice, group, tell)
    return choice, confirmed.event


# -- what was recorded -------------------------------------------------------------------------------------------------


def _plans_of_as_many(recorded: RecordedRun, size: int, tell: Listener) -> Sequence[Plan | None]:
    """The recorded plans if they are of `size` processes (None each for a run without plans); else nothing."""
    plans = recorded.plans
    if not plans:
        return (None,) * size
    shares = plans[0].shares
    if len(shares) != size:
        return ()
    # A kill may have come between writing two of them.
    together = len(plans) == size and all(
        plan.shares == shares and plan.batch == max(1, share) for plan, share in zip(plans, shares, strict=True)
    )
    if not together:
        tell.warning("the plans of the processes do not belong together: they are made anew")
    return plans if together else ()


def _still_holds(recorded: RecordedRun, config: Config) -> bool:
    """Whether nothing has changed that the recorded plans depend on. On resume only the budget can, and without any a
    run goes on as it was planned."""
    if recorded.fork:
        known = bool(recorded.plans) or not wants_plan(config)
        return known and _basis(recorded.config) == _basis(config)
    return not wants_plan(config) or _budget(recorded.config) == _budget(config)


def _bounded(config: Config, recorded: RecordedRun | None) -> Config:
    """Without a budget by now, it goes on within the one that it was planned for."""
    return config if recorded is None or wants_plan(config) else _with_memory_of(config, recorded.config)


def _with_memory_of(config: Config, other: Config) -> Config:
    return config.model_copy(update={"memory": other.memory})


def _outdated(plans: Sequence[Plan | None], config: Config, classes: int) -> str | None:
    """Why plans that hold cannot be followed by this version, which may divide the network otherwise than the one that
    made them."""
    known = [plan for plan in plans if plan is not None]
    stages = decompose(network_of(config, classes)) if known else ()
    for plan in known:
        try:
            check_plan(plan, stages)
        except ValueError as error:
            return f"the recorded plan is an older version's ({error}): the same computation is planned again"
    return None


def _crowded(plans: Sequence[Plan | None], group: Group) -> str | None:
    """Why plans that hold cannot be followed on this machine, or on another process's: what is to wait in host memory
    has no room there. The smaller plans in reserve count too."""
    if not any(_waiting_bytes(plan) for plan in plans):
        return None
    short = next(filter(None, group.gather(shortage(_waiting_bytes(plans[group.rank])))), None)
    return short and f"the recorded plan lets wait {short}: the same computation is planned again"


def _waiting_bytes(plan: Plan | None) -> int:
    return 0 if plan is None else max(one.predicted.host_bytes or 0 for one in (plan, *plan.ladder))


def _in_free_host_memory(config: Config, tell: Listener) -> Config:
    """A run that has begun is not refused for a machine with less: there it goes on as with `auto`."""
    size = config.memory.host
    if isinstance(size, str) or (why := shortage(size)) is None:
        return config
    tell.note(f"memory.host is {why}: planned for half of that")
    return config.model_copy(update={"memory": config.memory.model_copy(update={"host": "auto"})})


def _budget(config: Config) -> tuple[object, ...]:
    memory = config.memory
    waiting = (memory.host, memory.link) if memory.host != "off" else None
    return memory.vram, memory.tensors, memory.card, memory.platform if memory.card else None, waiting


def _basis(config: Config) -> tuple[object, ...]:
    train = config.train
    computed = (train.batch, train.micro_batch, train.precision, train.memory_format, train.sync_bn, config.optim.work)
    loss = (train.label_smoothing > 0, config.data.mixup > 0)
    kernels = (train.device, train.batch_norm, train.tf32, train.deterministic, train.freeze)
    # The pictures lie on the card beside the step.
    data = config.data
    count = (data.train_subset, data.val_split, data.val_folder, data.test_split, data.skip_damaged)
    pictures = (data.source, *count) if for_card(config) else ()
    return *_budget(config), config.memory.allow_accumulation, *computed, *loss, data.image_size, *kernels, *pictures


def _same_computation(config: Config, plan: Plan | None, request: Request, group: Group) -> BatchSplit:
    """For another budget what the recorded plan, or the plain step of a run without one, computes: shares,
    micro-batches, precision, memory format. Raises Infeasible."""
    train = config.train
    shares = even_shares(train.batch, group.size) if plan is None else plan.shares
    share = max(1, shares[group.rank])
    request = replace(
        request,
        batch=share,
        micro_batch=min(share, train.micro_batch or share) if plan is None else plan.micro_batch,
        modes={train.precision: train.memory_format},
        batch_norm=batch_norm_of(config) if plan is None else plan.batch_norm,
        settled=True,
    )
    choice = group.together(lambda: choose(request))
    choice = replace(choice, plan=replace(choice.plan, shares=shares))
    seconds = group.gather(choice.plan.predicted.step_seconds if shares[group.rank] else 0.0)
    return BatchSplit(shares, tuple(seconds), {group.rank: choice})


# -- what comes of it --------------------------------------------------------------------------------------------------


def _split(group: Group, config: Config, plan: Plan | None) -> Split:
    """By the shares in the plans of all processes; even shares without a plan."""
    if plan is not None:
        return Split(plan.shares, group.rank, tuple(group.gather(plan.micro_batch)))
    shares, micro = even_shares(config.train.batch, group.size), config.train.micro_batch
    return Split(shares, group.rank, tuple(min(share, micro or share) for share in shares))


def _settled(settings: Settings, plan: Plan, reasons: Mapping[str, str], *, auto: bool) -> Settings:
    """The settings with what was decided; `reasons`: setting -> why."""
    if auto:
        settings = _with_batch(settings, plan.effective_batch)
    for name in ("precision", "memory_format"):
        key, value = f"train.{name}", getattr(plan, name)
        if getattr(settings.config.train, name) != value:
            settings = settings.replace({key: value}, reasons.get(key, "auto: the plan"))
    return settings


def batch_chosen(settings: Settings) -> Settings:
    """Of a run that has begun. Older versions recorded that the batch is to be chosen beside the one that was."""
    if not settings.config.memory.auto_batch:
        return settings
    return settings.replace({"memory.auto_batch": False}, "train.batch is chosen")


def _with_batch(settings: Settings, batch: int) -> Settings:
    """The linear rule (Goyal et al., "Accurate, large minibatch SGD", 2017): the learning rate follows the batch."""
    config = settings.config
    before = config.train.batch
    settings = batch_chosen(settings.replace({"train.batch": batch}, "auto: the most pictures per second that fit"))
    if batch == before:
        return settings
    factor = batch / before
    rates = {"optim.lr": config.optim.lr * factor, "schedule.low_start_lr": config.schedule.low_start_lr * factor}
    return settings.replace(rates, f"linear rule: batch {before} -> {batch}")


def _say_split(split: BatchSplit, choice: Choice, group: Group, tell: Listener) -> None:
    if not group.alone:
        for line in describe_split(split, group.gather(choice.budget.source)):
            tell.note(line)
    _say(choice, group, tell)


def _say(choice: Choice, group: Group, tell: Listener) -> None:
    for line in (*memory_lines(choice), *explain(choice)):
        tell.note(line)
    if any(group.gather(not choice.plan.exact)):
        tell.warning(inexact(choice.plan) if not choice.plan.exact else "another process accumulates gradients")
