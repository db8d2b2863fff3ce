"""Batches: order, crop and flip as pure functions of (seed, epoch, sample index), for a whole batch at once.

The crop is torchvision's `RandomCrop(32, padding=4)`: black pixels around the picture, before normalisation. The
pictures stay uint8 and unpadded where the network is (154 MB for the 50,000 of CIFAR-10, padded 240 MB). A batch is
padded, its rows are chosen by `index_select` (on a CPU a copy of 40 bytes each) and its columns, mirrored or not, by
one `gather`; what else was tried is in `benchmarks/augmentation.py`.

Known limitation: pictures are 32x32, the crop offset is 0..8.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core import counter_rng as addressed
from lowmem.data.pictures import CHANNELS, SIDE, Pictures, Triple

Part = tuple[int, int]  # of a batch, its pictures [first, past)
PADDING = 4
_PADDED = SIDE + 2 * PADDING
_OFFSETS = 2 * PADDING + 1
_CONTIGUOUS = torch.contiguous_format


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which an epoch visits its n pictures, int64 [n]; every index once."""
    return addressed.permutation(addressed.derive_seed(seed, "order", epoch), n)


def augmentation(seed: int, epoch: int, samples: NDArray[np.integer]) -> NDArray[np.int64]:
    """Crop offsets from the top and the left (0..8) and flip (0 or 1) of `samples` (indices into the training
    pictures, [K]), of (seed, epoch, index) alone: int64 [3, K]."""
    words = addressed.draw_uint64(addressed.derive_seed(seed, "augment", epoch), samples)
    # 24 bits for each offset: the bias of the remainder is below 1e-6.
    top = (words >> np.uint64(40)) % np.uint64(_OFFSETS)
    left = (words >> np.uint64(16)) % np.uint64(1 << 24) % np.uint64(_OFFSETS)
    flip = words & np.uint64(1)
    return np.stack([top, left, flip]).astype(np.int64)


class Normalizer:
    """uint8 [B, 3, 32, 32] -> float32 of the same shape, (x / 255 - mean) / std per channel."""

    def __init__(self, mean: Triple, std: Triple, device: torch.device) -> None:
        shape = (CHANNELS, 1, 1)
        self._shift = torch.tensor([255.0 * m for m in mean], dtype=torch.float32).view(shape).to(device)
        self._scale = torch.tensor([1.0 / (255.0 * s) for s in std], dtype=torch.float32).view(shape).to(device)

    def __call__(self, images: Tensor, memory_format: torch.memory_format = _CONTIGUOUS) -> Tensor:
        # A subtraction and a product, not one fused multiply-add: each rounds once in every kernel, so a
        # picture has the same bits wherever it stands in a batch, and on every device.
        out = images.to(torch.float32, copy=True).sub_(self._shift).mul_(self._scale)
        # Converting last is 2.5 times faster on a CPU than widening into a channels-last tensor.
        return out.contiguous(memory_format=memory_format)


class TrainBatches:
    """The training batches of every epoch, by (epoch, step): no state, any step can be asked at any time.

    The pictures move to `device` and stay there as uint8 (no copy on the CPU). `batch`: pictures in a step; the last
    step of an epoch has the rest. `augment`: random crop with padding 4 and random horizontal flip.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        seed: int,
        batch: int,
        augment: bool,
        mean: Triple,
        std: Triple,
        device: torch.device | str,
    ) -> None:
        if batch < 1 or len(pictures) == 0:
            raise ValueError(f"batch {batch} of {len(pictures)} pictures: both must be at least 1")
        self.batch_size = batch
        self.steps_per_epoch = -(-len(pictures) // batch)
        self._seed = seed
        self._augment = augment
        self._device = torch.device(device)
        self._images = pictures.images.contiguous().to(self._device)
        self._labels = pictures.labels.to(self._device)
        self._normalize = Normalizer(mean, std, self._device)
        self._columns = torch.arange(SIDE, device=self._device)
        first = torch.arange(CHANNELS, device=self._device).view(CHANNELS, 1) * _PADDED
        self._rows = first + self._columns  # [3, 32]: rows of the top left crop of one padded picture
        self._planned_epoch: int | None = None
        self._plan = torch.empty(0)

    def size(self, step: int) -> int:
        """Pictures in step `step` of any epoch: the last has the rest. Raises IndexError for one that is not there."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        return min(self.batch_size, self._images.shape[0] - step * self.batch_size)

    def batch(
        self, epoch: int, step: int, *, memory_format: torch.memory_format = _CONTIGUOUS, part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step `step` (from 0) of epoch `epoch`: float32 [B, 3, 32, 32] normalised, int64 [B], on the device. Raises
        IndexError. `part`: only that of it, with the bits that it has in the whole batch."""
        images, labels = self.raw_batch(epoch, step, part=part)
        return self._normalize(images, memory_format), labels

    def raw_batch(self, epoch: int, step: int, *, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """As `batch`, cropped and flipped but not normalised: uint8 [B, 3, 32, 32], int64 [B]."""
        first, past = part or (0, self.size(step))
        start = step * self.batch_size
        plan = self._epoch_plan(epoch)[:, start + first : start + min(past, self.size(step))]
        images = self._images.index_select(0, plan[0])
        labels = self._labels.index_select(0, plan[0])
        return (self._crop_and_flip(images, plan[1], plan[2], plan[3]) if self._augment else images), labels

    def _epoch_plan(self, epoch: int) -> Tensor:
        """int64 [4, N] on the device: sample, top, left, flip in the epoch's order; one transfer an epoch."""
        if epoch != self._planned_epoch:
            order = epoch_order(self._seed, epoch, self._images.shape[0])
            plan = np.stack([order, *augmentation(self._seed, epoch, order)])
            self._plan, self._planned_epoch = torch.from_numpy(plan).to(self._device), epoch
        return self._plan

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Rows from `top`, columns from `left` of the padded pictures; columns mirrored where `flip` is 1."""
        n = images.shape[0]
        padded = F.pad(images, (PADDING,) * 4).view(n * CHANNELS * _PADDED, _PADDED)
        first = torch.arange(n, device=images.device) * (CHANNELS * _PADDED) + top
        rows = (first.view(n, 1, 1) + self._rows).view(-1)
        bands = padded.index_select(0, rows).view(n, CHANNELS, SIDE, _PADDED)
        # left + j, or left + 31 - j if flipped
        columns = (left + flip * (SIDE - 1)).view(n, 1) + (1 - 2 * flip).view(n, 1) * self._columns
        return bands.gather(3, columns.view(n, 1, 1, SIDE).expand(n, CHANNELS, SIDE, SIDE))


def eval_batches(
    pictures: Pictures,
    batch: int,
    mean: Triple,
    std: Triple,
    device: torch.device | str,
    memory_format: torch.memory_format = _CONTIGUOUS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures in order, not augmented: float32 [B, 3, 32, 32] normalised, int64 [B], on the device, one batch at
    a time: evaluation must not hold a second data set on a small card."""
    if batch < 1:
        raise ValueError(f"batch {batch}: it must be at least 1")
    place = torch.device(device)
    normalize = Normalizer(mean, std, place)
    for start in range(0, len(pictures), batch):
        images = pictures.images[start : start + batch].to(place)
        yield normalize(images, memory_format), pictures.labels[start : start + batch].to(place)
