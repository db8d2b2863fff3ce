"""A new run from a checkpoint of an old one, with changed settings; the old run is only read.

The past is not rewritten: rows, weights and momentum up to the checkpoint are the old run's, and a fork that changes
the number of epochs leaves the schedule's milestones where they were, unless the schedule is asked to change too.
At a step in the middle of an epoch the rest of it is trained under the new settings, on the pictures that were still
to come: so nothing may change which those are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem.config.schema import Config, flatten
from lowmem.config.settings import Settings
from lowmem.core.errors import CorruptCheckpoint, LowmemError, PreflightError, UsageError
from lowmem.data import Dataset
from lowmem.lifecycle.run_identity import belongs_to, most_bytes
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.checkpoint import Checkpoint, disk_errors
from lowmem.runs.checkpoint_state import Position
from lowmem.runs.folder import FORKING
from lowmem.runs.store import RunFolder
from lowmem.runs.view import RunView
from lowmem.train.schedule import RateCurve, rate_curve, side_by_side, starts_low
from lowmem.train.state import config_hash

_AT = re.compile(r"([0-9]{1,15})|step:([0-9]{1,15})|last")
Changes = Mapping[str, tuple[object, object]]
_SCHEDULE = ("schedule.milestones", "schedule.reference_epochs")
# What decides which picture comes when.
_ORDER = ("seed", "train.batch", "data.train_subset", "data.val_split")
_PICTURES = ("seed", "data.source", "data.root", "data.train_subset", "data.val_split")


@dataclass(frozen=True)
class ForkPoint:
    """The checkpoint a fork begins from, verified, and where in its run it is."""

    run: Path
    config: Config
    saved: Checkpoint
    position: Position
    others: str  # the places one can fork from, in words
    skipped: tuple[str, ...] = ()  # newer checkpoints that are damaged, in words

    @property
    def mid_epoch(self) -> bool:
        return self.position.step_in_epoch != 0


def find(run: Path, config: Config, at: int | str) -> ForkPoint:
    """The checkpoint `at`: an epoch (its end), `step:4692`, or `last`: the newest that verifies and belongs to the run.

    Raises UsageError naming those there are, and CorruptCheckpoint if it is there and cannot be used.
    """
    asked = _AT.fullmatch(str(at))
    if asked is None:
        raise UsageError(
            f"--at {at} is no place in a run: give an epoch (its end) like 12, a step like step:4692, or last"
        )
    epoch, step = (None if number is None else int(number) for number in asked.groups())
    check, limit_bytes = belongs_to(config), most_bytes(config)
    view = RunView(run)
    positions = [position for position in view.checkpoints if position.step > 0]
    elsewhere = [reason.removeprefix("a checkpoint is damaged: ") for reason in view.damaged_checkpoints]
    others = f"there are {', '.join(position.at for position in reversed(positions))}" if positions else "there is none"
    damaged: list[str] = []
    for position in positions:
        if step not in (None, position.step) or (epoch is not None and position.at != str(epoch)):
            continue
        try:
            saved = checkpoints.load(position.path, limit_bytes)
            check(saved)
        except CorruptCheckpoint as error:
            damaged.append(str(error))
            continue
        skipped = (*elsewhere, *damaged) if at == "last" else ()
        return ForkPoint(run, config, saved, position, others, skipped)
    what = f" of step {step}" if step is not None else f" of the end of epoch {epoch}" if epoch is not None else ""
    reasons = f" (damaged: {'; '.join((*damaged, *elsewhere))})" if damaged or elsewhere else ""
    text = f"{run} has no usable checkpoint{what}: {others}{reasons}; "
    if damaged:
        raise CorruptCheckpoint(f"{text}fork from another place, or restore the run's own files")
    raise UsageError(f"{text}keep more with --keep-every")


# -- what changes ------------------------------------------------------------------------------------------------------


def changed(recorded: Settings, values: Mapping[str, object], why: str) -> Settings:
    """The settings of the fork. With another number of epochs the milestones stay at the epochs where they were,
    unless the schedule's own are among `values`. Raises UsageError."""
    epochs, old = values.get("train.epochs"), recorded.config
    asked = any(key in values for key in _SCHEDULE)
    if type(epochs) is int and epochs > 0 and epochs != old.train.epochs and not asked:
        # The products are those of `milestone_steps`: not a step is off.
        scale = old.train.epochs / old.schedule.reference_epochs
        milestones = [milestone * scale for milestone in old.schedule.milestones]
        recorded = recorded.replace(dict(zip(_SCHEDULE, (milestones, epochs), strict=True)), f"{why}, as it was")
    return recorded.replace(values, why)


def check(old: Config, new: Config) -> Changes:
    """What changes, name -> (old, new). Raises UsageError for nothing, or for what weights cannot be carried into."""
    before, after = flatten(old), flatten(new)
    changes = {key: (before[key], value) for key, value in after.items() if before[key] != value}
    for key in changes:
        if key.startswith("model."):
            raise UsageError(
                f"{key} cannot become {after[key]!r} in a fork: the weights are for {before[key]!r} only; "
                "start a new run with `lowmem train`"
            )
        if key in ("recipe", "memory.auto_batch"):
            raise UsageError(
                f"{key} decides other settings when a run is begun, and cannot be changed in a fork: set those with "
                "--set, or start a new run with `lowmem train`"
            )
    if not changes:
        raise UsageError(
            "a fork that changes nothing is a resume: say what changes with --set, like --set optim.lr=0.01"
        )
    return changes


def refuse_place(source: ForkPoint, new: Config, changes: Changes, *, same_pictures: bool = True) -> None:
    """Raises UsageError if the new run would already be over, or if, in the middle of an epoch, other pictures would
    come than were still to come."""
    run = source.saved.state["run"]
    if run["epoch"] >= new.train.epochs:
        raise UsageError(
            f"the fork is at epoch {run['epoch']} and would end at {new.train.epochs}: ask for more with "
            f"--set train.epochs={run['epoch'] + source.config.train.epochs}"
        )
    stop = new.train.max_steps
    if stop is not None and run["step"] >= stop:
        raise UsageError(
            f"the fork is at step {run['step']} and would stop at train.max_steps = {stop}: add --set "
            "train.max_steps=null"
        )
    other = [key for key in _ORDER if key in changes]
    if not same_pictures and ("data.test_subset" not in changes or "data.source" in changes):
        other.append("data.source")
    if source.mid_epoch and other:
        raise UsageError(
            f"{other[0]} changes which picture comes when, and step {source.position.step} is in the middle of epoch "
            f"{source.position.epoch + 1}: fork at the end of an epoch ({source.others})"
        )


def carry_over(source: ForkPoint, new: Config, changes: Changes, dataset: Dataset) -> Checkpoint:
    """The checkpoint as the new run's own: its identity, and its step counted in the new run's batches. `new`: as they
    were decided, since by these the new run knows its checkpoints.

    Raises UsageError as `refuse_place` does, and for data with another number of classes.
    """
    refuse_place(source, new, changes, same_pictures=_same_pictures(source, dataset))
    saved, run = source.saved, dict(source.saved.state["run"])
    classes = saved.model["linear.bias"].shape[0]
    if classes != len(dataset.classes):
        raise UsageError(
            f"{dataset.name} has {len(dataset.classes)} classes, the network tells {classes} apart: a fork keeps them"
        )
    if not source.mid_epoch:
        # The learning rate follows the step: with another batch or subset an epoch has another number of them.
        run["step"] = run["epoch"] * steps_per_epoch(new, dataset)
    # The old run's best was chosen under other settings, perhaps on other pictures, and its weights are not here.
    run["best"] = None
    # Whether the run gets anywhere is a new question. What going back has made of its rate stays, unless there is
    # another to begin with.
    run |= {"rollbacks": 0, "exploded_losses": 0, "chance_epochs": 0, "told_stuck": False}
    if "optim.lr" in changes:
        run["lr_scale"] = 1.0
    run["low_start"] = bool(run.get("low_start")) and starts_low(new)
    identity = {"settings": config_hash(new), "data": dataset.fingerprint}
    return replace(saved, step=run["step"], state={"run": run, "identity": identity})


def _same_pictures(source: ForkPoint, dataset: Dataset) -> bool:
    return bool(source.saved.state["identity"].get("data") == dataset.fingerprint)


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    """Optimizer steps an epoch, the last, smaller batch included."""
    return -(-len(dataset.train.labels) // config.train.batch)


# -- in words ----------------------------------------------------------------------------------------------------------


def _rates(source: ForkPoint, new: Config, carried: Checkpoint, steps: int) -> tuple[RateCurve, RateCurve]:
    """The learning rate from the fork on, as it would have been and as it is. `steps`: of an epoch of the new run.
    Those of the old one follow from where its checkpoint is."""
    at, low_start = source.position, bool(source.saved.state["run"].get("low_start"))
    old_steps = (at.step - at.step_in_epoch) // at.epoch if at.epoch else steps
    return (
        rate_curve(source.config, old_steps, at.step, low_start=low_start, scale=_scale(source.saved)),
        rate_curve(new, steps, carried.step, low_start=carried.state["run"]["low_start"], scale=_scale(carried)),
    )


def _scale(saved: Checkpoint) -> float:
    """What going back from a broken loss has made of the learning rate."""
    return float(saved.state["run"].get("lr_scale", 1.0))


def explain(source: ForkPoint, new: Config, changes: Changes, carried: Checkpoint, dataset: Dataset) -> list[str]:
    """What changes, what does not, and the learning rate before and after, in lines."""
    at, old, steps = source.position, source.config, steps_per_epoch(new, dataset)
    place = f"step {at.step}, in epoch {at.epoch + 1}" if source.mid_epoch else f"the end of epoch {at.epoch}"
    lines = [f"a fork of {source.run} from {place} ({at.path.name}); {source.run} stays as it is"]
    stays = "train.epochs" in changes and (_milestones(old) == _milestones(new))
    for key, (before, after) in changes.items():
        if not (stays and key in _SCHEDULE):
            lines.append(f"{key}: {before!r} -> {after!r}")
    if stays:
        lines.append(
            f"the schedule stays where it was, milestones at {_list_epochs(_milestones(old))}: for one scaled to "
            f"{new.train.epochs} epochs, `lowmem fork` with --set schedule.reference_epochs="
            f"{old.schedule.reference_epochs} too"
        )
    if source.mid_epoch:
        lines.append(
            f"epoch {at.epoch + 1} goes on after {at.step_in_epoch} of its {steps} steps with the pictures that were "
            "still to come; its row will be of both settings"
        )
    lines.append("best weights are chosen anew, from here on")
    lines += side_by_side(*_rates(source, new, carried, steps))
    if (scale := _scale(source.saved)) != 1.0:
        stays_words = "so is the fork (--set optim.lr=… begins with a rate of its own)"
        now = stays_words if _scale(carried) == scale else f"the fork begins with {new.optim.lr:g}"
        lines.append(f"{source.run} went back from a broken loss and is at {scale:g} of its learning rate: {now}")
    if carried.state["run"]["low_start"]:
        schedule = new.schedule
        until = schedule.low_start_until_error_pct
        lines.append(f"the low start is on: {schedule.low_start_lr:g} until the training error is under {until:g} %")
    return lines


def warnings(source: ForkPoint, changes: Changes, dataset: Dataset) -> list[str]:
    """What may be meant otherwise."""
    found = [f"skipped a damaged checkpoint: {reason}" for reason in source.skipped]
    asked = [key for key in _PICTURES if key in changes]
    if not _same_pictures(source, dataset) and not asked and "data.test_subset" not in changes:
        found.append(f"the pictures are not those that {source.run} was trained on, though no setting of them changes")
    if dataset.val is not None and asked:
        found.append(
            f"{asked[0]} changes which pictures are held back: the weights have been trained on some of them, so the "
            "validation error will look too good"
        )
    return found


def _milestones(config: Config) -> list[float]:
    scale = config.train.epochs / config.schedule.reference_epochs
    return [milestone * scale for milestone in config.schedule.milestones]


def _list_epochs(milestones: list[float]) -> str:
    listed = [f"{milestone:.5g}" for milestone in milestones]
    return f"epoch {listed[0]}" if len(listed) == 1 else f"epochs {' and '.join(listed)}" if listed else "none"


# -- on disk -----------------------------------------------------------------------------------------------------------


def write(source: ForkPoint, carried: Checkpoint, settings: Settings, out: RunFolder, dataset: Dataset) -> None:
    """Puts rows, picture and checkpoint into the new folder, the checkpoint last. The old run's files are only read.

    Raises DiskError.
    """
    at, steps = source.position, steps_per_epoch(settings.config, dataset)
    (out.path / FORKING).touch()
    # Where they are counted in other steps, the old ones would stand among the new.
    out.copy_rows(source.run, epoch=at.epoch, step=at.step if carried.step == at.step else None)
    _draw(source, _rates(source, settings.config, carried, steps), carried.step / steps, out)
    checkpoints.save(out.checkpoints, carried, keep=settings.config.checkpoint.keep)
    (out.path / FORKING).unlink()
    out.event("fork", source=source.run.name, checkpoint=at.path.name, epoch=at.epoch, step=carried.step)


def _draw(source: ForkPoint, curves: tuple[RateCurve, RateCurve], fork_at: float, out: RunFolder) -> None:
    """report/learning_rate.png; `fork_at`: epochs done."""
    try:
        from lowmem.report.figures import draw_rate_curve  # matplotlib
    except ImportError as error:
        raise PreflightError(f"the fork's picture cannot be drawn ({error}): install matplotlib with pip") from None
    past: list[tuple[float, float]] = []
    try:
        rows = RunView(source.run).epochs
    except LowmemError:
        rows = ()  # the rows of the fork itself have been read by now; this is only the picture
    for row in rows:
        if row.lr is not None and row.epoch <= source.position.epoch:
            past.append((row.epoch - 1, row.lr))
    before, after = (_to_the_end(curve.points, curve.end) for curve in curves)
    title = f"Learning rate of {out.path.name}, a fork of {source.run.name}"
    png = draw_rate_curve(title, _to_the_end(past, fork_at), before, after, fork_at)
    with disk_errors(out.path / "report" / "learning_rate.png") as path:
        path.parent.mkdir(exist_ok=True)
        write_bytes_atomic(path, png)


def _to_the_end(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """With the last value once more, at the end: steps are drawn from point to point."""
    return [*points, (end, points[-1][1])] if points else []
