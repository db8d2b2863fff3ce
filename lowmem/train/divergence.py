"""Divergence: a loss that is no number any more, or has exploded. Seen where losses are fetched anyway, and undone.

What is wrong stays wrong: from NaN no step leads back, and a net whose weights have exploded under batch norm has
frozen. So the run goes back to the newest checkpoint that is sound and goes on with half the learning rate, at most
three times, after which it stops. That is the default because a run is left alone for hours: stopping would lose
them, and going on with NaN as well. What it does to the learning rate is said, stands in events.jsonl and in the
report, and is part of the run's state, so that a resume is exact.

An overflow under fp16 is none of this: the scaler skips that step, and the loss, taken in fp32 before any scaling,
is finite.

Known limitation: checkpoints made by the clock (`checkpoint.every_minutes`) are where a run may go back to, so that
two runs that go back need not be equal. Runs that do not go back are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lowmem.core.errors import CorruptCheckpoint, Diverged
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.store import RunFolder
from lowmem.train.replica import Replica, share_checkpoint
from lowmem.train.watchers import Act, Verdict

MOST_ROLLBACKS = 3
LR_FACTOR = 0.5
EXPLODED_FACTOR = 5.0  # times the loss of guessing; a healthy Res110 begins at 1.2, a first epoch's mean was 1.1
EXPLODED_STEPS = 100  # the first steps of a run may be that bad, and a single spike of 1e13 may pass
EXPLODED_LOSSES = 3  # at least, where few are logged


class Divergence:
    """Watches the loss. `chance_loss`: of guessing, nats. What it counts is in the run's state."""

    def __init__(self, chance_loss: float, log_every_steps: int) -> None:
        self._limit = EXPLODED_FACTOR * chance_loss
        self._log_every_steps = log_every_steps

    def logged(self, state: RunState, losses: Iterable[float]) -> None:
        """Counts the logged losses of single steps in."""
        for loss in losses:
            state.exploded_losses = state.exploded_losses + 1 if loss > self._limit else 0

    def look(self, state: RunState) -> Verdict:
        """ROLLBACK if anything is wrong with the loss as it was last fetched."""
        if not math.isfinite(state.loss_sum):
            return Verdict(Act.ROLLBACK, f"the training loss is {state.loss_sum}")
        steps = state.exploded_losses * self._log_every_steps
        if state.exploded_losses >= EXPLODED_LOSSES and steps >= EXPLODED_STEPS:
            why = f"the training loss has been above {self._limit:.3g} for {steps} steps"
            return Verdict(Act.ROLLBACK, why)
        return Verdict()

    def look_at_evaluation(self, test_loss: float, weights: Iterable[Tensor]) -> Verdict:
        """What the last update of an epoch broke. A test loss that is no number proves nothing by itself: in fp16 a net
        can overflow in evaluation, while its running statistics lag behind its weights."""
        if math.isfinite(test_loss) or _all_finite(weights):
            return Verdict()
        why = f"the loss on the test pictures is {test_loss} and the weights are no numbers any more"
        return Verdict(Act.ROLLBACK, why)


def roll_back(replica: Replica, folder: RunFolder, why: str) -> None:
    """Puts the newest sound checkpoint into the replica, at half the learning rate; the caller saves that.

    Raises Diverged if the run is to stop, if it went back often enough, or if there is nothing to go back to. Then
    too the newest checkpoint left is a sound one, if any is.
    """
    broken, group = replica.state, replica.group

    def stop(reason: str) -> NoReturn:
        folder.event("diverged", what=why, step=broken.step, epoch=broken.epoch + 1, why=reason)
        raise Diverged(f"{why} at step {broken.step} (epoch {broken.epoch + 1}): {reason}")

    newest, unsound = _newest_sound(folder) if group.leads else (None, [])
    newest = share_checkpoint(group, newest)
    if newest is None:
        stop("none of the checkpoints kept is from before it: start again with a smaller rate")
    saved, path = newest
    checkpoints.set_aside(dict.fromkeys(unsound, why))
    way_out = _way_out(broken, replica.config.optim.lr, folder, saved, path)
    if replica.config.train.on_nan == "stop":
        stop(f"stopped as asked; {way_out}")
    if broken.rollbacks >= MOST_ROLLBACKS:
        stop(f"going back {broken.rollbacks} times did not help; {way_out}")
    state = replica.restore(saved)
    state.rollbacks, state.lr_scale = broken.rollbacks + 1, broken.lr_scale * LR_FACTOR
    state.elapsed_seconds = broken.elapsed_seconds
    replica.state = state
    folder.cut_back(epoch=state.epoch, step=state.step)
    folder.event(
        "rollback",
        what=why,
        step=broken.step,
        epoch=broken.epoch + 1,
        checkpoint=path.name,
        rollbacks=state.rollbacks,
        lr_scale=state.lr_scale,
    )
    replica.observer.warning(
        f"{why} at step {broken.step} (epoch {broken.epoch + 1}): going back to step {state.step}, with "
        f"{state.lr_scale:g} of the learning rate from there on ({state.rollbacks} of {MOST_ROLLBACKS} times)"
    )


def _way_out(broken: RunState, lr: float, folder: RunFolder, saved: Checkpoint, path: Path) -> str:
    smaller = f"--set optim.lr={lr * broken.lr_scale / 10:g}"
    words = f"saved is {path.name}, from before it"
    if saved.step == 0:
        return f"{words}: start again with a smaller rate, like {smaller}"
    run = saved.state["run"]
    place = f"step:{saved.step}" if run["step_in_epoch"] else f"{run['epoch']}"
    words += f": try `lowmem fork {folder.path} --at {place} {smaller}`"
    if broken.rollbacks >= MOST_ROLLBACKS:
        return words
    return f"{words}, or `lowmem resume {folder.path} --on-nan rollback`"


def _newest_sound(folder: RunFolder) -> tuple[tuple[Checkpoint, Path] | None, list[Path]]:
    """The newest sound checkpoint, and the newer ones that verify but are not sound."""
    unsound: list[Path] = []
    for path in checkpoints.checkpoint_folders(folder.checkpoints):
        try:
            saved = checkpoints.load(path)
        except CorruptCheckpoint:
            continue  # what a resume would skip as well
        run = saved.state.get("run", {})
        loss_is_sound = math.isfinite(run.get("loss_sum", math.nan)) and not run.get("exploded_losses", 0)
        if loss_is_sound and _all_finite((*saved.model.values(), *saved.optimizer.values())):
            return (saved, path), unsound
        unsound.append(path)
    return None, unsound


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
