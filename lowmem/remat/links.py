"""Ways to host memory and back, each with its own memory there.

A link copies beside the computing, in the order in which it is asked, each way for itself; memory on the device is
taken and freed by the stream that computes, at the moments at which it asks (never by `record_stream`, whose frees
nobody can predict), so that a simulation sees the same. The link of outlines copies nothing; that of the CPU copies for
real, on threads of its own and at a rate that can be set: every order and every byte is tested there. That of CUDA is
in `lowmem.remat.links_cuda`.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowmem.measure.outline import is_outline

ALIGNMENT_BYTES = 4096  # of slabs: of pages, which are what is registered


def fills_its_memory(value: Any) -> bool:
    """Whether it is a tensor whose elements are all of its storage, so that its bytes can be moved as they lie."""
    if not isinstance(value, Tensor) or not value.numel() or value.storage_offset():
        return False
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return is_outline(value) or value.untyped_storage().nbytes() == value.nbytes


class Arena:
    """Host memory in slabs: those that are given back are used again by tensors of the same size, so that steps that
    are alike take no more than the first. Every slab is a mapping of its own, given to `adopt` once (to be pinned), and
    stays one even if an interrupt keeps it from being given back: nobody else's memory may lie where a card copies to.

    Several threads may use it, and the garbage collector in the middle of that: there is no lock to wait for."""

    def __init__(self, adopt: Callable[[int, int], None] | None = None) -> None:
        self._adopt = adopt
        self._free: dict[int, list[Slab]] = {}
        self._slabs: list[Slab] = []

    def take(self, nbytes: int) -> Slab:
        size = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        with suppress(IndexError):
            return self._free.setdefault(size, []).pop()
        slab = Slab(size, shared=self._adopt is not None)
        self._slabs.append(slab)
        if self._adopt is not None:
            self._adopt(slab.address, size)
        return slab

    @property
    def bytes(self) -> int:
        """In all, in use or not."""
        return sum(slab.size for slab in self._slabs)

    def give_back(self, slab: Slab) -> None:
        self._free[slab.size].append(slab)


class Slab:
    """Memory that the kernel maps; it goes with the process, or with the object.

    A forked process has its own copy of it, unless it is `shared`: a card that knows the addresses of pages goes on
    using those, which a copy on writing might leave to the other process. Raises MemoryError."""

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size = size
        private = {} if shared or os.name != "posix" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        try:
            self.memory = mmap.mmap(-1, size, **private)
        except OSError as error:
            raise MemoryError(f"there is no host memory for {size} bytes that are to wait in it: {error}") from error
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Passing(Protocol):
    def wait(self) -> Any:
        """Makes what is computed from now on wait until it has happened."""


@dataclass(eq=False)
class Ticket:
    """Of one tensor on its way, and what it is made again as."""

    device: Tensor | None  # while the copy out may read it
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    on: torch.device
    sent: Passing
    slab: Slab | None = None
    back: Tensor | None = None
    arrived: Passing | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class HostLink:
    """Between a device and host memory. Subclasses copy."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def send(self, tensor: Tensor) -> Ticket:
        """Begins the copy out, behind what computes the tensor."""
        slab = self.arena.take(tensor.nbytes)
        sent = self.copy_out(tensor, slab)
        return Ticket(tensor, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, sent, slab)

    def fetch(self, ticket: Ticket) -> None:
        """Takes room on the device, and begins the copy back."""
        ticket.back = torch.empty_strided(ticket.shape, ticket.strides, dtype=ticket.dtype, device=ticket.on)
        assert ticket.slab is not None
        ticket.arrived = self.copy_back(ticket.slab, ticket.back)

    def take(self, ticket: Ticket) -> Tensor:
        """The tensor, which what is computed from now on waits for; the slab is free. While it is waited for, the
        ticket holds what is copied to: the waiting may be interrupted."""
        tensor = ticket.back
        assert tensor is not None
        assert ticket.arrived is not None
        ticket.arrived.wait()
        self.forget(ticket)
        return tensor

    def forget(self, ticket: Ticket) -> None:
        """Its slab is free: its copies are over, or `drain` was called."""
        ticket.device = ticket.back = None
        if ticket.slab is not None:
            slab, ticket.slab = ticket.slab, None
            self.arena.give_back(slab)

    def abandon(self, tickets: Sequence[Ticket]) -> None:
        """Nothing of them moves any more, and their slabs are free."""
        self.drain()
        for ticket in tickets:
            self.forget(ticket)

    def drain(self) -> None:
        """Waits until nothing moves."""
        raise NotImplementedError

    def copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        """Begins it; returns its end."""
        raise NotImplementedError

    def copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        """Begins it; returns its end."""
        raise NotImplementedError


class _Done:
    def wait(self) -> None:
        pass


class OutlineLink(HostLink):
    """Between outlines and nothing: what is freed and taken is seen, what is copied has no values."""

    def __init__(self) -> None:
        super().__init__(Arena())

    def send(self, tensor: Tensor) -> Ticket:
        return Ticket(tensor, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, _Done())

    def fetch(self, ticket: Ticket) -> None:
        ticket.back = torch.empty_strided(ticket.shape, ticket.strides, dtype=ticket.dtype, device=ticket.on)
        ticket.arrived = _Done()

    def drain(self) -> None:
        pass


class CpuLink(HostLink):
    """Copies on two threads, one each way. `bytes_per_second`: of each way, None: as fast as the machine copies."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        super().__init__(Arena())
        self._out, self._in = _Channel(bytes_per_second), _Channel(bytes_per_second)

    def copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        return self._out.copy(slab.address, tensor.data_ptr(), tensor.nbytes)

    def copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        return self._in.copy(tensor.data_ptr(), slab.address, tensor.nbytes)

    def abandon(self, tickets: Sequence[Ticket]) -> None:
        if threading.current_thread() in (self._out.thread, self._in.thread):
            # The garbage collector came by there, and a thread cannot wait for itself.
            threading.Thread(target=super().abandon, args=(tickets,), daemon=True).start()
        else:
            super().abandon(tickets)

    def drain(self) -> None:
        self._out.drain()
        self._in.drain()


class _Copy(NamedTuple):
    """Asked for at a time of `time.perf_counter`."""

    to: int
    source: int
    nbytes: int
    asked_at: float
    done: threading.Event


class _Channel:
    """One way: a thread that copies what it is given, one after the other. It holds the interpreter's lock for no
    longer than it takes to ask for a copy.

    Nothing moves while the process forks, and the thread of a process that was forked is one of its own. Nothing moves
    any more when the interpreter ends, as its threads have by the time that the last tensors go.
    """

    _CHUNK_BYTES = 8 << 20

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._over = False
        self._begin()
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.drain, after_in_child=self._begin)

    def _begin(self) -> None:
        self._asked: queue.SimpleQueue[_Copy] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(self._asked,), daemon=True, name="lowmem-link")
        self.thread.start()

    def _end(self) -> None:
        self.drain()
        self._over = True

    def copy(self, to: int, source: int, nbytes: int) -> threading.Event:
        done = threading.Event()
        self._asked.put(_Copy(to, source, nbytes, time.perf_counter(), done))
        return done

    def drain(self) -> None:
        if not self._over:
            self.copy(0, 0, 0).wait()

    def _work(self, asked: queue.SimpleQueue[_Copy]) -> None:
        ends = 0.0  # by the rate, so that a thread that wakes late makes up for it
        while True:
            to, source, nbytes, asked_at, done = asked.get()
            ends = max(ends, asked_at)
            for begin in range(0, nbytes, self._CHUNK_BYTES):
                size = min(self._CHUNK_BYTES, nbytes - begin)
                ctypes.memmove(to + begin, source + begin, size)
                if self._rate is not None:
                    ends += size / self._rate
                    time.sleep(max(0.0, ends - time.perf_counter()))
            done.set()


@cache
def cpu_link(bytes_per_second: float | None = None) -> CpuLink:
    """One a process and rate."""
    return CpuLink(bytes_per_second)
