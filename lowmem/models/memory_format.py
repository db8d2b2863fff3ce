"""Which networks may not run in channels-last on a CPU: the convolution library corrupts memory in some.

oneDNN's backward pass of a 1x1 convolution with a stride writes past its buffers in channels-last and fp32 if there are
few input channels: under 8 on processors with AVX2, with one thread too; under 16 with AVX-512, with several threads
and a batch that they do not divide (torch 2.14 and 2.15; the process crashes or worse). Contiguous, bf16, larger
kernels and stride 1 are not affected. The scans are in benchmarks/LOG.md.

The rule is the same for every processor and number of threads, so that it has a margin on most: what a run computes
shall not depend on the machine it was begun on.
"""

from __future__ import annotations

from torch import nn

from lowmem.core.errors import PreflightError

SAFE_CHANNELS = 16


def unsafe_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Name -> convolution, of those that must not run in channels-last and fp32 on a CPU."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and _unsafe(module)}


def _unsafe(conv: nn.Conv2d) -> bool:
    few = conv.in_channels // conv.groups < SAFE_CHANNELS
    return few and tuple(conv.kernel_size) == (1, 1) and max(conv.stride) > 1


def is_safe(model: nn.Module, device: str, precision: str, memory_format: str) -> bool:
    """Whether the library computes the network so without corrupting memory. A precision that is still open counts as
    fp32; on the CPU `amp` is bf16."""
    exposed = device == "cpu" and memory_format == "channels-last" and precision != "amp"
    return not (exposed and unsafe_convolutions(model))


def check_memory_format(model: nn.Module, device: str, precision: str, memory_format: str) -> None:
    """Raises PreflightError unless `is_safe`."""
    if is_safe(model, device, precision, memory_format):
        return
    name, conv = next(iter(unsafe_convolutions(model).items()))
    raise PreflightError(
        f"channels-last in fp32 corrupts memory on the CPU: {name} is a 1x1 convolution of stride {max(conv.stride)} "
        f"with {conv.in_channels // conv.groups} input channels, and the library has a fault there under "
        f"{SAFE_CHANNELS}, with one thread too: use --memory-format contiguous or --precision amp (for a run that has "
        "begun: lowmem fork RUN --at last --set train.memory_format=contiguous)"
    )
