"""One real step and one evaluation batch before a run, timed and undone to the last bit.

Unlike with a failed step (`step.undo.Undo`), the update is made here too: so everything is copied first (`Before`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.core.errors import OutOfMemory
from lowmem.distributed.group import Group
from lowmem.measure.out_of_memory import Failure, release
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import Score
from lowmem.step.undo import Before, Undo
from lowmem.train.oom_fallback import OomFallback, memory_words
from lowmem.train.replica import Replica
from lowmem.train.stall import GradientNorms

_QUICK_SECONDS = 10.0  # what takes longer is not run a second time for a better measurement


@dataclass(frozen=True)
class StepTrial:
    """Seconds of a step and of an evaluation batch with their pictures, warmed up where that was quick; the mean loss
    and the error of that step, the norm of every layer's gradient in it, and the evaluation's score."""

    step_seconds: float
    step_pictures: int
    evaluation_seconds: float
    score: Score
    loss: float
    error_pct: float
    layers: tuple[str, ...]
    gradient_norms: tuple[float, ...]


def try_step(replica: Replica, folder: RunFolder) -> StepTrial:
    """Runs the next step of the run and evaluates its first test pictures, and leaves the trainer as it was.

    Out-of-memory takes the next smaller plan, as it does later in the run; the folder's events tell it. Raises
    OutOfMemory if there is none.
    """
    before = Before(replica.step)
    fallback, undo = OomFallback(replica, folder), Undo(replica.step, replica.model)
    norms = GradientNorms(replica.model, replica.step, every=1)
    try:
        while isinstance(done := _twice_if_quick(replica.group, lambda: _step(replica, undo, norms)), Failure):
            if done.final and not replica.group.alone:
                raise _out_of_memory(replica, done)  # the others wait for what this process does not do
            before.restore()  # even where the update had begun
            release()
            if (cause := fallback.after(replace(done, final=False))) is not None:
                fallback.record(cause)
                with replica.group.alike():
                    raise _out_of_memory(replica, cause)
        seconds, (totals, pictures) = done
        scored = _twice_if_quick(Group(), lambda: fallback.evaluated(lambda size: _score(replica, size)))
        if isinstance(scored, Failure):
            raise _out_of_memory(replica, scored)
    finally:
        before.restore()
    loss, wrong = (total / pictures for total in totals)
    norms.keep(1, 1)
    measured = tuple(norms.fetch()[0][2])
    return StepTrial(seconds, pictures, scored[0], scored[1], loss, 100 * wrong, norms.names, measured)


def _step(replica: Replica, undo: Undo, norms: GradientNorms) -> tuple[list[float], int] | Failure:
    state = replica.state
    # A checkpoint may be of the end of an epoch whose evaluation was still to come.
    at = min(state.step_in_epoch, replica.batches.steps_per_epoch - 1)

    def work() -> tuple[Tensor, int]:
        images, labels, size = replica.next_batch(state.epoch, at)
        return replica.step(images, labels, replica.lr(state.step), norms.measure, size), size

    done = undo.attempt(work)
    # Reading the sums waits for the device: the time is that of the work, not of its launch.
    return done if isinstance(done, Failure) else (done[0].tolist(), done[1])


def _score(replica: Replica, size: int) -> Score:
    test = replica.dataset.test
    sums = replica.evaluate(test.take(torch.arange(min(size, len(test))).numpy()), size)
    assert sums is not None  # nobody asks it to stop
    return sums.score()


def _twice_if_quick(group: Group, work: Callable[[], Any]) -> Any:
    """(seconds, result) of the second call if the first was quick (it has what libraries make once), else of the first;
    or the Failure of either. `group`: the processes that do it together."""
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        if isinstance(result, Failure):
            return result
        seconds = time.perf_counter() - began
        if group.most([int(seconds > _QUICK_SECONDS)])[0]:
            break
    return seconds, result


def _out_of_memory(replica: Replica, failure: Failure) -> OutOfMemory:
    memory = memory_words(replica.meter.read())
    less = "a smaller --vram" if replica.plan else "a plan with --vram, like --vram 4G"
    return OutOfMemory(
        f"{failure.words} ({failure.message}) in the trial before the first step, and no smaller plan is left{memory}; "
        f"nothing was started: free what others use, or give the run {less}"
    )
