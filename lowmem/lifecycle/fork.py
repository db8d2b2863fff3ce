"""A new run from a checkpoint of an old one, with changed settings; the old run is only read.

The past is not rewritten: rows, weights and momentum up to the checkpoint are the old run's, and a fork that changes
the number of epochs leaves the schedule's milestones where they were, unless the schedule is asked to change too. A
smooth schedule keeps its warm-up and falls to the new end: the rate is that of a run which was of the new length.
At a step in the middle of an epoch the rest of it is trained under the new settings, on the pictures that were still
to come: so nothing may change which those are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowmem.choose.decide import RecordedRun, batch_chosen
from lowmem.choose.execution import resolve_execution
from lowmem.config.networks import refuse_changed_files
from lowmem.config.paths import where_else
from lowmem.config.schema import OF_THE_WEIGHTS, ONLY_AT_THE_BEGINNING, OWN_NETWORK, Config, flatten
from lowmem.config.settings import Settings
from lowmem.core.errors import CorruptCheckpoint, ForeignCheckpoint, LowmemError, PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.core.units import counted
from lowmem.data import Dataset
from lowmem.distributed.group import Group
from lowmem.lifecycle.begin import New, warn_of_names, with_hashes
from lowmem.lifecycle.run_identity import Changes, belongs_to, classes_of, most_bytes, read_plans
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.checkpoint import Checkpoint, disk_errors
from lowmem.runs.checkpoint_state import Position, read_state
from lowmem.runs.folder import FORKING, refuse_existing
from lowmem.runs.store import RunFolder
from lowmem.runs.view import RunView
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from lowmem.train.replica import ANOTHER_OPTIMIZER, REFROZEN, exact_settings, identity_of
from lowmem.train.schedule import rate_curve, scaled_milestones, side_by_side, starts_low, warmup_epochs

_AT = re.compile(r"([0-9]{1,15})|step:([0-9]{1,15})|last")
_SCHEDULE = ("schedule.milestones", "schedule.reference_epochs")
_WARMUP = "schedule.warmup_epochs"
# What decides which picture comes when.
_READ = (
    "data.train_subset", "data.val_split", "data.val_folder", "data.test_split", "data.skip_damaged", "data.fit",
    "data.image_size",
)  # fmt: skip
_ORDER = ("seed", "train.batch", *_READ)
_PICTURES = ("seed", "data.source", "data.root", *_READ)


@dataclass(frozen=True)
class ForkPoint:
    """The checkpoint a fork begins from, verified, and where in its run it is."""

    saved: Checkpoint
    position: Position
    others: str  # the places one can fork from, in words
    skipped: tuple[str, ...] = ()  # newer checkpoints that cannot be used, in words


def find(run: Path, config: Config, at: int | str, into: Config | None = None) -> ForkPoint:
    """The checkpoint `at`: an epoch (its end), `step:4692`, or `last`: the newest that verifies and belongs to the run.
    `into`: settings whose network is to take its weights, if not the run's own, whose file is not run then.

    Raises UsageError naming those there are, and CorruptCheckpoint if it is there and cannot be used.
    """
    asked = _AT.fullmatch(str(at))
    if asked is None:
        raise UsageError(
            f"--at {at} is no place in a run: give an epoch (its end) like 12, a step like step:4692, or last"
        )
    epoch, step = (None if number is None else int(number) for number in asked.groups())
    check, limit_bytes = belongs_to(config, into), most_bytes(into or config)
    view = RunView(run)
    positions = [position for position in view.checkpoints if position.step > 0]
    elsewhere = [reason.replace("a checkpoint is damaged", "damaged", 1) for reason in view.damaged_checkpoints]
    others = f"there are {', '.join(position.at for position in reversed(positions))}" if positions else "there is none"
    damaged: list[str] = []
    for position in positions:
        if step not in (None, position.step) or (epoch is not None and position.at != str(epoch)):
            continue
        try:
            saved = checkpoints.load(position.path, limit_bytes)
            check(saved)
        except CorruptCheckpoint as error:
            kind = "" if isinstance(error, ForeignCheckpoint) else "damaged: "
            damaged.append(f"{kind}{error}")
            continue
        return ForkPoint(saved, position, others, (*elsewhere, *damaged) if at == "last" else ())
    what = f" of step {step}" if step is not None else f" of the end of epoch {epoch}" if epoch is not None else ""
    reasons = f" ({'; '.join((*damaged, *elsewhere))})" if damaged or elsewhere else ""
    text = f"{run} has no usable checkpoint{what}: {others}{reasons}; "
    if damaged:
        raise CorruptCheckpoint(f"{text}fork from another place, or restore the run's own files")
    raise UsageError(f"{text}keep more with --keep-every")


def changed(recorded: Settings, values: Mapping[str, object], why: str) -> Settings:
    """The settings of the fork. With another number of epochs the milestones stay at the epochs where they were, and
    so does the end of a warm-up, unless the schedule's own are among `values`. Raises UsageError."""
    epochs, old = values.get("train.epochs"), recorded.config
    asked = any(key in values for key in _SCHEDULE)
    if type(epochs) is int and epochs > 0 and epochs != old.train.epochs and not asked:
        where: dict[str, object] = dict(zip(_SCHEDULE, (scaled_milestones(old), epochs), strict=True))
        # The share of the run that is one-cycle's, in epochs.
        if 0 < warmup_epochs(old) < epochs and not {_WARMUP, "schedule.kind"} & set(values):
            where[_WARMUP] = warmup_epochs(old)
        recorded = recorded.replace(where, f"{why}, as it was")
    if old.train.hours is not None and "train.hours" not in values:  # it is nearly over
        recorded = recorded.replace({"train.hours": None}, f"{why}, whose time it was")
    if "model.spec" in values:  # named now: of the files as they are
        values = {"model.args": {}, **values, "model.sha256": {}}
    return recorded.replace(values, why)


def check(old: Config, new: Config, *, named: bool = False) -> Changes:
    """What changes, name -> (old, new). `named`: the user names the network, so that its files may be other ones.
    Raises UsageError for nothing, or for what weights cannot be carried into."""
    before, after = flatten(old), flatten(new)
    changes = {key: (before[key], value) for key, value in after.items() if before[key] != value}
    for key in changes:
        if key == "model.sha256" and not named:
            raise UsageError(
                "model.sha256 is recorded, and cannot be set in a fork: name the network with --model, and its files "
                "are taken as they are"
            )
        if (key.startswith("model.") and key not in OWN_NETWORK) or key in OF_THE_WEIGHTS:
            raise UsageError(
                f"{key} cannot become {after[key]!r} in a fork: the weights are for {before[key]!r} only; "
                "start a new run with `lowmem train`"
            )
        if key in ONLY_AT_THE_BEGINNING:
            raise UsageError(
                f"{key} decides how a run is begun, and cannot be changed in a fork, which goes on from a checkpoint: "
                "start a new run with `lowmem train`"
            )
    if not changes:
        raise UsageError(
            "a fork that changes nothing is a resume: say what changes with --set, like --set optim.lr=0.01"
        )
    return changes


class Fork(New):
    """A new run that begins with an old one's checkpoint. `recorded`: the old one's settings."""

    def __init__(
        self,
        source: Path,
        recorded: Settings,
        at: int | str,
        changes: Mapping[str, object],
        path: Path,
        *,
        dry_run: bool = False,
    ) -> None:
        super().__init__(recorded, path, dry_run=dry_run)
        self.given, self.source = changes, f"fork of {shorten(source.name)}"
        self._run, self._old, self._at, self._begun = source, recorded.config, at, batch_chosen(recorded)

    def open(self, group: Group, observer: Observer, stack: ExitStack) -> tuple[Settings, RecordedRun | None]:
        """Raises UsageError if nothing changes, the network would, or there is no such checkpoint."""
        if "model.spec" not in self.given:
            refuse_changed_files(self._old.model.spec, self._old.model.sha256)
        settings = with_hashes(resolve_execution(changed(self._begun, self.given, self.source)))
        self._wanted = settings
        self._changes = check(self._begun.config, settings.config, named="model.spec" in self.given)
        observer.phase("reading the old run's checkpoint and verifying it")
        into = settings.config if settings.config.model != self._old.model else None
        self._point = find(self._run, self._old, self._at, into)
        self._refuse_place(settings.config)
        refuse_existing(self.path)
        try:
            own = not set(OWN_NETWORK) & set(self._changes)  # else they are for another network
            plans = read_plans(self._run, self._old) if own else []
        except CorruptCheckpoint as error:
            observer.warning(f"{error}; the fork is planned anew")
            plans = []
        return settings, RecordedRun(self._old, plans, fork=True)

    def _refuse_place(self, new: Config, *, same_pictures: bool = True) -> None:
        """Raises UsageError if the new run would already be over, or if, in the middle of an epoch, other pictures
        would come than were still to come."""
        at, stop = self._point.position, new.train.max_steps
        if at.epoch >= new.train.epochs:
            raise UsageError(
                f"the fork is at epoch {at.epoch} and would end at {new.train.epochs}: ask for more than {at.epoch} "
                "with --epochs"
            )
        if stop is not None and at.step >= stop:
            raise UsageError(
                f"the fork is at step {at.step} and would stop at train.max_steps = {stop}: add --set "
                "train.max_steps=null"
            )
        other = [key for key in _ORDER if key in self._changes]
        if not same_pictures and ("data.test_subset" not in self._changes or "data.source" in self._changes):
            other.append("data.source")
        if at.step_in_epoch and other:
            raise UsageError(
                f"{other[0]} changes which picture comes when, and step {at.step} is in the middle of epoch "
                f"{at.epoch + 1}: fork at the end of an epoch ({self._point.others})"
            )

    def where_data_is_given(self, config: Config) -> str:
        return where_else(config, flags=False)

    def checkpoint(self, settings: Settings, dataset: Dataset, observer: Observer) -> Checkpoint:
        """The old run's as the new run's own: with its identity, and its step counted in the new run's batches.
        `settings`: as they were decided, since by these the new run knows its checkpoints. Raises UsageError for a
        place or pictures that cannot be, and for data with another number of classes."""
        new, old, at = settings.config, self._point.saved, self._point.position
        self._changes = check(self._begun.config, new, named="model.spec" in self.given)
        identity, recorded = identity_of(new, dataset), old.state["identity"]
        same_pictures = bool(recorded.get("data") == identity["data"])
        self._refuse_place(new, same_pictures=same_pictures)
        classes = classes_of(old, new)
        if classes is not None and classes != len(dataset.classes):
            raise UsageError(
                f"{dataset.name} has {counted(len(dataset.classes), 'class')}, the network tells {classes} apart: "
                "a fork keeps them"
            )
        steps = self._steps = -(-len(dataset.train.labels) // new.train.batch)  # an epoch, the smaller last included
        was = self._was = read_state(old.state, old.step)
        # The old run's best was chosen under other settings, perhaps on other pictures, and its weights are not here.
        # Whether the run gets anywhere is a new question. What going back has made of its rate stays, unless there is
        # another to begin with.
        now = self._now = replace(was, best=None, rollbacks=0, exploded_losses=0, chance_epochs=0, told_stuck=False)
        if not at.step_in_epoch:
            # The learning rate follows the step: with another batch or subset an epoch has another number of them.
            now.step = now.epoch * steps
        if "optim.lr" in self._changes:
            now.lr_scale = 1.0
        now.low_start = was.low_start and starts_low(new)
        state = {"run": asdict(now), "identity": identity, "settings": exact_settings(new)}
        if "train.freeze" in self._changes:
            state[REFROZEN] = {"was": list(self._old.train.freeze)}
        if self._old.optim.work != new.optim.work:
            state[ANOTHER_OPTIMIZER] = {"was": self._old.optim.kind}
        self._carried = replace(old, step=now.step, state=state)
        # The rate from the fork on, as it would have been and as it is. The old run's steps an epoch follow from where
        # its checkpoint is.
        old_steps = (at.step - at.step_in_epoch) // at.epoch if at.epoch else steps
        self._rates = (
            rate_curve(self._old, old_steps, at.step, low_start=was.low_start, scale=was.lr_scale),
            rate_curve(new, steps, now.step, low_start=now.low_start, scale=now.lr_scale),
        )
        for line in self._explain(new):
            observer.note(line)
        for line in self._warnings(dataset, same_pictures):
            observer.warning(line)
        warn_of_names(old, identity, self._run, observer)
        return self._carried

    def _explain(self, new: Config) -> list[str]:
        """What changes, what does not, and the learning rate before and after, in lines."""
        run, old, at = self._run, self._old, self._point.position
        place = f"step {at.step}, in epoch {at.epoch + 1}" if at.step_in_epoch else f"the end of epoch {at.epoch}"
        lines = [f"a fork of {run} from {place} ({at.path.name}); {run} stays as it is"]
        milestones = scaled_milestones(old)
        stays = "train.epochs" in self._changes and milestones == scaled_milestones(new)
        smooth = new.schedule.kind != "steps"
        as_it_was = _SCHEDULE if warmup_epochs(old) != warmup_epochs(new) else (*_SCHEDULE, _WARMUP)
        for key, (before, after) in self._changes.items():
            if key == "model.sha256":
                lines.append(_describe_files(before, after))
            elif not (stays and key in as_it_was):
                lines.append(f"{key}: {before!r} -> {after!r}")
        if stays and smooth and old.schedule.kind == new.schedule.kind:
            lines.append(
                f"the {new.schedule.kind} schedule now ends with epoch {new.train.epochs}: from here on the rate is "
                "what a run of that length has there"
            )
        elif stays and not smooth:
            listed = " and ".join(f"{milestone:.5g}" for milestone in milestones)
            epochs = f"epoch {listed}" if milestones else "none"
            lines.append(
                f"the schedule stays where it was, milestones at {epochs}: for one scaled to "
                f"{counted(new.train.epochs, 'epoch')}, `lowmem fork` with --set "
                f"schedule.reference_epochs={old.schedule.reference_epochs} too"
            )
        if at.step_in_epoch:
            lines.append(
                f"epoch {at.epoch + 1} goes on after {at.step_in_epoch} of its {self._steps} steps with the pictures "
                "that were still to come; its row will be of both settings"
            )
        if "optim.kind" in self._changes:
            lines.append(f"{new.optim.kind} begins with a state of its own, what {old.optim.kind} kept is left behind")
        if "optim.ema" in self._changes and None in self._changes["optim.ema"]:
            mean = "is left behind" if new.optim.ema is None else "begins with the weights of the fork"
            lines.append(f"the running mean of the weights {mean}")
        lines += ["best weights are chosen anew, from here on", *side_by_side(*self._rates)]
        if (scale := self._was.lr_scale) != 1.0:
            stays_words = "so is the fork (--set optim.lr=… begins with a rate of its own)"
            now = stays_words if self._now.lr_scale == scale else f"the fork begins with {new.optim.lr:g}"
            lines.append(f"{run} went back from a broken loss and is at {scale:g} of its learning rate: {now}")
        if self._now.low_start:
            rate, until = new.schedule.low_start_lr, new.schedule.low_start_until_error_pct
            lines.append(f"the low start is on: {rate:g} until the training error is under {until:g} %")
        return lines

    def _warnings(self, dataset: Dataset, same_pictures: bool) -> list[str]:
        """What may be meant otherwise."""
        found = [f"skipped a checkpoint: {reason}" for reason in self._point.skipped]
        asked = [key for key in _PICTURES if key in self._changes]
        if not same_pictures and not asked and "data.test_subset" not in self._changes:
            trained = f"the pictures are not those that {self._run} was trained on"
            found.append(f"{trained}, though no setting of them changes")
        if dataset.val is not None and asked:
            found.append(
                f"{asked[0]} changes which pictures are held back: the weights have been trained on some of them, so "
                "the validation error will look too good"
            )
        return found

    def _write_first(self, trainer: Trainer, folder: RunFolder) -> None:
        """Puts rows, picture and checkpoint into the new folder, the checkpoint last. The old run's files are only
        read. Raises DiskError."""
        at, carried = self._point.position, self._carried
        folder.flush()
        (folder.path / FORKING).touch()
        # Where they are counted in other steps, the old ones would stand among the new.
        folder.copy_rows(self._run, epoch=at.epoch, step=at.step if carried.step == at.step else None)
        self._draw(folder.path)
        carried = replace(carried, optimizer=trainer.checkpoint().optimizer)  # which may be another kind's
        checkpoints.save(folder.checkpoints, carried, keep=trainer.config.checkpoint.keep)
        (folder.path / FORKING).unlink()
        folder.event("fork", source=self._run.name, checkpoint=at.path.name, epoch=at.epoch, step=carried.step)

    def _draw(self, run: Path) -> None:
        """report/learning_rate.png of the new run."""
        try:
            from lowmem.report.figures import draw_rate_curve  # matplotlib
        except ImportError as error:
            raise PreflightError(f"the fork's picture cannot be drawn ({error}): install matplotlib with pip") from None
        try:
            rows = RunView(self._run).epochs
        except LowmemError:
            rows = ()  # the rows of the fork itself have been read by now; this is only the picture
        last, fork_at = self._point.position.epoch, self._carried.step / self._steps
        past = [(row.epoch - 1, row.lr) for row in rows if row.lr is not None and row.epoch <= last]
        before, after = (_to_the_end(curve.points, curve.end) for curve in self._rates)
        title = f"Learning rate of {run.name}, a fork of {self._run.name}"
        png = draw_rate_curve(title, _to_the_end(past, fork_at), before, after, fork_at)
        with disk_errors(run / "report" / "learning_rate.png") as path:
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomic(path, png)


def _describe_files(before: object, after: object) -> str:
    """Of a network: those that are not as they were, by name."""
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"model.sha256: the network's files are other ones: {', '.join(differing)}"


def _to_the_end(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """With the last value once more, at the end: steps are drawn from point to point."""
    return [*points, (end, points[-1][1])] if points else []
