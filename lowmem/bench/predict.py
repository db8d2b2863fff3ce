"""What a cell is predicted to take, before it is measured: the real code on outlines (invariant 5), for the
library's ways of doing a step as for the engine's plans. And the search for the largest batch, which begins there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

from lowmem.bench import ENGINE, ENGINE_HOST, ENGINES, FAMILIES, FIRST_MODE, PLAIN_DEFAULT, Cell, Setup
from lowmem.choose.execution import budget_of, calibrator_of, request_of
from lowmem.choose.planning import choose, workspaces_of
from lowmem.choose.request import Budget, Choice, Request
from lowmem.config.schema import Config
from lowmem.config.settings import gather
from lowmem.core.errors import Infeasible, PreflightError
from lowmem.core.reading import shorten
from lowmem.models.resnet import check_memory_format
from lowmem.remat.libraries import workspace_cap_bytes
from lowmem.simulate import Simulated, simulate_step
from lowmem.step.train_step import FUSED
from lowmem.trial import PLAIN, executed

_LEAST_TRIES = 3
_PLENTY = 1 << 50
# Of the batch whose least plan would fill the memory with tensors alone; on a card gaps between blocks take the rest.
# For Bottleneck-110 in 6 GiB it is 0.89 by the allocator's model, in fp32 and in AMP.
_WITHOUT_GAPS = 0.9
Mode = tuple[str, str]  # precision, memory format


class Predictor:
    """Of one network on one device. On a card the calibration of the device is used, and made where it lacks anything;
    `tell` hears what takes seconds."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup, self._tell = setup, tell

    # -- a cell --------------------------------------------------------------------------------------------------------

    def prepare(self, cell: Cell, budget: Budget | None = None) -> None:
        """Fills prediction, budget and plan in. Of time only what was measured on this device, not what a datasheet
        says of another. `budget`: in place of the cell's own, planned without measuring. Raises Infeasible, and
        PreflightError for a mode that corrupts memory."""
        check_memory_format(self._requests[True].model, self.setup.device, *cell.mode)
        mode, batch, on_card = cell.mode, cell.batch, self.setup.on_card
        if cell.family in ENGINES:
            choice = self._choice(cell) if budget is None else self.plan(mode, batch, budget, measured=False)
            simulated, predicted, budget = choice.simulated, choice.plan.predicted, choice.budget
            cell.budget_bytes, cell.cap_bytes, cell.terms = budget.tensor_bytes, budget.allocator_bytes, budget.rows()
            cell.plan = choice.plan.to_json()
            reserved, device = predicted.peak_reserved_bytes, predicted.device_bytes
            device = None if device is None else device + budget.pictures_bytes
            if on_card or choice.timed:
                cell.predicted_step_seconds, cell.predicted_overhead = predicted.step_seconds, predicted.overhead
        else:
            simulated = self._way(cell.family, mode, batch, measured=budget is None)
            reserved = simulated.estimate.peak_reserved_bytes
            device = reserved + self._requests[True].budget.process_bytes
            if on_card and cell.kind == "time" and cell.family == PLAIN_DEFAULT:
                cell.predicted_step_seconds = self.plan(mode, batch, self._tensors(_PLENTY)).plain_seconds
        if on_card:
            cell.predicted_reserved_bytes, cell.predicted_device_bytes = reserved, device
        # On the CPU tensors are counted as they are, on a card as the allocator rounds them.
        taken = simulated.estimate
        cell.predicted_allocated_bytes = taken.peak_allocated_bytes if on_card else taken.peak_tensor_bytes
        cell.predicted_flops, cell.prepared = simulated.flops, True

    def _choice(self, cell: Cell) -> Choice:
        """Of the engine. Raises Infeasible."""
        host = cell.family == ENGINE_HOST
        match cell.budget:
            case None:
                return self.plan(cell.mode, cell.batch, self.budget(cell.memory_bytes))
            case int():
                size = cell.budget
            case float():
                size = int(cell.budget * self._plain_peak(cell.mode))
            case _:
                size = self._least_bytes(cell.mode, cell.batch, host=host)
                for _ in range(_LEAST_TRIES):
                    try:
                        return self.plan(cell.mode, cell.batch, self._tensors(size), host=host)
                    except Infeasible as error:
                        # What the solver alone said; the whole step, with the allocator's segments, takes a bit more.
                        size = max(size + 1, error.least_bytes)
        return self.plan(cell.mode, cell.batch, self._tensors(size), host=host)

    # -- plans and ways ------------------------------------------------------------------------------------------------

    def plan(self, mode: Mode, batch: int, budget: Budget, measured: bool = True, *, host: bool = False) -> Choice:
        """`measured`: on a card by what is measured on it, which takes time for every new batch; else by rates and room
        for workspaces alone. `host`: tensors may wait in the setup's host memory. Raises Infeasible."""
        request = replace(self._request(mode, batch, measured), budget=budget)
        return choose(request if host else replace(request, host=None))

    def _way(
        self, family: str, mode: Mode, batch: int, measured: bool = True, capacity_bytes: int | None = None
    ) -> Simulated:
        """A step as the library does it. Raises PreflightError for a way that fails for the network: selective
        checkpointing refuses tensors that are changed in place."""
        way, fused = FAMILIES[family]
        request = self._request(mode, batch, measured)
        shape = request.shape(mode[0], batch)
        # On CUDA torch takes the multi-tensor form, which outlines, being on the CPU, would not.
        default = {"foreach": True} if self.setup.on_card else {}
        try:
            return simulate_step(
                shape,
                None,
                request.rates(mode[0]),
                capacity_bytes,
                workspaces_of(request, shape),
                way=lambda model: executed(model, way),
                optimizer=FUSED if fused or self.setup.fused else default,
            )
        except RuntimeError as error:
            if way == PLAIN:
                raise
            raise PreflightError(f"{way} fails for this network ({shorten(error, 200)})") from None

    def _least_bytes(self, mode: Mode, batch: int, measured: bool = True, *, host: bool = False) -> int:
        try:
            self.plan(mode, batch, self._tensors(1), measured, host=host)
        except Infeasible as error:
            return error.least_bytes
        return 1

    def _plain_peak(self, mode: Mode) -> int:
        plain = partial(self._way, PLAIN_DEFAULT, mode, self.setup.batch)
        return self._requests[True].once(("plain step", mode), plain).estimate.peak_allocated_bytes

    # -- budgets -------------------------------------------------------------------------------------------------------

    def budget(self, memory_bytes: int | None, measured: bool = True) -> Budget:
        """So much for tensors, where the setup counts in them; else of a card with so much memory, on the terms of the
        card at hand or of the reference card. None: the card as it is, on the CPU half of what plain is predicted to
        take. Raises Infeasible for a card too small for anything."""
        on_card = self.setup.on_card
        if memory_bytes is None:
            if on_card:
                return self._requests[measured].budget
            return self._tensors(self._plain_peak(FIRST_MODE) // 2)
        if self.setup.tensors_bytes is not None:
            return self._tensors(memory_bytes, measured)
        calibrator = self._requests[True].calibrator
        other, _ = budget_of(self._config_for(vram=memory_bytes), self.setup.pictures, calibrator)
        return replace(other, workspace_bytes=self._requests[measured].budget.workspace_bytes) if on_card else other

    def _tensors(self, tensor_bytes: int, measured: bool = True) -> Budget:
        """So much for the step's tensors; on a card on the terms of the card at hand."""
        return self._requests[measured].budget.for_tensors(tensor_bytes, "budget of the cell")

    def _request(self, mode: Mode, batch: int, measured: bool = True) -> Request:
        precision, layout = mode
        request = self._requests[measured]
        return replace(request, batch=batch, modes={precision: layout})

    @cached_property
    def _requests(self) -> dict[bool, Request]:
        """By what is measured (True), and by a datasheet's rates with room for workspaces. Made at the first use,
        since the card may have to be asked for it."""
        # On the CPU a run needs a budget, and gets each cell's own.
        config = self._config_for(tensors=None if self.setup.on_card else _PLENTY)
        calibrator = calibrator_of(config, self._tell, lambda what, *_: self._tell(what))
        asked = request_of(config, 10, self.setup.pictures, calibrator)
        rough = replace(asked, calibrator=None)
        if asked.budget.on_card:  # measured workspaces are in what was simulated
            rough = replace(rough, known={}, budget=replace(asked.budget, workspace_bytes=workspace_cap_bytes()))
        return {True: asked, False: rough}

    def _config_for(self, **memory: int | None) -> Config:
        """Of a run that would be planned like this."""
        setup = self.setup
        flags = {f"model.{name}": value for name, value in setup.model.given.items()}
        flags |= {"train.batch": setup.batch, "train.device": setup.device, "data.image_size": setup.image_size}
        flags |= {f"memory.{name}": size_bytes for name, size_bytes in memory.items()}
        flags |= {"train.precision": "fp32", "train.memory_format": "contiguous"}
        flags |= {} if setup.host is None else {"memory.host": setup.host}
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
        simulated = self._way(cell.family, cell.mode, batch, False, budget.tensor_bytes if budget.on_card else None)
        return simulated.estimate.peak_allocated_bytes <= budget.tensor_bytes and simulated.fits

    def guess(self, cell: Cell, budget: Budget) -> int:
        """Where the search for the largest begins. What a step takes is a constant and a part that grows with the
        batch: two batches tell both. A plan takes what it may, so for the engine it is the least that counts."""

        def taken(batch: int) -> int:
            if cell.family == ENGINE:
                return self._least_bytes(cell.mode, batch, measured=False)
            return self._way(cell.family, cell.mode, batch, measured=False).estimate.peak_allocated_bytes

        start, small = self.setup.batch, max(1, self.setup.batch // 2)
        most = taken(start)
        each = max(1, (most - taken(small)) // max(1, start - small))
        guess = start + (budget.tensor_bytes - most) // each
        return int(_WITHOUT_GAPS * guess) if cell.family == ENGINE and budget.on_card else guess


class Search(NamedTuple):
    """The largest batch that held, the smallest that did not (None: not found); (batch, whether it held), in order."""

    holds: int | None
    fails: int | None
    tried: list[tuple[int, bool]]


def largest(holds: Callable[[int], bool | None], guess: int, unit: int, most: int) -> Search:
    """The largest multiple of `unit` that `holds`, from a guess: doubling steps away from it until both a batch that
    holds and one that does not are known, then bisection until they are neighbours. `most` tries at most; `holds`
    answers None when there is no time left for one."""
    found = failed = None
    tried: list[tuple[int, bool]] = []
    at = max(unit, guess // unit * unit)
    step = max(unit, at // 32 // unit * unit)
    while len(tried) < most and (held := holds(at)) is not None:
        tried.append((at, held))
        found, failed = (at, failed) if held else (found, at)
        if found is not None and failed is not None:
            if failed - found <= unit:
                break
            at = (found + failed) // 2 // unit * unit
        elif held:
            at, step = at + step, 2 * step
        elif at == unit:
            break
        else:
            at, step = max(unit, at - step), 2 * step
    return Search(found, failed, tried)
