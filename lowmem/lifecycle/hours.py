"""`train.hours`: how many epochs of a new run fit into the time. Decided once, before its first step, by what steps and
an evaluation were measured to take; recorded as `train.epochs`, to which the schedule is scaled. What a machine that
becomes slower does not manage in the time is left, saved (`train.watchers.TimeLimit`)."""

from __future__ import annotations

import time
from typing import Any

from lowmem.config.settings import Settings, to_yaml
from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.units import counted, format_duration, format_number
from lowmem.runs.store import RunFolder
from lowmem.step.undo import Before
from lowmem.train.loop import Trainer
from lowmem.train.replica import identity_of

_RESERVE = 0.05  # of the time, for a machine that becomes slower
_MEASURED_SHARE, _MOST_MEASURED_SECONDS = 0.01, 30.0
_LEAST_STEPS = 3


def measure_step(trainer: Trainer, hours: float) -> float:
    """Mean seconds of steps of whole batches, one after the other, in all processes; the trainer is then as it was."""
    most = min(_MOST_MEASURED_SECONDS, _MEASURED_SHARE * 3600 * hours)
    before, group = Before(trainer.step), trainer.group
    whole = max(1, trainer.batches.steps_per_epoch - 1)  # without the last, smaller one
    try:
        began, steps = time.perf_counter(), 0
        while steps < _LEAST_STEPS or group.most([int(time.perf_counter() - began < most)])[0]:
            images, labels, size, share = trainer.next_batch(0, steps % whole)
            trainer.step(images, labels, trainer.lr(0), None, size, share).tolist()  # waits for the device
            steps += 1
        return (time.perf_counter() - began) / steps
    finally:
        before.restore()


def fit_into_hours(trainer: Trainer, settings: Settings, folder: RunFolder, epoch_seconds: float) -> dict[str, Any]:
    """Shortens the run, which has taken no step, to the epochs that fit, if not all do; says and returns what was
    decided. `epoch_seconds`: with evaluation and saving. Raises PreflightError where not even one fits, UsageError for
    other settings that want more of them."""
    hours, asked = trainer.config.train.hours, trainer.config.train.epochs
    assert hours is not None
    fits = int((1 - _RESERVE) * 3600 * hours / epoch_seconds)
    each = f"{format_duration(epoch_seconds)} an epoch"
    if fits < 1:
        least = format_number(epoch_seconds / 3600 / (1 - _RESERVE) * 1.1, 2)
        raise PreflightError(
            f"not one epoch fits into train.hours = {hours:g}: it takes about {format_duration(epoch_seconds)} here; "
            f"give --hours {least} or more, or fewer pictures with --set data.train_subset=N"
        )
    epochs = min(fits, asked)
    if epochs < asked:
        try:
            settings = settings.replace({"train.epochs": epochs}, f"what fits into train.hours = {hours:g}")
        except UsageError as error:
            raise UsageError(f"of {asked} epochs {epochs} fit into train.hours = {hours:g}: {error}") from None
        trainer.config = settings.config
        trainer.identity = identity_of(settings.config, trainer.dataset)
        trainer.group.lead(lambda: folder.write_config(to_yaml(settings)), None)
    of = f" of {asked}" if epochs < asked else ""
    whole = f"{'all ' * (1 < epochs == asked)}{counted(epochs, 'epoch')}{of} {'fits' if epochs == 1 else 'fit'}"
    scaled = f", and the schedule is scaled to {'it' if epochs == 1 else 'them'}" if epochs < asked else ""
    trainer.observer.note(
        f"train.hours = {hours:g}: {whole}, about {format_duration(epochs * epoch_seconds)} with {each}{scaled}; when "
        f"{format_duration(3600 * hours)} of training are over, it stops and is saved"
    )
    return {"hours": hours, "epochs": epochs, "asked_epochs": asked, "epoch_seconds": epoch_seconds}
