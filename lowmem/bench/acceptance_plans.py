"""The plans that the acceptance suite tries: each made once, and from as little simulating as will do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from lowmem.bench.acceptance import Setup
from lowmem.choose.budget import Budget, budget_of
from lowmem.choose.ladder import with_ladder
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request, calibrator_of, request_of
from lowmem.core.errors import Infeasible
from lowmem.plan.solver import Solver
from lowmem.remat.libraries import workspace_cap_bytes
from lowmem.simulate import Simulated, simulate_step

# Of the batch whose least plan would fill the memory with tensors alone; on a card gaps between blocks take the rest.
# For Bottleneck-110 in 6 GiB it is 0.89 by the allocator's model, in fp32 and in AMP.
_WITHOUT_GAPS = 0.9


class Plans:
    """Of one network on one device. `measuring_seconds`: the most that a measured plan took so far."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup, self._tell = setup, tell
        self.on_card = setup.device == "cuda"
        self.measuring_seconds = 0.0
        self._requests: tuple[Request, ...] = ()
        self._choices: dict[tuple[int, int, str, str, bool], Choice | Infeasible] = {}

    def request(self, measured: bool) -> Request:
        """One for all cells, so that what was simulated for one need not be again for another; made at the first use,
        since the card may have to be asked for it."""
        if not self._requests:
            setup = self.setup
            config = setup.settings(setup.vram_bytes, setup.batch, "fp32", "contiguous").config
            calibrator = calibrator_of(config, self._tell)
            asked = request_of(config, 10, setup.pictures if self.on_card else 0, calibrator)
            room = workspace_cap_bytes() if asked.budget.on_card else 0
            budget = replace(asked.budget, workspace_bytes=room)
            # Measured workspaces are in what was simulated; the CPU has none.
            known = {} if self.on_card else asked.known
            self._requests = (asked, replace(asked, calibrator=None, known=known, budget=budget))
        return self._requests[0 if measured and self._requests[0].calibrator is not None else 1]

    def budget(self, vram_bytes: int, measured: bool) -> Budget:
        """Of a card with so much memory: the same terms."""
        budget, full = self.request(measured).budget, self.setup.vram_bytes
        if vram_bytes == full:
            return budget
        config = self.setup.settings(vram_bytes, self.setup.batch, "fp32", "contiguous").config
        pictures = self.setup.pictures if self.on_card else 0
        other, _ = budget_of(config, pictures, self.request(True).calibrator)
        return replace(other, workspace_bytes=budget.workspace_bytes)

    def choice(
        self, vram_bytes: int, batch: int, precision: str = "fp32", layout: str = "contiguous", measured: bool = True
    ) -> Choice:
        """Planned once, on a card by what is measured on it; or, not `measured`, by rates and room for workspaces
        alone, which is quick. Raises Infeasible."""
        base = self.request(measured)
        measured = base.calibrator is not None
        key = (vram_bytes, batch, precision, layout, measured)
        if key not in self._choices:
            began = time.monotonic()
            budget = self.budget(vram_bytes, measured)
            wanted = replace(
                base, batch=batch, budget=budget, precisions=(precision,), memory_format=layout, formats={}
            )
            try:
                self._choices[key] = choose(wanted)
            except Infeasible as error:
                self._choices[key] = error
            if measured:
                self.measuring_seconds = max(self.measuring_seconds, time.monotonic() - began)
        found = self._choices[key]
        if isinstance(found, Infeasible):
            raise found
        return found

    @cached_property
    def laddered(self) -> Choice:
        """The plan for all of the memory, with its ladder. Raises Infeasible."""
        return with_ladder(self.choice(self.setup.vram_bytes, self.setup.batch))

    # -- the largest batch ---------------------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Batches are told apart to this many pictures: a sixteenth of the usual one."""
        return max(1, self.setup.batch // 16)

    def guess(self, precision: str, *, planned: bool) -> tuple[int, int]:
        """Where the search for the largest batch begins, planned or plain, and what it tells batches apart to: the unit
        or, where that is more, 3 % of them. Raises Infeasible.

        What a step takes is a constant and a part that grows with the batch. A plan takes what it may, so for it the
        least counts that it could take at the usual batch."""
        start, limit = self._start(precision), self.budget(self.setup.vram_bytes, measured=False).tensor_bytes
        batch = start.plan.batch
        images = 4 * 3 * 32 * 32 * batch
        fixed = start.chain.outside_peak_bytes - images  # parameters, momentum, gradients

        def filled(batch: int, taken_bytes: int) -> int:
            each = max(1, (taken_bytes - fixed) // batch)
            return max(1, (limit - fixed) // each)

        if planned:
            least = Solver(start.chain, limit_bytes=start.budget.tensor_bytes).least().peak_bytes
            guess = filled(batch, least)
            if self.on_card:
                guess = max(1, int(_WITHOUT_GAPS * guess))
        else:
            guess = filled(batch, _taken(start, start.plain))
            shape = replace(start.shape, batch=guess, micro_batch=guess)
            guess = filled(guess, _taken(start, simulate_step(shape, None, start.rates)))
        return guess, max(self.unit, guess // 32 // self.unit * self.unit)

    def _start(self, precision: str) -> Choice:
        """A plan at the usual batch, the measured one if it is made, or at a smaller batch. Raises Infeasible."""
        batch, vram_bytes = self.setup.batch, self.setup.vram_bytes
        known = self._choices.get((vram_bytes, batch, precision, "contiguous", True))
        if isinstance(known, Choice):
            return known
        while True:
            try:
                return self.choice(vram_bytes, batch, precision, measured=False)
            except Infeasible:
                if batch <= self.unit:
                    raise
            batch //= 2


def _taken(choice: Choice, simulated: Simulated) -> int:
    """Bytes of a step, on a card those that its allocator reserves."""
    taken = simulated.estimate
    return taken.peak_reserved_bytes if choice.budget.on_card else taken.peak_allocated_bytes
