"""Measuring in a process of its own, `python -m lowmem.calibrate.worker`: whoever plans keeps no CUDA context, which
would take some hundred MiB of a small card from the trial that confirms the plan.

A job comes in through the pipe, pickled by the parent; figures go out as one line of JSON. Nothing of it is a file.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lowmem.calibrate.calibration import Calibration, Identity, Seconds
from lowmem.calibrate.stage_timer import ChainClock, Wanted, real_copy
from lowmem.calibrate.workspace import Workspaces
from lowmem.core.errors import PreflightError
from lowmem.measure.out_of_memory import Failure, attempt
from lowmem.measure.timing import time_calls
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.simulate import Call
from lowmem.step.train_step import amp_dtype

_TIMEOUT_SECONDS = 1800
# Pictures that blocks are timed with; a processor computes from the first picture on and needs no more than the least.
BUSY_BATCHES = (128, 256, 512, 1024)


class Job(Protocol):
    """Something to measure on a device; what it finds goes into the calibration."""

    def run(self, device: str, calibration: Calibration) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a chain under all their policies (`wanted`), or with `mode_key` one plain pass of all of them."""

    model: nn.Module
    input_shape: tuple[int, ...]
    precision: str
    memory_format: str
    wanted: tuple[Wanted, ...] = ()
    library_norm: bool = False
    mode_key: object = None

    def run(self, device: str, calibration: Calibration) -> None:
        clock = _clock(self, self.input_shape, device, calibration, self.library_norm)
        if self.mode_key is not None:
            mode = attempt(clock.mode, lambda: "timing")
            if not isinstance(mode, Failure):  # else it stays unknown
                calibration.put_mode(self.mode_key, mode)
        clock.measure(self.wanted)


@dataclass(frozen=True, kw_only=True)
class BusyBatch:
    """How many pictures keep a card busy, see `smallest_busy`; under `key`."""

    model: nn.Module
    image_shape: tuple[int, ...]
    precision: str
    memory_format: str
    key: object

    def run(self, device: str, calibration: Calibration) -> None:
        def bound_by_host(batch: int) -> bool | None:
            shape = (batch, *self.image_shape)
            clock = _clock(self, shape, device, calibration)
            bound = attempt(clock.bound_by_host, lambda: "timing")
            return None if isinstance(bound, Failure) else bound

        calibration.put_size(self.key, smallest_busy(bound_by_host))


def smallest_busy(bound_by_host: Callable[[int], bool | None]) -> int:
    """The smallest of BUSY_BATCHES with which a plain pass of a network's blocks waits for the card rather than for the
    launching of its kernels: from there on seconds grow with the batch. The largest that fits (for one that does not,
    `bound_by_host` answers None) if none is enough."""
    largest = BUSY_BATCHES[0]
    for batch in BUSY_BATCHES:
        bound = bound_by_host(batch)
        if bound is None:
            break
        largest = batch
        if not bound:
            break
    return largest


@dataclass(frozen=True, kw_only=True)
class Convolutions:
    """The workspace of each call; on CUDA only."""

    calls: tuple[Call, ...]
    precision: str

    def run(self, device: str, calibration: Calibration) -> None:
        Workspaces(calibration, amp_dtype(self.precision, device)).measure(self.calls, device)


@dataclass(frozen=True, kw_only=True)
class Update:
    """The optimizer's step over all parameters."""

    model: nn.Module
    momentum: bool
    key: object

    def run(self, device: str, calibration: Calibration) -> None:
        parameters = list(real_copy(self.model, device, torch.contiguous_format).parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        momentum = 0.9 if self.momentum else 0.0
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=1e-4, fused=True)
        seconds = time_calls(optimizer.step, device, warmup=2, rounds=3).median_seconds
        calibration.put_seconds(self.key, Seconds(seconds, 0.0))


def _clock(
    job: Stages | BusyBatch,
    input_shape: tuple[int, ...],
    device: str,
    calibration: Calibration,
    library_norm: bool = False,
) -> ChainClock:
    return ChainClock(
        job.model,
        input_shape=input_shape,
        device=device,
        memory_format=torch.channels_last if job.memory_format == "channels-last" else torch.contiguous_format,
        low=amp_dtype(job.precision, device),
        library_norm=library_norm,
        calibration=calibration,
    )


Measure = Callable[[Sequence[Job], str, Calibration], None]


def measure_here(jobs: Sequence[Job], device: str, calibration: Calibration) -> None:
    """In this process."""
    for job in jobs:
        job.run(device, calibration)
        if device == "cuda":
            torch.cuda.empty_cache()


def measure_apart(jobs: Sequence[Job], device: str, calibration: Calibration, *, numerics: Numerics) -> None:
    """In a process of its own. Raises PreflightError with its last words if it fails."""
    task = (list(jobs), device, calibration.identity, calibration.figures)
    calibration.figures.update(ask(pickle.dumps((task, numerics))))


def ask(task: bytes) -> Any:
    """Starts the process, hands it a task, returns what it answers. Raises PreflightError."""
    command = [sys.executable, "-m", "lowmem.calibrate.worker"]
    try:
        done = subprocess.run(command, input=task, capture_output=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise PreflightError(
            f"measuring the device took longer than {_TIMEOUT_SECONDS} s: plan without by --set memory.calibrate=never"
        ) from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        last = words[0] if words else f"it ended with code {done.returncode}"
        raise PreflightError(
            f"measuring the device failed ({last}): `lowmem doctor` looks for the cause; --set memory.calibrate=never "
            "plans without"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Does the task on standard input."""
    task, numerics = pickle.loads(sys.stdin.buffer.read())
    prepare_libraries(numerics)
    if task == "memory":
        from lowmem.calibrate.device import measure_memory

        print(json.dumps(measure_memory()))
        return
    jobs: list[Job]
    identity: Identity
    jobs, device, identity, figures = task
    calibration = Calibration(identity, None)
    calibration.figures.update(figures)
    measure_here(jobs, device, calibration)
    print(json.dumps({name: value for name, value in calibration.figures.items() if name not in figures}))


if __name__ == "__main__":
    main()
