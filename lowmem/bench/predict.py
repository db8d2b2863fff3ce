"""What a cell is predicted to take, before it is measured: the real code on fake tensors (invariant 5), for the
library's ways of doing a step as for the engine's plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from lowmem.bench.cells import ENGINE, FAMILIES, FIRST_MODE, LEAST, PLAIN_DEFAULT, Cell, Setup
from lowmem.bench.largest import Search, largest
from lowmem.calibrate.calibrator import Calibrator
from lowmem.choose.budget import Budget, budget_of, tensors_only
from lowmem.choose.planning import choose, workspaces_of
from lowmem.choose.request import Choice, Request, calibrator_of, request_of
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import Infeasible
from lowmem.core.units import format_size
from lowmem.models.resnet import ResNet
from lowmem.remat.libraries import workspace_cap_bytes
from lowmem.simulate import Simulated, simulate_step
from lowmem.step.train_step import FUSED
from lowmem.trial.ways import executed

_SEARCH_TRIES = 8
_LEAST_TRIES = 3


class Predictor:
    """Of one network on one device. On a card the calibration of the device is used, and made where it lacks anything;
    `tell` hears what takes seconds."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup, self._tell = setup, tell
        self._requests: tuple[Request, Request] | None = None
        self._calibrator: Calibrator | None = None
        self._peaks: dict[tuple[str, str], int] = {}

    def prepare(self, cell: Cell) -> None:
        """Fills a `step` cell in: prediction, budget and plan, or why it is refused."""
        cell.prepared = True
        if cell.family != ENGINE:
            self.note_way(cell, self.way(cell, cell.batch))
            return
        try:
            self.note_choice(cell, self._choice(cell))
        except Infeasible as error:
            cell.refused = f"no plan fits: the least takes {format_size(error.least_bytes)}"

    def note_choice(self, cell: Cell, choice: Choice) -> None:
        """A plan and what it says of itself."""
        predicted, budget = choice.plan.predicted, choice.budget
        cell.budget_bytes, cell.cap_bytes = budget.tensor_bytes, budget.allocator_bytes
        cell.plan = choice.plan.to_json()
        cell.predicted_allocated_bytes = self._peak_bytes(choice.simulated)
        cell.predicted_flops = choice.simulated.flops
        cell.predicted_overhead = predicted.overhead
        if self.setup.on_card:
            cell.predicted_reserved_bytes = predicted.peak_reserved_bytes
            cell.predicted_device_bytes = predicted.device_bytes

    def way(self, cell: Cell, batch: int, capacity_bytes: int | None = None, measured: bool = True) -> Simulated:
        """A step as the library does it. `measured`: with what is measured of the device, which takes time for
        every new batch."""
        way, optimizer = FAMILIES[cell.family]
        request = self._request(cell.mode, batch, measured)
        shape = request.shape(cell.precision, batch)
        return simulate_step(
            shape,
            None,
            request.rates(cell.precision),
            capacity_bytes,
            workspaces_of(request, shape),
            way=partial(_executed, way=way),
            optimizer=FUSED if optimizer == "fused" else self._default_form,
        )

    def plan(self, mode: tuple[str, str], batch: int, budget: Budget, measured: bool = True) -> Choice:
        """Raises Infeasible."""
        return choose(replace(self._request(mode, batch, measured), budget=budget))

    def memory(self) -> Budget:
        """That of the table of largest batches. Raises Infeasible for a card too small for anything."""
        vram_bytes = self.setup.vram_bytes
        if not self.setup.on_card:
            half = self._plain_peak(FIRST_MODE) // 2
            return tensors_only(half if vram_bytes is None else vram_bytes)
        request = self._request(FIRST_MODE, self.setup.batch, measured=False)
        if vram_bytes is None:
            return request.budget
        budget, _ = budget_of(self._settings(vram_bytes).config, 0, self._calibrator)
        return replace(budget, workspace_bytes=request.budget.workspace_bytes)

    def largest_batch(self, cell: Cell, budget: Budget, unit: int) -> tuple[Search, Choice | None]:
        """The largest multiple of `unit` that is predicted to fit, and the engine's plan for it."""
        limit = budget.tensor_bytes
        capacity = limit if budget.on_card else None
        choices: dict[int, Choice] = {}
        peaks: dict[int, int] = {}

        def fits(batch: int) -> bool:
            if cell.family == ENGINE:
                try:
                    choices[batch] = self.plan(cell.mode, batch, budget, measured=False)
                except Infeasible as error:
                    peaks[batch] = error.least_bytes
                return batch in choices
            simulated = self.way(cell, batch, capacity, measured=False)
            peaks[batch] = simulated.estimate.peak_allocated_bytes
            return peaks[batch] <= limit and simulated.fits

        # What a step takes is a constant and a part that grows with the batch: two batches tell both. A plan takes
        # what it may, so for the engine it is the least that counts.
        start, small = self.setup.batch, max(1, self.setup.batch // 2)
        for batch in (small, start):
            if cell.family == ENGINE:
                peaks[batch] = self._least_bytes(cell.mode, batch, measured=False)
            else:
                fits(batch)
        each = max(1, (peaks[start] - peaks[small]) // max(1, start - small))
        guess = start + (limit - peaks[start]) // each
        found = largest(fits, max(unit, guess), unit, _SEARCH_TRIES)
        return found, choices.get(found.holds or 0)

    # -- what they share -----------------------------------------------------------------------------------------------

    @property
    def _default_form(self) -> Mapping[str, bool]:
        """On CUDA torch takes the multi-tensor form, which fake tensors, living on the CPU, would not."""
        return {"foreach": True} if self.setup.on_card else {}

    def _choice(self, cell: Cell) -> Choice:
        """Of the engine in a `step` cell. Raises Infeasible."""
        if cell.budget == LEAST:
            return self._least_choice(cell.mode, cell.batch)
        budget_bytes = cell.budget
        if isinstance(budget_bytes, float):
            budget_bytes = int(budget_bytes * self._plain_peak(cell.mode))
        assert isinstance(budget_bytes, int)
        return self.plan(cell.mode, cell.batch, self._tensors(budget_bytes))

    def _least_choice(self, mode: tuple[str, str], batch: int) -> Choice:
        """The plan in the least memory for which there is one. Raises Infeasible if even that is not to be had."""
        least = self._least_bytes(mode, batch)
        for _ in range(_LEAST_TRIES):
            try:
                return self.plan(mode, batch, self._tensors(least))
            except Infeasible as error:
                # What the solver alone said; the whole step, with the allocator's segments, takes a little more.
                least = max(least + 1, error.least_bytes)
        return self.plan(mode, batch, self._tensors(least))

    def _least_bytes(self, mode: tuple[str, str], batch: int, measured: bool = True) -> int:
        try:
            self.plan(mode, batch, self._tensors(1), measured)
        except Infeasible as error:
            return error.least_bytes
        return 1

    def _tensors(self, tensor_bytes: int) -> Budget:
        """So much for the step's tensors; on a card on the terms of the card at hand."""
        if not self.setup.on_card:
            return tensors_only(tensor_bytes)
        budget = self._request(FIRST_MODE, self.setup.batch).budget
        beside = budget.process_bytes
        return replace(
            budget,
            total_bytes=tensor_bytes + beside,
            others_bytes=0,
            pictures_bytes=0,
            margin_bytes=0,
            source="budget of the cell",
        )

    def _plain_peak(self, mode: tuple[str, str]) -> int:
        if mode not in self._peaks:
            plain = Cell(
                kind="step",
                family=PLAIN_DEFAULT,
                precision=mode[0],
                memory_format=mode[1],
                batch=self.setup.batch,
            )
            self._peaks[mode] = self.way(plain, plain.batch).estimate.peak_allocated_bytes
        return self._peaks[mode]

    def _peak_bytes(self, simulated: Simulated) -> int:
        """On the CPU tensors are counted as they are, on a card as the allocator rounds them."""
        taken = simulated.estimate
        return taken.peak_allocated_bytes if self.setup.on_card else taken.peak_tensor_bytes

    def note_way(self, cell: Cell, simulated: Simulated) -> None:
        """What the library's way is predicted to take."""
        taken = simulated.estimate
        cell.predicted_allocated_bytes = self._peak_bytes(simulated)
        cell.predicted_flops = simulated.flops
        if self.setup.on_card:
            budget = self._request(cell.mode, cell.batch).budget
            cell.predicted_reserved_bytes = taken.peak_reserved_bytes
            cell.predicted_device_bytes = taken.peak_reserved_bytes + budget.process_bytes

    def _request(self, mode: tuple[str, str], batch: int, measured: bool = True) -> Request:
        """Made at the first use, since the card may have to be asked for it. Not `measured`: by a datasheet's rates,
        with room for workspaces."""
        if self._requests is None:
            # On the CPU a run needs a budget, and gets each cell's own.
            config = self._settings(None if self.setup.on_card else 1 << 60).config
            self._calibrator = calibrator_of(config, self._tell)
            asked = request_of(config, 10, 0, self._calibrator)
            roomy = asked
            if asked.budget.on_card:
                budget = replace(asked.budget, workspace_bytes=workspace_cap_bytes())
                roomy = replace(asked, calibrator=None, known={}, budget=budget)
            self._requests = (asked, roomy)
        precision, layout = mode
        request = self._requests[0 if measured else 1]
        return replace(request, batch=batch, precisions=(precision,), memory_format=layout, formats={})

    def _settings(self, vram_bytes: int | None) -> Settings:
        """Those of a run that would be planned like this."""
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
        return gather(flags=flags, sets=["memory.allow_accumulation=false"])


def _executed(model: nn.Module, way: str) -> nn.Module:
    assert isinstance(model, ResNet)
    return executed(model, way)
