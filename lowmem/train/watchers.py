"""Watchers: they look at a step or an epoch of a run and say what they want done. One `match` in the loop acts.

A watcher sees values and changes nothing but its own counts. What must survive a kill it keeps in the `RunState` that
it is given. Those of the loss are in `loss_watchers`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowmem.config.schema import TrainConfig
from lowmem.config.sections import CheckpointConfig
from lowmem.core.units import format_size
from lowmem.measure import Snapshot
from lowmem.measure.tensors import TensorMeter
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.saver import Saver
from lowmem.step.train_step import optimizer_tensors
from lowmem.train.replica import Replica
from lowmem.train.signals import NAMES

# -- verdicts ----------------------------------------------------------------------------------------------------------


class Act(IntEnum):
    """What is to be done, the strongest last. What gives way to something stronger is wanted still, and comes up again
    after the next step. So a run whose loss broke goes back before it is left: it is never left broken."""

    CONTINUE = 0
    SAVE = 1  # a checkpoint, in the background
    REPLAN = 2  # the next smaller plan: memory runs short
    LEAVE = 3  # saved
    ROLLBACK = 4  # to the newest sound checkpoint


@dataclass(frozen=True)
class Verdict:
    """`why`: of LEAVE the name of the signal, or one of the reasons below; else in words, for people."""

    act: Act = Act.CONTINUE
    why: str = ""

    @property
    def code(self) -> int:
        """For the small message between processes: greater for a stronger verdict. A signal goes by its number."""
        signal = _FROM_ONE.index(self.why) if self.act is Act.LEAVE else 0
        return len(_FROM_ONE) * self.act + signal

    @classmethod
    def of(cls, code: int, mine: Verdict) -> Verdict:
        """The strongest of all processes by its `code`, in this one's own words if it said the same (`mine`)."""
        if mine.code == code:
            return mine
        act, signal = divmod(code, len(_FROM_ONE))
        words = {Act.LEAVE: _FROM_ONE[signal], Act.REPLAN: "another process is short of it"}
        return cls(Act(act), words.get(Act(act), ""))


MAX_STEPS, PATIENCE = "train.max_steps", "train.patience"  # reasons to leave that are no signals
STALLED = "stalled"
HOURS = "train.hours"  # by the clock of one process; the others know from themselves
_FROM_ONE = (HOURS, *NAMES)  # what one process may be the only one to know, a signal before the clock


def strongest(*verdicts: Verdict) -> Verdict:
    """The first of the strongest."""
    return max(verdicts, key=lambda verdict: verdict.act)


# -- the end -----------------------------------------------------------------------------------------------------------


def out_of_patience(config: TrainConfig, state: RunState) -> bool:
    """Whether a run, between two epochs, has had `train.patience` of them since its best one. By what its checkpoints
    hold: a resume ends it at the same epoch."""
    best, most = state.best, config.patience
    return most is not None and best is not None and state.step_in_epoch == 0 and state.epoch - best.epoch >= most


def is_finished(config: TrainConfig, state: RunState) -> bool:
    """Whether there is nothing left to train, by its last epoch or by its patience."""
    return state.epoch >= config.epochs or out_of_patience(config, state)


class TimeLimit:
    """`train.hours`, of training in all processes' lives. `state`: as this process begins, which all of a group know
    alike; later each has a clock of its own. A step is not left in its middle, and an epoch whose steps are done is
    evaluated: that comes on top."""

    def __init__(self, hours: float | None, state: RunState) -> None:
        self._seconds = math.inf if hours is None else 3600 * hours
        self.was_over = state.elapsed_seconds >= self._seconds

    def look(self, elapsed_seconds: float) -> Verdict:
        return Verdict(Act.LEAVE, HOURS) if elapsed_seconds >= self._seconds else Verdict()


# -- the checkpoint interval -------------------------------------------------------------------------------------------


class CheckpointInterval:
    """When a run hands over a save and when it waits for one, so that no kill loses more than the configured interval.
    Begins with what `saver` finds on disk, at the count of steps `step`. `now`: seconds that only rise.

    A save exists once it is committed, and training goes on while it is written: so it is handed over before the
    interval is over. By the count of steps that is at every half of it, whose places do not depend on how fast a disk
    is: runs stay comparable. By the clock it is as long before the end as the longest write so far took. If the write
    takes longer, training waits for it (`hold`), but not for what the disk refuses (`Saver`). An evaluation that would
    pass the interval is begun with a save; a resume begins with it.

    Known limitation: a step cannot be left in its middle; by the clock the one under way comes on top. Nobody knows how
    long the first evaluation of a process will take: half an interval is allowed for.
    """

    def __init__(
        self, config: CheckpointConfig, saver: Saver, step: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._saver, self._now = config, saver, now
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._began = self._submitted_at = now()
        self._submitted = step

    def submitted(self, step: int) -> None:
        """A save of the run as it is now, after `step` steps, was handed over."""
        self._submitted, self._submitted_at = step, self._now()

    def look(self, step: int) -> Verdict:
        """SAVE if a save is to be handed over after `step` steps, or was to be and something stronger came first."""
        every = self._config.steps_between_saves
        due = (every is not None and step // every > self._submitted // every) or self.due_before(0.0)
        return Verdict(Act.SAVE if due else Act.CONTINUE)

    def due_before(self, seconds: float | None) -> bool:
        """Whether a save is to be handed over before what takes so long, by the clock (None: nobody knows how long)."""
        if self._seconds is None:
            return False
        seconds = self._seconds / 2 if seconds is None else seconds
        lead = min(self._seconds / 2, self._saver.longest_write_seconds)
        return self._now() - self._submitted_at + seconds > self._seconds - lead

    def hold(self, step: int) -> None:
        """Before the step after `step`: waits for the save that is being written, if a kill during that step would lose
        more than the interval. Costs nothing otherwise."""
        saved, most = self._saver.last_saved, self._config.every_steps
        if saved is None:
            return
        taken_at = self._began if saved.taken_at is None else saved.taken_at
        by_the_clock = self._seconds is not None and self._now() - taken_at > self._seconds
        if by_the_clock or (most is not None and step - saved.step >= most):
            self._saver.wait()


# -- memory pressure ---------------------------------------------------------------------------------------------------

FIRST = 3  # intervals to learn from, after the start and after each change of plan
IN_A_ROW = 2  # one slow interval is an accident
THRASHING_SLOWDOWN = 1.5
SPILL_SLOWDOWN = 3.0  # over PCIe it is more; other programs seldom take two thirds of a card
NEARLY_FULL_SHARE = 0.05  # of the card free
_REMEMBERED = 500  # intervals


class MemoryPressure:
    """Memory trouble that raises no error: the allocator thrashing, and host memory standing in for the card's, as the
    driver has it on Windows (`spills`). Where the device does not tell (the CPU) it never says anything.

    Both show in the step time of an interval of steps, against the run's own first ones; but that alone proves nothing
    (another program may use the card): thrashing takes allocator retries beside it, spilling a card that is nearly
    full. `began`: the device at the start.
    """

    def __init__(self, began: Snapshot, *, spills: bool = sys.platform == "win32") -> None:
        self._spills = spills
        self._retries_before = began.alloc_retries or 0
        self._retries: int | None = None
        self._retries_told = 0
        self.plan_changed()

    def plan_changed(self) -> None:
        """Another plan has another step time: everything is learned anew, which takes long enough that one bad spell
        cannot run down the whole ladder."""
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual_retries = 0.0  # a step, the most of the first intervals
        self._suspicious = 0

    def retries(self, device: Snapshot) -> int | None:
        """The allocator's retries since this was made, whenever their number has doubled since it was last told here:
        the first is told at once, and thousands in a dozen times. None: nothing to tell."""
        count = (device.alloc_retries or 0) - self._retries_before
        if count < max(1, 2 * self._retries_told):
            return None
        self._retries_told = count
        return count

    def look(self, steps: int, seconds: float, device: Snapshot) -> Verdict:
        """REPLAN if memory runs short, after `steps` steps took `seconds` of training and left the device so."""
        free, total = device.device_free_bytes, device.device_total_bytes
        if steps < 1 or device.alloc_retries is None or free is None or total is None:
            return Verdict()
        before, self._retries = self._retries, device.alloc_retries
        retries = (device.alloc_retries - before) / steps if before is not None else 0.0
        step_seconds = seconds / steps
        if len(self._seconds) < FIRST:
            self._seconds.append(step_seconds)
            self._usual_retries = max(self._usual_retries, retries)
            return Verdict()
        slowdown = step_seconds / max(median(self._seconds), 1e-9)
        slow = f"a step takes {slowdown:.1f} times as long as usual"
        if retries > self._usual_retries and slowdown >= THRASHING_SLOWDOWN:
            usual = f"{self._usual_retries:.2f} at first"
            why = f"the allocator empties its cache {retries:.2f} times a step ({usual}), and {slow}"
        elif self._spills and free < NEARLY_FULL_SHARE * total and slowdown >= SPILL_SLOWDOWN:
            why = f"{slow} on a card that is full: the driver seems to use host memory in its place"
        else:
            self._seconds.append(step_seconds)
            self._suspicious = 0
            return Verdict()
        self._suspicious += 1
        return Verdict(Act.REPLAN, why) if self._suspicious >= IN_A_ROW else Verdict()


# -- the plan's prediction ---------------------------------------------------------------------------------------------

_CHECKED_STEPS = 2  # the first may hold what libraries make once


@dataclass(frozen=True)
class MeasuredPeak:
    """Predicted and measured peak of a step's tensors, bytes, as the event `measured` has them. On CUDA also the
    allocator's segments (`reserved`) and all that is in use on the card (`device`), as far as known."""

    predicted_peak_bytes: int
    measured_peak_bytes: int
    budget_bytes: int | None
    predicted_reserved_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    predicted_device_bytes: int | None = None
    measured_device_bytes: int | None = None

    @property
    def within(self) -> bool:
        """Whether the peak is within the budget."""
        return self.budget_bytes is None or self.measured_peak_bytes <= self.budget_bytes

    def line(self, others: Sequence[Mapping[str, Any]] = ()) -> str:
        """For people, with those of other processes by their fields."""
        parts = [
            (self.measured_peak_bytes, self.predicted_peak_bytes, "of tensors at the peak of a step"),
            (self.measured_reserved_bytes, self.predicted_reserved_bytes, "held by the allocator"),
            (self.measured_device_bytes, self.predicted_device_bytes, "in use on the card by this process"),
        ]
        said = [
            f"{format_size(measured)} {what}"
            + (f" (predicted {format_size(predicted)}, {measured / predicted - 1:+.1%})" if predicted else "")
            for measured, predicted, what in parts
            if measured is not None
        ]
        verdict = "within" if self.within else "OVER"
        lines = [f"measured: {', '.join(said)}", f"{verdict} the budget of {format_size(self.budget_bytes)}"]
        lines += [
            f"process {rank}: {format_size(theirs['measured_peak_bytes'])}"
            f" (predicted {format_size(theirs['predicted_peak_bytes'])}, budget {format_size(theirs['budget_bytes'])})"
            for rank, theirs in enumerate(others, start=1)
        ]
        return "; ".join(lines)


class PlanCheck:
    """Measures the first steps under a replica's plan: on the CPU by counting tensors, on CUDA by the allocator.
    `kept`: to undo a step; the prediction has them, as all that is there between two steps."""

    def __init__(self, replica: Replica, kept: Iterable[Tensor]) -> None:
        plan, self._t, self._kept = replica.plan, replica, tuple(kept)
        self._plan = plan if plan is not None and plan.predicted.peak_allocated_bytes is not None else None
        self._cuda = replica.execution.device == "cuda"
        self._left = 0 if self._plan is None else _CHECKED_STEPS
        self._meter = TensorMeter()
        self._beside = 0  # bytes that the allocator holds beside the step's own tensors: the data set, above all

    @contextmanager
    def around(self, images: Tensor, labels: Tensor) -> Iterator[None]:
        """The context to run a step in."""
        if not self._left:
            yield
            return
        self._left -= 1
        model, kept = self._t.model, optimizer_tensors(self._t.optimizer)
        known = (*model.parameters(), *model.buffers(), *kept, *self._kept, images, labels)
        if self._cuda:
            self._beside = max(0, torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in known))
            yield
            return
        self._meter.adopt(known)
        with self._meter:
            yield

    def result(self) -> MeasuredPeak | None:
        """Once, after the last measured step."""
        if self._left or self._plan is None:
            return None
        plan, self._plan = self._plan, None
        predicted = plan.predicted
        assert predicted.peak_allocated_bytes is not None
        if not self._cuda:
            return MeasuredPeak(predicted.peak_allocated_bytes, self._meter.peak_bytes, plan.budget_bytes)
        device, beside = self._t.meter.read(), self._beside
        held, now, context = device.peak_reserved_bytes, device.reserved_bytes, device.context_bytes
        return MeasuredPeak(
            predicted_peak_bytes=predicted.peak_allocated_bytes,
            measured_peak_bytes=torch.cuda.max_memory_allocated() - beside,
            budget_bytes=plan.budget_bytes,
            predicted_reserved_bytes=predicted.peak_reserved_bytes,
            measured_reserved_bytes=None if held is None else held - beside,
            predicted_device_bytes=predicted.device_bytes,
            measured_device_bytes=None if now is None or context is None else now + context - beside,
        )
