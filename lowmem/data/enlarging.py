"""Small pictures made larger on the device, for networks that want them so: bilinear between the middles of pixels, as
`torch.nn.functional.interpolate(mode="bilinear")` does it, but with weights in 1/128.

Rows and columns are sums of two products of a byte and such a weight, which float32 (and TF32) holds exactly, and each
is rounded to bytes: so a picture has the same bytes in every batch, on every device and with every kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_UNITS = 128  # of a weight of 1


class Enlarger:
    """uint8 [B, C, S, S] on `device` -> uint8 [B, C, N, N], N at least S; the same if N is S. Takes 4 bytes for each of
    its values meanwhile."""

    def __init__(self, side: int, larger: int, device: torch.device) -> None:
        self._weights = None if larger <= side else _weights(side, larger).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        if self._weights is None:
            return images
        rows = self._weights.matmul(images.to(torch.float32)).add_(0.5).floor_()
        return rows.matmul(self._weights.T).add_(0.5).floor_().to(torch.uint8)


def _weights(side: int, larger: int) -> Tensor:
    """float32 [N, S]: two in every row, of sum 1; at the border one."""
    centres = np.clip((np.arange(larger) + 0.5) * side / larger - 0.5, 0, side - 1)
    before = np.minimum(centres.astype(np.int64), side - 2)
    of_next = np.rint((centres - before) * _UNITS) / _UNITS
    weights = np.zeros((larger, side), np.float32)
    weights[np.arange(larger), before] = 1 - of_next
    weights[np.arange(larger), before + 1] = of_next
    return torch.from_numpy(weights)
