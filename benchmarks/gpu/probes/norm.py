"""Batch norm: bits of the first and of the repeated one, and what the library's kernels cost against the native ones.

`library` is what `F.batch_norm` takes by itself (cuDNN's for fp32), `native` torch's own. Repeated: as the backward
pass of a checkpoint computes it again, without running statistics (invariant 2), in a new tensor or in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.probes.measuring import bytes_of, difference, same, seconds_of

_aten = torch.ops.aten
_MOMENTUM, _EPS = 0.1, 1e-5
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def look(device: str, shape: list[int]) -> dict[str, Any]:
    """`shape`: [N, C, H, W]. Figures by dtype and memory format, like `fp16 channels-last`. `implementation`: the
    library's number of what `F.batch_norm` takes (0 native, 1 cuDNN)."""
    found: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        for layout, memory_format in _FORMATS.items():
            try:
                found[f"{name} {layout}"] = _Norm(device, shape, dtype, memory_format).found()
            except RuntimeError as error:  # one that the library refuses must not take the others with it
                found[f"{name} {layout}"] = {"refused": str(error).partition("\n")[0][:200]}
    return found


class _Norm:
    """One dtype and format: fp32 weights as under autocast, random values."""

    def __init__(self, device: str, shape: list[int], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        self.device, self.channels = device, shape[1]
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        self.z = (drawn(*shape) * 3 + 2).to(device, dtype).contiguous(memory_format=memory_format)
        self.grad = drawn(*shape).to(device, dtype).contiguous(memory_format=memory_format)
        self.weight = (drawn(self.channels) + 1).to(device)
        self.bias = drawn(self.channels).to(device)

    def running(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.channels, device=self.device), torch.ones(self.channels, device=self.device)

    def library(self, mean: Tensor | None, var: Tensor | None, eps: float = _EPS) -> tuple[Any, ...]:
        """Result, mean, inverse deviation, reserve, implementation."""
        enabled = torch.backends.cudnn.enabled
        found: tuple[Any, ...] = _aten._batch_norm_impl_index(
            self.z, self.weight, self.bias, mean, var, True, _MOMENTUM, eps, enabled
        )
        return found

    def native(self, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Result, mean, inverse deviation."""
        found: tuple[Tensor, Tensor, Tensor] = _aten.native_batch_norm(
            self.z, self.weight, self.bias, mean, var, True, _MOMENTUM, _EPS
        )
        return found

    def native_in_place(self) -> Tensor:
        """In a copy's place, without running statistics."""
        out, saved = self.z.clone(), [torch.empty(self.channels, device=self.device) for _ in range(2)]
        _aten.native_batch_norm.out(
            out, self.weight, self.bias, None, None, True, _MOMENTUM, _EPS, out=out, save_mean=saved[0],
            save_invstd=saved[1],
        )  # fmt: skip
        return out

    def by_statistics(self, stats: tuple[Tensor, Tensor], in_place: bool) -> Tensor:
        """CUDA's elementwise kernel with the first pass's statistics: gathers nothing again."""
        source = self.z.clone() if in_place else self.z
        out = source if in_place else torch.empty_like(source)
        _aten.batch_norm_elemt.out(source, self.weight, self.bias, stats[0], stats[1], _EPS, out=out)
        return out

    def found(self) -> dict[str, Any]:
        first, native = self.library(*self.running()), self.native(*self.running())
        again = self.library(None, None)
        autograd = F.batch_norm(self.z, *self.running(), self.weight, self.bias, True, _MOMENTUM, _EPS)
        found: dict[str, Any] = {
            "implementation": int(first[4]),
            "library_is_autograds": same([first[0]], [autograd]),
            "library_repeated_bitwise": same(first[:3], again[:3]),
            "library_is_native": same([first[0]], [native[0]]),
            "library_native_difference": difference(first[0], native[0]),
            "native_repeated_bitwise": same(native, self.native(None, None)),
            "native_in_place_bitwise": same([native[0]], [self.native_in_place()]),
            "reserve_bytes": int(first[3].numel() * first[3].element_size()),
            **self._other_eps(),
            **self._backward(first, native),
        }
        if self.device == "cuda":
            stats = (native[1], native[2])
            found["by_statistics_bitwise"] = same([native[0]], [self.by_statistics(stats, False)])
            found["by_statistics_in_place_bitwise"] = same([native[0]], [self.by_statistics(stats, True)])
        running = self.running()
        for name, call in (("library", lambda: self.library(*running)), ("native", lambda: self.native(*running))):
            found[f"{name}_forward"] = {**bytes_of(call, self.device), "seconds": seconds_of(call, self.device)}
        return found

    def _other_eps(self) -> dict[str, float]:
        """A graph that is kept by shape must not be kept for another eps, nor for missing running statistics: the
        library's result against the native one after both were called with something else."""
        eps = 0.5
        other = self.library(None, None, eps)[0]
        wanted = _aten.native_batch_norm(self.z, self.weight, self.bias, None, None, True, _MOMENTUM, eps)[0]
        return {"library_other_eps_difference": difference(other, wanted)}

    def _backward(self, first: tuple[Any, ...], native: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
        """Of the library's pair against autograd's, bit for bit, and what both kernels cost."""
        mask = [True, True, True]

        def library() -> Any:
            return _aten._batch_norm_impl_index_backward(
                first[4], self.z, self.grad, self.weight, *self.running(), first[1], first[2], True, _EPS, mask,
                first[3],
            )  # fmt: skip

        def own() -> Any:
            return _aten.native_batch_norm_backward(
                self.grad, self.z, self.weight, None, None, native[1], native[2], True, _EPS, mask
            )

        leaves = [one.detach().clone().requires_grad_() for one in (self.z, self.weight, self.bias)]
        result = F.batch_norm(leaves[0], *self.running(), leaves[1], leaves[2], True, _MOMENTUM, _EPS)
        wanted = torch.autograd.grad(result, leaves, self.grad)
        found: dict[str, Any] = {
            "backward_is_autograds": same(library(), wanted),
            "backward_repeated_bitwise": same(library(), library()),
            "backward_native_difference": difference(own()[0], wanted[0]),
        }
        for name, call in (("library", library), ("native", own)):
            found[f"{name}_backward"] = {**bytes_of(call, self.device), "seconds": seconds_of(call, self.device)}
        return found
