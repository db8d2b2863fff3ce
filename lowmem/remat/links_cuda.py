"""The link of a CUDA card: two streams, events, and pinned memory.

A copy out waits on its stream for what was computed before it was asked for; what is computed after the planned point
waits for the copy, so that the device's memory is freed and taken again in the order of the computing stream alone.
Memory is registered slab by slab, as the pinning allocator of PyTorch rounds to powers of two (pt#150517); where the
system refuses (WSL2, `ulimit -l`) it stays pageable, which is said once: copies then hold up the computing.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from lowmem.remat.links import Arena, HostLink, Passing, Slab

_ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered


class CudaLink(HostLink):
    """Of one device."""

    def __init__(self, device: int) -> None:
        super().__init__(Arena(self._pin))
        self._device = torch.device("cuda", device)
        self._out, self._in = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        self.pinned = True

    def _pin(self, address: int, size: int) -> None:
        if not self.pinned:
            return
        error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if error not in (0, _ALREADY):
            self.pinned = False
            warnings.warn(
                f"host memory cannot be pinned (CUDA error {error} for {size} bytes; `ulimit -l`, WSL2): what waits on "
                "the host is copied from pageable memory, which is slower and holds up the computing",
                stacklevel=2,
            )

    def _copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        computing = torch.cuda.current_stream(self._device)
        self._out.wait_stream(computing)
        with torch.cuda.stream(self._out):
            _like(slab, tensor).copy_(tensor, non_blocking=True)
        return _Passed(self._out, self._device)

    def _copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        self._in.wait_stream(torch.cuda.current_stream(self._device))  # others may have had this memory
        with torch.cuda.stream(self._in):
            tensor.copy_(_like(slab, tensor), non_blocking=True)
        return _Passed(self._in, self._device)

    def drain(self) -> None:
        self._out.synchronize()
        self._in.synchronize()


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
