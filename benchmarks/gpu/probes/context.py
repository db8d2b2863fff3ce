"""What a process takes on the card beside its tensors: after one kernel, a tiny step, and whole steps of the network,
whose kernels are loaded when they are first used."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch.nn import functional as F

from lowmem.calibrate.device import measure_memory
from lowmem.measure import Meter, Snapshot
from lowmem.models import build


def look(device: str, arch: str, block: str, width: int, batch: int) -> dict[str, Any]:
    """Bytes. `tiny_step`: what a plan's budget is made from. To be asked alone, or others' changes count in."""
    with closing(Meter(device)) as meter:
        torch.ones(1, device=device).add_(1)
        found: dict[str, Any] = {"one_kernel": _figures(meter.read())}
        if device == "cuda":
            measure_memory()
        found["tiny_step"] = _figures(meter.read())
        for precision in ("fp32", "amp"):
            _steps(device, arch, block, width, batch, precision)
            found[f"whole_step_{precision}"] = _figures(meter.read())
    return found


def _figures(seen: Snapshot) -> dict[str, Any]:
    return {
        "context_bytes": seen.context_bytes,
        "process_bytes": seen.process_bytes,
        "reserved_bytes": seen.reserved_bytes,
        "device_used_bytes": seen.device_used_bytes,
        "source": seen.device_source,
        "missing": list(seen.missing),
    }


def _steps(device: str, arch: str, block: str, width: int, batch: int, precision: str) -> None:
    model = build(arch, block, width=width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    low = torch.float16 if device == "cuda" else torch.bfloat16
    for _ in range(2):
        with torch.autocast(device, low, enabled=precision == "amp"):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
