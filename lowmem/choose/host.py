"""From a run's settings: the host memory in which tensors of its step may wait, and how fast they get there."""

from __future__ import annotations

import os

import torch

from lowmem.config.cards import Card
from lowmem.config.schema import Config
from lowmem.core.errors import PreflightError
from lowmem.core.units import counted, format_size
from lowmem.measure.host import free_host_bytes
from lowmem.plan.hosting import HostTerms, LinkRates
from lowmem.remat.links_cuda import measured_rates


def host_terms_of(config: Config, card: Card) -> HostTerms | None:
    """Host memory that tensors may wait in, of this process alone, and the way there; None: they may not. Raises
    PreflightError for more than is free."""
    memory, here = config.memory, config.memory.card is None
    if memory.host == "off":
        return None
    free, processes = free_host_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if memory.host == "auto":
        if free is None:
            raise PreflightError("this system does not tell what host memory is free: give memory.host a size, like 4G")
        limit = free // 2 // processes
    else:
        limit = memory.host
        if here and free is not None and limit * processes > free:
            each = f" for each of {counted(processes, 'process')}" if processes > 1 else ""
            raise PreflightError(
                f"memory.host is {format_size(limit)}{each}, and {format_size(free)} of host memory are free: give "
                "less, or auto"
            )
    if memory.link != "auto":
        rates = LinkRates(memory.link * 1e9, memory.link * 1e9)
    elif here and config.train.device == "cuda" and torch.cuda.is_available():
        rates = LinkRates(*measured_rates(torch.cuda.current_device()))
    else:
        rates = LinkRates(card.host_bytes_per_second, card.host_bytes_per_second)
    return HostTerms(rates, limit)
