"""What the convolution library takes beside operands and results, call by call, measured on the card.

The workspace comes out of torch's own caching allocator, so it counts as allocated while the kernel runs. A measured
one is part of the simulated step; without a measurement a budget leaves room for an assumed one, and the library is
told not to take more (`lowmem.remat.libraries`; that it heeds this in cuDNN 9 is unproven, and what was measured does
not need it).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from lowmem.calibrate.calibration import Calibration
from lowmem.measure.out_of_memory import Failure, attempt
from lowmem.remat.libraries import workspace_cap_bytes
from lowmem.simulate import Call
from lowmem.simulate.allocator import round_block

_OPERATIONS = {
    str(torch.ops.aten.convolution.default): torch.ops.aten.convolution.default,
    str(torch.ops.aten.convolution_backward.default): torch.ops.aten.convolution_backward.default,
}


class Workspaces:
    """Call -> bytes, out of a calibration. A call that was never measured counts as the largest of its kind that was;
    `missing` has those."""

    def __init__(self, calibration: Calibration, low: torch.dtype | None) -> None:
        self._calibration = calibration
        self._low = low
        self._known: dict[Call, int] = {}
        self.missing: set[Call] = set()

    def __call__(self, call: Call) -> int:
        if call in self._known:
            return self._known[call]
        found = self._calibration.size_bytes(self._key(call))
        if found is None:
            self.missing.add(call)
            return max((size for one, size in self._known.items() if one.operation == call.operation), default=0)
        self._known[call] = found
        return found

    def measure(self, calls: Iterable[Call], device: str) -> None:
        """Runs each call on the card, in the dtype that autocast takes there. What does not fit stays unknown."""
        for call in calls:
            size = attempt(partial(_measured, call, device, self._low), lambda: "measuring a workspace")
            if isinstance(size, Failure):
                torch.cuda.empty_cache()
                continue
            self._calibration.put_size(self._key(call), size)
            self._known[call] = size
            self.missing.discard(call)

    def _key(self, call: Call) -> object:
        return ("workspace", workspace_cap_bytes(), str(self._low), call)


def _measured(call: Call, device: str, low: torch.dtype | None) -> int:
    operation = _OPERATIONS[call.operation]
    tensors = [None if spec is None else _tensor(spec, device, low) for spec in call.tensors]
    # no bias: its sizes are "none"
    backward = operation is torch.ops.aten.convolution_backward.default
    arguments = (*tensors, None, *call.rest) if backward else (*tensors, *call.rest)
    operation(*arguments)  # chooses the algorithm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = operation(*arguments)
    torch.cuda.synchronize()
    made = [results] if isinstance(results, Tensor) else [one for one in results if one is not None]
    held = sum(round_block(one.untyped_storage().nbytes()) for one in made)
    return max(0, torch.cuda.max_memory_allocated() - before - held)


def _tensor(spec: tuple[tuple[int, ...], tuple[int, ...], str], device: str, low: torch.dtype | None) -> Tensor:
    """Fake tensors live on the CPU, whose low dtype is bf16; the card's own takes its place."""
    shape, strides, name = spec
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    if low is not None and dtype is torch.bfloat16:
        dtype = low
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).normal_()
