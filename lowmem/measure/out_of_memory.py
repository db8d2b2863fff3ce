"""Telling out-of-memory from other errors, whoever says it: torch's allocators, the driver, cuDNN, cuBLAS, NCCL.

For errors in this process and for the last lines of another one; the words alone need no torch, for the doctor.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lowmem.core.errors import PeerFailed
from lowmem.core.units import GIB, KIB, MIB, format_size

T = TypeVar("T")

# What libraries say beside torch.OutOfMemoryError and MemoryError. Certain are the CPU's allocator (on Linux, on
# Windows), the driver, NCCL (it passes the driver's words on) and cuDNN 9's own code for memory. The others are what
# older convolution and matrix libraries say when the card is full (a handle or a workspace that cannot be made;
# pytorch's search over convolution kernels swallows out-of-memory of each and reports that none is left).
_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|CUDA( driver)? error: out of memory|std::bad_alloc"
    r"|Cuda failure .{0,40}'out of memory'"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"
    r"|CU(DNN|BLAS)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    r"|unable to find an engine to execute this computation|[Uu]nable to find a valid cuDNN algorithm"
)
# Of exceptions, as the last lines of a process that died of one have them.
_TRACEBACK = re.compile(r"CUDA out of memory|OutOfMemory|MemoryError")
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": KIB, "mib": MIB, "gib": GIB}


@dataclass(frozen=True)
class Failure:
    """Out of memory."""

    phase: str  # of a step, or beside it
    message: str  # the library's
    asked_bytes: int | None = None  # if it says
    final: bool = False  # the update had begun: nothing was undone, and the last checkpoint is the only way back
    peer: bool = False  # it was another process that ran out, and this one undid the step for it

    @property
    def words(self) -> str:
        asked = "" if self.asked_bytes is None else f", asking for {format_size(self.asked_bytes)}"
        return f"out of memory in {self.phase}{asked}"


def classify(error: BaseException, phase: str) -> Failure | None:
    """None: it is something else than out-of-memory."""
    import torch

    text = str(error)
    if isinstance(error, PeerFailed):
        return Failure(phase, text, peer=True)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (
        isinstance(error, RuntimeError) and _WORDS.search(text)
    ):
        return None
    asked = _ASKED.search(text)
    # The first sentence: what follows are the allocator's figures and advice on its settings.
    message = re.split(r"\. |\n", text or type(error).__name__, maxsplit=1)[0]
    return Failure(phase, message, int(float(asked[1]) * _UNITS[asked[2].lower()]) if asked else None)


def says_out_of_memory(text: str) -> bool:
    """Whether what another process has printed tells that it ran out of memory."""
    return bool(_WORDS.search(text) or _TRACEBACK.search(text))


def attempt(work: Callable[[], T], phase: Callable[[], str]) -> T | Failure:
    """The result of `work`, or how it ran out of memory; other errors go on. The error is not kept: its traceback holds
    every tensor of the frames it came through (pytorch issues 27600, 18853, 82218)."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if (failure := classify(error, phase())) is None:
            raise
    return failure


def halving(work: Callable[[int], T], size: int, phase: str, halved: Callable[[Failure, int], None]) -> T | Failure:
    """`work(size)`, with half of it whenever it runs out of memory, which `halved` hears with the smaller size; the
    Failure where not even 1 has room."""
    result = attempt(lambda: work(size), lambda: phase)
    if not isinstance(result, Failure):
        return result
    release()
    if size == 1:
        return result
    halved(result, size // 2)
    return halving(work, size // 2, phase, halved)


def release() -> None:
    """Gives back what nobody holds any more. To be called outside of an `except`."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
