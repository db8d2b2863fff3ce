"""A card for which there is no profile: described by its driver and by two short measurements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lowmem.calibrate.calibration import Calibration, Seconds
from lowmem.config.cards import Card, UsableShare, has_tensor_cores
from lowmem.core.units import MIB
from lowmem.measure.timing import Timing, time_calls

_COPY_BYTES = 256 * MIB
_SIDE = 4096  # of the square matrices: 0.14 TFLOP a product
_CPU_COPY_BYTES = 64 * MIB
_CPU_SIDE = 1024


@dataclass(frozen=True)
class RawRates:
    """A job for the worker: a copy, and products of square matrices in fp32 and in the low dtype of autocast."""

    def run(self, device: str, calibration: Calibration) -> None:
        size, side = _sizes(device)
        low = torch.float16 if device == "cuda" else torch.bfloat16
        source = torch.zeros(size // 4, device=device)
        target = torch.empty_like(source)
        self._put(calibration, "copy", time_calls(lambda: target.copy_(source), device))
        for what, dtype in (("fp32", torch.float32), ("low", low)):
            a = torch.randn(side, side, device=device).to(dtype)
            out = torch.empty_like(a)
            self._put(calibration, what, time_calls(partial(torch.mm, a, a, out=out), device))

    @staticmethod
    def _put(calibration: Calibration, what: str, timing: Timing) -> None:
        calibration.put_seconds(("rate", what), Seconds(timing.median_seconds, 0.0))


def measured_rates(device: str, calibration: Calibration) -> tuple[float, float, float] | None:
    """(bytes, fp32 operations, low operations) per second: a copy reads and writes, a product of n x n matrices takes
    2 n^3 operations. None if `RawRates` was not run."""
    found = [calibration.seconds(("rate", what)) for what in ("copy", "fp32", "low")]
    copying, fp32, low = (0.0 if one is None else one.forward for one in found)
    if not (copying and fp32 and low):
        return None
    size, side = _sizes(device)
    operations = 2.0 * side**3
    return 2.0 * size / copying, operations / fp32, operations / low


def _sizes(device: str) -> tuple[int, int]:
    return (_COPY_BYTES, _SIDE) if device == "cuda" else (_CPU_COPY_BYTES, _CPU_SIDE)


def describe_card(
    name: str,
    *,
    memory_bytes: int,
    capability: tuple[int, int],
    context_bytes: int,
    rates: tuple[float, float, float],
    link: tuple[int | None, int | None] = (None, None),
) -> Card:
    """A profile of a card that has none. `rates`: see `measured_rates`; `link`: PCIe generation and lanes.

    The kind of its fp16 follows from the measured rates, the share that is usable is that of other cards.
    """
    bandwidth, fp32, low = rates
    generation, lanes = link
    speed = f"{min(max(generation or 3, 3), 5)}.0"
    width = lanes if lanes in (1, 2, 4, 8, 16) else 16
    fp16 = "tensor-cores" if has_tensor_cores(name, capability) else ("2:1" if low > 1.2 * fp32 else "1/64")
    return Card(
        name=name,
        memory=memory_bytes,
        capability=f"{capability[0]}.{min(capability[1], 9)}",
        bandwidth_gb_per_second=bandwidth / 1e9,
        fp32_tflops=fp32 / 1e12,
        fp16=fp16,
        pcie=f"{speed}x{width}",
        context=context_bytes,
        usable=UsableShare(linux=0.98, linux_display=0.92, windows=0.81),
    )
