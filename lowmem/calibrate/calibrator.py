"""What a plan's predictions need to know of the device at hand, measured once per card, driver and torch version."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem.calibrate.calibration import Calibration, Mode, Seconds, figure_name
from lowmem.calibrate.device import DeviceFacts
from lowmem.calibrate.measuring import BUSY_BATCHES, Figures, Job, described, measure, rates_of
from lowmem.calibrate.stage_timer import FAST, PLAIN, Wanted
from lowmem.models.resnet import ResNet, check_memory_format
from lowmem.remat.libraries import Numerics, workspace_cap_bytes
from lowmem.simulate import Call
from lowmem.simulate.stage import Option, StageMeasure
from lowmem.step.train_step import amp_dtype

Progress = Callable[[str], None]
Measure = Callable[[Sequence[Job]], Figures]


def stage_key(measure_key: Hashable, precision: str, timed_batch: int) -> tuple[object, ...]:
    """Of a stage as the simulator tells stages apart (signature, trainable, shape, strides, dtype, need_input, masked,
    library_norm), for the batch that is timed."""
    assert isinstance(measure_key, tuple)
    signature, trainable, shape, *rest = measure_key
    timed = (timed_batch, *shape[1:])
    return (precision, repr(signature), trainable, timed, *(repr(one) for one in rest))


def _timing(key: object, what: str | Option) -> tuple[object, object]:
    """The key of seconds of a stage: the same text in every process (sets have no order of their own)."""
    if isinstance(what, Option):
        return key, (what.policy.name, what.policy.drop_output, what.policy.fused, what.last)
    return key, what


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the stages of one chain as it was measured, None for what did not fit; scaled from the batch that was
    timed to the chain's own, which is `factor` times that."""

    calibration: Calibration
    precision: str
    timed_batch: int
    factor: float
    outside_seconds: float

    def seconds(self, measure: StageMeasure, what: str | Option) -> Seconds | None:
        """Of a policy, FAST (its `forward`) or PLAIN (forward and backward under autograd: its `backward`)."""
        found = self.calibration.seconds(_timing(stage_key(measure.key, self.precision, self.timed_batch), what))
        if found is None:
            return None
        return Seconds(found.forward * self.factor, found.backward * self.factor, found.restore * self.factor)


class Workspaces:
    """What the convolution library takes beside operands and results: call -> bytes, out of a calibration. A call that
    was never measured counts as the largest of its kind that was; `missing` has those.

    A measured workspace is part of the simulated step; without a measurement a budget leaves room for an assumed one,
    and the library is told not to take more (`lowmem.remat.libraries`; that it heeds this in cuDNN 9 is unproven, and
    what was measured does not need it).
    """

    def __init__(self, calibration: Calibration, low: torch.dtype | None) -> None:
        self._calibration = calibration
        self._low = low
        self._known: dict[Call, int] = {}
        self.missing: set[Call] = set()

    def __call__(self, call: Call) -> int:
        if call in self._known:
            return self._known[call]
        found = self._calibration.size_bytes(self.key(call))
        if found is None:
            self.missing.add(call)
            return max((size for one, size in self._known.items() if one.operation == call.operation), default=0)
        self._known[call] = found
        return found

    def key(self, call: Call) -> object:
        return ("workspace", workspace_cap_bytes(), str(self._low), call)


class Calibrator:
    """One device and what is known of it; measures what is not. `progress` hears a sentence when that takes seconds.

    `facts`: of a CUDA device. `measure`: what does the jobs, by default `measuring.measure`. `numerics`: of the runs
    that are predicted.
    """

    def __init__(
        self,
        device: str,
        calibration: Calibration,
        progress: Progress = lambda text: None,
        *,
        facts: DeviceFacts | None = None,
        measure_jobs: Measure | None = None,
        numerics: Numerics = Numerics(),
    ) -> None:
        self.device, self.calibration, self.progress, self.facts = device, calibration, progress, facts
        self._measure = measure_jobs or partial(measure, device=device, numerics=numerics)

    def workspaces(self, precision: str) -> Workspaces | None:
        """None on the CPU, whose kernels do not take theirs from a counted allocator."""
        return Workspaces(self.calibration, amp_dtype(precision, self.device)) if self.device == "cuda" else None

    def measure_workspaces(self, table: Workspaces, calls: set[Call], precision: str) -> None:
        """Fills the table with what it lacks of the calls."""
        for call in calls:
            table(call)
        missing = sorted(table.missing & calls, key=repr)
        if missing:
            named = {
                figure_name("bytes", table.key(call)): [call.operation, call.tensors, call.rest] for call in missing
            }
            job: Job = {"kind": "convolutions", "calls": named, "precision": precision}
            self._run([job], f"the workspace of {len(missing)} convolutions")
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
        what = "the update of the parameters"
        if wanted:
            chain = self._chain(model, (timed_batch, *input_shape[1:]), precision, memory_format)
            named = {str(index): described(names) for index, names in wanted.items()}
            jobs.append({"kind": "stages", "wanted": named, "library_norm": library_norm, **chain})
            ways = sum(isinstance(one, Option) for names in wanted.values() for one in names.values())
            what = f"{len(wanted)} blocks, {ways} ways to run them, in {precision} and {memory_format}"
        if self.calibration.seconds(update) is None:
            figure = figure_name("seconds", update)
            jobs.append({"kind": "update", "figure": figure, "network": _recipe(model), "momentum": momentum})
        self._run(jobs, what)
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
        missing = [pair for pair, key in keys.items() if self.calibration.mode(key) is None]
        jobs = [
            {"kind": "mode", "figure": figure_name("mode", keys[pair]), **self._chain(model, timed, *pair)}
            for pair in missing
        ]
        self._run(jobs, " and ".join(f"{precision} in {layout}" for precision, layout in missing))
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
            way = {"network": _recipe(model), "precision": precision, "memory_format": memory_format}
            job = {"kind": "busy", "figure": figure_name("bytes", key), "image_shape": image_shape, **way}
            self._run([job], f"how many pictures keep it busy in {precision} and {memory_format}")
        return min(batch, self.calibration.size_bytes(key) or BUSY_BATCHES[0])

    def rates(self) -> tuple[float, float, float] | None:
        """(bytes, fp32 operations, operations in the low dtype of autocast) per second; None if they are not to be
        had."""
        keys = {what: ("rate", what) for what in ("copy", "fp32", "low")}
        if not all(self.calibration.seconds(key) for key in keys.values()):
            figures = {what: figure_name("seconds", key) for what, key in keys.items()}
            self._run([{"kind": "rates", **figures}], "how fast it copies and multiplies")
        found = {what: self.calibration.seconds(key) for what, key in keys.items()}
        seconds = {what: one.forward for what, one in found.items() if one is not None and one.forward}
        return rates_of(self.device, **seconds) if len(seconds) == len(keys) else None

    def _wanted(self, measures: Sequence[StageMeasure], precision: str, timed_batch: int) -> dict[int, Wanted]:
        """What the calibration lacks of each distinct stage, by its first place in the chain."""
        wanted: dict[int, Wanted] = {}
        looked: set[Hashable] = set()
        for index, one in enumerate(measures):
            key = stage_key(one.key, precision, timed_batch)
            options: list[str | Option] = [FAST, PLAIN, *(option.option for option in one.options)]
            lacking = [what for what in options if self.calibration.seconds(_timing(key, what)) is None]
            if lacking and key not in looked:
                wanted[index] = {figure_name("seconds", _timing(key, what)): what for what in lacking}
            looked.add(key)
        return wanted

    def _chain(
        self, model: nn.Module, input_shape: Sequence[int], precision: str, memory_format: str
    ) -> Mapping[str, Any]:
        """Of a job, which stages to run how. Raises PreflightError for a network that must not run so."""
        check_memory_format(model, self.device, precision, memory_format)
        shape = list(input_shape)
        way = {"precision": precision, "memory_format": memory_format}
        return {"network": _recipe(model), "input_shape": shape, **way}

    def _run(self, jobs: Sequence[Job], what: str) -> None:
        """Kept at once: what was measured is not lost with the process."""
        if not jobs:
            return
        began = time.monotonic()
        word = "card" if self.device == "cuda" else "processor"
        self.progress(f"measuring the {word}, once: {what}")
        self.calibration.figures.update(self._measure(jobs))
        self.calibration.save()
        self.progress(f"measured in {time.monotonic() - began:.0f} s")


def _recipe(model: nn.Module) -> dict[str, Any]:
    """By which another process makes it: only networks of the family can be measured."""
    assert isinstance(model, ResNet)
    assert model.recipe is not None
    return model.recipe


def _shapes(model: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
