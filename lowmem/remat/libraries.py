"""What CUDA's libraries are told before their first kernel: which kernels they may take, and how much memory beside.

Two steps on one card have the same bits only if nothing is chosen by trial (`cudnn.benchmark`) and nothing is summed in
the order in which threads happen to finish: `cudnn.deterministic` rules out the algorithms that do (backward filter
ALGO_0 and 3, backward data ALGO_0); cuBLAS needs a workspace of a fixed kind
(https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility). cuDNN promises no bits across architectures.

TF32 rounds the operands of a product to 10 bits of mantissa. From capability 8.0 on torch lets convolutions in fp32 use
it, and matrix products not; older cards have none.

Workspaces come out of torch's caching allocator: the convolutions' for the time of a call, cuBLAS's and cublasLt's from
the first matrix product on (one handle: lowmem's backward pass runs in the thread of the forward).

Known limitations: a process that has used cuBLAS keeps the workspace it has. That cuDNN 9 heeds the cap is unproven.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from lowmem.core.units import KIB, MIB

# Of a convolution, where nothing was measured: the library is told not to take more.
ASSUMED_WORKSPACE_BYTES = 256 * MIB
_CONVOLUTIONS = "CUDNN_CONV_WSCAP_DBG"  # MiB
_BLAS = "CUBLAS_WORKSPACE_CONFIG"  # :KiB:count, once or more
# Of the two that are deterministic, eight buffers of 16 KiB or of 4 MiB, the one that leaves the card its memory:
# what these cards train are convolutions, and a matrix product or two at the end.
_DETERMINISTIC_BLAS = ":16:8"
_USUAL_BLAS = ":4096:2:16:8"  # torch's (pytorch/pytorch#95668)
_HOPPER_BLAS = ":4096:8"
_BLAS_LT_BYTES = MIB


_set_here: set[str] = set()  # variables of this process's environment that the user has not set


@dataclass(frozen=True)
class Numerics:
    """What is asked of kernels; otherwise they are chosen as torch is set."""

    deterministic: bool = True  # the same bits every time
    tf32: Literal["auto", "never"] = "auto"  # `never` computes fp32 as fp32


def prepare_libraries(numerics: Numerics) -> None:
    """For this process, before it uses CUDA; on the CPU it changes nothing that is computed. What the user has set of
    caps and workspaces stays."""
    os.environ.setdefault(_CONVOLUTIONS, str(ASSUMED_WORKSPACE_BYTES // MIB))
    if numerics.deterministic:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        if _BLAS not in os.environ:
            os.environ[_BLAS] = _DETERMINISTIC_BLAS
            _set_here.add(_BLAS)
    if numerics.tf32 == "never":
        # The older of torch's two ways: it leaves both readable, the newer one alone makes the older one raise.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def environment_for(numerics: Numerics) -> dict[str, str]:
    """This process's environment for another one with these numerics: what deterministic kernels need is the user's to
    set, or was set here and is not handed on to a process that is to have others."""
    dropped = set() if numerics.deterministic else _set_here
    return {name: value for name, value in os.environ.items() if name not in dropped}


def workspace_cap_bytes() -> int:
    """Of the convolutions: the cap in force, or what is assumed where its text is no number."""
    text = os.environ.get(_CONVOLUTIONS, "")
    return int(text) * MIB if text.isdigit() else ASSUMED_WORKSPACE_BYTES


def blas_workspace_bytes(capability: tuple[int, int], *, deterministic: bool) -> int:
    """Of cuBLAS and cublasLt on a card of this capability, by the rules of torch's sources (2.7 to 2.15)."""
    usual = _DETERMINISTIC_BLAS if deterministic else _HOPPER_BLAS if capability == (9, 0) else _USUAL_BLAS
    return (_configured_bytes(os.environ.get(_BLAS, usual)) or _configured_bytes(usual) or 0) + _BLAS_LT_BYTES


def _configured_bytes(text: str) -> int | None:
    """None for what cuBLAS would not understand either."""
    numbers = text.removeprefix(":").split(":")
    if len(numbers) % 2 or not all(number.isdigit() for number in numbers):
        return None
    return sum(int(size) * KIB * int(count) for size, count in zip(numbers[::2], numbers[1::2], strict=True))


def convolutions_in_tf32(capability: tuple[int, int], tf32: str = "auto") -> bool:
    """Whether convolutions in fp32 use TF32 on a card of this capability, as this process is set."""
    if capability < (8, 0) or tf32 == "never":
        return False
    newer = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9; readable whichever way it was set
    return bool(newer.fp32_precision == "tf32" if newer is not None else torch.backends.cudnn.allow_tf32)
