"""Holds the plan's prediction against the run's own first steps, and says the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.core.units import format_size
from lowmem.measure import Snapshot
from lowmem.measure.tensors import TensorMeter
from lowmem.plan.record import Plan
from lowmem.step.train_step import optimizer_tensors

_STEPS = 2  # the first may hold what libraries make once


@dataclass(frozen=True)
class Finding:
    """Predicted and measured peak of the step's tensors, bytes; whether the measured one is within the budget. On CUDA
    also the allocator's segments (`reserved`) and all that is in use on the card (`device`), as far as known."""

    predicted_bytes: int
    measured_bytes: int
    budget_bytes: int | None
    predicted_reserved_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    predicted_device_bytes: int | None = None
    measured_device_bytes: int | None = None

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
            "predicted_reserved_bytes": self.predicted_reserved_bytes,
            "measured_reserved_bytes": self.measured_reserved_bytes,
            "predicted_device_bytes": self.predicted_device_bytes,
            "measured_device_bytes": self.measured_device_bytes,
        }

    @property
    def words(self) -> str:
        verdict = "within" if self.within else "OVER"
        reserved = _against(self.measured_reserved_bytes, self.predicted_reserved_bytes, "held by the allocator")
        device = _against(self.measured_device_bytes, self.predicted_device_bytes, "in use on the card by this process")
        return (
            f"measured: {_against(self.measured_bytes, self.predicted_bytes, 'of tensors at the peak of a step')[2:]}"
            f"{reserved}{device}; {verdict} the budget of {format_size(self.budget_bytes)}"
        )

    def words_with(self, others: Sequence[Mapping[str, Any]]) -> str:
        """`words`, and those of other processes by their `fields`."""
        lines = [
            f"process {rank}: {format_size(one['measured_peak_bytes'])}"
            f" (predicted {format_size(one['predicted_peak_bytes'])}, budget {format_size(one['budget_bytes'])})"
            for rank, one in enumerate(others, start=1)
        ]
        return "; ".join([self.words, *lines])


def _against(measured: int | None, predicted: int | None, what: str) -> str:
    """`, 5,401 MiB held by the allocator (predicted 5,402 MiB, -0.0%)`; empty if nothing was measured."""
    if measured is None:
        return ""
    expected = "" if not predicted else f" (predicted {format_size(predicted)}, {measured / predicted - 1:+.1%})"
    return f", {format_size(measured)} {what}{expected}"


class PlanCheck:
    """Measures the first steps of a planned run: on the CPU by counting tensors, on CUDA by the allocator."""

    def __init__(
        self,
        plan: Plan | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: str,
        copies: Sequence[Tensor] = (),
        read: Callable[[], Snapshot] = Snapshot,
    ) -> None:
        """`copies`: what the loop keeps to undo a step; the prediction has it. `read`: the device's figures."""
        predicted = plan.predicted.peak_allocated_bytes if plan is not None else None
        self._plan = plan if predicted is not None else None
        self._model, self._optimizer, self._device, self._copies = model, optimizer, device, copies
        self._left = _STEPS if predicted is not None else 0
        self._meter = TensorMeter()
        self._read = read
        self._beside = 0

    def around(self, images: Tensor, labels: Tensor) -> AbstractContextManager[None]:
        """The context to run a step in."""
        if not self._left:
            return nullcontext()
        return self._measured(images, labels)

    @contextmanager
    def _measured(self, images: Tensor, labels: Tensor) -> Iterator[None]:
        self._left -= 1
        state = optimizer_tensors(self._optimizer)
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
        if self._left or self._plan is None:
            return None
        plan, self._plan = self._plan, None
        predicted = plan.predicted
        assert predicted.peak_allocated_bytes is not None
        if self._device != "cuda":
            return Finding(predicted.peak_allocated_bytes, self._meter.peak_bytes, plan.budget_bytes)
        seen = self._read()
        own = None
        if seen.reserved_bytes is not None and seen.context_bytes is not None:
            own = seen.reserved_bytes + seen.context_bytes
        held = seen.peak_reserved_bytes
        return Finding(
            predicted_bytes=predicted.peak_allocated_bytes,
            measured_bytes=torch.cuda.max_memory_allocated() - self._beside,
            budget_bytes=plan.budget_bytes,
            predicted_reserved_bytes=predicted.peak_reserved_bytes,
            measured_reserved_bytes=None if held is None else held - self._beside,
            predicted_device_bytes=predicted.device_bytes,
            measured_device_bytes=None if own is None else own - self._beside,
        )
