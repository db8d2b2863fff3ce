"""Holds the plan's prediction against the run's own first steps, and says the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.measure.tensors import TensorMeter
from lowmem.plan.record import Plan
from lowmem.units import format_size

_STEPS = 2  # the first may hold what libraries make once


@dataclass(frozen=True)
class Finding:
    """Predicted and measured peak of the step's tensors, bytes; whether the measured one is within the budget."""

    predicted_bytes: int
    measured_bytes: int
    budget_bytes: int | None

    @property
    def within(self) -> bool:
        return self.budget_bytes is None or self.measured_bytes <= self.budget_bytes

    @property
    def fields(self) -> dict[str, int | None]:
        """For events.jsonl."""
        return {
            "predicted_peak_bytes": self.predicted_bytes,
            "measured_peak_bytes": self.measured_bytes,
            "budget_bytes": self.budget_bytes,
        }

    @property
    def words(self) -> str:
        off = self.measured_bytes / self.predicted_bytes - 1
        verdict = "within" if self.within else "OVER"
        return (
            f"measured: {format_size(self.measured_bytes)} of tensors at the peak of a step, predicted "
            f"{format_size(self.predicted_bytes)} ({off:+.1%}); {verdict} the budget of "
            f"{format_size(self.budget_bytes)}"
        )


class PlanCheck:
    """Measures the first steps of a planned run: on the CPU by counting tensors, on CUDA by the allocator."""

    def __init__(
        self,
        plan: Plan | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: str,
        copies: Sequence[Tensor] = (),
    ) -> None:
        """`copies`: what the loop keeps to undo a step; the prediction has it."""
        predicted = plan.predicted.peak_allocated_bytes if plan is not None else None
        self._predicted = predicted
        self._budget = plan.budget_bytes if plan is not None else None
        self._model, self._optimizer, self._device, self._copies = model, optimizer, device, copies
        self._left = _STEPS if predicted is not None else 0
        self._meter = TensorMeter()
        self._beside = 0

    def around(self, images: Tensor, labels: Tensor) -> AbstractContextManager[None]:
        """The context to run a step in."""
        if not self._left:
            return nullcontext()
        return self._measured(images, labels)

    @contextmanager
    def _measured(self, images: Tensor, labels: Tensor) -> Iterator[None]:
        self._left -= 1
        state = [v for slots in self._optimizer.state.values() for v in slots.values() if isinstance(v, Tensor)]
        known = (*self._model.parameters(), *self._model.buffers(), *state, *self._copies, images, labels)
        if self._device == "cuda":
            # What the allocator holds beside the step's own tensors: the data set, above all.
            own = sum(tensor.numel() * tensor.element_size() for tensor in known)
            self._beside = max(0, torch.cuda.memory_allocated() - own)
            yield
            return
        self._meter.adopt(known)
        with self._meter:
            yield

    def finding(self) -> Finding | None:
        """Once, after the last measured step."""
        if self._left or self._predicted is None:
            return None
        if self._device == "cuda":
            measured = torch.cuda.max_memory_allocated() - self._beside
        else:
            measured = self._meter.peak_bytes
        found = Finding(self._predicted, measured, self._budget)
        self._predicted = None
        return found
