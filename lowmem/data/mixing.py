"""What is taken from training pictures and mixed into them once they are normalised, where zero is the mean colour:
cutout, random erasing, mixup. All of it is drawn by (seed, epoch, picture) or (seed, epoch, step), so that neither
micro-batches nor the number of processes change it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core import counter_rng as addressed
from lowmem.data.cutting import random_boxes

ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # shares of the picture's area; height to width
_ATTEMPTS = 1000  # at a share of Beta(alpha, alpha); each succeeds with a chance of a half or more


def cutout_boxes(seed: int, epoch: int, samples: NDArray[np.integer], side: int, cutout: int) -> NDArray[np.int64]:
    """Squares around a pixel of each picture that may stand out over its border (DeVries and Taylor, "Improved
    regularization of convolutional neural networks with cutout", 2017): top, left, height, width, int64 [4, K]."""
    words = addressed.draw_uint64(addressed.derive_seed(seed, "cutout", epoch), samples)
    centres = np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)]).astype(np.int64) * side >> 32
    return np.concatenate([centres - cutout // 2, np.full_like(centres, cutout)])


def erased_boxes(seed: int, epoch: int, samples: NDArray[np.integer], side: int, share: float) -> NDArray[np.int64]:
    """Rectangles in that share of the pictures (Zhong et al., "Random erasing data augmentation", 2017), of the sizes
    of torchvision's `RandomErasing`, empty in the others: top, left, height, width, int64 [4, K]."""
    boxes = random_boxes(
        seed, epoch, samples, side, purpose="erasing", areas=ERASED_AREA, aspects=ERASED_ASPECT, most=side - 1
    )
    words = addressed.draw_uint64(addressed.derive_seed(seed, "erased", epoch), samples)
    boxes[:, (words >> np.uint64(11)) / 2**53 >= share] = 0
    return boxes


def erase_(images: Tensor, boxes: Tensor) -> Tensor:
    """Zeros in `images`, float [B, C, N, N], in place; boxes int [4, B] on the same device."""
    top, left, height, width = boxes[:, :, None]
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (places >= top) & (places < top + height), (places >= left) & (places < left + width)
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def partners(seed: int, epoch: int, step: int, size: int) -> NDArray[np.int64]:
    """With which picture of a batch of `size` each is mixed: a permutation of their places, int64 [size]."""
    return addressed.permutation(addressed.derive_seed(seed, "mixup", "partners", epoch, step), size)


def mixup_share(seed: int, epoch: int, step: int, alpha: float) -> float:
    """What a step's pictures keep of themselves (Zhang et al., "mixup: beyond empirical risk minimization", 2018), of
    Beta(alpha, alpha), alpha above 0: in units of 2**-24, so that float32 holds it exactly, and one minus it.

    Alpha below 1 by Jöhnk's way (1964), else by Ulrich's ("Computer generation of distributions on the m-sphere",
    1984)."""
    key = addressed.derive_seed(seed, "mixup", "share", epoch, step)
    words = addressed.draw_uint64(key, np.arange(2 * _ATTEMPTS)).reshape(-1, 2)
    for u, v in ((words >> np.uint64(11)) + 0.5) / 2**53:  # in (0, 1)
        if alpha >= 1:
            share = 0.5 + 0.5 * math.sqrt(1 - u ** (2 / (2 * alpha - 1))) * math.cos(2 * math.pi * v)
            break
        x, y = math.log(u) / alpha, math.log(v) / alpha  # of the powers, which may be too small for a number
        if math.exp(x) + math.exp(y) <= 1:
            share = 1 / (1 + math.exp(min(y - x, 700.0)))
            break
    return round(share * 2**24) / 2**24
