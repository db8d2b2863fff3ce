"""A loss that is no number any more, or that has exploded: seen where losses are fetched anyway, and undone.

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
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from lowmem.core.errors import CorruptCheckpoint, Diverged
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.store import RunFolder
from lowmem.train.state import restore, share_checkpoint

if TYPE_CHECKING:
    from lowmem.train.loop import Trainer

MOST_ROLLBACKS = 3
LR_FACTOR = 0.5
EXPLODED_FACTOR = 5.0  # times the loss of guessing; a healthy Res110 begins at 1.2, a first epoch's mean was 1.1
EXPLODED_STEPS = 100  # the first steps of a run may be that bad, and a single spike of 1e13 may pass
EXPLODED_LOSSES = 3  # at least, where few are logged


class Recovery:
    """Says what is wrong with a run's loss, and goes back to before it was. `chance_loss`: of guessing, nats."""

    def __init__(self, trainer: Trainer, folder: RunFolder, chance_loss: float) -> None:
        self._t = trainer
        self._folder = folder
        self._limit = EXPLODED_FACTOR * chance_loss

    def wrong(self) -> str | None:
        """What is wrong with the loss as it was last fetched, in words; None: nothing."""
        state = self._t.state
        if not math.isfinite(state.loss_sum):
            return f"the training loss is {state.loss_sum}"
        steps = state.exploded_losses * self._t.config.train.log_every_steps
        if state.exploded_losses >= EXPLODED_LOSSES and steps >= EXPLODED_STEPS:
            return f"the training loss has been above {self._limit:.3g} for {steps} steps"
        return None

    def wrong_after(self, test_loss: float) -> str | None:
        """What the last update of an epoch broke, seen in the evaluation. A test loss that is no number proves nothing
        by itself: in fp16 a net can overflow in evaluation, while its running statistics lag behind its weights."""
        if math.isfinite(test_loss) or _finite(self._t.model.state_dict().values()):
            return None
        return f"the loss on the test pictures is {test_loss} and the weights are no numbers any more"

    def logged(self, losses: Iterable[float]) -> None:
        """Counts the logged losses of single steps in."""
        state = self._t.state
        for loss in losses:
            state.exploded_losses = state.exploded_losses + 1 if loss > self._limit else 0

    def back(self, what: str) -> None:
        """Puts the newest sound checkpoint into the trainer, at half the learning rate; the caller saves that.

        Raises Diverged if the run is to stop, if it went back often enough, or if there is nothing to go back to. Then
        too the newest checkpoint left is a sound one, if any is.
        """
        t = self._t
        broken = t.state
        where = f"at step {broken.step} (epoch {broken.epoch + 1})"
        found, unsound = self._newest_sound() if t.group.leads else (None, [])
        found = share_checkpoint(t.group, found)
        if found is None:
            self._stop(what, where, "none of the checkpoints kept is from before it: start again with a smaller rate")
        saved, path = found
        checkpoints.set_aside(dict.fromkeys(unsound, what))
        if t.config.train.on_nan == "stop":
            self._stop(what, where, f"stopped as asked; {self._way_out(path, saved)}")
        if broken.rollbacks >= MOST_ROLLBACKS:
            self._stop(what, where, f"going back {broken.rollbacks} times did not help; {self._way_out(path, saved)}")
        state = restore(saved, t.model, t.optimizer, t.step.scaler, t.identity)
        state.rollbacks, state.lr_scale = broken.rollbacks + 1, broken.lr_scale * LR_FACTOR
        state.elapsed_seconds = broken.elapsed_seconds
        t.state = state
        self._folder.cut_back(epoch=state.epoch, step=state.step)
        self._folder.event(
            "rollback",
            what=what,
            step=broken.step,
            epoch=broken.epoch + 1,
            checkpoint=path.name,
            rollbacks=state.rollbacks,
            lr_scale=state.lr_scale,
        )
        t.observer.warning(
            f"{what} {where}: going back to step {state.step}, with {state.lr_scale:g} of the learning rate from there "
            f"on ({state.rollbacks} of {MOST_ROLLBACKS} times)"
        )

    def _stop(self, what: str, where: str, why: str) -> NoReturn:
        state = self._t.state
        self._folder.event("diverged", what=what, step=state.step, epoch=state.epoch + 1, why=why)
        raise Diverged(f"{what} {where}: {why}")

    def _way_out(self, path: Path, saved: Checkpoint) -> str:
        run, lr = self._folder.path, self._t.config.optim.lr * self._t.state.lr_scale / 10
        words = f"saved is {path.name}, from before it"
        if saved.step == 0:
            return f"{words}: start again with a smaller rate, like --set optim.lr={lr:g}"
        words += f": try `lowmem fork {run} --at {_place(saved)} --set optim.lr={lr:g}`"
        if self._t.state.rollbacks >= MOST_ROLLBACKS:
            return words
        return f"{words}, or `lowmem resume {run} --on-nan rollback`"

    def _newest_sound(self) -> tuple[tuple[Checkpoint, Path] | None, list[Path]]:
        """The newest sound checkpoint, and the newer ones that verify but are not sound."""
        unsound: list[Path] = []
        for path in checkpoints.checkpoint_folders(self._folder.checkpoints):
            try:
                saved = checkpoints.load(path)
            except CorruptCheckpoint:
                continue  # what a resume would skip as well
            if self._is_sound(saved):
                return (saved, path), unsound
            unsound.append(path)
        return None, unsound

    def _is_sound(self, saved: Checkpoint) -> bool:
        run = saved.state.get("run", {})
        if run.get("exploded_losses", 0) or not math.isfinite(run.get("loss_sum", math.nan)):
            return False
        return _finite((*saved.model.values(), *saved.optimizer.values()))


def _place(saved: Checkpoint) -> str:
    """As `lowmem fork --at` takes it."""
    run = saved.state["run"]
    return f"step:{saved.step}" if run["step_in_epoch"] else f"{run['epoch']}"


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point())
