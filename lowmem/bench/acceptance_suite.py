"""The acceptance suite: a network planned for a card, and everything that was promised of it held against real steps.

Cells go in order of importance, each in clean processes, under one limit of time: what no longer fits into it is said
to be not run. After each cell the account so far is handed on, so that a kill keeps it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lowmem.bench import gradients, survival
from lowmem.bench.acceptance import NO_TIME, Row, Setup, set_overheads
from lowmem.bench.largest import largest
from lowmem.bench.trial import Trial, TrialResult, answer_of, run_trial
from lowmem.bench.verdict import verdict
from lowmem.bench.ways import PER_BLOCK, PLAIN, PLANNED, SELECTIVE
from lowmem.choose.budget import Budget
from lowmem.choose.ladder import with_ladder
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.choose.session import budget_of, calibrator_of, request_of
from lowmem.choose.workspace import workspace_cap_bytes
from lowmem.errors import Infeasible, LowmemError
from lowmem.models.memory_format import check_memory_format
from lowmem.plan.solver import Solver
from lowmem.units import format_duration, format_size

_FINISH_SECONDS = 10.0  # for the last tables and the picture
_FIRST_GUESS_SECONDS = 20.0  # of a trial, until one was seen
_LAST = "channels-last"

Tell = Callable[[str], None]
Save = Callable[[list[Row]], None]
RunTrial = Callable[[Trial, float], TrialResult]
# (module of lowmem.bench, question as JSON, seconds) -> its answer, or in words why there is none
Ask = Callable[[str, str, float], "dict[str, Any] | str"]


def ask_process(module: str, question: str, timeout_seconds: float) -> dict[str, Any] | str:
    """In a clean process."""
    return answer_of((sys.executable, "-m", f"lowmem.bench.{module}"), question, timeout_seconds)


@dataclass(frozen=True)
class Cell:
    """A part of the suite: what it is called, about how many trials it takes, and what does it."""

    kind: str
    name: str
    trials: int
    run: Callable[[Row], None]


class Suite:
    """One run of the suite. `save` gets all rows after each cell; `tell` a line before each. `run` and `ask` do the
    work of a cell within so many seconds."""

    def __init__(
        self, setup: Setup, *, save: Save, tell: Tell, run: RunTrial = run_trial, ask: Ask = ask_process
    ) -> None:
        self.setup = setup
        self.on_card = setup.device == "cuda"
        self._save, self._tell, self._run_trial, self._ask_module = save, tell, run, ask
        self._ends = time.monotonic() + 60 * setup.minutes - _FINISH_SECONDS
        self._trial_seconds = self._measuring_seconds = 0.0
        self._requests: tuple[Request, ...] = ()
        self._choices: dict[tuple[int, int, str, str, bool], Choice] = {}
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
            if self._no_time(cell.trials, measuring=cell.kind == "format"):
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
        """The most important first: a short limit of time leaves out the last."""
        full, half = self.setup.vram_bytes, self.setup.vram_bytes // 2
        size, half_size = format_size(full), format_size(half)
        real = Cell("out of memory", "out of memory, real, survived", 2, partial(self._survival, True))
        return [
            Cell("memory", f"planned for {size}", 1, partial(self._memory, full)),
            Cell("memory", f"planned for {half_size}", 1, partial(self._memory, half)),
            Cell("time", "save-all (plain PyTorch), no limit", 1, partial(self._way, PLAIN)),
            Cell("gradients", "gradients, planned against untouched", 1, self._gradients),
            Cell("out of memory", "out of memory, injected, survived", 2, partial(self._survival, False)),
            *([real] if self.on_card else []),
            Cell("largest", f"largest batch in {size}, fp32, planned", 1, partial(self._largest_planned, "fp32")),
            Cell("largest", f"largest batch in {size}, fp32, plain", 4, partial(self._largest_plain, "fp32")),
            Cell("time", "the library's checkpointing per block, no limit", 1, partial(self._way, PER_BLOCK)),
            Cell("time", "the library's selective checkpointing, no limit", 1, partial(self._way, SELECTIVE)),
            Cell("largest", f"largest batch in {size}, AMP, planned", 1, partial(self._largest_planned, "amp")),
            Cell("largest", f"largest batch in {size}, AMP, plain", 4, partial(self._largest_plain, "amp")),
            Cell("format", f"fp32, channels-last, planned for {size}", 1, partial(self._format, "fp32", _LAST)),
            Cell("format", f"AMP, contiguous, planned for {size}", 1, partial(self._format, "amp", "contiguous")),
            Cell("format", f"AMP, channels-last, planned for {size}", 1, partial(self._format, "amp", _LAST)),
        ]

    # -- what the cells share --------------------------------------------------------------------------------------

    def _no_time(self, trials: int = 1, measuring: bool = False) -> bool:
        """`measuring`: the card is timed for a plan, which has its own cost."""
        needed = trials * (self._trial_seconds or _FIRST_GUESS_SECONDS)
        return self.seconds_left < needed + (self._measuring_seconds if measuring else 0.0)

    def _trial(self, trial: Trial) -> TrialResult:
        began = time.monotonic()
        result = self._run_trial(trial, max(1.0, self.seconds_left))
        self._trial_seconds = max(self._trial_seconds, time.monotonic() - began)
        return result

    def _request(self, measured: bool) -> Request:
        """One for all cells, so that what was simulated for one need not be again for another; made at the first use,
        since the card may have to be asked for it."""
        if not self._requests:
            setup = self.setup
            config = setup.settings(setup.vram_bytes, setup.batch, "fp32", "contiguous").config
            calibrator = calibrator_of(config, self._tell)
            asked = request_of(config, 10, setup.pictures if self.on_card else 0, calibrator)
            room = workspace_cap_bytes() if asked.budget.on_card else 0
            budget = replace(asked.budget, workspace_bytes=room)
            self._requests = (asked, replace(asked, calibrator=None, known={}, budget=budget))
        return self._requests[0 if measured and self._requests[0].calibrator is not None else 1]

    def _budget(self, vram_bytes: int, measured: bool) -> Budget:
        """Of a card with so much memory: the same terms."""
        budget, full = self._request(measured).budget, self.setup.vram_bytes
        if vram_bytes == full:
            return budget
        config = self.setup.settings(vram_bytes, self.setup.batch, "fp32", "contiguous").config
        pictures = self.setup.pictures if self.on_card else 0
        smaller, _ = budget_of(config, pictures, self._request(True).calibrator)
        return replace(smaller, workspace_bytes=budget.workspace_bytes)

    def _choice(
        self, vram_bytes: int, batch: int, precision: str = "fp32", layout: str = "contiguous", measured: bool = True
    ) -> Choice:
        """Planned once, on a card by what is measured on it; or, not `measured`, by rates and room for workspaces
        alone, which is quick. Raises Infeasible."""
        base = self._request(measured)
        measured = base.calibrator is not None
        key = (vram_bytes, batch, precision, layout, measured)
        if key not in self._choices:
            began = time.monotonic()
            self._choices[key] = choose(
                replace(
                    base,
                    batch=batch,
                    budget=self._budget(vram_bytes, measured),
                    precisions=(precision,),
                    memory_format=layout,
                    formats={},
                )
            )
            if measured:
                self._measuring_seconds = max(self._measuring_seconds, time.monotonic() - began)
        return self._choices[key]

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
        )

    def _describe(self, row: Row, batch: int, precision: str, layout: str, vram_bytes: int | None) -> None:
        row.batch, row.precision, row.memory_format, row.vram_bytes = batch, precision, layout, vram_bytes
        row.emulated = vram_bytes is not None and self.setup.emulates(vram_bytes)

    def _planned(self, row: Row, vram_bytes: int, precision: str, layout: str) -> None:
        """Planned, tried, and judged."""
        batch = self.setup.batch
        self._describe(row, batch, precision, layout, vram_bytes)
        choice = self._choice(vram_bytes, batch, precision, layout)
        row.predict(choice, self.on_card)
        result = self._trial(self._of(PLANNED, batch, precision, layout, choice))
        row.measure(result, self.on_card)
        row.refused, _ = verdict(result, choice.budget, self.setup.device)

    # -- the cells -------------------------------------------------------------------------------------------------

    def _memory(self, vram_bytes: int, row: Row) -> None:
        self._planned(row, vram_bytes, "fp32", "contiguous")

    def _format(self, precision: str, layout: str, row: Row) -> None:
        check_memory_format(self._request(True).model, self.setup.device, precision, layout)
        self._planned(row, self.setup.vram_bytes, precision, layout)

    def _way(self, way: str, row: Row) -> None:
        """Not limited: what the others are held against. What it takes is predicted for plain autograd only."""
        batch = self.setup.batch
        self._describe(row, batch, "fp32", "contiguous", None)
        row.facts["save_all"] = way == PLAIN
        if way == PLAIN:
            choice = self._choice(self.setup.vram_bytes, batch)
            plain = choice.plain
            row.predicted_allocated_bytes = plain.estimate.peak_allocated_bytes
            if self.on_card:
                row.predicted_reserved_bytes = plain.estimate.peak_reserved_bytes
                row.predicted_step_seconds = choice.plain_seconds
        result = self._trial(self._of(way, batch, "fp32", "contiguous"))
        row.measure(result, self.on_card)
        row.refused = result.refused

    def _gradients(self, row: Row) -> None:
        """Of the plan for half the memory, which differs most from the untouched model; or of that for all of it."""
        self._describe(row, self.setup.batch, "fp32", "contiguous", None)
        try:
            choice = self._choice(self.setup.vram_bytes // 2, self.setup.batch)
        except Infeasible:
            choice = self._choice(self.setup.vram_bytes, self.setup.batch)
        self._ask(row, "gradients", gradients.Question(**self._network(), plan=choice.plan.to_json()))
        row.batch = row.facts.pop("batch", row.batch)

    def _survival(self, real: bool, row: Row) -> None:
        vram_bytes, batch = self.setup.vram_bytes, self.setup.batch
        self._describe(row, batch, "fp32", "contiguous", vram_bytes)
        choice = with_ladder(self._choice(vram_bytes, batch))
        cap, plan = choice.budget.allocator_bytes, choice.plan.to_json()
        self._ask(row, "survival", survival.Question(**self._network(), plan=plan, cap_bytes=cap, real=real))

    def _network(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "arch": setup.arch,
            "block": setup.block,
            "width": setup.width,
            "batch": setup.batch,
            "device": setup.device,
        }

    def _ask(self, row: Row, module: str, question: gradients.Question | survival.Question) -> None:
        """The answer of a module's process becomes the row's facts."""
        found = self._ask_module(module, json.dumps(asdict(question)), max(1.0, self.seconds_left))
        if isinstance(found, str):
            row.refused = found
        else:
            row.facts = found

    def _largest_planned(self, precision: str, row: Row) -> None:
        """By the planner; what it finds is tried by real steps, and a little less should they not bear it out."""
        setup = self.setup
        self._describe(row, setup.batch, precision, "contiguous", setup.vram_bytes)
        start = self._feasible_start(precision)

        def fits(batch: int) -> bool | None:
            if self._no_time():
                return None
            try:
                self._choice(setup.vram_bytes, batch, precision, measured=False)
            except Infeasible:
                return False
            return True

        grows = Solver(start.chain).least().peak_bytes
        found = largest(fits, _scaled(start, grows), self._unit, self.setup.tries)
        row.facts = {"planned": found.tried, "refused_by_the_planner": found.fails, "tried": []}
        batch = found.holds
        while batch is not None and not self._no_time():
            choice = self._choice(setup.vram_bytes, batch, precision, measured=False)
            result = self._trial(replace(self._of(PLANNED, batch, precision, "contiguous", choice), steps=2, warmup=1))
            row.batch = batch
            row.predict(choice, self.on_card)
            row.measure(result, self.on_card)
            row.refused, for_memory = verdict(result, choice.budget, setup.device)
            row.facts["tried"].append((batch, row.refused or "holds"))
            if not for_memory or len(row.facts["tried"]) == 3:
                return
            batch = max(1, min(batch - self._unit, int(0.95 * batch) // self._unit * self._unit))
        if not row.facts["tried"]:
            row.refused = NO_TIME if self._no_time() else _none_found(len(found.tried), "plans")

    def _largest_plain(self, precision: str, row: Row) -> None:
        """By real steps alone, from where the prediction points."""
        setup = self.setup
        self._describe(row, setup.batch, precision, "contiguous", setup.vram_bytes)
        start = self._feasible_start(precision)
        guess = _scaled(start, start.plain.estimate.peak_allocated_bytes)
        row.facts["tried"] = tried = []

        def holds(batch: int) -> bool | None:
            if self._no_time():
                return None
            trial = self._of(PLAIN, batch, precision, "contiguous")
            cap = start.budget.allocator_bytes
            result = self._trial(replace(trial, steps=2, warmup=1, cap_bytes=cap))
            refused, for_memory = verdict(result, start.budget, setup.device)
            tried.append((batch, refused or "holds"))
            if refused is None and batch >= (row.facts.get("holds") or 0):
                row.measure(result, self.on_card)
                row.facts["holds"] = row.batch = batch
            return None if refused is not None and not for_memory else refused is None

        found = largest(holds, guess, self._unit, self.setup.tries)
        row.facts["fails"] = found.fails
        if found.holds is None:
            row.refused = NO_TIME if self._no_time() else _none_found(len(tried), "trials")

    @property
    def _unit(self) -> int:
        """Batches are told apart to this many pictures: a sixteenth of the usual one."""
        return max(1, self.setup.batch // 16)

    def _feasible_start(self, precision: str) -> Choice:
        """A plan at the usual batch, or at a smaller one. Raises Infeasible."""
        batch = self.setup.batch
        while True:
            try:
                return self._choice(self.setup.vram_bytes, batch, precision, measured=False)
            except Infeasible:
                if batch <= self._unit:
                    raise
            batch //= 2


def _none_found(tries: int, what: str) -> str:
    return f"none found in {tries} {what}"


def _scaled(start: Choice, peak_bytes: int) -> int:
    """The batch at which a peak would fill the budget, if all but what always exists grows with the batch."""
    images = 4 * 3 * 32 * 32 * start.plan.batch
    fixed = start.chain.outside_peak_bytes - images  # parameters, momentum, gradients
    each = max(1, (peak_bytes - fixed) // start.plan.batch)
    return max(1, (start.budget.tensor_bytes - fixed) // each)
