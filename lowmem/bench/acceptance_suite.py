"""The acceptance suite: a network planned for a card, and everything that was promised of it held against real steps.

Cells go in order of what they tell for their time, each in clean processes, under one limit of time: what no longer
fits into it is said to be not run. After each cell the account so far is handed on, so that a kill keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lowmem.bench.acceptance import NO_TIME, Row, Setup, plain_at, set_overheads
from lowmem.bench.acceptance_plans import Plans
from lowmem.bench.largest import largest
from lowmem.bench.plan_checks import GRADIENTS, SURVIVAL, PlanQuestion
from lowmem.choose.request import Choice
from lowmem.core.errors import Infeasible, LowmemError
from lowmem.core.units import format_duration, format_size
from lowmem.isolate import Call
from lowmem.isolate import run as run_apart
from lowmem.models.memory_format import check_memory_format
from lowmem.trial.trial import Trial, TrialResult, run_trial, verdict, waits_for_host
from lowmem.trial.ways import PER_BLOCK, PLAIN, PLANNED, SELECTIVE

_FINISH_SECONDS = 10.0  # for the last tables and the picture
_FIRST_GUESS_SECONDS = 20.0  # of a trial, until one was seen
_LAST = "channels-last"
# Times the usual batch: where a fast card waits for its launches at the usual one, times are compared there, under
# twice the memory, which leaves as much room for it as half the memory does for the usual one.
_LARGER = 4

Tell = Callable[[str], None]
Save = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Cell:
    """A part of the suite: what it is called, about how many trials it takes, and what does it. `measuring`: the card
    is timed for a plan first."""

    kind: str
    name: str
    trials: int
    run: Callable[[Row], None]
    measuring: bool = False


class Suite:
    """One run of the suite. `save` gets all rows after each cell; `tell` a line before each. `call`: how the
    work of a cell is run in a process of its own."""

    def __init__(self, setup: Setup, *, save: Save, tell: Tell, call: Call = run_apart) -> None:
        self.setup = setup
        self.on_card = setup.device == "cuda"
        self._save, self._tell, self._call = save, tell, call
        self._ends = time.monotonic() + 60 * setup.minutes - _FINISH_SECONDS
        self._trial_seconds = 0.0
        self._plans = Plans(setup, tell)
        self.rows: list[Row] = []

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def run(self) -> list[Row]:
        """All cells. Nothing that goes wrong in one stops the others."""
        cells = self.cells()
        for number, cell in enumerate(cells, start=1):
            left = format_duration(max(0.0, self.seconds_left))
            self._tell(f"[{number}/{len(cells)}] {cell.name} ({left} left)")
            row = Row(kind=cell.kind, name=cell.name)
            began = time.monotonic()
            if self._no_time(cell.trials, cell.measuring):
                row.refused = NO_TIME
            else:
                try:
                    cell.run(row)
                except Infeasible as error:
                    row.refused = f"no plan fits: the least takes {format_size(error.least_bytes)}"
                except LowmemError as error:
                    row.refused = str(error)
            row.cell_seconds = time.monotonic() - began
            self.rows.append(row)
            set_overheads(self.rows)
            self._save(self.rows)
        return self.rows

    def cells(self) -> list[Cell]:
        """Those of the kinds that are asked for, the ones that tell most first: a short limit of time leaves out the
        last."""
        full, half = self.setup.vram_bytes, self.setup.vram_bytes // 2
        size, half_size = format_size(full), format_size(half)
        cells = [
            Cell("memory", f"planned for {size}", 1, partial(self._memory, full)),
            Cell("memory", f"planned for {half_size}", 1, partial(self._memory, half)),
            Cell("time", "save-all (plain PyTorch), no limit", 1, partial(self._way, PLAIN)),
            *(self._larger_cells() if self.on_card else []),
            Cell("gradients", "gradients, planned against untouched", 1, self._gradients),
            Cell("out of memory", "out of memory, injected, survived", 2, partial(self._survival, False)),
        ]
        if self.on_card:
            cells.append(Cell("out of memory", "out of memory, real, survived", 2, partial(self._survival, True)))
        cells += [
            Cell("time", "the library's checkpointing per block, no limit", 1, partial(self._way, PER_BLOCK)),
            Cell("time", "the library's selective checkpointing, no limit", 1, partial(self._way, SELECTIVE)),
            Cell("largest", f"largest batch in {size}, fp32, planned", 1, partial(self._largest_planned, "fp32")),
            Cell("largest", f"largest batch in {size}, fp32, plain", 3, partial(self._largest_plain, "fp32")),
            Cell("format", f"AMP, channels-last, planned for {size}", 1, partial(self._format, "amp", _LAST), True),
            Cell("format", f"fp32, channels-last, planned for {size}", 1, partial(self._format, "fp32", _LAST), True),
            Cell("format", f"AMP, contiguous, planned for {size}", 1, partial(self._format, "amp", "contiguous"), True),
            Cell("largest", f"largest batch in {size}, AMP, planned", 1, partial(self._largest_planned, "amp")),
            Cell("largest", f"largest batch in {size}, AMP, plain", 3, partial(self._largest_plain, "amp")),
        ]
        return [cell for cell in cells if cell.kind in self.setup.cells]

    def _larger_cells(self) -> list[Cell]:
        batch, twice = _LARGER * self.setup.batch, format_size(2 * self.setup.vram_bytes)
        return [
            Cell("time", f"save-all (plain PyTorch), batch {batch}, no limit", 1, self._larger_plain, True),
            Cell("time", f"planned for {twice}, batch {batch}", 1, self._larger_planned),
        ]

    # -- what the cells share --------------------------------------------------------------------------------------

    def _no_time(self, trials: int = 1, measuring: bool = False) -> bool:
        """`measuring`: the card is timed for a plan, which has its own cost."""
        needed = trials * (self._trial_seconds or _FIRST_GUESS_SECONDS)
        return self.seconds_left < needed + (self._plans.measuring_seconds if measuring else 0.0)

    def _trial(self, trial: Trial) -> TrialResult:
        began = time.monotonic()
        result = run_trial(trial, max(1.0, self.seconds_left), self._call)
        self._trial_seconds = max(self._trial_seconds, time.monotonic() - began)
        return result

    def _of(self, way: str, batch: int, precision: str, layout: str, choice: Choice | None = None) -> Trial:
        """A trial; under a choice's budget if there is one, and executing its plan if that is the way."""
        setup = self.setup
        return Trial(
            arch=setup.arch,
            block=setup.block,
            width=setup.width,
            batch=batch,
            precision=precision,
            memory_format=layout,
            device=setup.device,
            way=way,
            plan=choice.plan.to_json() if choice is not None and way == PLANNED else None,
            pictures=setup.pictures,
            eval_batch=batch if way in (PLANNED, PLAIN) else None,
            cap_bytes=choice.budget.allocator_bytes if choice is not None else None,
            steps=setup.steps,
            detailed=self.on_card and way == PLAIN,  # tells how much of a step the card computes
        )

    def _describe(self, row: Row, batch: int, precision: str, layout: str, vram_bytes: int | None) -> None:
        row.batch, row.precision, row.memory_format, row.vram_bytes = batch, precision, layout, vram_bytes
        row.emulated = vram_bytes is not None and self.setup.emulates(vram_bytes)

    def _planned(self, row: Row, vram_bytes: int, batch: int, precision: str, layout: str) -> None:
        """Planned, tried, and judged."""
        self._describe(row, batch, precision, layout, vram_bytes)
        choice = self._plans.choice(vram_bytes, batch, precision, layout)
        row.predict(choice, self.on_card)
        result = self._trial(self._of(PLANNED, batch, precision, layout, choice))
        row.measure(result, self.on_card)
        row.refused, _ = verdict(result, choice.budget, self.setup.device)

    def _plain(self, row: Row, vram_bytes: int, batch: int) -> None:
        """Not limited; what it takes is predicted beside the plan for so much memory."""
        row.facts["save_all"] = True
        choice = self._plans.choice(vram_bytes, batch)
        row.predicted_allocated_bytes = choice.plain.estimate.peak_allocated_bytes
        if self.on_card:
            row.predicted_reserved_bytes = choice.plain.estimate.peak_reserved_bytes
            row.predicted_step_seconds = choice.plain_seconds

    # -- the cells -------------------------------------------------------------------------------------------------

    def _memory(self, vram_bytes: int, row: Row) -> None:
        self._planned(row, vram_bytes, self.setup.batch, "fp32", "contiguous")

    def _format(self, precision: str, layout: str, row: Row) -> None:
        check_memory_format(self._plans.request(True).model, self.setup.device, precision, layout)
        self._planned(row, self.setup.vram_bytes, self.setup.batch, precision, layout)

    def _way(self, way: str, row: Row) -> None:
        """Not limited: what the others are held against. What it takes is predicted for plain autograd only."""
        batch = self.setup.batch
        self._describe(row, batch, "fp32", "contiguous", None)
        if way == PLAIN:
            self._plain(row, self.setup.vram_bytes, batch)
        self._measured(row, way, batch)

    def _measured(self, row: Row, way: str, batch: int) -> None:
        result = self._trial(self._of(way, batch, "fp32", "contiguous"))
        row.measure(result, self.on_card)
        row.refused = result.refused

    def _larger_plain(self, row: Row) -> None:
        """Where the card waits for its launches at the usual batch; it is not limited either."""
        usual, batch = plain_at(self.rows, self.setup.batch), _LARGER * self.setup.batch
        self._describe(row, batch, "fp32", "contiguous", None)
        share = None if usual is None else usual.busy_share
        if waits_for_host(share):
            self._plain(row, 2 * self.setup.vram_bytes, batch)
            self._measured(row, PLAIN, batch)
        elif share is None:
            row.refused = f"not run: how much of a step the card computes at batch {self.setup.batch} is not known"
        else:
            row.refused = f"not needed: the card computes {share:.0%} of a plain step at batch {self.setup.batch}"

    def _larger_planned(self, row: Row) -> None:
        batch = _LARGER * self.setup.batch
        if plain_at(self.rows, batch) is None:
            row.refused = f"not run: there is no plain step of batch {batch} to hold it against"
            return
        self._planned(row, 2 * self.setup.vram_bytes, batch, "fp32", "contiguous")

    def _gradients(self, row: Row) -> None:
        """Of the plan for half the memory, which differs most from the untouched model; or of that for all of it."""
        self._describe(row, self.setup.batch, "fp32", "contiguous", None)
        try:
            choice = self._plans.choice(self.setup.vram_bytes // 2, self.setup.batch)
        except Infeasible:
            choice = self._plans.choice(self.setup.vram_bytes, self.setup.batch)
        self._ask(row, GRADIENTS, PlanQuestion(**self._network(), plan=choice.plan.to_json()))
        row.batch = row.facts.pop("batch", row.batch)

    def _survival(self, real: bool, row: Row) -> None:
        vram_bytes, batch = self.setup.vram_bytes, self.setup.batch
        self._describe(row, batch, "fp32", "contiguous", vram_bytes)
        choice = self._plans.laddered
        cap, plan = choice.budget.allocator_bytes, choice.plan.to_json()
        self._ask(row, SURVIVAL, PlanQuestion(**self._network(), plan=plan, cap_bytes=cap, real=real))

    def _network(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "arch": setup.arch,
            "block": setup.block,
            "width": setup.width,
            "batch": setup.batch,
            "device": setup.device,
        }

    def _ask(self, row: Row, check: str, question: PlanQuestion) -> None:
        """The answer of a check becomes the row's facts."""
        outcome = self._call(check, asdict(question), timeout_seconds=max(1.0, self.seconds_left))
        found = outcome.answer_or_refusal
        if isinstance(found, str):
            row.refused = found
        else:
            row.facts = found

    def _largest_planned(self, precision: str, row: Row) -> None:
        """By the planner; what it finds is tried by real steps, and a little less should they not bear it out."""
        setup, plans = self.setup, self._plans
        self._describe(row, setup.batch, precision, "contiguous", setup.vram_bytes)

        def fits(batch: int) -> bool | None:
            if self._no_time():
                return None
            try:
                plans.choice(setup.vram_bytes, batch, precision, measured=False)
            except Infeasible:
                return False
            return True

        guess, unit = plans.guess(precision, planned=True)
        found = largest(fits, guess, unit, setup.tries)
        row.facts = {"planned": found.tried, "refused_by_the_planner": found.fails, "unit": unit, "tried": []}
        batch = found.holds
        while batch is not None and not self._no_time():
            choice = plans.choice(setup.vram_bytes, batch, precision, measured=False)
            result = self._trial(replace(self._of(PLANNED, batch, precision, "contiguous", choice), steps=2, warmup=1))
            row.batch = batch
            row.predict(choice, self.on_card)
            row.measure(result, self.on_card)
            row.refused, for_memory = verdict(result, choice.budget, setup.device)
            row.facts["tried"].append((batch, row.refused or "holds"))
            if not for_memory or len(row.facts["tried"]) == 3:
                return
            batch = max(1, min(batch - plans.unit, int(0.95 * batch) // plans.unit * plans.unit))
        if not row.facts["tried"]:
            row.refused = NO_TIME if self._no_time() else _none_found(len(found.tried), "plans")

    def _largest_plain(self, precision: str, row: Row) -> None:
        """By real steps alone, from where the prediction points."""
        setup, plans = self.setup, self._plans
        self._describe(row, setup.batch, precision, "contiguous", setup.vram_bytes)
        guess, unit = plans.guess(precision, planned=False)
        budget = plans.budget(setup.vram_bytes, measured=False)
        row.facts = {"unit": unit, "tried": []}

        def holds(batch: int) -> bool | None:
            if self._no_time():
                return None
            trial = replace(self._of(PLAIN, batch, precision, "contiguous"), steps=2, warmup=1, detailed=False)
            result = self._trial(replace(trial, cap_bytes=budget.allocator_bytes))
            refused, for_memory = verdict(result, budget, setup.device)
            row.facts["tried"].append((batch, refused or "holds"))
            if refused is None and batch >= (row.facts.get("holds") or 0):
                row.measure(result, self.on_card)
                row.facts["holds"] = row.batch = batch
            return None if refused is not None and not for_memory else refused is None

        found = largest(holds, guess, unit, setup.tries)
        row.facts["fails"] = found.fails
        if found.holds is None:
            row.refused = NO_TIME if self._no_time() else _none_found(len(found.tried), "trials")


def _none_found(tries: int, what: str) -> str:
    return f"none found in {tries} {what}"
