"""What a cell is predicted to take, before it is measured: the real code on fake tensors (invariant 5), for the
library's ways of doing a step as for the engine's plans. And the search for the largest batch, which begins there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import nn

from lowmem.bench.cells import ENGINE, FAMILIES, FIRST_MODE, LEAST, PLAIN_DEFAULT, Cell, Setup
from lowmem.calibrate.calibrator import Calibrator
from lowmem.choose.execution import budget_of, calibrator_of, request_of
from lowmem.choose.planning import choose, with_ladder, workspaces_of
from lowmem.choose.request import Budget, Choice, Request, tensors_only
from lowmem.config.schema import Config
from lowmem.config.settings import gather
from lowmem.core.errors import Infeasible
from lowmem.core.units import format_size
from lowmem.models.memory_format import check_memory_format
from lowmem.models.resnet import ResNet
from lowmem.remat.libraries import workspace_cap_bytes
from lowmem.simulate import Simulated, simulate_step
from lowmem.step.train_step import FUSED
from lowmem.trial.ways import executed

_LEAST_TRIES = 3
_PLENTY = 1 << 50
# Of the batch whose least plan would fill the memory with tensors alone; on a card gaps between blocks take the rest.
# For Bottleneck-110 in 6 GiB it is 0.89 by the allocator's model, in fp32 and in AMP.
_WITHOUT_GAPS = 0.9
Mode = tuple[str, str]  # precision, memory format


class Predictor:
    """Of one network on one device; what was planned once is not planned again. On a card the calibration of the device
    is used, and made where it lacks anything; `tell` hears what takes seconds."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup, self._tell = setup, tell
        self._calibrator: Calibrator | None = None
        self._choices: dict[object, Choice | Infeasible] = {}
        self._peaks: dict[Mode, int] = {}

    # -- a cell --------------------------------------------------------------------------------------------------------

    def prepare(self, cell: Cell) -> None:
        """Fills prediction, budget and plan in, or why it is refused. Raises PreflightError for a mode that corrupts
        memory."""
        check_memory_format(self._requests[0].model, self.setup.device, *cell.mode)
        try:
            if cell.family == ENGINE:
                self.note_choice(cell, self._choice(cell))
            else:
                self.note_way(cell, self.way(cell, cell.batch))
        except Infeasible as error:
            cell.refused = f"no plan fits: the least takes {format_size(error.least_bytes)}"
        cell.prepared = True

    def note_choice(self, cell: Cell, choice: Choice) -> None:
        """A plan and what it says of itself; of time only what was measured on this device, not what a datasheet says
        of another."""
        predicted, budget = choice.plan.predicted, choice.budget
        cell.budget_bytes, cell.cap_bytes, cell.terms = budget.tensor_bytes, budget.allocator_bytes, budget.rows()
        cell.plan = choice.plan.to_json()
        cell.predicted_allocated_bytes = self._peak_bytes(choice.simulated)
        cell.predicted_flops = choice.simulated.flops
        if self.setup.on_card:
            cell.predicted_reserved_bytes = predicted.peak_reserved_bytes
            if predicted.device_bytes is not None:
                cell.predicted_device_bytes = predicted.device_bytes + budget.pictures_bytes
        if self.setup.on_card or choice.timed:
            cell.predicted_step_seconds, cell.predicted_overhead = predicted.step_seconds, predicted.overhead

    def note_way(self, cell: Cell, simulated: Simulated) -> None:
        """What the library's way is predicted to take; of the suite's plain step its time too."""
        cell.predicted_allocated_bytes = self._peak_bytes(simulated)
        cell.predicted_flops = simulated.flops
        if self.setup.on_card:
            reserved = simulated.estimate.peak_reserved_bytes
            beside = self._request(cell.mode, cell.batch).budget.process_bytes
            cell.predicted_reserved_bytes, cell.predicted_device_bytes = reserved, reserved + beside
            if cell.kind == "time" and cell.family == PLAIN_DEFAULT:
                cell.predicted_step_seconds = self.plan(cell.mode, cell.batch, self._tensors(_PLENTY)).plain_seconds

    def _choice(self, cell: Cell) -> Choice:
        """Of the engine. Raises Infeasible."""
        if cell.vram_bytes is not None:
            return self.plan(cell.mode, cell.batch, self.budget(cell.vram_bytes))
        if cell.budget == LEAST:
            return self._least_choice(cell.mode, cell.batch)
        budget_bytes = cell.budget
        if isinstance(budget_bytes, float):
            budget_bytes = int(budget_bytes * self._plain_peak(cell.mode))
        assert isinstance(budget_bytes, int)
        return self.plan(cell.mode, cell.batch, self._tensors(budget_bytes))

    # -- plans and ways ------------------------------------------------------------------------------------------------

    def plan(self, mode: Mode, batch: int, budget: Budget, measured: bool = True) -> Choice:
        """`measured`: on a card by what is measured on it, which takes time for every new batch; else by rates and room
        for workspaces alone. Raises Infeasible."""
        key = (mode, batch, budget, measured)
        if key not in self._choices:
            try:
                self._choices[key] = choose(replace(self._request(mode, batch, measured), budget=budget))
            except Infeasible as error:
                self._choices[key] = error
        found = self._choices[key]
        if isinstance(found, Infeasible):
            raise found
        return found

    def laddered(self) -> Choice:
        """The plan for all of the memory, with its ladder. Raises Infeasible."""
        return with_ladder(self.plan(FIRST_MODE, self.setup.batch, self.budget(self.setup.vram_bytes)))

    def way(self, cell: Cell, batch: int, capacity_bytes: int | None = None, measured: bool = True) -> Simulated:
        """A step as the library does it."""
        way, form = FAMILIES[cell.family]
        request = self._request(cell.mode, batch, measured)
        shape = request.shape(cell.precision, batch)
        return simulate_step(
            shape,
            None,
            request.rates(cell.precision),
            capacity_bytes,
            workspaces_of(request, shape),
            way=partial(_executed, way=way),
            optimizer=FUSED if form == "fused" or self.setup.fused else self._default_form,
        )

    @property
    def _default_form(self) -> Mapping[str, bool]:
        """On CUDA torch takes the multi-tensor form, which fake tensors, living on the CPU, would not."""
        return {"foreach": True} if self.setup.on_card else {}

    def _least_choice(self, mode: Mode, batch: int) -> Choice:
        """The plan in the least memory for which there is one. Raises Infeasible if even that is not to be had."""
        least = self._least_bytes(mode, batch)
        for _ in range(_LEAST_TRIES):
            try:
                return self.plan(mode, batch, self._tensors(least))
            except Infeasible as error:
                # What the solver alone said; the whole step, with the allocator's segments, takes a little more.
                least = max(least + 1, error.least_bytes)
        return self.plan(mode, batch, self._tensors(least))

    def _least_bytes(self, mode: Mode, batch: int, measured: bool = True) -> int:
        try:
            self.plan(mode, batch, self._tensors(1), measured)
        except Infeasible as error:
            return error.least_bytes
        return 1

    def _plain_peak(self, mode: Mode) -> int:
        if mode not in self._peaks:
            precision, layout = mode
            batch = self.setup.batch
            plain = Cell(kind="step", family=PLAIN_DEFAULT, precision=precision, memory_format=layout, batch=batch)
            self._peaks[mode] = self.way(plain, batch).estimate.peak_allocated_bytes
        return self._peaks[mode]

    def _peak_bytes(self, simulated: Simulated) -> int:
        """On the CPU tensors are counted as they are, on a card as the allocator rounds them."""
        taken = simulated.estimate
        return taken.peak_allocated_bytes if self.setup.on_card else taken.peak_tensor_bytes

    # -- budgets -------------------------------------------------------------------------------------------------------

    def budget(self, vram_bytes: int | None, measured: bool = True) -> Budget:
        """Of a card with so much memory (None: as it is) on the terms of the card at hand; on the CPU so much for
        tensors, None: half of what plain is predicted to take. Raises Infeasible for a card too small for anything."""
        if not self.setup.on_card:
            return tensors_only(self._plain_peak(FIRST_MODE) // 2 if vram_bytes is None else vram_bytes)
        budget = self._request(FIRST_MODE, self.setup.batch, measured).budget
        if vram_bytes is None:
            return budget
        other, _ = budget_of(self._config_for(vram_bytes), self.setup.pictures, self._calibrator)
        return replace(other, workspace_bytes=budget.workspace_bytes)

    def _tensors(self, tensor_bytes: int) -> Budget:
        """So much for the step's tensors; on a card on the terms of the card at hand."""
        if not self.setup.on_card:
            return tensors_only(tensor_bytes)
        budget = self._request(FIRST_MODE, self.setup.batch).budget
        return replace(
            budget,
            total_bytes=tensor_bytes + budget.process_bytes,
            others_bytes=0,
            pictures_bytes=0,
            margin_bytes=0,
            source="budget of the cell",
        )

    def _request(self, mode: Mode, batch: int, measured: bool = True) -> Request:
        precision, layout = mode
        request = self._requests[0 if measured else 1]
        return replace(request, batch=batch, modes={precision: layout})

    @cached_property
    def _requests(self) -> tuple[Request, Request]:
        """By what is measured, and by a datasheet's rates with room for workspaces. Made at the first use, since the
        card may have to be asked for it."""
        # On the CPU a run needs a budget, and gets each cell's own.
        config = self._config_for(None if self.setup.on_card else _PLENTY)
        self._calibrator = calibrator_of(config, self._tell)
        asked = request_of(config, 10, self.setup.pictures if self.setup.on_card else 0, self._calibrator)
        on_card = asked.budget.on_card
        budget = replace(asked.budget, workspace_bytes=workspace_cap_bytes() if on_card else 0)
        # Measured workspaces are in what was simulated; the CPU has none.
        return asked, replace(asked, calibrator=None, known={} if on_card else asked.known, budget=budget)

    def _config_for(self, vram_bytes: int | None) -> Config:
        """Of a run that would be planned like this."""
        setup = self.setup
        flags = {
            "model.arch": setup.arch,
            "model.block": setup.block,
            "model.width": setup.width,
            "train.batch": setup.batch,
            "train.precision": "fp32",
            "train.memory_format": "contiguous",
            "train.device": setup.device,
            "memory.vram": vram_bytes,
        }
        timed = ["memory.calibrate=always"] if setup.timed else []
        return gather(flags=flags, sets=["memory.allow_accumulation=false", *timed]).config

    # -- the largest batch ---------------------------------------------------------------------------------------------

    def fits(self, cell: Cell, batch: int, budget: Budget) -> bool:
        """Whether a batch is predicted to."""
        if cell.family == ENGINE:
            try:
                self.plan(cell.mode, batch, budget, measured=False)
            except Infeasible:
                return False
            return True
        taken, fits = self._taken(cell, batch, budget.tensor_bytes if budget.on_card else None)
        return taken <= budget.tensor_bytes and fits

    def guess(self, cell: Cell, budget: Budget) -> int:
        """Where the search for the largest begins. What a step takes is a constant and a part that grows with the
        batch: two batches tell both. A plan takes what it may, so for the engine it is the least that counts."""
        start, small = self.setup.batch, max(1, self.setup.batch // 2)
        if cell.family == ENGINE:
            taken = [self._least_bytes(cell.mode, batch, measured=False) for batch in (small, start)]
        else:
            taken = [self._taken(cell, batch, None)[0] for batch in (small, start)]
        each = max(1, (taken[1] - taken[0]) // max(1, start - small))
        guess = start + (budget.tensor_bytes - taken[1]) // each
        return int(_WITHOUT_GAPS * guess) if cell.family == ENGINE and budget.on_card else guess

    def _taken(self, cell: Cell, batch: int, capacity_bytes: int | None) -> tuple[int, bool]:
        simulated = self.way(cell, batch, capacity_bytes, measured=False)
        return simulated.estimate.peak_allocated_bytes, simulated.fits


def _executed(model: nn.Module, way: str) -> nn.Module:
    assert isinstance(model, ResNet)
    return executed(model, way)


@dataclass
class Search:
    """Where a search stands: `holds` is the largest batch that did, `fails` the smallest that did not (None: not found
    yet), `tried` all in order."""

    holds: int | None = None
    fails: int | None = None
    tried: list[tuple[int, bool]] = field(default_factory=list)

    def note(self, batch: int, held: bool) -> None:
        self.tried.append((batch, held))
        if held:
            self.holds = max(batch, self.holds or 0)
        else:
            self.fails = min(batch, self.fails or batch)


def largest(holds: Callable[[int], bool | None], guess: int, unit: int, most: int) -> Search:
    """The largest multiple of `unit` that `holds`, from a guess: doubling steps away from it until both a batch that
    holds and one that does not are known, then bisection until they are neighbours. `most` tries at most; `holds`
    answers None when there is no time left for one."""
    search = Search()
    at = max(unit, guess // unit * unit)
    step = max(unit, at // 32 // unit * unit)
    while len(search.tried) < most:
        held = holds(at)
        if held is None:
            break
        search.note(at, held)
        if search.holds is not None and search.fails is not None:
            if search.fails - search.holds <= unit:
                break
            at = (search.holds + search.fails) // 2 // unit * unit
        elif held:
            at, step = at + step, 2 * step
        elif at == unit:
            break
        else:
            at, step = max(unit, at - step), 2 * step
    return search
