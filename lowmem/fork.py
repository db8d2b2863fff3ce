"""A new run from a checkpoint of an old one, with changed settings; the old run is only read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.config import Config, flatten
from lowmem.data import Dataset
from lowmem.errors import CorruptCheckpoint, UsageError
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.store import RunFolder
from lowmem.settings import Settings
from lowmem.train.schedule import learning_rate, starts_low
from lowmem.train.state import config_hash


def find(run: Path, epoch: int) -> tuple[Checkpoint, Path]:
    """The checkpoint at the end of `epoch`, verified. Raises UsageError naming the epochs there are."""
    kept = []
    for path in checkpoints.found(run / "checkpoints"):
        try:
            saved = checkpoints.load(path)
        except CorruptCheckpoint:
            continue
        at = saved.state.get("run", {})
        if at.get("step_in_epoch") != 0:
            continue
        if at.get("epoch") == epoch:
            return saved, path
        kept.append(at.get("epoch"))
    there = f"there are epochs {', '.join(map(str, sorted(kept)))}" if kept else "there is none at the end of an epoch"
    raise UsageError(
        f"{run} has no usable checkpoint of the end of epoch {epoch}: {there}; keep more with checkpoint.keep"
    )


def check(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """What changes, name -> (old, new). Raises UsageError for nothing, or for what weights cannot be carried into."""
    before, after = flatten(old), flatten(new)
    changes = {key: (before[key], value) for key, value in after.items() if before[key] != value}
    for key in changes:
        if key.startswith("model."):
            raise UsageError(
                f"{key} cannot become {after[key]!r} in a fork: the weights are for {before[key]!r} only; "
                "start a new run with `lowmem train`"
            )
    if not changes:
        raise UsageError(
            "a fork that changes nothing is a resume: say what changes with --set, like --set optim.lr=0.01"
        )
    return changes


def carry_over(saved: Checkpoint, old: Config, new: Config, dataset: Dataset) -> Checkpoint:
    """The checkpoint as the new run's own: its identity, and its step counted in the new run's batches.

    Raises UsageError if the new run would already be over, or its data has another number of classes.
    """
    run: dict[str, Any] = dict(saved.state["run"])
    if run["epoch"] >= new.train.epochs:
        raise UsageError(
            f"the fork is at epoch {run['epoch']} and would end at {new.train.epochs}: ask for more with "
            f"--set train.epochs={run['epoch'] + old.train.epochs}"
        )
    classes = saved.model["linear.bias"].shape[0]
    if classes != len(dataset.classes):
        raise UsageError(
            f"{dataset.name} has {len(dataset.classes)} classes, the network tells {classes} apart: a fork keeps them"
        )
    # The learning rate follows the step: with another batch or subset an epoch has another number of them.
    run["step"] = run["epoch"] * steps_per_epoch(new, dataset)
    # The old run's best was chosen under other settings, perhaps on other pictures, and its weights are not here.
    run["best"] = None
    # The rate is what the new settings say, and whether the run gets anywhere with it is a new question.
    run |= {"lr_scale": 1.0, "rollbacks": 0, "exploded_losses": 0, "chance_epochs": 0, "told_stuck": False}
    run["low_start"] = bool(run["low_start"]) and starts_low(new)
    identity = {"settings": config_hash(new), "data": dataset.fingerprint}
    return replace(saved, step=run["step"], state={"run": run, "identity": identity})


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    """Optimizer steps an epoch, the last, smaller batch included."""
    return -(-len(dataset.train.labels) // config.train.batch)


def explain(
    changes: Mapping[str, tuple[object, object]], old: Config, new: Config, saved: Checkpoint, steps: int
) -> list[str]:
    """What changes, and the learning rate before and after, in lines."""
    epoch, low_start = int(saved.state["run"]["epoch"]), bool(saved.state["run"]["low_start"])
    lines = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in changes.items()]
    for words, config in (("learning rate before", old), ("learning rate after", new)):
        rates: list[str] = []
        for at in range(epoch, config.train.epochs):
            rate = f"{learning_rate(config, steps, at * steps, low_start=low_start):g}"
            if not rates or rates[-1].partition(" ")[0] != rate:
                rates.append(f"{rate} from epoch {at + 1}")
        lines.append(f"{words}: {', '.join(rates) or 'the run was over'}")
    return lines


def write(saved: Checkpoint, source: Path, settings: Settings, out: RunFolder, where: Path) -> None:
    """Puts checkpoint and the rows up to it into the new folder. The old run's files are only read."""
    epoch = int(saved.state["run"]["epoch"])
    out.copy_metrics(source, epoch=epoch)
    checkpoints.save(out.checkpoints, saved, keep=settings.config.checkpoint.keep)
    out.event("fork", source=source.name, checkpoint=where.name, epoch=epoch, step=saved.step)
