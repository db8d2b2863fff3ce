"""Measures on the device at hand what a plan's predictions need, once per card, driver and torch version."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from lowmem.calibrate.calibration import Calibration, Mode, Seconds
from lowmem.calibrate.card_probe import RawRates, measured_rates
from lowmem.calibrate.device import DeviceFacts
from lowmem.calibrate.stage_timer import FAST, PLAIN, Wanted
from lowmem.calibrate.worker import (
    BUSY_BATCHES,
    BusyBatch,
    Convolutions,
    Job,
    Measure,
    Stages,
    Update,
    measure_apart,
    measure_here,
)
from lowmem.calibrate.workspace import Workspaces
from lowmem.models.memory_format import check_memory_format
from lowmem.remat.libraries import Numerics
from lowmem.simulate import Call
from lowmem.simulate.stage import Option, StageMeasure
from lowmem.step.train_step import amp_dtype

Progress = Callable[[str], None]


def stage_key(measure_key: Hashable, precision: str, timed_batch: int) -> tuple[object, ...]:
    """Of a stage as the simulator tells stages apart (signature, trainable, shape, strides, dtype, need_input, masked,
    library_norm), for the batch that is timed."""
    assert isinstance(measure_key, tuple)
    signature, trainable, shape, *rest = measure_key
    timed = (timed_batch, *shape[1:])
    return (precision, repr(signature), trainable, timed, *(repr(one) for one in rest))


def option_key(option: Option) -> tuple[object, ...]:
    """The same text in every process (sets have no order of their own)."""
    return (option.policy.name, option.drops_output, option.fused, option.last)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the stages of one chain as it was measured, None for what did not fit; scaled from the batch that was
    timed to the chain's own, which is `factor` times that."""

    calibration: Calibration
    precision: str
    timed_batch: int
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
        found = self.calibration.seconds((stage_key(measure.key, self.precision, self.timed_batch), what))
        if found is None:
            return None
        return Seconds(found.forward * self.factor, found.backward * self.factor, found.restore * self.factor)


class Calibrator:
    """One device and what is known of it; measures what is not. `progress` hears a sentence when that takes seconds.

    `facts`: of a CUDA device. `measure`: what does the jobs, by default on CUDA a process of its own. `numerics`: of
    the runs that are predicted.
    """

    def __init__(
        self,
        device: str,
        calibration: Calibration,
        progress: Progress = lambda text: None,
        *,
        facts: DeviceFacts | None = None,
        measure: Measure | None = None,
        numerics: Numerics = Numerics(),
    ) -> None:
        self.device, self.calibration, self.progress, self.facts = device, calibration, progress, facts
        apart = partial(measure_apart, numerics=numerics)
        self._measure = measure or (apart if device == "cuda" else measure_here)

    def workspaces(self, precision: str) -> Workspaces | None:
        """None on the CPU, whose kernels do not take theirs from a counted allocator."""
        return Workspaces(self.calibration, amp_dtype(precision, self.device)) if self.device == "cuda" else None

    def measure_workspaces(self, table: Workspaces, calls: set[Call], precision: str) -> None:
        """Fills the table with what it lacks of the calls."""
        for call in calls:
            table(call)
        missing = tuple(sorted(table.missing & calls, key=repr))
        if missing:
            self._run(
                [Convolutions(calls=missing, precision=precision)], f"the workspace of {len(missing)} convolutions"
            )
            table.missing.clear()

    def times(
        self,
        model: nn.Module,
        measures: Sequence[StageMeasure],
        *,
        input_shape: Sequence[int],
        precision: str,
        memory_format: str,
        momentum: bool,
        library_norm: bool = False,
    ) -> StageTimes:
        """Measures each distinct block and policy that the calibration lacks. Takes some seconds to a minute."""
        timed_batch = self.timed_batch(model, input_shape, precision, memory_format)
        wanted = self._wanted(measures, precision, timed_batch)
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        update = ("optimizer", momentum, shapes)
        jobs: list[Job] = []
        if wanted:
            jobs.append(
                Stages(
                    model=model,
                    input_shape=(timed_batch, *input_shape[1:]),
                    precision=precision,
                    memory_format=memory_format,
                    wanted=tuple(wanted),
                    library_norm=library_norm,
                )
            )
        if self.calibration.seconds(update) is None:
            jobs.append(Update(model=model, momentum=momentum, key=update))
        ways = sum(len(one.options) for one in wanted)
        blocks = f"{len(wanted)} blocks, {ways} ways to run them, in {precision} and {memory_format}"
        self._run(jobs, blocks if wanted else "the update of the parameters")
        found = self.calibration.seconds(update)
        return StageTimes(
            calibration=self.calibration,
            precision=precision,
            timed_batch=timed_batch,
            factor=input_shape[0] / timed_batch,
            outside_seconds=0.0 if found is None else found.forward,
        )

    def modes(
        self, model: nn.Module, input_shape: Sequence[int], pairs: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Mode]:
        """Of each pair (precision, memory format): seconds of a plain step's distinct blocks, each times how often it
        occurs, and whether outputs and gradients were finite. All at one batch: the largest that any of them is timed
        with and that all of them have room for."""
        batches = {self.timed_batch(model, input_shape, *pair) for pair in pairs}
        found: dict[tuple[str, str], Mode] = {}
        for batch in sorted(batches, reverse=True):
            found = self._modes_at((batch, *input_shape[1:]), model, pairs)
            if len(found) == len(pairs):
                break
        return found

    def _modes_at(
        self, timed: tuple[int, ...], model: nn.Module, pairs: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Mode]:
        keys = {pair: ("mode", *pair, timed, _shapes(model)) for pair in pairs}
        jobs = [
            Stages(model=model, input_shape=timed, precision=precision, memory_format=layout, mode_key=key)
            for (precision, layout), key in keys.items()
            if self.calibration.mode(key) is None
        ]
        self._run(jobs, " and ".join(f"{job.precision} in {job.memory_format}" for job in jobs))
        known = {pair: self.calibration.mode(key) for pair, key in keys.items()}
        return {pair: mode for pair, mode in known.items() if mode is not None}

    def timed_batch(self, model: nn.Module, input_shape: Sequence[int], precision: str, memory_format: str) -> int:
        """Pictures that blocks are timed with: enough for a larger batch to take as much longer as it is larger. On a
        fast card 128 may only keep the host busy, with launching; it is measured once how many it takes there."""
        batch, image_shape = input_shape[0], tuple(input_shape[1:])
        if self.device != "cuda" or batch <= BUSY_BATCHES[0]:
            return min(batch, BUSY_BATCHES[0])
        key = ("busy", precision, memory_format, image_shape, _shapes(model))
        if self.calibration.size_bytes(key) is None:
            job = BusyBatch(
                model=model, image_shape=image_shape, precision=precision, memory_format=memory_format, key=key
            )
            self._run([job], f"how many pictures keep it busy in {precision} and {memory_format}")
        return min(batch, self.calibration.size_bytes(key) or BUSY_BATCHES[0])

    def rates(self) -> tuple[float, float, float] | None:
        """See `lowmem.calibrate.card_probe.measured_rates`."""
        if measured_rates(self.device, self.calibration) is None:
            self._run([RawRates()], "how fast it copies and multiplies")
        return measured_rates(self.device, self.calibration)

    def _wanted(self, measures: Sequence[StageMeasure], precision: str, timed_batch: int) -> list[Wanted]:
        wanted: dict[Hashable, Wanted] = {}
        for index, measure in enumerate(measures):
            key = stage_key(measure.key, precision, timed_batch)
            options = tuple((option_key(one.option), one.option) for one in measure.options)
            names = [FAST, PLAIN, *(name for name, _ in options)]
            known = (self.calibration.seconds((key, name)) is not None for name in names)
            if key not in wanted and not all(known):
                wanted[key] = Wanted(index, key, options)
        return list(wanted.values())

    def _run(self, jobs: Sequence[Job], what: str) -> None:
        """Kept at once: what was measured is not lost with the process. Raises PreflightError for a network that must
        not run so."""
        if not jobs:
            return
        for job in jobs:
            if isinstance(job, Stages):
                check_memory_format(job.model, self.device, job.precision, job.memory_format)
        began = time.monotonic()
        word = "card" if self.device == "cuda" else "processor"
        self.progress(f"measuring the {word}, once: {what}")
        self._measure(jobs, self.device, self.calibration)
        self.calibration.save()
        self.progress(f"measured in {time.monotonic() - began:.0f} s")


def _shapes(model: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
