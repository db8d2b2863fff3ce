"""Where the parts run: versions, card, driver and the card's memory."""

from __future__ import annotations

from typing import Any

from lowmem.calibrate.device import describe
from lowmem.measure import read_driver


def environment(device: str) -> dict[str, Any]:
    """Of this machine. Makes a context on CUDA. Raises RuntimeError if the device is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    found = describe(device)
    if device == "cuda":
        torch.ones(1, device="cuda").add_(1).sum().item()  # a build without this card's kernels fails here
        found["capability"] = list(torch.cuda.get_device_capability())
        found["card_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["driver"] = read_driver().driver_version
    return found
