"""The measuring of `lowmem bench`, tables and acceptance suite alike: cell by cell, in rounds, within a time limit."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from lowmem.bench import ENGINES, FAMILIES, FIRST_MODE, PLAIN_DEFAULT, PLAIN_FREE, Cell, Setup
from lowmem.bench.plan_checks import GRADIENTS, SURVIVAL, PlanQuestion
from lowmem.bench.predict import Predictor, largest
from lowmem.choose.planning import with_ladder
from lowmem.choose.request import Budget
from lowmem.core.errors import Infeasible, LowmemError
from lowmem.core.units import format_duration, format_size
from lowmem.isolate import Call
from lowmem.measure.processor import busy_cores, usable_cores
from lowmem.trial import PLAIN, PLANNED, Trial, TrialResult, run_trial, verdict

_FIRST_GUESS_SECONDS = {"cpu": 6.0, "cuda": 15.0}  # of a trial, until one was seen
_LEAST_TIMEOUT_SECONDS = 5.0
_MOST_TIMEOUT_SECONDS = 1800.0
_HOLDS = "holds"
_LOOK_SECONDS = 5.0  # between two looks at what else the processor does
_VERIFIED = 3  # tries to bear a predicted largest batch out by real steps


Task = tuple[Cell, int]  # a measurement to be made: a cell's, in a round


class Bench:
    """One run over cells; those of them that are measured already are not measured again. `tell` gets a line before
    each measurement; `save` hears after each, so that a kill keeps it, and at last, whether everything is measured.
    `call`: how a function is run in a process of its own. `seconds`: how long it may take in all; what no longer fits
    into it is left out, and its cell says so.
    """

    def __init__(
        self,
        setup: Setup,
        cells: Sequence[Cell],
        *,
        seconds: float,
        tell: Callable[[str], None],
        save: Callable[[Sequence[Cell], bool], object],
        call: Call,
    ) -> None:
        self.setup, self.cells, self._tell, self._save, self._call = setup, list(cells), tell, save, call
        self._ends = time.monotonic() + seconds
        self._predictor = Predictor(setup, lambda text: tell(f"    {text}"))
        self._trials_took: list[float] = []
        self._taken: float | None = None
        self._looked = -math.inf

    def run(self) -> bool:
        """Measures what is not there yet -> whether everything is. What goes wrong in a cell stops no other."""
        tasks = [task for task in self.tasks() if not _done(*task)]
        complete = True
        for number, (cell, turn) in enumerate(tasks, start=1):
            if _done(cell, turn):  # refused in an earlier round of this run
                continue
            left = min(self._seconds_of(tasks[number - 1 :]), self._left())
            began = time.monotonic()
            if self._seconds_of([(cell, turn)]) > self._left():
                complete = False
                continue
            self._tell(f"[{number}/{len(tasks)}] {_describe(cell, turn)} ({format_duration(left)} left)")
            try:
                complete &= self._measure(cell, turn)
            except Infeasible as error:
                cell.prepared, cell.refused = True, f"no plan fits: the least takes {format_size(error.least_bytes)}"
            except LowmemError as error:
                cell.refused = str(error)
            cell.seconds = time.monotonic() - began
            self._save(self.cells, False)
        self._save(self.cells, complete)
        return complete

    def tasks(self) -> list[Task]:
        """The most important first: every cell once, then further rounds. In a round plain is first, for the others are
        held against it, and their order is the round's own: whatever else the machine does hits all alike."""
        tasks = [(cell, 1) for cell in self.cells]
        for number in range(2, max((cell.rounds for cell in self.cells), default=0) + 1):
            again = [cell for cell in self.cells if cell.rounds >= number]
            again = sorted(random.Random(number).sample(again, len(again)), key=lambda one: one.family != PLAIN_DEFAULT)
            tasks += [(cell, number) for cell in again]
        return tasks

    # -- time ----------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def _limit(self) -> float:
        return min(_MOST_TIMEOUT_SECONDS, max(_LEAST_TIMEOUT_SECONDS, self._left()))

    def _seconds_of(self, tasks: Sequence[Task]) -> float:
        """An estimate: as long as the same cell took, of a largest batch as long as the others, else by the number of
        trials alone: timing a card for the first plan takes minutes, and is done once."""
        guess = statistics.fmean(self._trials_took or [_FIRST_GUESS_SECONDS[self.setup.device]])
        alike = [one.seconds for one in self.cells if one.kind == "largest" and one.seconds is not None]

        def usual(cell: Cell) -> float:
            return statistics.fmean(alike) if alike and cell.kind == "largest" else cell.weight * guess

        return sum(usual(cell) if cell.seconds is None else cell.seconds for cell, _ in tasks)

    def _trial(self, trial: Trial) -> TrialResult | None:
        """None: it was ended because the time is over, which says nothing about it."""
        taken = self._taken_cores()
        began, limit = time.monotonic(), self._limit()
        result = run_trial(trial, limit, self._call)
        took = time.monotonic() - began
        if result.refused is not None and took >= limit < _MOST_TIMEOUT_SECONDS:
            return None
        self._trials_took.append(took)
        return replace(result, taken_cores=taken)

    def _taken_cores(self) -> float | None:
        """As `TrialResult` has it; a step on a card needs the core that launches its kernels."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            busy, cores = busy_cores(), usable_cores()
            needed = 1 if self.setup.on_card else torch.get_num_threads()
            self._taken = None if busy is None or cores is None else max(0.0, busy - max(0, cores - needed))
            self._looked = time.monotonic()
        return self._taken

    # -- cells ---------------------------------------------------------------------------------------------------------

    def _measure(self, cell: Cell, turn: int) -> bool:
        """Whether there was time for it, in this round."""
        on_card = self.setup.on_card
        if cell.unless is not None and (why := cell.unless(self.cells)) is not None:
            cell.refused = why
            return True
        if cell.kind == "largest":
            return self._largest(cell)
        if cell.kind in ("gradients", "out of memory"):
            return self._check(cell)
        if not cell.prepared:
            self._predictor.prepare(cell)
        trial = self._trial_of(cell)
        if cell.kind == "step":
            # On the CPU operations and bits are the same every time; on a card plain itself may differ from run to run.
            trial = replace(trial, detailed=on_card or turn == 1)
        elif trial.way in (PLAIN, PLANNED):
            # How much of a plain step the card computes is told in detail.
            trial = replace(trial, eval_batch=cell.batch, detailed=on_card and trial.way == PLAIN)
        result = self._trial(trial)
        if result is not None:
            cell.trials[str(turn)] = {**asdict(result), "refused": self._over(cell, result)}
        return result is not None

    def _trial_of(self, cell: Cell) -> Trial:
        way, fused = FAMILIES[cell.family]
        return Trial(
            **self.setup.network,
            batch=cell.batch,
            precision=cell.precision,
            memory_format=cell.memory_format,
            deterministic=cell.family != PLAIN_FREE,
            way=way,
            fused=fused or self.setup.fused,
            plan=cell.plan,
            pictures=self.setup.pictures,
            cap_bytes=cell.cap_bytes,
            steps=self.setup.steps,
            warmup=self.setup.warmup,
        )

    def _over(self, cell: Cell, result: TrialResult) -> str | None:
        """Why a trial is refused. What is not planned has no limit here; on the CPU a plan's tensors are its promise,
        on a card the allocator was capped at it."""
        if cell.family not in ENGINES or result.refused is not None:
            return result.refused
        if cell.memory_bytes is not None:
            return verdict(result, self._predictor.budget(cell.memory_bytes), self.setup.device)[0]
        taken = result.peak_allocated_bytes
        if taken is None or cell.budget_bytes is None or taken <= max(cell.budget_bytes, cell.cap_bytes or 0):
            return None
        return f"OVER: takes {format_size(taken)}, the budget is {format_size(cell.budget_bytes)}"

    def _largest(self, cell: Cell) -> bool:
        """Where the prediction points, tried by real steps and an evaluation, and a little less should they not bear it
        out; or by real steps alone, which begin there."""
        budget = self._predictor.budget(self.setup.memory_bytes, measured=False)
        cell.budget_bytes, cell.cap_bytes = budget.tensor_bytes, budget.allocator_bytes
        guess = self._predictor.guess(cell, budget)
        unit = self.setup.unit(guess)
        cell.facts = {"unit": unit, "tried": []}

        def fits(batch: int) -> bool | None:
            return self._predictor.fits(cell, batch, budget) if self._left() else None

        search = largest(fits, guess, unit, self.setup.tries)
        if cell.by_trials:
            holds = partial(self._try, cell, budget=budget)
            search = largest(holds, search.holds or unit, unit, self.setup.tries)
            cell.facts |= {"holds": search.holds, "fails": search.fails}
            cell.batch = search.holds or cell.batch
        else:
            cell.facts |= {"fails": search.fails, "predicted": search.tried}
            batch = search.holds
            for _ in range(_VERIFIED):
                if batch is None:
                    break
                cell.batch = batch
                self._predictor.prepare(cell, budget)
                if self._try(cell, batch, budget) is not False or batch <= unit:
                    break
                batch = max(unit, min(batch - unit, int(0.95 * batch) // unit * unit))
        if not cell.trials and not self._left():
            cell.prepared, cell.plan, cell.facts = False, None, {}
            return False
        cell.prepared = True
        if search.holds is None and search.fails is not None:
            cell.refused = f"not even a batch of {search.fails} fits {format_size(budget.tensor_bytes)}"
        return True

    def _try(self, cell: Cell, batch: int, budget: Budget) -> bool | None:
        """Whether real steps hold; None if there was no time, or they failed otherwise than for memory. The cell keeps
        the last ones that held, if any did."""
        held = any(said == _HOLDS for _, said in cell.facts["tried"])
        steps = self.setup.largest_steps
        trial = replace(self._trial_of(cell), batch=batch, steps=steps, warmup=1, eval_batch=batch)
        result = self._trial(trial) if self._left() else None
        if result is None:
            cell.trials = cell.trials if held else {}
            return None
        refused, for_memory = verdict(result, budget, self.setup.device)
        cell.facts["tried"].append((batch, refused or _HOLDS))
        if refused is None or not held:
            cell.trials = {"1": {**asdict(result), "refused": refused}}
        return refused is None or (False if for_memory else None)

    def _check(self, cell: Cell) -> bool:
        """Of a plan: of gradients the one for half the memory, which differs most from the untouched model, or that for
        all of it; of survival the latter, with its ladder."""
        setup, predictor = self.setup, self._predictor
        assert setup.memory_bytes is not None
        full = predictor.budget(setup.memory_bytes)
        if cell.kind == "out of memory":
            function, choice = SURVIVAL, with_ladder(predictor.plan(FIRST_MODE, setup.batch, full))
        else:
            function = GRADIENTS
            try:
                choice = predictor.plan(FIRST_MODE, setup.batch, predictor.budget(setup.memory_bytes // 2))
            except Infeasible:
                choice = predictor.plan(FIRST_MODE, setup.batch, full)
        plan, cap_bytes = choice.plan.to_json(), choice.budget.allocator_bytes
        question = PlanQuestion(**setup.network, batch=setup.batch, plan=plan, cap_bytes=cap_bytes, real=cell.real)
        outcome = self._call(function, asdict(question), timeout_seconds=self._limit())
        if outcome.ended == "too long" and not self._left():
            return False
        cell.prepared, cell.refused, cell.facts = True, outcome.refused, outcome.answer or {}
        cell.batch = cell.facts.pop("batch", cell.batch)
        return True


def _done(cell: Cell, turn: int) -> bool:
    return str(turn) in cell.trials or cell.refused is not None


def _describe(cell: Cell, turn: int) -> str:
    mode = f"{cell.precision}, {cell.memory_format}"
    if cell.title:
        return cell.title
    if cell.kind == "largest":
        return f"largest batch, {mode}: {cell.label}"
    return f"round {turn} of {cell.rounds}, {mode}: {cell.label}"
