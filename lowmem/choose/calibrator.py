"""Measures on the device at hand what a plan's predictions need, once per card, driver and torch version."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from lowmem.choose.calibration import Calibration, Mode, Seconds
from lowmem.choose.clock import FAST, PLAIN, TIMED_BATCH, ChainClock, Wanted, real_copy
from lowmem.choose.workspace import Workspaces
from lowmem.measure.timing import time_calls
from lowmem.simulate import Call
from lowmem.simulate.stage import Option, StageMeasure

Progress = Callable[[str], None]
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def stage_key(measure_key: Hashable, precision: str) -> tuple[object, ...]:
    """Of a stage as the simulator tells stages apart (signature, trainable, shape, strides, dtype, need_input, masked),
    for the batch that is timed."""
    assert isinstance(measure_key, tuple)
    signature, trainable, shape, *rest = measure_key
    timed = (min(shape[0], TIMED_BATCH), *shape[1:])
    return (precision, repr(signature), trainable, timed, *(repr(one) for one in rest))


def option_key(option: Option) -> tuple[object, ...]:
    """The same text in every process (sets have no order of their own)."""
    return (option.policy.name, option.drops_output, option.fused, option.last)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the stages of one chain as it was measured, None for what did not fit; scaled from the batch that was
    timed to the chain's own."""

    calibration: Calibration
    precision: str
    factor: float
    outside_seconds: float

    def option(self, measure: StageMeasure, option: Option) -> Seconds | None:
        return self._scaled(measure, option_key(option))

    def fast_seconds(self, measure: StageMeasure) -> float | None:
        found = self._scaled(measure, FAST)
        return None if found is None else found.forward

    def plain_seconds(self, measure: StageMeasure) -> float | None:
        """Forward and backward under autograd."""
        found = self._scaled(measure, PLAIN)
        return None if found is None else found.backward

    def _scaled(self, measure: StageMeasure, what: object) -> Seconds | None:
        found = self.calibration.seconds((stage_key(measure.key, self.precision), what))
        if found is None:
            return None
        return Seconds(found.forward * self.factor, found.backward * self.factor, found.restore * self.factor)


class Calibrator:
    """One device and what is known of it. `progress` hears a sentence when something takes seconds."""

    def __init__(self, device: str, calibration: Calibration, progress: Progress = lambda text: None) -> None:
        self.device, self.calibration, self.progress = device, calibration, progress

    def low_dtype(self, precision: str) -> torch.dtype | None:
        """As the run's own autocast: fp16 on CUDA, bf16 on the CPU."""
        if precision != "amp":
            return None
        return torch.float16 if self.device == "cuda" else torch.bfloat16

    def workspaces(self, precision: str) -> Workspaces | None:
        """None on the CPU, whose kernels do not take theirs from a counted allocator."""
        return Workspaces(self.calibration, self.low_dtype(precision)) if self.device == "cuda" else None

    def measure_workspaces(self, table: Workspaces, calls: set[Call]) -> None:
        """Fills the table with what it lacks."""
        missing = [call for call in calls if call in table.missing]
        if missing:
            self.progress(f"measuring the workspace of {len(missing)} convolutions on the card")
            table.measure(sorted(missing, key=repr), self.device)
            self._settle()

    def times(
        self,
        model: nn.Module,
        measures: Sequence[StageMeasure],
        *,
        input_shape: Sequence[int],
        precision: str,
        memory_format: torch.memory_format,
        momentum: bool,
    ) -> StageTimes:
        """Measures each distinct block and policy that the calibration lacks. Takes some seconds to a minute."""
        wanted = self._wanted(measures, precision)
        if wanted:
            clock = self._clock(model, input_shape, precision, memory_format)
            clock.measure(wanted, lambda done, of: self._tell(done, of, precision))
            self._settle()
        return StageTimes(
            calibration=self.calibration,
            precision=precision,
            factor=max(1.0, input_shape[0] / TIMED_BATCH),
            outside_seconds=self._optimizer_seconds(model, momentum),
        )

    def modes(
        self, model: nn.Module, input_shape: Sequence[int], precisions: Sequence[str], formats: Sequence[str]
    ) -> dict[tuple[str, str], Mode]:
        """(precision, memory format) -> seconds of a plain step's distinct blocks, each times how often it occurs, and
        whether outputs and gradients were finite."""
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
        timed = (min(input_shape[0], TIMED_BATCH), *input_shape[1:])
        found: dict[tuple[str, str], Mode] = {}
        for precision, layout in product(precisions, formats):
            key = ("mode", precision, layout, timed, shapes)
            mode = self.calibration.mode(key)
            if mode is None:
                self.progress(f"measuring {precision} in {layout} on the {self._word()}")
                clock = self._clock(model, timed, precision, FORMATS[layout])
                mode = clock.mode()
                self.calibration.put_mode(key, mode)
                self._settle()
            found[precision, layout] = mode
        return found

    def _clock(
        self, model: nn.Module, input_shape: Sequence[int], precision: str, memory_format: torch.memory_format
    ) -> ChainClock:
        return ChainClock(
            model,
            input_shape=input_shape,
            device=self.device,
            memory_format=memory_format,
            low=self.low_dtype(precision),
            calibration=self.calibration,
        )

    def _wanted(self, measures: Sequence[StageMeasure], precision: str) -> list[Wanted]:
        wanted: dict[Hashable, Wanted] = {}
        for index, measure in enumerate(measures):
            key = stage_key(measure.key, precision)
            options = tuple((option_key(one.option), one.option) for one in measure.options)
            names = [FAST, PLAIN, *(name for name, _ in options)]
            known = (self.calibration.seconds((key, name)) is not None for name in names)
            if key not in wanted and not all(known):
                wanted[key] = Wanted(index, key, options)
        return list(wanted.values())

    def _optimizer_seconds(self, model: nn.Module, momentum: bool) -> float:
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        key = ("optimizer", momentum, shapes)
        found = self.calibration.seconds(key)
        if found is None:
            found = Seconds(self._timed_optimizer(model, momentum), 0.0)
            self.calibration.put_seconds(key, found)
            self._settle()
        return found.forward

    def _timed_optimizer(self, model: nn.Module, momentum: bool) -> float:
        parameters = list(real_copy(model, self.device, torch.contiguous_format).parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        rate = 0.9 if momentum else 0.0
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=rate, weight_decay=1e-4, fused=True)
        return time_calls(optimizer.step, self.device, warmup=2, rounds=3).median_seconds

    def _settle(self) -> None:
        """Kept at once: what was measured is not lost with the process, and the memory goes back."""
        self.calibration.save()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _tell(self, done: int, of: int, precision: str) -> None:
        if done < of:
            self.progress(f"measuring the {self._word()} ({precision}): block {done + 1} of {of}")

    def _word(self) -> str:
        return "card" if self.device == "cuda" else "processor"
