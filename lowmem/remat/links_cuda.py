"""The link of a CUDA card: two streams, events, and pinned memory.

A copy out waits on its stream for what was computed before it was asked for; what is computed after the planned point
waits for the copy, so that the device's memory is freed and taken again in the order of the computing stream alone.
Memory is registered slab by slab, as the pinning allocator of PyTorch rounds to powers of two (pt#150517); where the
system refuses (WSL2, `ulimit -l`) it stays pageable, which is said once: copies then hold up the computing.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from lowmem.remat.links import Arena, HostLink, Passing, Slab


class CudaLink(HostLink):
    """Of one device."""

    def __init__(self, device: int) -> None:
        super().__init__(Arena(self._pin))
        self.device = torch.device("cuda", device)
        self.streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)  # out and back
        self.pinned = True
        self._registered: list[int] = []  # addresses

    def _pin(self, address: int, size: int) -> None:
        if not self.pinned:
            return
        with torch.cuda.device(self.device):
            error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if error == 0:
            self._registered.append(address)
            return
        self.pinned = False
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)  # or the next kernel is blamed for the error, which CUDA remembers
        warnings.warn(
            f"host memory cannot be pinned (CUDA error {error} for {size} bytes; `ulimit -l`, WSL2): what waits on "
            "the host is copied from pageable memory, which is slower and holds up the computing",
            stacklevel=2,
        )

    def unpin(self) -> None:
        """Before its memory goes: what is mapped at the same address later would be taken for the old pages."""
        self.drain()
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())

    def copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        computing = torch.cuda.current_stream(self.device)
        self.streams[0].wait_stream(computing)
        self.streams[0].wait_stream(self.streams[1])  # the slab may just have been read, for another computing stream
        with torch.cuda.stream(self.streams[0]):
            _like(slab, tensor).copy_(tensor, non_blocking=True)
        return _Passed(self.streams[0], self.device)

    def copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        self.streams[1].wait_stream(torch.cuda.current_stream(self.device))  # others may have had this memory
        with torch.cuda.stream(self.streams[1]):
            tensor.copy_(_like(slab, tensor), non_blocking=True)
        return _Passed(self.streams[1], self.device)

    def drain(self) -> None:
        self.streams[0].synchronize()
        self.streams[1].synchronize()


class _Passed:
    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        self._event, self._device = torch.cuda.Event(), device
        self._event.record(stream)

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))


def _like(slab: Slab, tensor: Tensor) -> Tensor:
    """The slab as a tensor that lies in memory as the other one does."""
    flat = torch.frombuffer(slab.memory, dtype=tensor.dtype, count=tensor.numel())
    return flat.as_strided(tensor.shape, tensor.stride())


@cache
def cuda_link(device: int) -> CudaLink:
    """One a process and device."""
    return CudaLink(device)


_PROBE_BYTES = 64 << 20
_PROBES = 4


def measured_rates() -> tuple[float, float]:
    """Of the current device: bytes per second out and back, while both ways are busy, with the link's own memory; the
    best of three rounds. Takes tenths of a second, 128 MiB there and here, and a context."""
    link = CudaLink(torch.cuda.current_device())
    try:
        rounds = [_measured(link) for _ in range(3)]
    finally:
        link.unpin()
    out, back = map(max, zip(*rounds, strict=True))
    return out, back


def _measured(link: CudaLink) -> list[float]:
    there = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=link.device)
    here = torch.empty_like(there)
    slabs = link.arena.take(_PROBE_BYTES), link.arena.take(_PROBE_BYTES)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in link.streams]
    torch.cuda.synchronize(link.device)
    for way, stream in enumerate(link.streams):
        marks[way][0].record(stream)
        for _ in range(_PROBES):
            if way:
                link.copy_back(slabs[1], here)
            else:
                link.copy_out(there, slabs[0])
        marks[way][1].record(stream)
    link.drain()
    for slab in slabs:
        link.arena.give_back(slab)
    return [_PROBES * _PROBE_BYTES / (begun.elapsed_time(ended) / 1000) for begun, ended in marks]
