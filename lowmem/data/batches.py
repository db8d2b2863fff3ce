"""Batches: order, crop and flip as pure functions of (seed, epoch, sample index), for a whole batch at once.

Pictures in memory are cropped as torchvision's `RandomCrop(S, padding=4)` does it: black pixels around the picture,
before normalisation. They stay uint8 and unpadded where the network is (154 MB for the 50,000 of CIFAR-10, padded 240
MB), if they take no more than `MOST_HELD_BYTES` there; else on the host. A batch is padded, its rows are chosen by
`index_select` (on a CPU a copy of 40 bytes each) and its columns, mirrored or not, by one `gather`; what else was tried
is in `benchmarks/augmentation.py`. Those of a source of its own size are enlarged after that (`lowmem.data.enlarging`).
Pictures on the disk are cut and resized on the host (`lowmem.data.cutting`); on a card's behalf the next batch while
the step computes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core import counter_rng as addressed
from lowmem.data.cutting import Cutter, middles
from lowmem.data.enlarging import Enlarger
from lowmem.data.mixing import cutout_boxes, erase_, erased_boxes, mixup_share, partners
from lowmem.data.pictures import MOST_HELD_BYTES, AnyPictures, MappedPictures, PerChannel

Part = tuple[int, int]  # of a batch, its pictures [first, past)
PADDING = 4
_OFFSETS = 2 * PADDING + 1
_CONTIGUOUS = torch.contiguous_format


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which an epoch visits its n pictures, int64 [n]; every index once."""
    return addressed.permutation(addressed.derive_seed(seed, "order", epoch), n)


def augmentation(seed: int, epoch: int, samples: NDArray[np.integer]) -> NDArray[np.int64]:
    """Offsets of a padded crop from the top and the left (0..8) and flip (0 or 1) of `samples` (indices into the
    training pictures, [K]), of (seed, epoch, index) alone: int64 [3, K]."""
    words = addressed.draw_uint64(addressed.derive_seed(seed, "augment", epoch), samples)
    # 24 bits for each offset: the bias of the remainder is below 1e-6.
    top = (words >> np.uint64(40)) % np.uint64(_OFFSETS)
    left = (words >> np.uint64(16)) % np.uint64(1 << 24) % np.uint64(_OFFSETS)
    flip = words & np.uint64(1)
    return np.stack([top, left, flip]).astype(np.int64)


class Normalizer:
    """uint8 [B, C, N, N] -> float32 of the same shape, (x / 255 - mean) / std per channel: less `shift`, times
    `scale`, float32 [C, 1, 1] each."""

    def __init__(self, mean: PerChannel, std: PerChannel, device: torch.device) -> None:
        shape = (len(mean), 1, 1)
        self.shift = torch.tensor([255.0 * m for m in mean], dtype=torch.float32).view(shape).to(device)
        self.scale = torch.tensor([1.0 / (255.0 * s) for s in std], dtype=torch.float32).view(shape).to(device)

    def __call__(self, images: Tensor, memory_format: torch.memory_format = _CONTIGUOUS) -> Tensor:
        # A subtraction and a product, not one fused multiply-add: each rounds once in every kernel, so a
        # picture has the same bits wherever it stands in a batch, and on every device.
        if memory_format is _CONTIGUOUS:  # bytes are moved faster than what they become
            images = images.contiguous()
        out = images.to(torch.float32, copy=True).sub_(self.shift).mul_(self.scale)
        # Converting last is 2.5 times faster on a CPU than widening into a channels-last tensor.
        out = out.contiguous(memory_format=memory_format)
        if out.shape[1] > 1:
            return out
        # Of one channel both formats are the same bytes, and only the strides tell kernels which is meant.
        meant = torch.empty(out.shape, device="meta", memory_format=memory_format)
        return out.as_strided(out.shape, meant.stride())


class TrainBatches:
    """The training batches of every epoch, by (epoch, step): no state, any step can be asked at any time.

    Pictures in memory move to `device` as uint8 and stay there, unless they are too many (no copy on the CPU). `batch`:
    pictures in a step; the last step of an epoch has the rest. `augment`: random crop and random horizontal flip.
    `cutout`, `random_erasing`, `mixup`: see `DataConfig` and `lowmem.data.mixing`.
    """

    def __init__(
        self,
        pictures: AnyPictures,
        *,
        seed: int,
        batch: int,
        augment: bool,
        mean: PerChannel,
        std: PerChannel,
        device: torch.device | str,
        cutout: int | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
    ) -> None:
        if batch < 1 or len(pictures) == 0:
            raise ValueError(f"batch {batch} of {len(pictures)} pictures: both must be at least 1")
        self.batch_size = batch
        self.steps_per_epoch = -(-len(pictures) // batch)
        self._count, self._seed, self._augment = len(pictures), seed, augment
        self._device = torch.device(device)
        self._normalize = Normalizer(mean, std, self._device)
        self._planned_epoch: int | None = None
        self._plan = torch.empty(0)
        self._size, self._cutout, self._erasing, self._mixup = pictures.image_size, cutout, random_erasing, mixup
        self._boxes: tuple[Tensor, ...] = ()  # of the planned epoch, on the device: what is erased
        self._partners = torch.empty(0)
        self._enlarge = Enlarger(pictures.side, pictures.image_size, self._device)
        self._side = pictures.side
        self._cutter: Cutter | None = None
        # Where a batch's pictures are chosen and cropped.
        self._place, host = self._device, torch.device("cpu")
        if isinstance(pictures, MappedPictures):
            self._place = host
            self._cutter = Cutter(pictures, seed, ahead=self._device.type != "cpu")
        else:
            if pictures.images.nbytes > MOST_HELD_BYTES:
                self._place = host
            self._images = pictures.images.contiguous().to(self._place)
            self._columns = torch.arange(self._side, device=self._place)
            first = torch.arange(pictures.channels, device=self._place).view(-1, 1) * (self._side + 2 * PADDING)
            self._rows = first + self._columns  # [C, S]: rows of the top left crop of one padded picture
        self._labels = pictures.labels.to(self._place)

    def size(self, step: int) -> int:
        """Pictures in step `step` of any epoch: the last has the rest. Raises IndexError for one that is not there."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        return min(self.batch_size, self._count - step * self.batch_size)

    def batch(
        self, epoch: int, step: int, *, memory_format: torch.memory_format = _CONTIGUOUS, part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step `step` (from 0) of epoch `epoch`: float32 [B, C, N, N] normalised, int64 [B], on the device. Raises
        IndexError. `part`: only that of it, with the bits that it has in the whole batch. With mixup the labels are
        int64 [B, 2]: of the picture and of what it is mixed with; `share` tells how much of it is the picture's."""
        first, past = part or (0, self.size(step))
        start, past = step * self.batch_size, min(past, self.size(step))
        if not self._mixup:
            images, labels = self.raw_batch(epoch, step, part=part)
            return self._finished(images, slice(start + first, start + past), memory_format), labels
        images, labels = self.raw_batch(epoch, step)  # of all: the partners may be anywhere among them
        others = self._partners[start + first : start + past]
        mixed = self._finished(images[first:past], slice(start + first, start + past), memory_format)
        added = self._finished(images.index_select(0, others), start + others, memory_format)
        share = self.share(epoch, step)
        labels = torch.stack([labels[first:past], labels.index_select(0, others)], 1)
        return mixed.mul_(share).add_(added.mul_(1 - share)), labels

    def share(self, epoch: int, step: int) -> float:
        """Of the first of two labels, and of a picture in what it is mixed to; 1 without mixup."""
        return mixup_share(self._seed, epoch, step, self._mixup) if self._mixup else 1.0

    def _finished(self, images: Tensor, places: slice | Tensor, memory_format: torch.memory_format) -> Tensor:
        """Normalised, and without what is erased. `places`: of the pictures in the epoch's order."""
        out = self._normalize(images, memory_format)
        for boxes in self._boxes:
            erase_(out, boxes[:, places])
        return out

    def raw_batch(self, epoch: int, step: int, *, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """As `batch`, cropped and flipped but not normalised: uint8 [B, C, N, N], int64 [B]."""
        first, past = part or (0, self.size(step))
        start = step * self.batch_size
        plan = self._epoch_plan(epoch)
        chosen = slice(start + first, start + min(past, self.size(step)))
        labels = self._labels.index_select(0, plan[0, chosen])
        if self._cutter is not None:
            following = slice(chosen.start + self.batch_size, min(chosen.stop + self.batch_size, self._count))
            images = self._cutter.cut(plan, chosen, following, augment=self._augment)
        else:
            images = self._images.index_select(0, plan[0, chosen])
            if self._augment:
                images = self._crop_and_flip(images, *plan[1:, chosen])
        images, labels = (one.to(self._device, non_blocking=True) for one in (images, labels))
        return self._enlarge(images), labels

    def _epoch_plan(self, epoch: int) -> Tensor:
        """int64 [4, N]: sample, top, left, flip in the epoch's order; one transfer an epoch. Of pictures on the disk
        [6, N]: with the crop's height and width before the flip."""
        if epoch != self._planned_epoch:
            order = epoch_order(self._seed, epoch, self._count)
            draws = augmentation(self._seed, epoch, order)
            if self._cutter is not None:
                draws = np.concatenate([self._cutter.boxes(epoch, order), draws[2:]])
            self._plan = torch.from_numpy(np.stack([order, *draws])).to(self._place)
            found = []
            if self._cutout is not None:
                found.append(cutout_boxes(self._seed, epoch, order, self._size, self._cutout))
            if self._erasing:
                found.append(erased_boxes(self._seed, epoch, order, self._size, self._erasing))
            self._boxes = tuple(torch.from_numpy(boxes.astype(np.int16)).to(self._device) for boxes in found)
            if self._mixup:
                each = [partners(self._seed, epoch, at, self.size(at)) for at in range(self.steps_per_epoch)]
                self._partners = torch.from_numpy(np.concatenate(each)).to(self._device)
            self._planned_epoch = epoch
        return self._plan

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Rows from `top`, columns from `left` of the padded pictures; columns mirrored where `flip` is 1."""
        (n, channels), side = images.shape[:2], self._side
        width = side + 2 * PADDING
        padded = F.pad(images, (PADDING,) * 4).view(n * channels * width, width)
        first = torch.arange(n, device=images.device) * (channels * width) + top
        rows = (first.view(n, 1, 1) + self._rows).view(-1)
        bands = padded.index_select(0, rows).view(n, channels, side, width)
        # left + j, or left + side - 1 - j if flipped
        columns = (left + flip * (side - 1)).view(n, 1) + (1 - 2 * flip).view(n, 1) * self._columns
        return bands.gather(3, columns.view(n, 1, 1, side).expand(n, channels, side, side))


def eval_batches(
    pictures: AnyPictures,
    batch: int,
    mean: PerChannel,
    std: PerChannel,
    device: torch.device | str,
    memory_format: torch.memory_format = _CONTIGUOUS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures in order, not augmented: float32 [B, C, N, N] normalised, int64 [B], on the device, one batch at
    a time: evaluation must not hold a second data set on a small card. Of larger pictures on the disk the middle."""
    if batch < 1:
        raise ValueError(f"batch {batch}: it must be at least 1")
    place = torch.device(device)
    normalize = Normalizer(mean, std, place)
    for start in range(0, len(pictures), batch):
        part = pictures.part(start, min(start + batch, len(pictures)))
        yield normalize(as_seen(part, place), memory_format), part.labels.to(place)


def as_seen(pictures: AnyPictures, device: torch.device) -> Tensor:
    """All of them as evaluation has them, but not normalised: uint8 [K, C, N, N]."""
    if isinstance(pictures, MappedPictures):
        return middles(pictures, range(len(pictures))).to(device)
    return Enlarger(pictures.side, pictures.image_size, device)(pictures.images.to(device))
