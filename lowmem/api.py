"""What the commands do, from Python: `run_training`, `resume_training`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem import fork
from lowmem.choose import resolve_execution
from lowmem.choose.budget import ASSUMED_CONTEXT_BYTES
from lowmem.choose.execution import refuse_unsafe, require_device
from lowmem.choose.explain import explain, explain_ladder, inexact
from lowmem.choose.ladder import with_ladder
from lowmem.choose.planning import Choice, choose
from lowmem.choose.session import plan_run, ranked, replan, request_of, settle, wants_plan
from lowmem.config import Config, known_keys
from lowmem.confirm import Confirmed, confirm_run, wants_confirmation
from lowmem.data import Dataset, load
from lowmem.environment import describe
from lowmem.errors import CorruptCheckpoint, OutOfMemory, UsageError
from lowmem.models import build, skeleton
from lowmem.plan.record import Plan
from lowmem.preflight import preflight
from lowmem.remat import stage_names
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.store import RunFolder, require_run
from lowmem.settings import Settings, from_yaml, refuse_changes, to_yaml
from lowmem.train.loop import Outcome, Trainer
from lowmem.train.observer import Observer
from lowmem.train.schedule import starts_low
from lowmem.train.state import config_hash, restore
from lowmem.train.step import Execution
from lowmem.train.survive import classify


@dataclass(frozen=True)
class RunResult:
    """The folder of a run and how it ended."""

    path: Path
    outcome: Outcome


def run_training(
    config: Config | Settings, out: Path | str | None = None, observer: Observer | None = None
) -> RunResult:
    """What `lowmem train` does: load the data, make the run folder (default `runs/<arch>`), preflight, train.

    Raises LowmemError: UsageError if the folder exists, PreflightError before the first step, Interrupted after a
    signal with everything saved, DiskError.
    """
    observer = observer or Observer()
    settings = config if isinstance(config, Settings) else Settings(config, dict.fromkeys(known_keys(), "caller"))
    planned = wants_plan(resolve_execution(settings).config)
    settings = resolve_execution(settings, leave_precision=planned)
    if settings.config.memory.auto_batch and not planned:
        raise UsageError("--batch auto needs something to fit into: give --vram, like --vram 6G")
    path = Path(out) if out is not None else Path("runs") / settings.config.model.arch
    _refuse_existing(path)
    dataset = _load_data(settings.config, observer)
    plan: Plan | None = None
    confirmed: Confirmed | None = None
    if planned:
        settings, plan, confirmed = _decide(settings, dataset, observer)
    environment = describe(settings.config.train.device)
    with RunFolder.create(path, to_yaml(settings), environment) as folder:
        try:
            with _out_of_memory(path):
                trainer = _make_trainer(settings.config, dataset, observer, plan)
            preflight(trainer, folder)
            if plan is not None:
                folder.write_plan(plan.to_json())
            trainer.state.low_start = starts_low(settings.config)
            # From here on a run can be resumed, however early it is killed.
            checkpoints.save(folder.checkpoints, trainer.checkpoint(), keep=settings.config.checkpoint.keep)
        except BaseException:
            # Not a step was taken: nothing is to be kept, and the folder must not be in the way of another try.
            folder.discard()
            raise
        folder.event("start", **environment)
        if confirmed is not None:
            folder.event("confirmed", **confirmed.event)
        if plan is not None and not plan.exact:
            folder.event("warning", what=inexact(plan))
        observer.note(_headline(settings.config, dataset, path))
        return _go(trainer, folder)


def _decide(settings: Settings, dataset: Dataset, observer: Observer) -> tuple[Settings, Plan, Confirmed | None]:
    """The settings with what the plan decided, the plan, and the trials by which it was confirmed, if it was to be."""
    classes, pictures = len(dataset.classes), len(dataset.train.labels)
    request = request_of(settings.config, classes, pictures)
    choices = ranked(request, settings.config, pictures)
    confirmed = None
    choice = choices[0]
    if wants_confirmation(settings.config):
        for line in explain(choice):
            observer.note(line)
        settled = settle(settings, choice).config
        confirmed = confirm_run(
            settled, request, choices, num_classes=classes, train_pictures=pictures, tell=observer.note
        )
        choice = confirmed.choice
        same = choice.plan.schedule == choices[0].plan.schedule and choice.plan.batch == choices[0].plan.batch
        observer.note("the plan is confirmed:" if same else "another plan is taken, by what was measured:")
    choice = _told(choice, observer)
    if not choice.plan.exact:
        observer.warning(inexact(choice.plan))
    return settle(settings, choice), choice.plan, confirmed


def resume_training(path: Path | str, changes: Settings | None = None, observer: Observer | None = None) -> RunResult:
    """What `lowmem resume` does: go on from the newest checkpoint that verifies, in the middle of its epoch.

    `changes`: the recorded settings with operational ones replaced (see `config.OPERATIONAL`). Raises UsageError if
    the folder is no run or anything else differs, CorruptCheckpoint if nothing can be resumed.
    """
    observer = observer or Observer()
    path = Path(path)
    recorded = recorded_settings(path)
    settings = resolve_execution(changes or recorded)
    refuse_changes(recorded.config, settings.config, str(path))
    require_device(settings.config.train.device)
    with RunFolder.open(path) as folder:
        if not checkpoints.found(folder.checkpoints):
            raise CorruptCheckpoint(f"{path} has no checkpoint to go on from: start again under another --out")
        saved, where, skipped = checkpoints.load_newest(folder.checkpoints)
        for reason in skipped.values():
            observer.warning(f"skipped a damaged checkpoint: {reason}")
            folder.event("warning", what="checkpoint skipped", reason=reason)
        dataset = _load_data(settings.config, observer)
        plan, replanned = _plan_of(folder, recorded.config, settings.config, dataset, observer)
        with _out_of_memory(path):
            trainer = _make_trainer(settings.config, dataset, observer, plan)
            trainer.state = restore(saved, trainer.model, trainer.optimizer, trainer.step.scaler, trainer.identity)
        state = trainer.state
        # Only now is it certain that this run goes on from here: nothing was written before.
        checkpoints.set_aside(skipped)
        if replanned and plan is not None:
            folder.write_plan(plan.to_json())
            folder.write_config(to_yaml(settings))
            folder.event("replan", budget_bytes=plan.budget_bytes)
        folder.cut_back(epoch=state.epoch, step=state.step)
        folder.event(
            "resume",
            checkpoint=where.name,
            epoch=state.epoch,
            step=state.step,
            **describe(settings.config.train.device),
        )
        if state.epoch >= settings.config.train.epochs:
            observer.note(f"{path} is finished: all {state.epoch} epochs are done")
        else:
            observer.note(f"resuming {path} from {where.name}: epoch {state.epoch + 1}, step {state.step_in_epoch}")
        return _go(trainer, folder)


def fork_run(
    source: Path | str,
    *,
    at: int,
    changes: Settings,
    out: Path | str | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """What `lowmem fork` does: a new run (default `SOURCE-fork`) from the end of epoch `at`, trained to its end.

    `changes`: the recorded settings with some replaced. Raises UsageError if nothing changes, the network would, or
    there is no such checkpoint; the old run is only read.
    """
    observer = observer or Observer()
    source = Path(source).resolve()
    path = Path(out) if out is not None else source.with_name(f"{source.name}-fork")
    _refuse_existing(path)
    old, settings = recorded_settings(source).config, resolve_execution(changes)
    differing = fork.check(old, settings.config)
    saved, where = fork.find(source, at)
    dataset = _load_data(settings.config, observer)
    carried = fork.carry_over(saved, old, settings.config, dataset)
    steps = fork.steps_per_epoch(settings.config, dataset)
    for line in fork.explain(differing, old, settings.config, carried, steps):
        observer.note(line)
    settings, plan = _forked_plan(source, old, settings, dataset, observer)
    with RunFolder.create(path, to_yaml(settings), describe(settings.config.train.device)) as folder:
        if plan is not None:
            folder.write_plan(plan.to_json())
        fork.write(carried, source, settings, folder, where)
    return resume_training(path, None, observer)


def _forked_plan(
    source: Path, old: Config, settings: Settings, dataset: Dataset, observer: Observer
) -> tuple[Settings, Plan | None]:
    """The source's plan, if nothing changes that it depends on; else a new one if the fork wants any."""
    new = settings.config
    if (old.memory, old.train.batch, old.train.micro_batch, old.train.precision, old.train.memory_format) == (
        (new.memory, new.train.batch, new.train.micro_batch, new.train.precision, new.train.memory_format)
    ):
        return settings, read_plan(source, new)
    if not wants_plan(new):
        return settings, None
    settings, choice = plan_run(settings, len(dataset.classes), len(dataset.train.labels))
    return settings, _told(choice, observer).plan


def _told(choice: Choice, observer: Observer) -> Choice:
    """The choice with its ladder, and the observer told of both."""
    for line in explain(choice):
        observer.note(line)
    choice = with_ladder(choice)
    observer.note(explain_ladder(choice.plan))
    return choice


def recorded_settings(path: Path) -> Settings:
    """The settings of an existing run. Raises UsageError if it is none."""
    require_run(path)
    return from_yaml(path / "config.yaml")


def _refuse_existing(path: Path) -> None:
    """The same refusal as `RunFolder.create`, before minutes are spent on decoding pictures."""
    if path.is_dir() and any(path.iterdir()):
        RunFolder.create(path, "", {})
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another folder with --out")


def _load_data(config: Config, observer: Observer) -> Dataset:
    return load(config.data, config.seed, progress=observer.data_progress)


def _plan_of(
    folder: RunFolder, old: Config, new: Config, dataset: Dataset, observer: Observer
) -> tuple[Plan | None, bool]:
    """The plan the run recorded; another only if another memory is asked for (invariant 7): then (plan, True).

    Raises CorruptCheckpoint for a plan.json that is damaged or another run's, Infeasible.
    """
    plan = read_plan(folder.path, new)
    if (old.memory.vram, old.memory.card) == (new.memory.vram, new.memory.card) or not wants_plan(new):
        return plan, False
    pictures = len(dataset.train.labels)
    if plan is None:
        # The run was unplanned: what it computes is the plain step at its own micro-batch.
        request = request_of(new, len(dataset.classes), pictures)
        choice = choose(replace(request, settled=True, precisions=(new.train.precision,)))
    else:
        choice = replan(new, plan, len(dataset.classes), pictures)
    return _told(choice, observer).plan, True


def read_plan(run: Path, config: Config) -> Plan | None:
    """The plan in a run's plan.json, None if it has none. Raises CorruptCheckpoint if it is damaged or does not belong
    to these settings."""
    path = run / "plan.json"
    if not path.is_file():
        return None
    try:
        plan = Plan.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} holds no plan ({error}): restore it, or start another run") from None
    model, train = config.model, config.train
    names = stage_names(skeleton(model.arch, model.block, width=model.width))
    ours = (names, train.batch, train.precision, train.memory_format)
    if (plan.stages, plan.batch, plan.precision, plan.memory_format) != ours:
        raise CorruptCheckpoint(f"{path} is the plan of another run: restore this run's own, or start another run")
    return plan


def _go(trainer: Trainer, folder: RunFolder) -> RunResult:
    """Trains. Raises OutOfMemory with the way out; the last checkpoint stands."""
    _cap_emulated(trainer.config)
    with _out_of_memory(folder.path):
        return RunResult(folder.path, trainer.run(folder))


@contextmanager
def _out_of_memory(path: Path) -> Iterator[None]:
    """Turns the library's exception into ours, wherever there is no step to undo: while a run is set up."""
    failure = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = classify(error, "setting up")
        if failure is None:
            raise
    # Outside of the handler, which would hold on to the tensors.
    if failure is not None:
        raise OutOfMemory(
            f"{failure.words} ({failure.message}); the last checkpoint, if there is one, stands: free what others use, "
            f"or give less to plan for, like `lowmem resume {path} --vram 4G`"
        )


def _cap_emulated(config: Config) -> None:
    """A larger card made to behave like one of --vram: the allocator's segments and the context stay within it."""
    if config.train.device == "cuda" and config.memory.vram is not None:
        from lowmem.measure.cap import cap_allocator

        cap_allocator(config.memory.vram - ASSUMED_CONTEXT_BYTES)


def _make_trainer(config: Config, dataset: Dataset, observer: Observer, plan: Plan | None) -> Trainer:
    refuse_unsafe(config)
    model = build(
        config.model.arch,
        config.model.block,
        width=config.model.width,
        num_classes=len(dataset.classes),
        seed=config.seed,
    )
    execution = Execution(config.train.device, config.train.precision, config.train.memory_format)
    identity = {"settings": config_hash(config), "data": dataset.fingerprint}
    return Trainer(config, model, dataset, execution, identity, observer, plan)


def _headline(config: Config, dataset: Dataset, path: Path) -> str:
    model, train = config.model, config.train
    held = f", {len(dataset.val.labels):,} held back" if dataset.val is not None else ""
    return (
        f"{model.arch} ({model.block}, width {model.width}) on {dataset.name}: {len(dataset.train.labels):,} pictures "
        f"to train on{held}, {len(dataset.test.labels):,} to test; {train.epochs} epochs, batch {train.batch}, "
        f"{train.precision}, {train.memory_format}, {train.device}; run folder {path}"
    )
