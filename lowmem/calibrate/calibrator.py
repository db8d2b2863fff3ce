"""What a plan's predictions need to know of the device at hand: measured once, and kept in a file per card, driver and
torch version.

A calibration only makes predictions better: one that is missing, damaged or of another format is never an error, it is
measured again. Keys say everything a figure depends on; a figure's name has the hash of their text, and is what the
file has, and what a process that measures is told (`lowmem.calibrate.measuring`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.calibrate.device import DeviceFacts, Identity
from lowmem.calibrate.measuring import BUSY_BATCHES, RATED, Figures, Job, measure
from lowmem.calibrate.stage_timer import FAST, PLAIN, Mode, Seconds, Timed
from lowmem.core.phases import Phase, untold
from lowmem.core.reading import read_json
from lowmem.core.units import LARGEST, counted
from lowmem.models import recipe_of
from lowmem.models.resnet import check_memory_format
from lowmem.remat.libraries import Numerics, workspace_cap_bytes
from lowmem.simulate import Call, StepShape
from lowmem.simulate.stage import StageMeasure
from lowmem.step.train_step import amp_dtype

FORMAT = 2
_LARGEST_FILE_BYTES = 32 << 20
_LARGEST_NUMBER = 1e9  # seconds; NaN is not below it either

Progress = Callable[[str], None]


class Calibration:
    """Figures of one device by key. `folder` None: nothing is read or kept."""

    def __init__(self, identity: Identity, folder: Path | None) -> None:
        self.identity = identity
        self.path = None if folder is None else folder / identity.file_name
        self.figures: Figures = {} if self.path is None else _read(self.path, identity)

    def seconds(self, key: object) -> Seconds | None:
        found = self._numbers("seconds", key, 3)
        return None if found is None else Seconds(*found)

    def mode(self, key: object) -> Mode | None:
        found = self._numbers("mode", key, 2)
        return None if found is None else Mode(found[0], bool(found[1]))

    def size_bytes(self, key: object) -> int | None:
        """A workspace, a context, a number of pictures: integers."""
        found = self.figures.get(figure_name("bytes", key))
        return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= LARGEST else None

    def put(self, kind: str, key: object, figure: Any) -> None:
        """As a file has it: `seconds` and `mode` are lists of their fields, `bytes` a number."""
        self.figures[figure_name(kind, key)] = figure

    def save(self) -> None:
        """Replaces the file whole. A disk that refuses costs only that it is measured again next time."""
        if self.path is None:
            return
        content = {"format": FORMAT, "identity": asdict(self.identity), "figures": self.figures}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".writing-") as aside:
                written = Path(aside) / self.path.name
                written.write_text(json.dumps(content), encoding="utf-8")
                os.replace(written, self.path)

    def _numbers(self, kind: str, key: object, count: int) -> list[float] | None:
        found = self.figures.get(figure_name(kind, key))
        if not isinstance(found, list) or len(found) != count:
            return None
        good = all(isinstance(one, (int, float)) and 0 <= one <= _LARGEST_NUMBER for one in found)
        return [float(one) for one in found] if good else None


def figure_name(kind: str, key: object) -> str:
    """`kind` is `seconds`, `mode` or `bytes`."""
    return f"{kind}:{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}"


def _read(path: Path, identity: Identity) -> Figures:
    try:
        content = read_json(path, _LARGEST_FILE_BYTES)
        if content["format"] != FORMAT or content["identity"] != asdict(identity):
            return {}
        figures = content["figures"]
        return dict(figures) if isinstance(figures, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the stages of a step's chain as they were measured, None for what did not fit; scaled from the batch
    that was timed to the step's own micro-batch."""

    calibration: Calibration
    shape: StepShape
    timed_batch: int

    def seconds(self, stage: StageMeasure, what: Timed) -> Seconds | None:
        found = self.calibration.seconds(self.key(stage, what))
        factor = self.shape.micro_batch / self.timed_batch
        return found and Seconds(found.forward * factor, found.backward * factor, found.restore * factor)

    @property
    def outside_seconds(self) -> float:
        """Of the optimizer's step."""
        found = self.calibration.seconds(self.update_key)
        return 0.0 if found is None else found.forward

    def key(self, stage: StageMeasure, what: Timed) -> object:
        """Of a stage as the simulator tells stages apart (signature, trainable, shape, strides, dtype, need_input,
        masked, library_norm), for the batch that is timed: the same text in every process (sets have no order of their
        own)."""
        assert isinstance(stage.key, tuple)
        signature, trainable, shape, *rest = stage.key
        timed = (self.timed_batch, *shape[1:])
        alike = (self.shape.precision, repr(signature), trainable, timed, *(repr(one) for one in rest))
        return alike, what if isinstance(what, str) else (
            what.policy.name,
            what.policy.drop_output,
            what.policy.fused,
            what.last,
        )

    @property
    def update_key(self) -> object:
        trained = (parameter for parameter in self.shape.model.parameters() if parameter.requires_grad)
        shapes = tuple(tuple(parameter.shape) for parameter in trained)
        return "optimizer", self.shape.optim.work, shapes


@dataclass(frozen=True)
class Workspaces:
    """What the convolution library takes beside operands and results: call -> bytes, out of a calibration, as a part of
    the simulated step (without one a budget leaves room for an assumed workspace: `lowmem.remat.libraries`). A call
    that was never measured counts as the largest of its kind that was; `missing` has those."""

    calibration: Calibration
    low: torch.dtype | None
    missing: set[Call] = field(default_factory=set)
    _known: dict[Call, int] = field(default_factory=dict)

    def __call__(self, call: Call) -> int:
        if call in self._known:
            return self._known[call]
        found = self.calibration.size_bytes(self.key(call))
        if found is None:
            self.missing.add(call)
            return max((size for one, size in self._known.items() if one.operation == call.operation), default=0)
        self._known[call] = found
        return found

    def key(self, call: Call) -> object:
        return ("workspace", workspace_cap_bytes(), str(self.low), call)


@dataclass(frozen=True)
class Calibrator:
    """One device and what is known of it; measures what is not. `phase` hears what is being measured, `progress` what
    was; `facts`: of a CUDA device; `numerics`: of the runs that are predicted; `measure`: what does the jobs."""

    device: str
    calibration: Calibration
    progress: Progress = lambda text: None
    facts: DeviceFacts | None = None
    numerics: Numerics = field(default_factory=Numerics)
    measure: Callable[[Sequence[Job], str, Numerics], Figures] = measure
    phase: Phase = untold

    def workspaces(self, precision: str, calls: Callable[[], set[Call]]) -> Workspaces | None:
        """Of `calls`, measured where they were not before; None on the CPU, whose kernels do not take theirs from a
        counted allocator."""
        if self.device != "cuda":
            return None
        table = Workspaces(self.calibration, amp_dtype(precision, self.device))
        for call in calls():
            table(call)
        if missing := sorted(table.missing, key=repr):
            named = {
                figure_name("bytes", table.key(call)): [call.operation, call.tensors, call.rest] for call in missing
            }
            job = {"kind": "convolutions", "calls": named, "precision": precision}
            self._run([job], f"the workspace of {counted(len(missing), 'convolution')}")
            table.missing.clear()
        return table

    def times(self, shape: StepShape, stages: Sequence[StageMeasure]) -> StageTimes:
        """Measures each distinct block and policy that the calibration lacks. Takes some seconds to a minute."""
        times = StageTimes(self.calibration, shape, self.timed_batch(shape))
        wanted: dict[str, list[object]] = {}  # by the name of the figure, see `measuring`
        for stage in {stage.key: stage for stage in stages}.values():
            timed: list[Timed] = [FAST, PLAIN, *(option.option for option in stage.options)]
            for what in timed:
                key = times.key(stage, what)
                if self.calibration.seconds(key) is None:
                    told = [what] if isinstance(what, str) else [what.policy.name, what.last]
                    wanted[figure_name("seconds", key)] = [stages.index(stage), *told]
        jobs: list[Job] = []
        said = "the update of the parameters"
        if wanted:
            chain = self._chain(shape, times.timed_batch)
            jobs.append({"kind": "stages", "wanted": wanted, "library_norm": shape.library_norm, **chain})
            blocks, ways = len({at for at, *_ in wanted.values()}), sum(len(told) > 2 for told in wanted.values())
            said = f"{blocks} blocks, {ways} ways to run them, in {shape.precision} and {shape.memory_format}"
        if self.calibration.seconds(times.update_key) is None:
            update = {"network": recipe_of(shape.model), "optim": shape.optim.model_dump(mode="json")}
            jobs.append({"kind": "update", "figure": figure_name("seconds", times.update_key), **update})
        self._run(jobs, said)
        return times

    def modes(self, shapes: Sequence[StepShape]) -> dict[tuple[str, str], Mode]:
        """(precision, memory format) of each of the shapes -> seconds of a plain step's distinct blocks, each times how
        often it occurs, and whether outputs and gradients were finite. All at one batch: the largest that any of them
        is timed with and that all of them have room for."""
        found: dict[tuple[str, str], Mode] = {}
        for batch in sorted({self.timed_batch(shape) for shape in shapes}, reverse=True):
            keys = {
                shape: ("mode", *_way(shape), (batch, *shape.image_shape), _parameters(shape.model)) for shape in shapes
            }
            missing = [shape for shape, key in keys.items() if self.calibration.mode(key) is None]
            jobs = [
                {"kind": "mode", "figure": figure_name("mode", keys[shape]), **self._chain(shape, batch)}
                for shape in missing
            ]
            self._run(jobs, " and ".join(" in ".join(_way(shape)) for shape in missing))
            found = {_way(shape): mode for shape, key in keys.items() if (mode := self.calibration.mode(key))}
            if len(found) == len(shapes):
                break
        return found

    def timed_batch(self, shape: StepShape) -> int:
        """Pictures that blocks are timed with: enough for a larger batch to take as much longer as it is larger. On a
        fast card 128 may only keep the host busy, with launching; it is measured once how many it takes there."""
        if self.device != "cuda" or shape.micro_batch <= BUSY_BATCHES[0]:
            return min(shape.micro_batch, BUSY_BATCHES[0])
        key = ("busy", *_way(shape), shape.image_shape, _parameters(shape.model))
        if self.calibration.size_bytes(key) is None:
            job = {"kind": "busy", "figure": figure_name("bytes", key), "image_shape": shape.image_shape}
            said = f"how many pictures keep it busy in {shape.precision} and {shape.memory_format}"
            self._run([{**job, **_network(shape)}], said)
        return min(shape.micro_batch, self.calibration.size_bytes(key) or BUSY_BATCHES[0])

    def rates(self) -> tuple[float, float, float] | None:
        """(bytes, fp32 operations, operations in the low dtype of autocast) per second of a card; None if they are not
        to be had."""
        keys = {what: ("rate", what) for what in RATED}
        if not all(self.calibration.seconds(key) for key in keys.values()):
            figures = {what: figure_name("seconds", key) for what, key in keys.items()}
            self._run([{"kind": "rates", **figures}], "how fast it copies and multiplies")
        taken = [found.forward for key in keys.values() if (found := self.calibration.seconds(key))]
        if len(taken) < len(keys) or not all(taken):
            return None
        copy, fp32, low = (RATED[what] / seconds for what, seconds in zip(keys, taken, strict=True))
        return copy, fp32, low

    def _chain(self, shape: StepShape, batch: int) -> Job:
        """Of a job, which stages to run how. Raises PreflightError for a network that must not run so."""
        check_memory_format(shape.model, self.device, *_way(shape))
        return {"input_shape": [batch, *shape.image_shape], **_network(shape)}

    def _run(self, jobs: Sequence[Job], what: str) -> None:
        """Kept at once: what was measured is not lost with the process."""
        if not jobs:
            return
        began = time.monotonic()
        word = "card" if self.device == "cuda" else "processor"
        self.phase(f"measuring the {word}, once: {what}")
        self.calibration.figures.update(self.measure(jobs, self.device, self.numerics))
        self.calibration.save()
        self.progress(f"measured the {word}, once, in {time.monotonic() - began:.0f} s: {what}")


def _way(shape: StepShape) -> tuple[str, str]:
    return shape.precision, shape.memory_format


def _network(shape: StepShape) -> Job:
    return {"network": recipe_of(shape.model), "precision": shape.precision, "memory_format": shape.memory_format}


def _parameters(model: nn.Module) -> tuple[object, ...]:
    """Of those that are trained: with others frozen, blocks take another time."""
    return tuple((name, tuple(one.shape)) for name, one in model.named_parameters() if one.requires_grad)
