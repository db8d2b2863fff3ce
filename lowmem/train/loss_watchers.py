"""Watchers of the loss: a run that learns nothing (`Stall`), and one whose loss breaks (`Divergence`).

**Stall**, such as the plain 110-layer net's, which stays at chance for all of its 164 epochs. Three things must hold
over whole epochs: the loss is not below chance, the training error is not either, and hardly a gradient reaches the
first layers. What makes each of them certain:

*Loss.* A net that does not look at its pictures gives every picture the same logits. If they never moved, its mean loss
over an epoch would be at least H, the entropy of the labels (ln 10 = 2.3026 for ten equal classes). They do move, after
the last few batches. Let d be by how much its loss is above H on average; the loss of a picture, -log p of its class,
then has a variance of nearly 2d (to second order both come from the same wandering logits), and the mean of N pictures
a standard error of sqrt(2d/N). Below H by more than the minimum over d of d - z sqrt(2d/N), which is -z²/(2N), it does
not come at z standard errors: 0.00009 nats for 50,000 pictures and z = 3. So nets that learn slowly are told apart
where their error is not: the plain 56-layer net at width 16 had an error of 89.7 % of 10,000 pictures in its second
epoch (one standard error from chance), but a loss of 2.3002, five times this bound below H.

With label smoothing H is the entropy of the smoothed labels; mixup leaves both H and the guesser's error as they are,
since a batch mixed with itself has its labels once more.

*Training error.* Of a guesser it is binomial around the chance error e: a standard error of sqrt(e (1-e) / N), 0.13 %
for 50,000 pictures and ten classes.

*Gradients.* A net can be at chance and about to leave it: a residual net of 110 layers at the low start's rate (0.01)
spent its first two small epochs there. What tells it from the plain net is the gradient norm over the first tenth of
the layers (median) as a share of the last tenth's: over an epoch (geometric mean, for single records spread over five
decades) 0.2 to 0.3 in the residual net and 4e-6 to 7e-6 in the plain one (benchmarks/results/gradients). In nets with
batch norm it explodes before it vanishes: in the plain net's first step it is five million, and that one step makes the
first weights so large that nothing moves them afterwards. So the first epoch is not judged.

**Divergence**: a loss that is no number any more, or has exploded. From NaN no step leads back, and a net whose weights
have exploded under batch norm has frozen. So the run goes back to the newest checkpoint that is sound and goes on with
half the learning rate, at most three times, after which it stops: a run is left alone for hours, which stopping would
lose. It is said, recorded, and part of the run's state, so that a resume is exact. An overflow under fp16 is none of
this: the scaler skips that step, and the loss, taken in fp32 before any scaling, is finite.

Known limitation: checkpoints made by the clock (`checkpoint.every_minutes`) are where a run may go back to, so that
two runs that go back need not be equal. Runs that do not go back are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig
from lowmem.core.errors import CorruptCheckpoint, Diverged
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.store import RunFolder
from lowmem.train.replica import Replica, share_checkpoint
from lowmem.train.watchers import STALLED, Act, Verdict

# -- stall -------------------------------------------------------------------------------------------------------------

STANDARD_ERRORS = 3.0
VANISHED_SHARE = 1e-3
EPOCHS = 2  # at chance one after the other, the first epoch of a run not counted
LEAST_STEPS = 50  # in these: an epoch of a few pictures is no evidence
_LEAST_SHARE = 1e-30  # what stands for a gradient that is zero


@dataclass(frozen=True)
class Chance:
    """What guessing gives on `pictures` with the labels' frequencies: loss in nats, error in percent, and by how
    much an epoch may fall below without having learned anything."""

    loss: float
    error_pct: float
    pictures: int

    @classmethod
    def of(cls, labels: Tensor, classes: int = 0, label_smoothing: float = 0.0) -> Chance:
        """labels: int64 [N], on the CPU. `label_smoothing`: what the loss spreads over so many classes."""
        shares = torch.bincount(labels, minlength=classes).double() / len(labels)
        targets = (1 - label_smoothing) * shares + label_smoothing / len(shares)
        entropy = -sum(share * math.log(share) for share in targets.tolist() if share > 0)
        return cls(entropy, 100 * (1 - shares.max().item()), len(labels))

    @property
    def loss_noise(self) -> float:
        return STANDARD_ERRORS**2 / (2 * self.pictures)

    @property
    def error_noise_pct(self) -> float:
        share = self.error_pct / 100
        return 100 * STANDARD_ERRORS * math.sqrt(share * (1 - share) / self.pictures)


def tenth(layers: int) -> int:
    """How many of a net's layers are its first, and its last ones."""
    return max(1, layers // 10)


def gradient_share(norms: Sequence[float]) -> float | None:
    """The first layers' gradient norm as a share of the last ones' (medians over a tenth of the layers each).

    None if it is not known: a step that overflowed. Where no gradient is anywhere, none reaches the first layers: 0.
    """
    count = tenth(len(norms))
    first, last = median(norms[:count]), median(norms[-count:])
    if not (math.isfinite(first) and math.isfinite(last)):
        return None
    return first / last if last > 0 else 0.0 if first == 0 else math.inf


def note_share(state: RunState, norms: Sequence[float]) -> None:
    """Counts one record of an epoch in."""
    share = gradient_share(norms)
    if share is not None and math.isfinite(share):
        state.share_log_sum += math.log(max(share, _LEAST_SHARE))
        state.share_count += 1


@dataclass(frozen=True)
class Evidence:
    """Of the newest epoch, as the event `stuck` has it; `epochs_at_chance` up to it were alike."""

    epoch: int
    epochs_at_chance: int
    train_loss: float
    chance_loss: float
    chance_loss_noise: float
    train_error_pct: float
    chance_error_pct: float
    chance_error_noise_pct: float
    first_to_last_gradient: float

    @property
    def words(self) -> str:
        """For people."""
        return (
            f"this run learns nothing: {self.epochs_at_chance} epochs up to epoch {self.epoch} were at chance, the "
            f"last with a loss of {self.train_loss:.4f} (guessing: {self.chance_loss:.4f}, noise "
            f"{self.chance_loss_noise:.1g}) and a training error of {self.train_error_pct:.2f} % (guessing: "
            f"{self.chance_error_pct:.2f}, noise {self.chance_error_noise_pct:.2f}), and the gradient of the first "
            f"layers is {self.first_to_last_gradient:.1e} of the last ones', so that they stay as they are"
        )


class Stall:
    """Judges whole epochs. `stop`: whether a run is to be left for it. What it counts is in the run's state."""

    def __init__(self, chance: Chance, steps_per_epoch: int, *, stop: bool) -> None:
        self.evidence: Evidence | None = None  # of the last epoch
        self.is_new = False  # it was not there an epoch before
        self._chance, self._steps_per_epoch, self._stop = chance, steps_per_epoch, stop

    def look(self, state: RunState, *, epoch: int, loss: float, error_pct: float) -> Verdict:
        """Counts a whole epoch in (from 1), before the state's sums are cleared. LEAVE if the run is to stop for it."""
        self.evidence = self._judge(state, epoch, loss, error_pct)
        self.is_new = self.evidence is not None and not state.told_stuck
        state.told_stuck = self.evidence is not None
        return Verdict(Act.LEAVE, STALLED) if state.told_stuck and self._stop else Verdict()

    def _judge(self, state: RunState, epoch: int, loss: float, error_pct: float) -> Evidence | None:
        if state.share_count:
            state.gradient_share = math.exp(state.share_log_sum / state.share_count)
        share, chance = state.gradient_share, self._chance
        at_chance = loss >= chance.loss - chance.loss_noise and error_pct >= chance.error_pct - chance.error_noise_pct
        if epoch == 1 or share is None or share >= VANISHED_SHARE or not at_chance:
            state.chance_epochs = 0
            return None
        state.chance_epochs += 1
        if state.chance_epochs < EPOCHS or state.chance_epochs * self._steps_per_epoch < LEAST_STEPS:
            return None
        losses, errors = (loss, chance.loss, chance.loss_noise), (error_pct, chance.error_pct, chance.error_noise_pct)
        return Evidence(epoch, state.chance_epochs, *losses, *errors, share)


def way_out(model: ModelConfig) -> str:
    """What may help a network that stalls."""
    if model.spec is None and model.arch.startswith("cnn"):
        return f"train the net with shortcuts (--arch res{model.depth}) or one of fewer layers"
    return "try another learning rate (--set optim.lr=...) or another seed"


# -- divergence --------------------------------------------------------------------------------------------------------

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
            return Verdict(Act.ROLLBACK, f"the training loss has been above {self._limit:.3g} for {steps} steps")
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
    at = {"step": broken.step, "epoch": broken.epoch + 1}
    what = f"{why} at step {broken.step} (epoch {broken.epoch + 1})"

    def stop(reason: str) -> NoReturn:
        folder.event("diverged", what=why, **at, why=reason)
        raise Diverged(f"{what}: {reason}")

    newest, unsound = _newest_sound(folder) if group.leads else (None, [])
    newest = share_checkpoint(group, newest)
    if newest is None:
        stop("none of the checkpoints kept is from before it: start again with a smaller rate")
    saved, path = newest
    checkpoints.set_aside(dict.fromkeys(unsound, why))
    instead = _instead(broken, replica.config.optim.lr, folder, saved, path)
    if replica.config.train.on_nan == "stop":
        stop(f"stopped as asked; {instead}")
    if broken.rollbacks >= MOST_ROLLBACKS:
        stop(f"going back {broken.rollbacks} times did not help; {instead}")
    state = replica.state = replica.restore(saved)
    state.rollbacks, state.lr_scale = broken.rollbacks + 1, broken.lr_scale * LR_FACTOR
    state.elapsed_seconds = broken.elapsed_seconds
    folder.cut_back(epoch=state.epoch, step=state.step)
    now = {"rollbacks": state.rollbacks, "lr_scale": state.lr_scale}
    folder.event("rollback", what=why, **at, checkpoint=path.name, **now)
    replica.observer.warning(
        f"{what}: going back to step {state.step}, with {state.lr_scale:g} of the learning rate from there on "
        f"({state.rollbacks} of {MOST_ROLLBACKS} times)"
    )


def _instead(broken: RunState, lr: float, folder: RunFolder, saved: Checkpoint, path: Path) -> str:
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
