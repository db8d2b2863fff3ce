"""A card for which there is no profile: described by its driver and by two short measurements."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowmem.cards import Card, UsableShare
from lowmem.choose.calibration import Calibration, Seconds
from lowmem.measure.timing import time_calls
from lowmem.units import MIB

_COPY_BYTES = 256 * MIB
_SIDE = 4096  # of the square matrices: 0.14 TFLOP a product
_CPU_COPY_BYTES = 64 * MIB
_CPU_SIDE = 1024


def measured_rates(device: str, low: torch.dtype, calibration: Calibration) -> tuple[float, float, float]:
    """(bytes, fp32 operations, `low` operations) per second: a copy reads and writes, a product of n x n matrices takes
    2 n^3 operations. From the calibration if it has them."""
    size = _COPY_BYTES if device == "cuda" else _CPU_COPY_BYTES
    side = _SIDE if device == "cuda" else _CPU_SIDE

    def once(what: str, work: Callable[[], Callable[[], object]]) -> float:
        found = calibration.seconds(("rate", what))
        if found is None:
            found = Seconds(time_calls(work(), device).median_seconds, 0.0)
            calibration.put_seconds(("rate", what), found)
        return max(found.forward, 1e-9)

    def copying() -> Callable[[], object]:
        source = torch.zeros(size // 4, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def product(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            a = torch.randn(side, side, device=device).to(dtype)
            out = torch.empty_like(a)
            return lambda: torch.mm(a, a, out=out)

        return make

    operations = 2.0 * side**3
    return (
        2.0 * size / once(f"copy {size}", copying),
        operations / once(f"product {side} fp32", product(torch.float32)),
        operations / once(f"product {side} {low}", product(low)),
    )


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
    # Tensor cores give at least twice fp32 and came with 7.0; the GTX 16xx has twice fp32 without them, by name.
    cores = capability >= (7, 0) and "GTX 16" not in name
    fp16 = "tensor-cores" if cores else ("2:1" if low > 1.2 * fp32 else "1/64")
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
