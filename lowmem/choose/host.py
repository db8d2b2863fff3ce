"""From a run's settings: the host memory in which tensors of its step may wait, and how fast they get there."""

from __future__ import annotations

from lowmem.calibrate.device import ask_link
from lowmem.config.cards import Card
from lowmem.config.schema import Config
from lowmem.core.errors import PreflightError
from lowmem.core.units import counted, format_size
from lowmem.distributed.launch import processes_here
from lowmem.measure.host import free_host_bytes
from lowmem.plan.hosting import HostTerms
from lowmem.plan.timeline import LinkRates


def host_terms_of(
    config: Config, card: Card, processes: int = 1, *, on_paper: bool = True, measured: bool = False
) -> HostTerms | None:
    """Host memory that tensors may wait in, of this process alone, and the way there; None: they may not. `processes`:
    of the run; on paper all are on one machine, and where a card is named that is another one. `measured`: the link is
    the current CUDA device's. Raises PreflightError for more than is free."""
    memory = config.memory
    if memory.host == "off":
        return None
    alone, processes = processes == 1, processes if on_paper else processes_here()
    if memory.host == "auto":
        free = free_host_bytes()
        if free is None:
            raise PreflightError("this system does not tell what host memory is free: give memory.host a size, like 4G")
        limit = free // 2 // processes
    else:
        limit = memory.host
        here = memory.card is None or not on_paper
        if here and (why := shortage(limit, processes)) is not None:
            raise PreflightError(f"memory.host is {why}: give less, or auto")
    if memory.link != "auto":
        rates = LinkRates(memory.link * 1e9, memory.link * 1e9)
    elif measured:
        rates = LinkRates(*ask_link())
    else:
        rates = LinkRates(card.host_bytes_per_second, card.host_bytes_per_second)
    return HostTerms(rates, limit, grads=alone)  # other processes add to gradients while the backward goes on


def shortage(size: int, processes: int | None = None) -> str | None:
    """Why each of so many processes (None: those of this machine) cannot take `size` bytes of host memory; None if they
    can, or nobody tells."""
    processes, free = processes or processes_here(), free_host_bytes()
    if free is None or size * processes <= free:
        return None
    each = f" for each of {counted(processes, 'process')}" if processes > 1 else ""
    return f"{format_size(size)}{each}, and {format_size(free)} of host memory are free"
