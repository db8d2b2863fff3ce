"""The measuring of `lowmem bench`: cell by cell, in rounds, within a limit of time, resumable."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from lowmem.bench.cells import (
    ENGINE,
    FAMILIES,
    FIRST_MODE,
    MODES,
    PLAIN_DEFAULT,
    PLAIN_FREE,
    Cell,
    Setup,
    largest_cells,
    step_cells,
)
from lowmem.bench.predict import Predictor
from lowmem.bench.results import Results
from lowmem.core.errors import Infeasible
from lowmem.core.units import format_duration, format_size
from lowmem.isolate import Call
from lowmem.models import skeleton
from lowmem.models.memory_format import is_safe
from lowmem.plan.record import Plan
from lowmem.trial.trial import Trial, TrialResult, run_trial, verdict

_FIRST_GUESS_SECONDS = {"cpu": 6.0, "cuda": 15.0}  # of a trial, until one was seen
_LEAST_TIMEOUT_SECONDS = 5.0
_MOST_TIMEOUT_SECONDS = 1800.0
_TRIES = 3  # of a largest batch that real steps do not bear out


@dataclass(frozen=True)
class Task:
    """A measurement to be made: a cell's, in a round."""

    cell: Cell
    round: int


class Bench:
    """One run. `tell` gets a line before each measurement, `call`: how a trial is run in a process of its own.

    `seconds`: how long it may take in all; what no longer fits into it is left out, and the same command measures it.
    """

    def __init__(
        self, setup: Setup, results: Results, *, seconds: float, tell: Callable[[str], None], call: Call
    ) -> None:
        self.setup, self._results, self._tell, self._call = setup, results, tell, call
        self._ends = time.monotonic() + seconds
        self._predictor = Predictor(setup, lambda text: self._tell(f"    {text}"))
        known = results.load()
        model = skeleton(setup.arch, setup.block, width=setup.width)
        modes = [mode for mode in MODES if is_safe(model, setup.device, *mode)]
        fresh = [*step_cells(setup, modes), *largest_cells(setup)]
        self.cells = [known.get(cell.key, cell) for cell in fresh]
        self._took: dict[str, list[float]] = {}
        self.done_before = sum(len(cell.trials) for cell in self.cells)

    def run(self) -> bool:
        """Measures what is not there yet -> whether everything is. What goes wrong in a cell stops no other."""
        tasks = [task for task in self.tasks() if not _done(task)]
        complete = True
        for number, task in enumerate(tasks, start=1):
            if _done(task):  # refused in an earlier round of this run
                continue
            left = self._seconds_of(tasks[number - 1 :])
            what = f"[{number}/{len(tasks)}] {_words(task, self.setup)}"
            if self._seconds_of([task]) > self._left():
                complete = False
                continue
            self._tell(f"{what} ({format_duration(min(left, self._left()))} left)")
            began = time.monotonic()
            complete &= self._largest(task.cell) if task.cell.kind == "largest" else self._step(task)
            self._took.setdefault(task.cell.key, []).append(time.monotonic() - began)
            self._results.save(self.cells, finished=False)
        self._results.save(self.cells, finished=complete)
        return complete

    def tasks(self) -> list[Task]:
        """The most important first: every cell once, then further rounds. In a round plain is first, for the others are
        held against it, and the order of these is the round's own, so that whatever else the machine does hits all
        alike."""
        steps = [cell for cell in self.cells if cell.kind == "step"]
        first = [cell for cell in steps if cell.mode == FIRST_MODE]
        modes = [cell for cell in steps if cell.mode != FIRST_MODE]
        tasks = [Task(cell, 1) for cell in (*first, *modes)]
        tasks += [Task(cell, 1) for cell in self.cells if cell.kind == "largest"]
        for number in range(2, max(self.setup.rounds, self.setup.mode_rounds) + 1):
            again = first if number <= self.setup.rounds else []
            again = again + modes if number <= self.setup.mode_rounds else again
            again = sorted(random.Random(number).sample(again, len(again)), key=lambda one: one.family != PLAIN_DEFAULT)
            tasks += [Task(cell, number) for cell in again]
        return tasks

    # -- time ----------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _seconds_of(self, tasks: Sequence[Task]) -> float:
        """An estimate: as long as the same cell took, else the others of its kind."""
        seconds = 0.0
        for task in tasks:
            own = self._took.get(task.cell.key)
            alike = [one for key, took in self._took.items() for one in took if key.startswith(task.cell.kind)]
            others = [one for took in self._took.values() for one in took]
            guess = statistics.fmean(alike or others) if others else _FIRST_GUESS_SECONDS[self.setup.device]
            if not alike and task.cell.kind == "largest":
                guess *= 3
            seconds += own[-1] if own else guess
        return seconds

    def _trial(self, trial: Trial) -> TrialResult | None:
        """None: it was ended because the time is over, which says nothing about it."""
        limit = min(_MOST_TIMEOUT_SECONDS, max(_LEAST_TIMEOUT_SECONDS, self._left()))
        began = time.monotonic()
        result = run_trial(trial, limit, self._call)
        over = result.refused is not None and time.monotonic() - began >= limit < _MOST_TIMEOUT_SECONDS
        return None if over else result

    # -- cells ---------------------------------------------------------------------------------------------------------

    def _of(self, cell: Cell) -> Trial:
        way, optimizer = FAMILIES[cell.family]
        setup = self.setup
        return Trial(
            arch=setup.arch,
            block=setup.block,
            width=setup.width,
            batch=cell.batch,
            precision=cell.precision,
            memory_format=cell.memory_format,
            device=setup.device,
            deterministic=cell.family != PLAIN_FREE,
            way=way,
            optimizer=optimizer,
            plan=None if cell.plan is None else Plan.from_json(cell.plan).without_ladder().to_json(),
            cap_bytes=cell.cap_bytes,
            steps=setup.steps,
            warmup=setup.warmup,
        )

    def _step(self, task: Task) -> bool:
        """Whether there was time for it."""
        cell = task.cell
        if not cell.prepared:
            self._predictor.prepare(cell)
        if cell.refused is not None:
            return True
        # On the CPU operations and bits are the same every time; on a card plain itself may differ from run to run.
        result = self._trial(replace(self._of(cell), detailed=self.setup.on_card or task.round == 1))
        if result is None:
            return False
        found = asdict(result)
        over = _over(cell, result)
        if over is not None:
            found["refused"] = over
        cell.trials[str(task.round)] = found
        return True

    def _largest(self, cell: Cell) -> bool:
        """Where the prediction points, tried by real steps and an evaluation, and a little less should they not bear it
        out."""
        unit = max(1, self.setup.batch // (8 if self.setup.quick else 16))
        try:
            budget = self._predictor.memory()
            search, choice = self._predictor.largest_batch(cell, budget, unit)
        except Infeasible as error:
            cell.prepared, cell.refused = True, str(error)
            return True
        cell.budget_bytes, cell.cap_bytes = budget.tensor_bytes, budget.allocator_bytes
        if search.holds is None:
            cell.prepared = True
            cell.refused = f"not even a batch of {search.fails} fits {format_size(budget.tensor_bytes)}"
            return True
        tried: list[tuple[int, str]] = []
        batch, result = search.holds, None
        for _ in range(_TRIES):
            cell.batch = batch
            if cell.family == ENGINE:
                if choice is None or choice.plan.batch != batch:
                    choice = self._predictor.plan(cell.mode, batch, budget, measured=False)
                self._predictor.note_choice(cell, choice)
            else:
                self._predictor.note_way(cell, self._predictor.way(cell, batch, measured=False))
            steps = max(1, self.setup.steps // 2)
            result = self._trial(replace(self._of(cell), steps=steps, warmup=1, eval_batch=batch))
            if result is None:
                cell.plan = None
                return False
            refused, for_memory = verdict(result, budget, self.setup.device)
            tried.append((batch, refused or "holds"))
            if not for_memory or batch == unit:
                break
            batch = max(unit, min(batch - unit, int(0.95 * batch) // unit * unit))
        assert result is not None
        cell.prepared = True
        cell.facts = {"fails": search.fails, "predicted": search.tried, "tried": tried, "unit": unit}
        cell.trials["1"] = {**asdict(result), "refused": refused}
        return True


def _done(task: Task) -> bool:
    return str(task.round) in task.cell.trials or task.cell.refused is not None


def _words(task: Task, setup: Setup) -> str:
    cell = task.cell
    mode = f"{cell.precision}, {cell.memory_format}"
    if cell.kind == "largest":
        return f"largest batch, {mode}: {cell.label}"
    rounds = setup.rounds if cell.mode == FIRST_MODE else setup.mode_rounds
    return f"round {task.round} of {rounds}, {mode}: {cell.label}"


def _over(cell: Cell, result: TrialResult) -> str | None:
    """On the CPU a plan's tensors are its promise; on a card the allocator was capped at it."""
    taken = result.peak_allocated_bytes
    if cell.family != ENGINE or taken is None or cell.budget_bytes is None or taken <= cell.budget_bytes:
        return None
    if cell.cap_bytes is not None and taken <= cell.cap_bytes:
        return None
    return f"OVER: takes {format_size(taken)}, the budget is {format_size(cell.budget_bytes)}"
