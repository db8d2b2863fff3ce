"""What the commands do, from Python: `run_training`, `resume_training`, `fork_run`, `extend_run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowmem.calibrate.environment import describe
from lowmem.choose import resolve_execution
from lowmem.choose.decide import DataSize, Decision, batch_chosen, decide
from lowmem.choose.execution import numerics_of, refuse_unsafe, require_device
from lowmem.choose.explain import inexact
from lowmem.choose.session import wants_plan
from lowmem.config.schema import Config, flatten, known_keys
from lowmem.config.settings import Settings, to_yaml
from lowmem.core.errors import OutOfMemory, PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.data import Dataset
from lowmem.distributed.group import Group
from lowmem.lifecycle import fork
from lowmem.lifecycle.preflight import preflight
from lowmem.lifecycle.processes import (
    begun_before,
    changed_words,
    joined,
    launched,
    launcher,
    load_data,
    new_folder,
    norm_words,
    require_pictures,
    share_settings,
)
from lowmem.lifecycle.recorded_plans import forked_run, record_plans, recorded_run
from lowmem.lifecycle.resume import (
    changed_settings,
    device_only,
    elsewhere,
    keeping,
    newest,
    recorded_settings,
    shared_checkpoint,
    tidy,
)
from lowmem.lifecycle.startup_signals import leaving_early
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import classify
from lowmem.models import build
from lowmem.remat.libraries import prepare_libraries
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.null_writer import AbsentFolder
from lowmem.runs.setup import refuse_existing
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import Execution
from lowmem.train.loop import Outcome, Trainer
from lowmem.train.metrics import check_tensorboard
from lowmem.train.observer import Observer
from lowmem.train.schedule import starts_low
from lowmem.train.state import check_position, config_hash, restore
from lowmem.trial.plan_trial import confirm_run, wants_confirmation


@dataclass(frozen=True)
class RunResult:
    """The folder of a run and how it ended."""

    path: Path
    outcome: Outcome


@leaving_early()
def run_training(
    config: Config | Settings,
    out: Path | str | None = None,
    observer: Observer | None = None,
    *,
    dry_run: bool = False,
) -> RunResult:
    """What `lowmem train` does: load the data, make the run folder (default `runs/<arch>`), preflight, train. Started
    by torchrun, the processes do it together; rank 0 writes.

    `dry_run`: all of that up to the first step, and then nothing of it stays.

    Raises LowmemError: UsageError if the folder exists, PreflightError before the first step, Interrupted after a
    signal with everything saved, DiskError, PeerLost.
    """
    settings = config if isinstance(config, Settings) else Settings(config, dict.fromkeys(known_keys(), "caller"))
    launch, observer = launched(observer, settings.config.train.device)
    planned = wants_plan(resolve_execution(settings).config)
    settings = resolve_execution(settings, planned=planned)
    asked = [name for name in ("calibrate", "confirm") if getattr(settings.config.memory, name) == "always"]
    if asked and not planned:
        raise UsageError(f"memory.{asked[0]}=always needs something to fit into: give --vram, like --vram 6G")
    if settings.config.memory.auto_batch and not planned:
        raise UsageError("--batch auto needs something to fit into: give --vram, like --vram 6G")
    path = Path(out) if out is not None else Path("runs") / settings.config.model.arch
    with joined(launch, settings.config) as group:
        settings = share_settings(group, lambda: settings)
        if begun_before(group, path, settings.config):
            observer.note(f"started again after a failure (restart {group.restarts}): going on with {path}")
            return _go_on(group, path, None, observer)
        return _begin(group, settings, path, observer, dry_run)


def _begin(group: Group, settings: Settings, path: Path, observer: Observer, dry_run: bool) -> RunResult:
    # The settings as they were asked for, before anything is planned: by these a restart knows its own run.
    asked = {"asked": config_hash(settings.config), "launcher": launcher()}
    prepare_libraries(numerics_of(settings.config.train))
    require_pictures(group, settings.config)
    group.lead(lambda: _refuse_existing(path), None)
    group.together(lambda: check_tensorboard(settings.config))
    dataset = load_data(group, settings.config, observer)
    data = _size(dataset)
    pictures = len(dataset.train.labels)
    confirm = partial(confirm_run, num_classes=data.classes, train_pictures=pictures, tell=observer.note)
    wanted = wants_confirmation(settings.config)
    decided = decide(settings, data, group, confirm=confirm if wanted else None, tell=observer)
    settings, plan, confirmed = decided.settings, decided.plan, decided.confirmed
    environment = describe(settings.config.train.device) | {"processes": group.size}
    with new_folder(group, path, to_yaml(settings), {**environment, **asked}) as folder:
        try:
            trainer = _make_trainer(group, decided, dataset, observer, path)
            trainer.state.low_start = starts_low(settings.config)
            _cap_emulated(trainer)
            with _out_of_memory(path):
                preflight(trainer, folder)
            observer.note(_headline(settings.config, dataset, path))
            if dry_run:
                return _leave_nothing(trainer, folder)
            record_plans(group, trainer.plan, folder)
            # From here on a run can be resumed, however early it is killed.
            keep = settings.config.checkpoint.keep
            group.lead(lambda: checkpoints.save(folder.checkpoints, trainer.checkpoint(), keep=keep), folder.path)
        except BaseException:
            # Not a step was taken: nothing is to be kept, and the folder must not be in the way of another try.
            folder.discard()
            raise
        folder.event("start", steps_per_epoch=trainer.batches.steps_per_epoch, **environment)
        if confirmed is not None:
            folder.event("confirmed", **confirmed.event)
        if plan is not None and not plan.exact:
            folder.event("warning", what=inexact(plan))
        return _go(trainer, folder)


@leaving_early()
def resume_training(
    path: Path | str, changes: Settings | Mapping[str, object] | None = None, observer: Observer | None = None
) -> RunResult:
    """What `lowmem resume` does: go on from the newest checkpoint that verifies, in the middle of its epoch. Started by
    torchrun, the processes do it together, also of a run that another number of them began.

    `changes`: operational settings that are replaced (see `config.OPERATIONAL`), dotted name -> value, or the recorded
    settings with them. Raises UsageError if the folder is no run or anything else differs, CorruptCheckpoint if nothing
    can be resumed, PeerLost.
    """
    given = flatten(changes.config) if isinstance(changes, Settings) else dict(changes or {})
    launch, observer = launched(observer, str(given.get("train.device", "auto")))
    with joined(launch, device_only(given)) as group:
        return _go_on(group, Path(path), changes, observer)


def _go_on(group: Group, path: Path, changes: Settings | Mapping[str, object] | None, observer: Observer) -> RunResult:
    recorded = share_settings(group, lambda: recorded_settings(path))
    changed = changes if isinstance(changes, Settings) else recorded.replace(changes or {}, "resume")
    settings = group.together(lambda: changed_settings(recorded, changed, path))
    prepare_libraries(numerics_of(settings.config.train))
    require_pictures(group, settings.config)
    absent: RunFolder = AbsentFolder(path)
    with group.lead(lambda: RunFolder.open(path), absent) as folder:
        found = group.lead(lambda: newest(folder, settings.config, observer), None)
        saved, where = shared_checkpoint(group, found)
        dataset = load_data(group, settings.config, observer)
        run = recorded_run(group, path, recorded.config)
        decided = decide(settings, _size(dataset), group, recorded=run, tell=observer)
        trainer = _make_trainer(group, decided, dataset, observer, path)
        trainer.state = group.together(
            lambda: restore(saved, trainer.model, trainer.optimizer, trainer.step.scaler, trainer.identity)
        )
        state, before = trainer.state, trainer.state.processes
        group.together(lambda: check_position(state, trainer.batches.steps_per_epoch))
        # Only now is it certain that this run goes on from here: nothing was written before.
        group.lead(lambda: tidy(folder, found[2] if found else {}, settings.config), None)
        if decided.changed and decided.plan is not None:
            record_plans(group, decided.plan, folder)
            group.lead(lambda: folder.write_config(to_yaml(settings)), None)
            folder.event("replan", budget_bytes=decided.plan.budget_bytes)
        elif settings.config.checkpoint != recorded.config.checkpoint:
            group.lead(lambda: folder.write_config(to_yaml(keeping(recorded, settings))), None)
        damages: list[str] = group.lead(lambda: folder.cut_back(epoch=state.epoch, step=state.step), list[str]())
        for damage in damages:
            observer.warning(damage)
            folder.event("warning", what="rows lost", reason=damage)
        environment = describe(settings.config.train.device)
        folder.event(
            "resume",
            checkpoint=where.name,
            epoch=state.epoch,
            step=state.step,
            steps_per_epoch=trainer.batches.steps_per_epoch,
            **environment,
            processes=group.size,
        )
        if told := group.lead(lambda: elsewhere(path, environment), None):
            observer.note(told)
        if before != group.size:
            observer.warning(words := changed_words(before, group, settings.config))
            folder.event("warning", what=words)
        if state.epoch >= settings.config.train.epochs:
            observer.note(f"{path} is finished: all {state.epoch} epochs are done")
        else:
            observer.note(f"resuming {path} from {where.name}: epoch {state.epoch + 1}, step {state.step_in_epoch}")
        return _go(trainer, folder)


@leaving_early()
def fork_run(
    source: Path | str,
    *,
    at: int | str,
    changes: Mapping[str, object],
    out: Path | str | None = None,
    observer: Observer | None = None,
    dry_run: bool = False,
) -> RunResult:
    """What `lowmem fork` does: a new run (default `SOURCE-fork`) from a checkpoint of an old one, trained to its end.

    `at`: the end of an epoch by its number, `"step:4692"`, or `"last"`. `changes`: dotted names with their new values;
    see `lowmem.lifecycle.fork` for what becomes of the schedule and of an epoch that was begun. `dry_run`: up to the
    first step, and then nothing of it stays. Raises UsageError if nothing changes, the network would, or there is no
    such checkpoint; the old run is only read.
    """
    launch, observer = launched(observer)
    if launch is not None and launch.size > 1:
        raise UsageError(
            f"a fork is made by one process: begin `lowmem fork {source} …`, stop it with Ctrl-C, then go on "
            "with several, `torchrun … -m lowmem resume` the new run"
        )
    source, path = _fork_paths(Path(source), out)
    recorded = recorded_settings(source)
    begun = batch_chosen(recorded)
    settings = resolve_execution(fork.changed(begun, changes, f"fork of {shorten(source.name)}"))
    differing = fork.check(begun.config, settings.config)
    require_device(settings.config.train.device)
    prepare_libraries(numerics_of(settings.config.train))
    check_tensorboard(settings.config)
    found = fork.find(source, recorded.config, at)
    _refuse_existing(path)
    group = Group()
    dataset = load_data(group, settings.config, observer)
    carried = fork.carry_over(found, settings.config, differing, dataset)
    for line in fork.explain(found, settings.config, differing, carried, dataset):
        observer.note(line)
    for line in fork.warnings(found, differing, dataset):
        observer.warning(line)
    run = forked_run(source, recorded.config, observer)
    decided = decide(settings, _size(dataset), group, recorded=run, tell=observer)
    settings = decided.settings
    environment = describe(settings.config.train.device)
    with new_folder(group, path, to_yaml(settings), environment) as folder:
        try:
            t = trainer = _make_trainer(group, decided, dataset, observer, path)
            t.state = restore(carried, t.model, t.optimizer, t.step.scaler, t.identity)
            _cap_emulated(trainer)
            with _out_of_memory(path):
                preflight(trainer, folder)
            if dry_run:
                return _leave_nothing(trainer, folder)
            record_plans(group, trainer.plan, folder)
            fork.write(found, carried, settings, folder, dataset)
        except BaseException:
            folder.discard()
            raise
        folder.event("start", steps_per_epoch=trainer.batches.steps_per_epoch, **environment)
        observer.note(_headline(settings.config, dataset, path))
        return _go(trainer, folder)


def _fork_paths(source: Path, out: Path | str | None) -> tuple[Path, Path]:
    """The old run's folder and the new one's. Raises UsageError for one inside of the other."""
    if source.name in ("", ".."):
        source = source.resolve()
    path = Path(out) if out is not None else source.with_name(f"{source.name}-fork")
    if path.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"{path} lies inside of {source}, which a fork leaves as it is: choose another folder with --out"
        )
    return source, path


def extend_run(
    path: Path | str,
    *,
    epochs: int,
    changes: Mapping[str, object] | None = None,
    out: Path | str | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """What `lowmem resume --epochs` does: a fork from the run's newest checkpoint that goes on to `epochs` epochs; an
    ordinary resume if that is what the run has anyway.

    `changes`: further settings, dotted name -> value. Raises as `fork_run` and `resume_training` do.
    """
    observer, path = observer or Observer(), Path(path)
    recorded = recorded_settings(path)
    if epochs == recorded.config.train.epochs:
        if out is not None:
            raise UsageError(f"{path} is a run of {epochs} epochs: leave --out out to go on with it")
        return resume_training(path, recorded.replace(changes or {}, "resume"), observer)
    observer.note(
        f"{path} is a run of {recorded.config.train.epochs} epochs and stays one: with --epochs {epochs} a new run "
        "forks off from its newest checkpoint"
    )
    return fork_run(path, at="last", changes={**(changes or {}), "train.epochs": epochs}, out=out, observer=observer)


def _leave_nothing(trainer: Trainer, folder: RunFolder) -> RunResult:
    """The end of a dry run."""
    folder.discard()
    trainer.observer.note("dry run: everything is fit to start, and nothing was left behind")
    return RunResult(folder.path, Outcome(False, trainer.state))


def _refuse_existing(path: Path) -> None:
    """The same refusal as `RunFolder.create`, before minutes are spent on decoding pictures."""
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: choose another folder with --out")
        refuse_existing(path)
    except OSError as error:
        raise PreflightError(
            f"{path} cannot be looked at ({error.strerror or error}): choose another folder with --out"
        ) from None


def _go(trainer: Trainer, folder: RunFolder) -> RunResult:
    """Trains. Raises OutOfMemory with the way out where no smaller plan is left; the run is then saved."""
    _cap_emulated(trainer)
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


def _cap_emulated(trainer: Trainer) -> None:
    """A larger card made to behave like one of --vram, by the cap that the plan was made for and tried under."""
    plan = trainer.plan
    if trainer.config.train.device == "cuda" and plan is not None and plan.allocator_bytes is not None:
        cap_allocator(plan.allocator_bytes)


def _make_trainer(group: Group, decided: Decision, dataset: Dataset, observer: Observer, path: Path) -> Trainer:
    """Raises OutOfMemory, PreflightError; in all processes."""
    config = decided.settings.config

    def make() -> Trainer:
        refuse_unsafe(config)
        spec, classes = config.model, len(dataset.classes)
        model = build(spec.arch, spec.block, width=spec.width, num_classes=classes, seed=config.seed)
        execution = Execution(config.train.device, config.train.precision, config.train.memory_format)
        identity = {"settings": config_hash(config), "data": dataset.fingerprint}
        with _out_of_memory(path):
            return Trainer(config, model, dataset, execution, identity, observer, decided.plan, group, decided.split)

    trainer = group.together(make)
    if not group.alone:
        observer.note(norm_words(group, config, decided.split))
    return trainer


def _size(dataset: Dataset) -> DataSize:
    return DataSize(len(dataset.classes), len(dataset.train.labels))


def _headline(config: Config, dataset: Dataset, path: Path) -> str:
    model, train = config.model, config.train
    held = f", {len(dataset.val.labels):,} held back" if dataset.val is not None else ""
    return (
        f"{model.arch} ({model.block}, width {model.width}) on {dataset.name}: {len(dataset.train.labels):,} pictures "
        f"to train on{held}, {len(dataset.test.labels):,} to test; {train.epochs} epochs, batch {train.batch}, "
        f"{train.precision}, {train.memory_format}, {train.device}; run folder {path}"
    )
