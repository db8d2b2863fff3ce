"""Convolutions of the bottleneck network: what a call takes beside its results, and how long, forward and backward.

Asked with and without a cap on the library's workspace (CUDNN_CONV_WSCAP_DBG, MiB, in the question's environment) it
tells whether that variable has any effect in the cuDNN at hand.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.gpu.probes.measuring import bytes_of, difference, same, seconds_of

_aten = torch.ops.aten
_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Layer = tuple[int, int, int, int, int]  # channels in, channels out, kernel, stride, height and width


def look(device: str, batch: int, layers: list[Layer], deterministic: bool = True) -> dict[str, Any]:
    """Figures by dtype, format and layer, like `fp32 contiguous 64>64 3x3/1 at 32`, and their largest workspace.

    `forward_by_batch_bitwise`: whether the first half of the batch alone has the bits that it has in the whole."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, False
    found: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        for layout, memory_format in _FORMATS.items():
            for layer in layers:
                try:
                    figures = _layer(device, batch, layer, dtype, memory_format)
                except RuntimeError as error:
                    figures = {"refused": str(error).partition("\n")[0][:200]}
                channels_in, channels_out, kernel, stride, side = layer
                what = f"{channels_in}>{channels_out} {kernel}x{kernel}/{stride} at {side}"
                found[f"{name} {layout} {what}"] = figures
    sizes = [
        one[way]["workspace_bytes"]
        for one in found.values()
        for way in ("forward", "backward")
        if "refused" not in one and one[way]["workspace_bytes"] is not None
    ]
    cap = os.environ.get("CUDNN_CONV_WSCAP_DBG")
    return {"cap": cap, "most_workspace_bytes": max(sizes, default=None), "layers": found}


def _layer(
    device: str, batch: int, layer: Layer, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Any]:
    channels_in, channels_out, kernel, stride, side = layer
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).contiguous(memory_format=memory_format)

    x, weight = drawn(batch, channels_in, side, side), drawn(channels_out, channels_in, kernel, kernel)
    rest = ([stride, stride], [kernel // 2, kernel // 2], [1, 1], False, [0, 0], 1)

    def forward() -> torch.Tensor:
        result: torch.Tensor = _aten.convolution(x, weight, None, *rest)
        return result

    grad = torch.randn_like(forward())

    def backward() -> Any:
        return _aten.convolution_backward(grad, x, weight, None, *rest, [True, True, False])

    whole, half = forward(), _aten.convolution(x[: batch // 2], weight, None, *rest)
    first, again = backward(), backward()
    return {
        "forward": {**bytes_of(forward, device), "seconds": seconds_of(forward, device)},
        "backward": {**bytes_of(backward, device), "seconds": seconds_of(backward, device)},
        "forward_repeated_bitwise": same([whole], [forward()]),
        "forward_by_batch_bitwise": same([whole[: batch // 2]], [half]),
        "backward_repeated_bitwise": same(first[:2], again[:2]),
        "backward_difference": max(difference(one, other) for one, other in zip(first[:2], again[:2], strict=True)),
    }
