"""TF32: the library's switches as they are found, and what they do to error and time of a convolution and a product."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.probes.measuring import difference, seconds_of


def look(device: str, channels: int, batch: int) -> dict[str, Any]:
    """`difference`: of fp32 results from those in float64, relative to the largest value."""
    conv, product = torch.backends.cudnn, torch.backends.cuda.matmul
    found: dict[str, Any] = {
        "convolution_allowed": conv.allow_tf32,
        "product_allowed": product.allow_tf32,
        "product_precision": torch.get_float32_matmul_precision(),
        "deterministic": conv.deterministic,
        "benchmark": conv.benchmark,
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, 32, 32, generator=generator).to(device)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device)
    flat = x.reshape(-1, channels)
    square = weight[:, :, 0, 0].contiguous()
    exact_conv = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    exact_product = flat.double() @ square.double()
    for allowed in (True, False):
        conv.allow_tf32 = product.allow_tf32 = allowed

        def convolve() -> torch.Tensor:
            return torch.nn.functional.conv2d(x, weight, padding=1)

        def multiply() -> torch.Tensor:
            return flat @ square

        found["allowed" if allowed else "not allowed"] = {
            "convolution_difference": difference(convolve().double(), exact_conv),
            "convolution_seconds": seconds_of(convolve, device),
            "product_difference": difference(multiply().double(), exact_product),
            "product_seconds": seconds_of(multiply, device),
        }
    return found
