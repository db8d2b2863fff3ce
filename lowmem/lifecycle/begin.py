"""New and resume: two ways to make the same of a run, its settings as they are asked for, resolved, before anything is
planned, and what is recorded of it; and to make durable what comes of it. The third way is `fork`.

Of several processes rank 0 reads and writes the run's folder, and tells the others what they need: they need not see
its disk.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from lowmem.calibrate.device import describe, elsewhere
from lowmem.choose.decide import Decision, RecordedRun
from lowmem.choose.execution import resolve_execution, wants_plan, why_on_cpu
from lowmem.choose.explain import accumulated, inexact
from lowmem.config.networks import PRETRAINED
from lowmem.config.paths import absolute_paths, started_in, where_else
from lowmem.config.schema import Config, flatten, nest
from lowmem.config.settings import Settings, from_yaml, refuse_changes, to_yaml
from lowmem.core.errors import CorruptCheckpoint, ForeignCheckpoint, PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.core.units import counted, format_duration
from lowmem.data import Dataset
from lowmem.distributed.group import Group
from lowmem.lifecycle.hours import fit_into_hours
from lowmem.lifecycle.preflight import preflight
from lowmem.lifecycle.run_identity import (
    begun_before,
    belongs_to,
    launcher,
    most_bytes,
    read_plans,
    refuse_edited,
)
from lowmem.models import hashes_of
from lowmem.models.weights import InitialWeights, Placed, pretrained_file, read_initial
from lowmem.plan.record import Plan
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.folder import refuse_existing, refuse_unbegun, require_run
from lowmem.runs.store import NullFolder, RunFolder
from lowmem.runs.view import RunView, recorded_settings
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from lowmem.train.replica import check_position, config_hash, identity_of, share_checkpoint
from lowmem.train.watchers import is_finished


class New:
    """A run that begins with its first step, in a folder that is not there yet. `given`: the settings that decide how
    processes join."""

    def __init__(self, wanted: Settings, path: Path, *, dry_run: bool = False) -> None:
        self.path, self.dry_run = path, dry_run
        self.given: Mapping[str, object] = flatten(wanted.config)
        self.source = "given"  # where these come from, for errors
        self._wanted = wanted
        self._resumable = False  # from then on nothing is taken back
        self._initial: InitialWeights | None = None  # in the process that reads them
        self._begins_with = ""  # the weights that are not new, in words

    def after_restart(self, group: Group, observer: Observer) -> New | Resume:
        """What this is: torchrun starts the processes of a run that failed again with the command that began it."""
        self._wanted = share_settings(group, lambda: _resolved(self._wanted))
        if not begun_before(group, self.path, self._wanted.config):
            return self
        observer.note(f"started again after a failure (restart {group.restarts}): going on with {self.path}")
        return Resume(self.path)

    def open(self, group: Group, observer: Observer, stack: ExitStack) -> tuple[Settings, RecordedRun | None]:
        """The settings, and what is recorded of the run that goes on, or that this forks off from. Raises UsageError,
        PreflightError for a folder in the way, before minutes are spent on decoding pictures."""
        group.lead(lambda: refuse_existing(self.path), None)
        if (why := why_on_cpu(self._wanted)) is not None:
            observer.warning(f"this trains {why}")
        if (source := self._wanted.config.train.init) is None:
            return self._wanted, None
        self._initial = group.lead(lambda: _initial_weights(self._wanted.config, observer), None)
        found = group.share(self._initial and [self._initial.sha256, self._initial.file.name])
        self._begins_with = f"{source} ({found[1]}, SHA-256 {found[0][:12]})"
        return self._wanted.replace({"train.init_sha256": found[0]}, "the weights as they were"), None

    def where_data_is_given(self, config: Config) -> str:
        """To be said of pictures that are missing, or not the run's."""
        return ""

    def checkpoint(self, settings: Settings, dataset: Dataset, observer: Observer) -> Checkpoint | None:
        """What the trainer goes on from, under the settings that were decided."""
        return None

    def folder(self, group: Group, settings: Settings, dataset: Dataset, stack: ExitStack) -> RunFolder:
        """The run's folder, for as long as the stack lasts; here a new one, of which nothing stays unless it comes to
        its first checkpoint. What was asked for is recorded too: by this a restart knows its own run."""
        self._environment = describe(settings.config.train.device) | {"processes": group.size}
        asked = {"asked": config_hash(self._wanted.config), "launcher": launcher(), "started_in": started_in(self.path)}
        recorded = {**self._environment, **asked, **dataset.describe()}
        absent: RunFolder = NullFolder(self.path)
        folder = group.lead(lambda: RunFolder.create(self.path, to_yaml(settings), recorded), absent)
        stack.enter_context(folder)
        stack.callback(lambda: None if self._resumable else folder.discard())
        return folder

    def commit(self, decision: Decision, trainer: Trainer, folder: RunFolder) -> bool:
        """Tries everything, then writes plans and first checkpoint: now the run can be resumed, however early it is
        killed. False after a dry run. Raises PreflightError, OutOfMemory, DiskError."""
        placed = self._place_initial(trainer) if self._begins_with else None
        epoch_seconds, fitted = preflight(trainer, folder), None
        if trainer.config.train.hours is not None and trainer.state.step == 0:  # of a fork it is the limit alone
            with trainer.group.alike():
                fitted = fit_into_hours(trainer, decision.settings, folder, epoch_seconds)
        trainer.observer.note(_headline(trainer, self.path))
        if self.dry_run:
            trainer.observer.note("dry run: everything is fit to start, and nothing was left behind")
            return False
        trainer.observer.phase("saving the first checkpoint")
        trainer.record_plans(folder)
        trainer.group.lead(lambda: self._write_first(trainer, folder), None)
        self._resumable = True
        folder.event("start", steps_per_epoch=trainer.batches.steps_per_epoch, **self._environment)
        if placed is not None:
            new, train = [*placed.reshaped, *placed.missing], trainer.config.train
            folder.event("initial weights", of=train.init, sha256=train.init_sha256, loaded=len(placed.loaded), new=new)
        if fitted is not None:
            folder.event("hours", **fitted)
        if left_out := trainer.dataset.skipped:
            folder.event("pictures left out", count=len(left_out), files=left_out)
        if decision.confirmed is not None:
            folder.event("confirmed", **decision.confirmed)
        micro, batch = trainer.config.train.micro_batch, trainer.config.train.batch
        if decision.plan is not None and not decision.plan.exact:
            folder.event("warning", what=inexact(decision.plan))
        elif decision.plan is None and micro is not None and micro < batch:
            said = accumulated("micro-batches were asked for", batch, micro)
            trainer.observer.recorded_warning(folder, said)
        return True

    def _place_initial(self, trainer: Trainer) -> Placed:
        """Puts rank 0's weights into the network of every process, and says what became of them. Raises
        PreflightError."""
        group, mine, self._initial = trainer.group, self._initial, None
        tensors = group.share_tensors(None if mine is None else mine.tensors)
        placed = group.together(lambda: trainer.begin_with(tensors, self._begins_with))
        for line in (f"initial weights: {self._begins_with}", *placed.lines()):
            trainer.observer.note(line)
        return placed

    def _write_first(self, trainer: Trainer, folder: RunFolder) -> None:
        folder.flush()
        checkpoints.save(folder.checkpoints, trainer.checkpoint(), keep=trainer.config.checkpoint.keep)


_OF_THIS_PLACE = ("train.device", "memory.")


class Resume:
    """A run that goes on from its newest checkpoint that verifies. `given`: operational settings that are replaced,
    from now on; `recorded`: its settings, if they have been read."""

    def __init__(self, path: Path, given: Mapping[str, object] | None = None, recorded: Settings | None = None) -> None:
        self.path, self.source = path, "resume"
        self.given = given or {}
        self._known = recorded

    def open(self, group: Group, observer: Observer, stack: ExitStack) -> tuple[Settings, RecordedRun | None]:
        """Locks the folder. Raises UsageError if it is no run or if what is given is not operational, CorruptCheckpoint
        if nothing can be resumed."""
        recorded = self._recorded = share_settings(group, lambda: self._known or _recorded_here(self.path, group))

        def changed() -> Settings:
            settings = resolve_execution(recorded.replace(self.given, self.source))
            refuse_changes(recorded.config, settings.config, str(self.path))
            return settings

        group.lead(lambda: refuse_edited(self.path, recorded), None)
        settings = group.together(changed)
        absent: RunFolder = NullFolder(self.path)
        self._folder = stack.enter_context(group.lead(lambda: RunFolder.open(self.path), absent))
        self._skipped: Mapping[Path, CorruptCheckpoint] = {}
        newest = share_checkpoint(group, group.lead(lambda: self._newest(settings.config, observer), None))
        assert newest is not None
        self._saved, self._where = newest
        mine = group.lead(lambda: [plan.to_json() for plan in read_plans(self.path, recorded.config)], list[object]())
        return settings, RecordedRun(recorded.config, [Plan.from_json(plan) for plan in group.share(mine)])

    def _newest(self, config: Config, observer: Observer) -> tuple[Checkpoint, Path]:
        refuse_unbegun(self.path)
        folder = self._folder
        if folder.taken_over is not None:
            observer.note(f"{self.path} is taken over from {folder.taken_over}, which ended without leaving it")
        observer.phase("reading the newest checkpoint and verifying it")
        saved, where, self._skipped = checkpoints.load_newest(
            folder.checkpoints, belongs_to(config), most_bytes(config)
        )
        for reason in self._skipped.values():
            kind = "" if isinstance(reason, ForeignCheckpoint) else "damaged "
            said = f"skipped a {kind}checkpoint: {reason}"
            observer.recorded_warning(folder, said, what="checkpoint skipped", reason=str(reason))
        return saved, where

    def where_data_is_given(self, config: Config) -> str:
        return where_else(config, flags=True)

    def checkpoint(self, settings: Settings, dataset: Dataset, observer: Observer) -> Checkpoint:
        warn_of_names(self._saved, identity_of(settings.config, dataset), self.path, observer)
        return self._saved

    def folder(self, group: Group, settings: Settings, dataset: Dataset, stack: ExitStack) -> RunFolder:
        return self._folder

    def commit(self, decision: Decision, trainer: Trainer, folder: RunFolder) -> bool:
        """Cuts rows back to the checkpoint and writes what has changed: only now it is certain that the run goes on."""
        group, observer, state, kept = trainer.group, trainer.observer, trainer.state, trainer.config.checkpoint
        group.together(lambda: check_position(state, trainer.batches.steps_per_epoch))
        replanned = decision.plan if decision.changed else None

        def tidy() -> None:  # takes a while: before plans, which are to be on the disk together with their settings
            checkpoints.set_aside(self._skipped)
            folder.tidy(keep=kept.keep, keep_every=kept.keep_every)

        group.lead(tidy, None)
        if replanned is not None:
            trainer.record_plans(folder)

        def write() -> list[str]:
            folder.flush()
            if replanned is not None:
                folder.forget_plans(after=group.size)
            if new := self._to_record(decision):
                recorded = from_yaml(self.path / "config.yaml")
                folder.write_config(to_yaml(recorded.replace(new | absolute_paths(new, Path.cwd()), "resume")))
            if replanned is not None:
                why = {} if decision.why is None else {"why": decision.why}
                folder.event("replan", budget_bytes=replanned.budget_bytes, **why)
            return folder.cut_back(epoch=state.epoch, step=state.step)

        for damage in group.lead(write, list[str]()):
            observer.recorded_warning(folder, damage, what="rows lost", reason=damage)
        config = trainer.config
        environment = describe(config.train.device) | {"processes": group.size}
        steps = {"epoch": state.epoch, "step": state.step, "steps_per_epoch": trainer.batches.steps_per_epoch}
        goes_on = not is_finished(config.train, state)
        if goes_on:
            folder.event("resume", checkpoint=self._where.name, **steps, **environment)
        if different := group.lead(lambda: elsewhere(RunView(self.path).env, environment), None):
            observer.note(different)
        if state.processes != group.size:
            observer.recorded_warning(folder, _describe_processes(state.processes, group, config))
        if goes_on and "train.hours" in self.given and (hours := config.train.hours) is not None:
            spent = format_duration(state.elapsed_seconds)
            stays = f"it stays a run of {counted(config.train.epochs, 'epoch')}"
            observer.note(f"train.hours = {hours:g}, of which {spent} are over; {stays}")
        if goes_on:
            within = f"{state.step_in_epoch} of its {trainer.batches.steps_per_epoch} done"
            place = f"epoch {state.epoch + 1}, step {state.step} ({within})"
            observer.note(f"resuming {self.path} from {self._where.name}: {place}")
        return True

    def _to_record(self, decision: Decision) -> dict[str, object]:
        """The settings that stay: what was given, but for those of this device, which go with a new plan only."""
        before, now = flatten(self._recorded.config), flatten(decision.settings.config)
        return {
            key: value
            for key, value in now.items()
            if value != before[key] and (decision.changed or (key in self.given and not key.startswith(_OF_THIS_PLACE)))
        }


# -- settings ----------------------------------------------------------------------------------------------------------


def _resolved(settings: Settings) -> Settings:
    """Of a new run. Raises UsageError for what needs something to fit into, PreflightError without the device."""
    planned = wants_plan(resolve_execution(settings).config)
    settings = resolve_execution(settings, planned=planned)
    memory = settings.config.memory
    asked = [f"memory.{name}=always" for name in ("calibrate", "confirm") if getattr(memory, name) == "always"]
    asked += ["--batch auto"] if memory.auto_batch else []
    if asked and not planned:
        raise UsageError(f"{asked[0]} needs something to fit into: give --vram, like --vram 6G")
    return with_hashes(settings)


def with_hashes(settings: Settings) -> Settings:
    """With what a run records of the file of its network, which is run here for the first time. Hashes that the
    settings have already stay, and whoever makes the network holds it against them."""
    model = settings.config.model
    if model.sha256 or not (found := hashes_of(model, settings.config.data.channels)):
        return settings
    return settings.replace({"model.sha256": found}, "its files as they were")


def _initial_weights(config: Config, observer: Observer) -> InitialWeights:
    """Those that `train.init` names. Raises PreflightError, also for others than were recorded, UsageError for a folder
    that is no run's."""
    source, recorded, spec = str(config.train.init), config.train.init_sha256, str(config.model.spec)
    observer.phase("reading the weights to begin with")
    file = pretrained_file(spec, observer.phase) if source == PRETRAINED else Path(source)
    if file.is_dir():
        require_run(file)
        file = file / "weights" / "best.safetensors"
        if not file.is_file():
            raise PreflightError(f"{source} has no best weights yet ({file}): train it for an epoch, or name a file")
    found = read_initial(file)
    if recorded not in (None, found.sha256):
        raise PreflightError(
            f"{file} is not what was recorded (SHA-256 {found.sha256[:12]}, and train.init_sha256 is "
            f"{shorten(recorded, 12)}): put it back, or leave that setting out"
        )
    return found


def share_settings(group: Group, read: Callable[[], Settings]) -> Settings:
    """What `read` gives in rank 0, in every process."""
    mine = group.lead(read, None)
    values, sources = group.share(None if mine is None else [flatten(mine.config), dict(mine.sources)])
    return mine or Settings(Config.model_validate(nest(values)), sources)


def _recorded_here(path: Path, group: Group) -> Settings:
    """`recorded_settings`, in the process that has to have the run."""
    try:
        return recorded_settings(path)
    except UsageError as error:
        if group.alone:
            raise
        raise UsageError(
            f"{error} (looked for by process 0, on {socket.gethostname()}: with several machines the one that has the "
            "run must be rank 0, by `torchrun --node-rank=0 --master-addr=HOST`, or the folder must be a shared one)"
        ) from None


def warn_of_names(saved: Checkpoint, identity: Mapping[str, str], run: Path, observer: Observer) -> None:
    """Where the classes of the same pictures have been renamed; checkpoints of older versions do not tell."""
    if saved.state["identity"].get("classes", identity["classes"]) != identity["classes"]:
        observer.warning(f"the classes have other names than those that {run} was trained to tell apart")


# -- in words ----------------------------------------------------------------------------------------------------------


def _headline(trainer: Trainer, path: Path) -> str:
    model, train, dataset = trainer.config.model, trainer.config.train, trainer.dataset
    held = f", {len(dataset.val):,} held back" if dataset.val is not None else ""
    schedule = trainer.config.schedule
    rate = f"learning rate {trainer.config.optim.lr:g}" + (f" ({schedule.kind})" if schedule.kind != "steps" else "")
    if trainer.state.low_start:
        rate += f", at first {schedule.low_start_lr:g} (schedule.low_start)"
    pictures = f"{counted(len(dataset.train), 'picture')} to train on{held}, {len(dataset.test):,} to test"
    pictures += f", at {dataset.train.image_size}x{dataset.train.image_size}"
    return (
        f"{model.words} on {dataset.name}: {pictures}; "
        f"{counted(train.epochs, 'epoch')}, batch {train.batch}, {rate}, {train.precision}, "
        f"{train.memory_format}, {train.device}; run folder {path}"
    )


def _describe_processes(before: int, group: Group, config: Config) -> str:
    """What a resume on another number of processes must say."""
    saved, now = (counted(size, "process") for size in (before, group.size))
    stays = "the same pictures in the same order, the same batch and learning rates"
    head = f"saved by {saved}, going on with {now}: {stays}"
    if config.train.sync_bn:
        return f"{head}; sums have another rounding, so that from here on it is not bit for bit the run that it was"
    sees = "the whole batch at once" if group.alone else "each process's own pictures"
    return (
        f"{head}; but batch norm now sees {sees}, so that from here on gradients are not those that the run would have "
        "had"
    )
