"""The gradient norm of every layer, now and then: what tells a net that learns from one whose first layers do not.

Computed on the device after the last backward of a step and before its update, so that running out of memory here is
undone like any other failure of a step; fetched with the other figures of the steps, so that nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.step.train_step import TrainStep

MOST_STEPS_APART = 100  # by default; of an epoch of fewer than 1,000 steps a tenth


def default_every(steps_per_epoch: int) -> int:
    """Steps between two records where the settings leave it open: ten an epoch, or every 100 steps if that is more."""
    return min(MOST_STEPS_APART, max(1, steps_per_epoch // 10))


def measured_weights(model: nn.Module) -> dict[str, Tensor]:
    """All trainable convolution and linear weights by name, in the order of the forward pass."""
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    return {f"{name}.weight": one.weight for name, one in layers if one.weight.requires_grad}


class GradientNorms:
    """L2 norms of the gradients of all trainable convolution and linear weights, in the order of the forward pass.

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
