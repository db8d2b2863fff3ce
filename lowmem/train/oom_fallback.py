"""Going down the plan's ladder while a run goes on, in words, events and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem.core.errors import OutOfMemory
from lowmem.core.units import format_size
from lowmem.measure import Snapshot, who_holds
from lowmem.measure.out_of_memory import Failure, attempt, release
from lowmem.plan.record import Plan
from lowmem.runs.store import RunFolder
from lowmem.train.memory_pressure import Pressure, Reading

if TYPE_CHECKING:
    from lowmem.train.loop import Trainer

T = TypeVar("T")


class Descent:
    """What is done about memory that runs out. The loop asks; steps are undone elsewhere (`survive.Undo`)."""

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self._t = trainer
        self._folder = folder
        # What the plan can afford in training it can in evaluation; the whole batch it perhaps cannot.
        config, plan = trainer.config.train, trainer.plan
        self.eval_batch = config.eval_batch or (plan.micro_batch if plan else config.batch)
        self._pressure = Pressure(lambda: reading(trainer.meter.read()))
        self._told_of_pressure = False
        self._interval_began = trainer.state.step
        self.found: str | None = None  # memory that runs short, in words
        self._cause: Failure | None = None  # of the last step that failed, wherever

    def after(self, failure: Failure) -> bool:
        """Takes the next plan for a step that ran out of memory and was undone; False if there is none, or it was
        not. Of several processes all do, if those that failed can."""
        rung = self._t.plan.next_rung() if self._t.plan else None
        if failure.final:
            return False
        group, before = self._t.group, self._t.plan.budget_bytes if self._t.plan else None
        sizes = {"old_budget_bytes": before, "new_budget_bytes": rung.budget_bytes if rung else None}
        mine = None if failure.peer else {"failure": asdict(failure), "can": rung is not None, "sizes": sizes}
        everyone = group.gather(mine and {**mine, "memory": held(self._t.meter.read())})
        failed = [(rank, one) for rank, one in enumerate(everyone) if one is not None]
        rank, first = failed[0]
        self._cause = Failure(**first["failure"]) if rank == group.rank else _of_process(rank, first["failure"])
        if not all(one["can"] for _, one in failed):
            return False
        for rank, one in failed:
            who = {} if group.alone else {"process": rank}
            self.tell(Failure(**one["failure"]), memory=one["memory"], **one["sizes"], **who)
        if rung is not None:
            self._take(rung, f"{self._cause.words} ({self._cause.message})")
        self._record()
        return True

    def cause(self, failure: Failure) -> Failure:
        """Of a step that could not be made anywhere: the failure, or that of the process which had it."""
        return self._cause if failure.peer and self._cause is not None else failure

    def evaluated(self, score: Callable[[int], T]) -> T | Failure:
        """`score(batch)` with the evaluation's batch, which out-of-memory halves for the rest of this process; a
        Failure if one picture at a time is too much. Scores depend on the batch in the last bits only."""
        while isinstance(result := attempt(lambda: score(self.eval_batch), lambda: "evaluation"), Failure):
            release()
            if self.eval_batch == 1:
                return result
            self.eval_batch //= 2
            self.tell(result, evaluation_batch=self.eval_batch)
            self._t.observer.warning(f"{result.words}: evaluating {self.eval_batch} pictures at a time from here on")
        return result

    def saved(self, work: Callable[[], T]) -> T:
        """Saves, if need be a second time after giving back what can be. Raises OutOfMemory."""
        done = attempt(work, lambda: "saving")
        if isinstance(done, Failure):
            release()
            self.tell(done)
            done = attempt(work, lambda: "saving")
        if isinstance(done, Failure):
            raise OutOfMemory(f"{done.words} twice ({done.message}); the last checkpoint stands: {self._way_out()}")
        return done

    def tell(self, failure: Failure, *, memory: dict[str, Any] | None = None, **fields: Any) -> None:
        """The event, with what holds the memory as far as the device tells (`memory`: of another process)."""
        state = self._t.state
        self._folder.event(
            "out-of-memory",
            phase=failure.phase,
            message=failure.message,
            asked_bytes=failure.asked_bytes,
            epoch=state.epoch,
            step=state.step,
            **fields,
            memory=held(self._t.meter.read()) if memory is None else memory,
        )

    def at_the_end(self, failure: Failure) -> OutOfMemory:
        """The error that ends the run, which has just been saved if there was anything to save."""
        self.tell(failure, old_budget_bytes=self._t.plan.budget_bytes if self._t.plan else None, new_budget_bytes=None)
        state = self._t.state
        if failure.final:
            why = "when the update had begun, so that the step cannot be undone"
            stands = "the last checkpoint stands"
        else:
            why, stands = "and there is no smaller plan left", f"saved at epoch {state.epoch + 1}, step {state.step}"
        memory = "" if failure.peer else words(self._t.meter.read())
        return OutOfMemory(f"{failure.words} ({failure.message}), {why}{memory}; {stands}: {self._way_out()}")

    def interval(self, step: int, seconds: float) -> None:
        """Told of each stretch of training: `seconds` up to the count of steps `step`."""
        if step == self._interval_began:
            return
        self.found = self._pressure.interval(step - self._interval_began, seconds)
        self._interval_began = step
        if (count := self._pressure.retries()) is not None:
            # An allocation that failed and was had all the same: while it fails, cuDNN passes over engines in silence.
            self._folder.event("allocator-retries", step=step, count=count, memory=held(self._t.meter.read()))
            self._t.observer.note(f"the allocator has emptied its cache {count} times to go on: memory is tight")

    @property
    def asks(self) -> bool:
        """Whether memory runs short here, and that was not said in vain before."""
        return self.found is not None and not (self._told_of_pressure and not (self._t.plan and self._t.plan.ladder))

    def under_pressure(self) -> bool:
        """Between two steps: takes the next plan if the last interval looked like it. True if it did. Of several
        processes all do, wherever it was seen."""
        found, self.found = self.found, None
        if found is None and self._t.group.alone:
            return False
        found = found or "another process is short of it"
        rung = self._t.plan.next_rung() if self._t.plan else None
        before = self._t.plan.budget_bytes if self._t.plan else None
        if rung is None and self._told_of_pressure:
            self._record()
            return False
        self._told_of_pressure = rung is None
        self._folder.event(
            "pressure",
            what=found,
            step=self._t.state.step,
            old_budget_bytes=before,
            new_budget_bytes=rung.budget_bytes if rung else None,
            memory=held(self._t.meter.read()),
        )
        if rung is not None:
            self._take(rung, f"memory is short: {found}")
            release()
        else:
            self._t.observer.warning(f"memory is short: {found}; there is no smaller plan left")
        self._record()
        return rung is not None

    def _take(self, rung: Plan, why: str) -> None:
        before = self._t.plan
        assert before is not None
        self._t.take(rung)
        self._folder.event("replan", budget_bytes=rung.budget_bytes)
        self._pressure.plan_changed()
        sizes = f"{format_size(rung.budget_bytes)} instead of {format_size(before.budget_bytes)}"
        self._t.observer.warning(
            f"{why}: the step is done in {sizes} from here on, the same computation; {len(rung.ladder)} smaller plans "
            "are left"
        )

    def _record(self) -> None:
        """Every process's plan as it is now, for a resume."""
        plan = self._t.plan
        for rank, one in enumerate(self._t.group.gather(None if plan is None else plan.to_json())):
            if one is not None:
                self._folder.update_plan(one, rank)

    def _way_out(self) -> str:
        path = self._folder.path
        if self._t.plan is None:
            return f"free what others use, or give the run a plan with `lowmem resume {path} --vram 4G`"
        return f"free what others use and go on with `lowmem resume {path}`"


def _of_process(rank: int, values: dict[str, Any]) -> Failure:
    """Another one's, in its words."""
    failure = Failure(**values)
    return replace(failure, phase=f"{failure.phase} of process {rank}", peer=True)


def reading(snapshot: Snapshot) -> Reading | None:
    """What is watched for pressure; None where the device does not tell."""
    retries, free, total = snapshot.alloc_retries, snapshot.device_free_bytes, snapshot.device_total_bytes
    if retries is None or free is None or total is None:
        return None
    return Reading(retries, free, total)


def held(snapshot: Snapshot) -> dict[str, Any]:
    """What the device tells, for an event: bytes and counts, and who holds it in lines."""
    figures = {name: value for name, value in vars(snapshot).items() if isinstance(value, int)}
    return {**figures, "held_by": who_holds(snapshot)}


def words(snapshot: Snapshot) -> str:
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
