"""Telling out-of-memory from other errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed

import lowmem
from lowmem.measure.out_of_memory import Failure, attempt, classify, halving, says_out_of_memory


@pytest.mark.parametrize(
    ("error", "asked_bytes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"), 20 * 2**20),
        (torch.OutOfMemoryError("Allocation on device"), None),
        (MemoryError(), None),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            4_000_000,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 123 bytes."), 123),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), None),
        (RuntimeError("CUDA driver error: out of memory"), None),
        (RuntimeError("std::bad_alloc"), None),
        (RuntimeError("cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), None),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:78, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
                "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
            ),
            None,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("GET was unable to find an engine to execute this computation"), None),
    ],
)
def test_what_out_of_memory_looks_like(error: Exception, asked_bytes: int | None) -> None:
    failure = classify(error, "forward")
    assert failure is not None
    assert (failure.phase, failure.asked_bytes) == ("forward", asked_bytes)
    assert "\n" not in failure.message
    assert failure.message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("NCCL error: unhandled system error. Last error: socket was closed by a peer"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyError("out of memory"),
    ],
)
def test_what_it_does_not_look_like(error: Exception) -> None:
    assert classify(error, "forward") is None


def test_a_real_refusal_of_the_cpus_allocator() -> None:
    failure = attempt(lambda: torch.empty(2**60, dtype=torch.uint8), lambda: "data")
    assert isinstance(failure, Failure)
    assert failure.asked_bytes == 2**60


def test_another_error_goes_on() -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        attempt(fail, lambda: "forward")


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "torch.AcceleratorError: CUDA error: out of memory",
        "MemoryError",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_the_last_lines_of_a_process_that_ran_out(text: str) -> None:
    assert says_out_of_memory(f"Traceback (most recent call last):\n  somewhere\n{text}\n")


@pytest.mark.parametrize(
    "text", ["ValueError: no", "RuntimeError: CUDA error: an illegal memory access was encountered"]
)
def test_the_last_lines_of_another_end(text: str) -> None:
    assert not says_out_of_memory(f"Traceback (most recent call last):\n  somewhere\n{text}\n")


def test_one_place_knows_the_words() -> None:
    """Whoever looks for the library's own exception alone misses what its libraries say."""
    package = Path(lowmem.__file__).parent
    files = [path for path in package.rglob("*.py") if "torch.OutOfMemoryError" in path.read_text(encoding="utf-8")]
    assert {path.relative_to(package).as_posix() for path in files} == {
        "measure/out_of_memory.py",
        "bench/plan_checks.py",
    }


@pytest.mark.parametrize(("room", "tried"), [(12, [12]), (3, [12, 6, 3]), (0, [12, 6, 3, 1])])
def test_halved_until_there_is_room(room: int, tried: list[int]) -> None:
    sizes: list[int] = []
    told: list[tuple[str, int]] = []

    def work(size: int) -> int:
        sizes.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return size

    done = halving(work, 12, "evaluation", lambda failure, size: told.append((failure.phase, size)))
    assert sizes == tried
    assert told == [("evaluation", size) for size in tried[1:]]
    assert isinstance(done, Failure) if room == 0 else done == room
