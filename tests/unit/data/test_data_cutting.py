"""Batches cut from pictures on the disk: random resized crops as torchvision defines them, of addressed draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

from lowmem.core import counter_rng
from lowmem.data import TrainBatches, eval_batches
from lowmem.data.batches import augmentation
from lowmem.data.cutting import ASPECT, SCALE, Cutter, crop_boxes, middles
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import MappedPictures, PerChannel

SIDE, SIZE, COUNT = 73, 64, 90
MEAN: PerChannel = (0.49, 0.48, 0.44)
STD: PerChannel = (0.24, 0.23, 0.26)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> MappedPictures:
    """The label is the index."""
    keys = [number.to_bytes(16, "big") for number in range(1, COUNT + 1)]
    store = MappedStore(tmp_path_factory.mktemp("pieces"), "test", keys, SIDE)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    for number in range(COUNT):
        store.put(number, pixels[number])
    store.close()
    return store.pictures(range(COUNT), torch.arange(COUNT), SIZE)


def batches(pictures: MappedPictures, batch: int, *, seed: int = 0, augment: bool = True) -> TrainBatches:
    return TrainBatches(pictures, seed=seed, batch=batch, augment=augment, mean=MEAN, std=STD, device="cpu")


def epoch(pictures: MappedPictures, batch: int, number: int = 0) -> tuple[Tensor, Tensor]:
    made = batches(pictures, batch)
    parts = [made.raw_batch(number, step) for step in range(made.steps_per_epoch)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def scalar_box(seed: int, epoch: int, sample: int, side: int) -> tuple[int, int, int, int]:
    """torchvision's `get_params`, with our draws in the place of its own."""

    def halves(what: str, attempt: int) -> tuple[int, int]:
        key = counter_rng.derive_seed(seed, "crop", what, epoch, attempt)
        return divmod(int(counter_rng.draw_uint64(key, np.array([sample]))[0]), 2**32)

    for attempt in range(10):
        area, ratio = (draw / 2**32 for draw in halves("size", attempt))
        target = side * side * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
        aspect = math.exp(low + ratio * (high - low))
        width, height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < width <= side and 0 < height <= side:
            down, across = halves("place", attempt)
            return down * (side - height + 1) // 2**32, across * (side - width + 1) // 2**32, height, width
    return 0, 0, side, side


def test_boxes_are_by_torchvision_s_rule() -> None:
    boxes = crop_boxes(3, 5, np.arange(2000), 256)
    assert [tuple(box) for box in boxes.T.tolist()] == [scalar_box(3, 5, sample, 256) for sample in range(2000)]


def test_boxes_are_distributed_like_torchvision_s() -> None:
    ours = crop_boxes(0, 0, np.arange(6_000), 256)
    torch.manual_seed(0)
    whole = torch.empty(3, 256, 256)
    theirs = np.array([RandomResizedCrop.get_params(whole, list(SCALE), list(ASPECT)) for _ in range(6_000)]).T
    for of in (lambda b: b[2] * b[3], lambda b: np.log(b[3] / b[2]), lambda b: b[0], lambda b: b[1]):
        a, b = of(ours), of(theirs)
        assert abs(a.mean() - b.mean()) < 5 * b.std() * (2 / 6_000) ** 0.5
        assert a.std() == pytest.approx(b.std(), rel=0.03)
    top, left, height, width = ours
    assert (np.minimum(top, left) >= 0).all()
    assert ((top + height <= 256) & (left + width <= 256) & (height > 0) & (width > 0)).all()


def test_a_batch_is_cropped_resized_and_mirrored(pictures: MappedPictures) -> None:
    images, labels = batches(pictures, COUNT, seed=2).raw_batch(4, 0)
    order = labels.numpy()
    boxes, flips = crop_boxes(2, 4, order, SIDE), augmentation(2, 4, order)[2]
    assert set(flips.tolist()) == {0, 1}
    expected = []
    for index, (top, left, height, width), flip in zip(order, boxes.T.tolist(), flips, strict=True):
        cut = pictures[index][top : top + height, left : left + width].permute(2, 0, 1)[None]
        resized = F.interpolate(cut, (SIZE, SIZE), mode="bilinear", antialias=True)
        expected.append(resized.flip(3) if flip else resized)
    assert images.dtype == torch.uint8
    assert torch.equal(images, torch.cat(expected))


def test_pixels_are_near_torchvision_s_in_floating_point(pictures: MappedPictures) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images, labels = batches(pictures, COUNT).raw_batch(0, 0)
    order = labels.numpy()
    boxes, flips = crop_boxes(0, 0, order, SIDE), augmentation(0, 0, order)[2]
    for image, index, box, flip in zip(images, order, boxes.T.tolist(), flips, strict=True):
        exact = functional.resized_crop(pictures[index].permute(2, 0, 1).float(), *box, [SIZE, SIZE], antialias=True)
        exact = exact.flip(2) if flip else exact
        assert (image - exact).abs().max() <= 1.01


def test_pictures_do_not_depend_on_the_batch_the_order_or_the_part(pictures: MappedPictures) -> None:
    whole, labels = epoch(pictures, COUNT, 7)
    for batch in (1, 13, 32):
        images, same = epoch(pictures, batch, 7)
        assert torch.equal(labels, same)
        assert torch.equal(images, whole)
    made = batches(pictures, 32)
    for step in (2, 0, 1):  # in any order, and a process's part of each
        parts = [made.raw_batch(7, step, part=part)[0] for part in ((0, 5), (5, 21), (21, 32))]
        assert torch.equal(torch.cat(parts), whole[32 * step : 32 * step + 32])


def test_threads_and_beginning_the_next_do_not_change_a_batch(pictures: MappedPictures) -> None:
    threads = torch.get_num_threads()
    whole, labels = epoch(pictures, 40)
    torch.set_num_threads(3)
    try:
        made = batches(pictures, 40)
        made._cutter = Cutter(pictures, 0, ahead=True)
        for step in (0, 1, 2, 1, 1, 2):  # what is asked for and what was begun differ, too
            images, same = made.raw_batch(0, step)
            assert torch.equal(images, whole[40 * step : 40 * step + 40])
            assert torch.equal(same, labels[40 * step : 40 * step + 40])
        assert torch.equal(made.raw_batch(1, 0)[0], epoch(pictures, 40, 1)[0][:40])
    finally:
        torch.set_num_threads(threads)


def test_epochs_and_seeds_differ() -> None:
    boxes = [crop_boxes(seed, number, np.arange(100), 256).tobytes() for seed in (0, 1) for number in (0, 1)]
    assert len(set(boxes)) == 4


def test_a_sample_s_box_does_not_depend_on_the_others() -> None:
    alone, among = crop_boxes(1, 2, np.array([77]), 256), crop_boxes(1, 2, np.arange(100), 256)
    assert alone[:, 0].tolist() == among[:, 77].tolist()


def test_known_boxes_stay_what_they_are() -> None:
    """A run that is resumed with a later version must see the same pictures."""
    assert crop_boxes(0, 0, np.arange(4), 256).T.tolist() == KNOWN_BOXES


def test_evaluation_sees_the_middle(pictures: MappedPictures) -> None:
    found = list(eval_batches(pictures, 40, MEAN, STD, "cpu"))
    assert [len(labels) for _, labels in found] == [40, 40, 10]
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(COUNT))
    border = (SIDE - SIZE) // 2
    middle = torch.stack([pictures[i][border : border + SIZE, border : border + SIZE] for i in range(COUNT)])
    assert torch.equal(middles(pictures, range(COUNT)), middle.permute(0, 3, 1, 2))
    normal = (middle.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(torch.cat([images for images, _ in found]), normal, rtol=1e-5, atol=1e-5)


def test_training_without_augmentation_sees_the_middle(pictures: MappedPictures) -> None:
    images, labels = batches(pictures, COUNT, augment=False).raw_batch(0, 0)
    assert torch.equal(images, middles(pictures, labels.tolist()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_are_normalised_in_the_wanted_layout(pictures: MappedPictures, layout: torch.memory_format) -> None:
    made = batches(pictures, 16)
    raw, _ = made.raw_batch(0, 1)
    images, _ = made.batch(0, 1, memory_format=layout)
    assert images.is_contiguous(memory_format=layout)
    normal = (raw / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(images, normal, rtol=1e-5, atol=1e-5)


def test_a_part_has_all_that_it_needs(pictures: MappedPictures) -> None:
    part = pictures.part(10, 20)
    assert part.labels.tolist() == list(range(10, 20))
    assert torch.equal(part[3], pictures[13])


KNOWN_BOXES = [[5, 0, 248, 252], [0, 0, 254, 256], [5, 8, 195, 183], [25, 14, 198, 231]]
