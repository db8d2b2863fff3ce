"""Bytes and seconds of a call, for the probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowmem.measure.timing import time_calls
from lowmem.simulate.allocator import round_block


def bytes_of(call: Callable[[], Any], device: str) -> dict[str, int | None]:
    """`peak_bytes` beyond what was allocated before, `result_bytes` as the allocator rounds them, and
    `workspace_bytes`: what of the peak is no result. None on the CPU, whose allocator does not tell. The first call
    chooses kernels and is not looked at."""
    call()
    if device != "cuda":
        return {"peak_bytes": None, "result_bytes": None, "workspace_bytes": None}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    held = sum(round_block(one.untyped_storage().nbytes()) for one in _tensors(results))
    return {"peak_bytes": peak, "result_bytes": held, "workspace_bytes": max(0, peak - held)}


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """The median of three rounds."""
    return time_calls(call, device, rounds=3, least_seconds=0.002).median_seconds


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def difference(left: Tensor, right: Tensor) -> float:
    """The largest, relative to the largest value."""
    scale = right.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((left.float() - right.float()).abs().max() / scale)


def _tensors(results: Any) -> list[Tensor]:
    """New ones, each storage once."""
    made = [results] if isinstance(results, Tensor) else [one for one in results or () if isinstance(one, Tensor)]
    return list({one.untyped_storage().data_ptr(): one for one in made if one.numel()}.values())
