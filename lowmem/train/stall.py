"""Telling a run that learns nothing: the plain 110-layer net, which stays at chance for all of its 164 epochs.

Three things must hold over whole epochs: the loss is not below chance, the training error is not either, and hardly
a gradient reaches the first layers. What makes each of them certain:

**Loss.** A net that does not look at its pictures gives every picture the same logits. If they never moved, its mean
loss over an epoch, in which every picture comes once, would be at least H, the entropy of the labels (ln 10 = 2.3026
for ten equal classes), without any noise. They do move (the last layer's weights and biases follow the last few
batches). Let d be by how much its loss is above H on average; the loss of a picture, -log p of its class, then has a
variance of nearly 2d (to second order both come from the same wandering logits), and the mean of N pictures a
standard error of sqrt(2d/N). Below H by more than

    min over d of (d - z sqrt(2d/N)) = -z²/(2N)

it does not come at z standard errors, however its logits wander: 0.00009 nats for 50,000 pictures and z = 3. What is
below that has learned something. Above H everything counts as chance: a net whose last layer wanders, at a large
rate, is above it. Nets that learn slowly are caught by this where their error is not: the plain 56-layer net at
width 16 had an error of 89.7 % of 10,000 pictures in its second epoch (one standard error from chance), but a loss
of 2.3002, five times this bound below H.

**Training error.** Of a guesser it is binomial around the chance error e: a standard error of sqrt(e (1-e) / N),
0.13 % for 50,000 pictures and ten classes.

**Gradients.** A net can be at chance and about to leave it: a residual net of 110 layers at the low start's rate
(0.01) spent its first two small epochs there. What tells it from the plain net is whether a gradient reaches its
first layers: the norm over the first tenth of the layers (median) as a share of the last tenth's. Over an epoch
(geometric mean, for single records spread over five decades) it was 0.2 to 0.3 in the residual net and 4e-6 to 7e-6
in the plain one (benchmarks/results/gradients). In nets with batch norm it explodes before it vanishes: in the plain
net's first step the gradient of the first layer is five million times that of the last, and that one step makes its
weights so large that nothing moves them afterwards; batch norm hides their size from the layers behind. So the first
epoch is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lowmem.runs.checkpoint_state import RunState

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
    def of(cls, labels: Tensor) -> Chance:
        """labels: int64 [N], on the CPU."""
        shares = torch.bincount(labels).double() / len(labels)
        entropy = -sum(share * math.log(share) for share in shares.tolist() if share > 0)
        return cls(entropy, 100 * (1 - shares.max().item()), len(labels))

    @property
    def loss_noise(self) -> float:
        return STANDARD_ERRORS**2 / (2 * self.pictures)

    @property
    def error_noise_pct(self) -> float:
        share = self.error_pct / 100
        return 100 * STANDARD_ERRORS * math.sqrt(share * (1 - share) / self.pictures)

    def covers(self, loss: float, error_pct: float) -> bool:
        """Whether an epoch with this mean loss and error is no better than guessing."""
        return loss >= self.loss - self.loss_noise and error_pct >= self.error_pct - self.error_noise_pct


def ends(layers: int) -> int:
    """How many of a net's layers are its first, and its last ones."""
    return max(1, layers // 10)


def gradient_share(norms: Sequence[float]) -> float | None:
    """The first layers' gradient norm as a share of the last ones' (medians over a tenth of the layers each).

    None if it is not known: a step that overflowed. Where no gradient is anywhere, none reaches the first layers: 0.
    """
    count = ends(len(norms))
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
    """The evidence, of the newest epoch; `epochs` of them were like it."""

    epochs: int
    epoch: int
    loss: float
    error_pct: float
    share: float
    chance: Chance

    @property
    def fields(self) -> dict[str, float]:
        """For events.jsonl."""
        return {
            "epoch": self.epoch,
            "epochs_at_chance": self.epochs,
            "train_loss": self.loss,
            "chance_loss": self.chance.loss,
            "chance_loss_noise": self.chance.loss_noise,
            "train_error_pct": self.error_pct,
            "chance_error_pct": self.chance.error_pct,
            "chance_error_noise_pct": self.chance.error_noise_pct,
            "first_to_last_gradient": self.share,
        }

    @property
    def words(self) -> str:
        chance = self.chance
        return (
            f"this run learns nothing: {self.epochs} epochs up to epoch {self.epoch} were at chance, the last with a "
            f"loss of {self.loss:.4f} (guessing: {chance.loss:.4f}, noise {chance.loss_noise:.1g}) and a training "
            f"error of {self.error_pct:.2f} % (guessing: {chance.error_pct:.2f}, noise {chance.error_noise_pct:.2f}), "
            f"and the gradient of the first layers is {self.share:.1e} of the last ones', so that they stay as they are"
        )


def end_epoch(
    state: RunState, chance: Chance, *, epoch: int, loss: float, error_pct: float, steps_per_epoch: int
) -> Evidence | None:
    """Judges a whole epoch (from 1) and counts it in; what is found holds for the epochs up to this one."""
    if state.share_count:
        state.gradient_share = math.exp(state.share_log_sum / state.share_count)
    share = state.gradient_share
    if epoch == 1 or share is None or share >= VANISHED_SHARE or not chance.covers(loss, error_pct):
        state.chance_epochs = 0
        return None
    state.chance_epochs += 1
    if state.chance_epochs < EPOCHS or state.chance_epochs * steps_per_epoch < LEAST_STEPS:
        return None
    return Evidence(state.chance_epochs, epoch, loss, error_pct, share, chance)
