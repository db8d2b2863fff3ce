"""Stall: a run that learns nothing, such as the plain 110-layer net, which stays at chance for all of its 164 epochs;
and the gradient norm of every layer, now and then, by which it is told.

Three things must hold over whole epochs: the loss is not below chance, the training error is not either, and hardly
a gradient reaches the first layers. What makes each of them certain:

**Loss.** A net that does not look at its pictures gives every picture the same logits. If they never moved, its mean
loss over an epoch would be at least H, the entropy of the labels (ln 10 = 2.3026 for ten equal classes). They do move,
after the last few batches. Let d be by how much its loss is above H on average; the loss of a picture, -log p of its
class, then has a variance of nearly 2d (to second order both come from the same wandering logits), and the mean of N
pictures a standard error of sqrt(2d/N). Below H by more than the minimum over d of d - z sqrt(2d/N), which is
-z²/(2N), it does not come at z standard errors: 0.00009 nats for 50,000 pictures and z = 3. What is below that has
learned something; above H everything counts as chance. Nets that learn slowly are caught by this where their error is
not: the plain 56-layer net at width 16 had an error of 89.7 % of 10,000 pictures in its second epoch (one standard
error from chance), but a loss of 2.3002, five times this bound below H.

**Training error.** Of a guesser it is binomial around the chance error e: a standard error of sqrt(e (1-e) / N),
0.13 % for 50,000 pictures and ten classes.

**Gradients.** A net can be at chance and about to leave it: a residual net of 110 layers at the low start's rate
(0.01) spent its first two small epochs there. What tells it from the plain net is the gradient norm over the first
tenth of the layers (median) as a share of the last tenth's: over an epoch (geometric mean, for single records spread
over five decades) 0.2 to 0.3 in the residual net and 4e-6 to 7e-6 in the plain one (benchmarks/results/gradients). In
nets with batch norm it explodes before it vanishes: in the plain net's first step it is five million, and that one step
makes the first weights so large that nothing moves them afterwards. So the first epoch is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from lowmem.runs.checkpoint_state import RunState
from lowmem.step.train_step import TrainStep
from lowmem.train.watchers import STALLED, Act, Verdict

STANDARD_ERRORS = 3.0
VANISHED_SHARE = 1e-3
EPOCHS = 2  # at chance one after the other, the first epoch of a run not counted
LEAST_STEPS = 50  # in these: an epoch of a few pictures is no evidence
_LEAST_SHARE = 1e-30  # what stands for a gradient that is zero

MOST_STEPS_APART = 100  # two records of gradient norms, by default; of an epoch of fewer than 1,000 steps a tenth


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


def _tenth(layers: int) -> int:
    """How many of a net's layers are its first, and its last ones."""
    return max(1, layers // 10)


def gradient_share(norms: Sequence[float]) -> float | None:
    """The first layers' gradient norm as a share of the last ones' (medians over a tenth of the layers each).

    None if it is not known: a step that overflowed. Where no gradient is anywhere, none reaches the first layers: 0.
    """
    count = _tenth(len(norms))
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
        return Verdict(Act.LEAVE, STALLED) if self.evidence is not None and self._stop else Verdict()

    def _judge(self, state: RunState, epoch: int, loss: float, error_pct: float) -> Evidence | None:
        if state.share_count:
            state.gradient_share = math.exp(state.share_log_sum / state.share_count)
        share, chance = state.gradient_share, self._chance
        if epoch == 1 or share is None or share >= VANISHED_SHARE or not chance.covers(loss, error_pct):
            state.chance_epochs = 0
            return None
        state.chance_epochs += 1
        if state.chance_epochs < EPOCHS or state.chance_epochs * self._steps_per_epoch < LEAST_STEPS:
            return None
        losses, errors = (loss, chance.loss, chance.loss_noise), (error_pct, chance.error_pct, chance.error_noise_pct)
        return Evidence(epoch, state.chance_epochs, *losses, *errors, share)


def way_out(arch: str) -> str:
    """What may help a network that stalls."""
    if arch.startswith("cnn"):
        return f"train the net with shortcuts (--arch res{arch[3:]}) or one of fewer layers"
    return "try another learning rate (--set optim.lr=...) or another seed"


# -- gradient norms ----------------------------------------------------------------------------------------------------


def default_every(steps_per_epoch: int) -> int:
    """Steps between two records where the settings leave it open: ten an epoch, or every 100 steps if that is more."""
    return min(MOST_STEPS_APART, max(1, steps_per_epoch // 10))


def measured_weights(model: nn.Module) -> dict[str, Tensor]:
    """All trainable convolution and linear weights by name, in the order of the forward pass."""
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    return {f"{name}.weight": one.weight for name, one in layers if one.weight.requires_grad}


class GradientNorms:
    """L2 norms of the gradients of all trainable convolution and linear weights, in the order of the forward pass.
    Computed on the device after the last backward of a step and before its update, so that running out of memory here
    is undone like any other failure of a step; fetched with the other figures of the steps, so that nothing waits.

    They are those of the mean loss over the effective batch: after all micro-batches, and without the scaler's factor.
    Where the scaler found an overflow (fp16; the step is then skipped) they are infinite or no number.
    """

    def __init__(self, model: nn.Module, step: TrainStep, every: int) -> None:
        """Records step 1, whose gradients are those of the initial weights, and every `every`-th step."""
        weights = measured_weights(model)
        self.names = tuple(weights)
        self._weights = tuple(weights.values())
        self._step = step
        self._every = every
        self._latest: Tensor | None = None
        self._pending: list[tuple[int, int, Tensor]] = []

    def due(self, step: int) -> bool:
        """Whether the `step`-th step (from 1) is recorded."""
        return bool(self.names) and (step == 1 or step % self._every == 0)

    @torch.no_grad()
    def measure(self) -> None:
        """Called between backward and update; allocates, and waits for nothing."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._weights]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self._step.scaler.is_enabled():
            # The scale lies on the device and only the scaler knows it: what it makes of one.
            norms = norms / self._step.scaler.scale(torch.ones((), device=norms.device))
        self._latest = norms

    def keep(self, step: int, epoch: int) -> None:
        """The step that was measured is done: `step` and `epoch` count from 1."""
        if self._latest is not None:
            self._pending.append((step, epoch, self._latest))
            self._latest = None

    def fetch(self) -> list[tuple[int, int, list[float]]]:
        """(step, epoch, norm of each layer) of what was kept since the last call."""
        rows = [(step, epoch, norms.tolist()) for step, epoch, norms in self._pending]
        self._pending.clear()
        return rows

    def forget(self) -> None:
        """Drops what was not fetched."""
        self._pending.clear()
        self._latest = None

    def ends(self) -> dict[str, list[str]]:
        """The names of the first layers and of the last ones, whose norms are compared."""
        count = _tenth(len(self.names))
        return {"first": list(self.names[:count]), "last": list(self.names[-count:])}
