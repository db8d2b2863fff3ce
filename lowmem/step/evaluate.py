"""Loss and error on pictures the network is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.step.train_step import Execution


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy (nats) and error in percent over `count` pictures."""

    loss: float
    error_pct: float
    count: int


@dataclass(frozen=True)
class Sums:
    """Of the losses (nats) and of wrong predictions over `count` pictures: of several sets, or the parts of one, they
    add up."""

    loss: float
    wrong: float
    count: int

    def score(self) -> Score:
        """Raises ValueError if there are no pictures."""
        if self.count == 0:
            raise ValueError("there are no pictures to evaluate on")
        return Score(self.loss / self.count, 100.0 * self.wrong / self.count, self.count)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    execution: Execution,
    should_stop: Callable[[], bool] = lambda: False,
) -> Sums | None:
    """Scores the model in eval mode, and puts it back as it was. None if `should_stop` said so in between.

    Changes no parameter and no buffer, so that an evaluation that was cut off can simply be done again.
    """
    was_training = model.training
    model.eval()
    loss_sum: Tensor | float = 0.0
    wrong: Tensor | float = 0.0
    count = 0
    try:
        for images, labels in batches:
            if should_stop():
                return None
            with execution.autocast():
                logits = model(images)
            loss_sum = loss_sum + F.cross_entropy(logits.float(), labels, reduction="sum").double()
            wrong = wrong + (logits.argmax(1) != labels).sum()
            count += labels.shape[0]
    finally:
        model.train(was_training)
    return Sums(float(loss_sum), float(wrong), count)
