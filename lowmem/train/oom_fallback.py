"""OOM fallback: going down the plan's ladder when memory runs out or short while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from lowmem.config.schema import TrainConfig
from lowmem.core.errors import OutOfMemory
from lowmem.core.units import counted, format_size
from lowmem.measure import Snapshot, who_holds
from lowmem.measure.out_of_memory import Failure, attempt, halving, release
from lowmem.plan.record import Plan
from lowmem.runs.store import RunFolder
from lowmem.train.replica import Replica
from lowmem.train.watchers import MemoryPressure, Verdict

T = TypeVar("T")


class OomFallback:
    """What is done about memory that runs out. The loop asks; steps are undone elsewhere (`step.undo`)."""

    def __init__(self, replica: Replica, folder: RunFolder) -> None:
        self._t, self._folder = replica, folder
        self.eval_batch = evaluation_batch(replica.config.train, replica.plan)
        self._pressure = MemoryPressure(replica.meter.read())
        self._short = Verdict()  # of the last interval of steps
        self._said_none_left = False
        self._interval_began = replica.state.step

    # -- memory that ran out -------------------------------------------------------------------------------------------

    def after(self, failure: Failure) -> Failure | None:
        """Takes the next plan for a step that ran out of memory and was undone. Of several processes all do, if those
        that failed can. If there is none, or it was not undone, the failure of the process which had it."""
        if failure.final:
            return failure
        group, rung = self._t.group, self._rung
        mine = {"failure": asdict(failure), "can": rung is not None, "sizes": self._sizes}
        mine["memory"] = memory_fields(self._t.meter.read())
        failed = {r: theirs for r, theirs in enumerate(group.gather(None if failure.peer else mine)) if theirs}
        rank = min(failed)
        cause = Failure(**failed[rank]["failure"])
        if rank != group.rank:
            cause = replace(cause, phase=f"{cause.phase} of process {rank}", peer=True)
        if not all(theirs["can"] for theirs in failed.values()):
            return cause if failure.peer else failure
        for rank, theirs in failed.items():
            who = {} if group.alone else {"process": rank}
            self.record(Failure(**theirs["failure"]), memory=theirs["memory"], **theirs["sizes"], **who)
        if rung is not None:
            self._take(rung, f"{cause.words} ({cause.message})")
        self._t.record_plans(self._folder)
        return None

    def evaluated(self, score: Callable[[int], T]) -> T | Failure:
        """`score(batch)` with the evaluation's batch, which out-of-memory halves for the rest of this process; a
        Failure if one picture at a time is too much. Scores depend on the batch in the last bits only."""

        def halved(failure: Failure, size: int) -> None:
            self.eval_batch = size
            self.record(failure, evaluation_batch=size)
            self._t.observer.warning(evaluates_fewer(failure, size))

        return halving(score, self.eval_batch, "evaluation", halved)

    def saved(self, work: Callable[[], T]) -> T:
        """Saves, if need be a second time after giving back what can be. Raises OutOfMemory."""
        done = attempt(work, lambda: "saving")
        if isinstance(done, Failure):
            release()
            self.record(done)
            done = attempt(work, lambda: "saving")
        if isinstance(done, Failure):
            raise OutOfMemory(f"{done.words} twice ({done.message}); the last checkpoint stands: {self._way_out()}")
        return done

    def record(self, failure: Failure, *, memory: dict[str, Any] | None = None, **fields: Any) -> None:
        """The event, with what holds the memory as far as the device tells (`memory`: of another process)."""
        what = {"phase": failure.phase, "message": failure.message, "asked_bytes": failure.asked_bytes}
        at = {"epoch": self._t.state.epoch, "step": self._t.state.step}
        memory = memory or memory_fields(self._t.meter.read())
        self._folder.event("out-of-memory", **what, **at, **fields, memory=memory)

    def at_the_end(self, failure: Failure) -> OutOfMemory:
        """The error that ends the run, which has just been saved if there was anything to save."""
        self.record(failure, old_budget_bytes=self._sizes["old_budget_bytes"], new_budget_bytes=None)
        state = self._t.state
        why, stands = "and there is no smaller plan left", f"saved at epoch {state.epoch + 1}, step {state.step}"
        if failure.final:
            why = "when the update had begun, so that the step cannot be undone"
            stands = "the last checkpoint stands"
        memory = "" if failure.peer else memory_words(self._t.meter.read())
        return OutOfMemory(f"{failure.words} ({failure.message}), {why}{memory}; {stands}: {self._way_out()}")

    # -- memory that runs short ----------------------------------------------------------------------------------------

    def trained(self, step: int, seconds: float) -> None:
        """Told of each stretch of training: `seconds` up to the count of steps `step`."""
        if step == self._interval_began:
            return
        device = self._t.meter.read()
        self._short = self._pressure.look(step - self._interval_began, seconds, device)
        self._interval_began = step
        if (count := self._pressure.retries(device)) is not None:
            # An allocation that failed and was had all the same: while it fails, cuDNN passes over engines in silence.
            self._folder.event("allocator-retries", step=step, count=count, memory=memory_fields(device))
            self._t.observer.note(
                f"the allocator has emptied its cache {counted(count, 'time')} to go on: memory is tight"
            )

    def verdict(self) -> Verdict:
        """REPLAN while memory runs short here, unless that was said in vain before."""
        in_vain = self._said_none_left and not (self._t.plan and self._t.plan.ladder)
        return Verdict() if in_vain else self._short

    def replan(self, why: str) -> bool:
        """Between two steps: takes the next plan, wherever memory runs short. False if this process has none."""
        self._short = Verdict()
        rung = self._rung
        if rung is not None or not self._said_none_left:
            self._said_none_left = rung is None
            memory = memory_fields(self._t.meter.read())
            self._folder.event("pressure", what=why, step=self._t.state.step, **self._sizes, memory=memory)
            if rung is None:
                self._t.observer.warning(f"memory is short: {why}; there is no smaller plan left")
            else:
                self._take(rung, f"memory is short: {why}")
                release()
        self._t.record_plans(self._folder)
        return rung is not None

    # -- the ladder ----------------------------------------------------------------------------------------------------

    @property
    def _rung(self) -> Plan | None:
        """The next smaller plan."""
        return self._t.plan and self._t.plan.next_rung()

    @property
    def _sizes(self) -> dict[str, int | None]:
        """Of this plan and the next smaller one, for events."""
        old, new = (None if plan is None else plan.budget_bytes for plan in (self._t.plan, self._rung))
        return {"old_budget_bytes": old, "new_budget_bytes": new}

    def _take(self, rung: Plan, why: str) -> None:
        before = self._t.plan
        assert before is not None
        self._t.take(rung)
        self._folder.event("replan", budget_bytes=rung.budget_bytes)
        self._pressure.plan_changed()
        sizes = f"{format_size(rung.budget_bytes)} instead of {format_size(before.budget_bytes)}"
        self._t.observer.warning(
            f"{why}: the step is done in {sizes} from here on, the same computation; "
            f"{counted(len(rung.ladder), 'smaller plan')} left"
        )

    def _way_out(self) -> str:
        path = self._folder.path
        if self._t.plan is None:
            return f"free what others use, or give the run a plan with `lowmem resume {path} --vram 4G`"
        return f"free what others use and go on with `lowmem resume {path}`"


def evaluation_batch(train: TrainConfig, plan: Plan | None) -> int:
    """Pictures at a time: what the plan can afford in training it can in evaluation; the whole batch it perhaps
    cannot."""
    return train.eval_batch or (plan.micro_batch if plan else train.batch)


def evaluates_fewer(failure: Failure, size: int) -> str:
    return f"{failure.words}: evaluating {counted(size, 'picture')} at a time from here on"


def memory_fields(snapshot: Snapshot) -> dict[str, Any]:
    """What the device tells, for an event: bytes and counts, and who holds it in lines."""
    figures = {name: value for name, value in vars(snapshot).items() if isinstance(value, int)}
    return {**figures, "held_by": who_holds(snapshot)}


def memory_words(snapshot: Snapshot) -> str:
    """The same for an error message, beginning with its own punctuation; empty where nobody tells."""
    parts = []
    if snapshot.allocated_bytes is not None:
        own = f"this process has {format_size(snapshot.allocated_bytes)} allocated"
        parts.append(f"{own} and {format_size(snapshot.reserved_bytes)} reserved")
    elif snapshot.process_bytes is not None:
        parts.append(f"this process holds {format_size(snapshot.process_bytes)}")
    if snapshot.device_free_bytes is not None:
        free, total = format_size(snapshot.device_free_bytes), format_size(snapshot.device_total_bytes)
        parts.append(f"{free} of {total} are free")
    if lines := who_holds(snapshot):
        parts.append(f"held by {', '.join(lines)}")
    return f" ({'; '.join(parts)})" if parts else ""
