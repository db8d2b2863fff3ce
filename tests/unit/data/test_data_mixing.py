"""Cutout, random erasing and mixup: functions of seed, epoch and picture (or step), whoever makes the batch."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing

from lowmem.core import counter_rng
from lowmem.data import Pictures, TrainBatches
from lowmem.data.batches import epoch_order
from lowmem.data.cutting import ATTEMPTS
from lowmem.data.mapped import MappedStore
from lowmem.data.mixing import (
    ERASED_AREA,
    ERASED_ASPECT,
    cutout_boxes,
    erase_,
    erased_boxes,
    mixup_share,
    partners,
)
from lowmem.data.pictures import AnyPictures, PerChannel

MEAN: PerChannel = (0.49, 0.48, 0.44)
STD: PerChannel = (0.24, 0.23, 0.26)
COUNT = 50
ALL = {"cutout": 9, "random_erasing": 0.5, "mixup": 0.4}


@pytest.fixture(scope="module", params=["held", "enlarged", "on the disk"])
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyPictures:
    """The label is the index."""
    rng, labels = np.random.default_rng(0), torch.arange(COUNT)
    if request.param != "on the disk":
        images = torch.from_numpy(rng.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8))
        return Pictures(images, labels, enlarged_to=40 if request.param == "enlarged" else 32)
    keys = [number.to_bytes(16, "big") for number in range(1, COUNT + 1)]
    store = MappedStore(tmp_path_factory.mktemp("pieces"), "test", keys, 73)
    for number in range(COUNT):
        store.put(number, rng.integers(0, 256, (73, 73, 3), dtype=np.uint8))
    store.close()
    return store.pictures(range(COUNT), labels, 64)


def batches(data: AnyPictures, batch: int = 16, *, seed: int = 3, **options: float) -> TrainBatches:
    return TrainBatches(data, seed=seed, batch=batch, augment=True, mean=MEAN, std=STD, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [ALL, {"cutout": 9}, {"random_erasing": 0.5}, {"mixup": 0.4}])
def test_any_part_of_a_batch_has_the_bits_that_it_has_in_the_whole(
    pictures: AnyPictures, options: dict[str, float]
) -> None:
    """However many processes share it, and in whatever order steps are asked for."""
    made = batches(pictures, **options)
    whole = [made.batch(2, step) for step in range(made.steps_per_epoch)]
    for step in reversed(range(made.steps_per_epoch)):
        size = made.size(step)
        for cuts in ((0, size), (0, 1, size), (0, 7, 9, size) if size > 9 else (0, size)):
            parts = [batches(pictures, **options).batch(2, step, part=part) for part in pairwise(cuts)]
            for together, expected in zip(zip(*parts, strict=True), whole[step], strict=True):
                assert torch.equal(torch.cat(together), expected)
    assert made.size(made.steps_per_epoch - 1) == 2  # the last is a smaller one


def test_what_is_erased_does_not_depend_on_the_batch(pictures: AnyPictures) -> None:
    options = {"cutout": 9, "random_erasing": 0.5}
    found = [
        torch.cat([made.batch(1, step)[0] for step in range(made.steps_per_epoch)])
        for made in (batches(pictures, size, **options) for size in (1, 16, COUNT))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], batches(pictures, COUNT, **options).batch(2, 0)[0])
    assert not torch.equal(found[2], batches(pictures, COUNT, seed=4, **options).batch(1, 0)[0])


def test_the_rest_of_a_picture_stays_as_it_was(pictures: AnyPictures) -> None:
    plain, labels = batches(pictures, COUNT).batch(1, 0)
    cut, same = batches(pictures, COUNT, cutout=9).batch(1, 0)
    assert torch.equal(labels, same)
    side = plain.shape[-1]
    for picture, changed, box in zip(plain, cut, cutout_boxes(3, 1, labels.numpy(), side, 9).T.tolist(), strict=True):
        expected = picture.clone()
        top, left, height, width = box
        expected[:, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = 0
        assert torch.equal(changed, expected)
        assert (height, width) == (9, 9)
        assert -4 <= min(top, left) <= max(top, left) < side - 4


def test_cutouts_centres_are_uniform() -> None:
    top, left, _, _ = cutout_boxes(0, 0, np.arange(64_000), 8, 4) + 2
    cells = np.bincount(top * 8 + left, minlength=64)
    assert len(cells) == 64
    assert abs(((cells - 1000) ** 2 / 1000).sum() - 63) < 4.5 * (2 * 63) ** 0.5


def _scalar_box(seed: int, epoch: int, sample: int, side: int) -> list[int]:
    """torchvision's `RandomErasing.get_params`, with our draws in the place of its own."""

    def halves(what: str, attempt: int) -> tuple[int, int]:
        key = counter_rng.derive_seed(seed, "erasing", what, epoch, attempt)
        return divmod(int(counter_rng.draw_uint64(key, np.array([sample]))[0]), 2**32)

    for attempt in range(ATTEMPTS):
        area, ratio = (draw / 2**32 for draw in halves("size", attempt))
        erased = side * side * (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0]))
        low, high = map(math.log, ERASED_ASPECT)
        aspect = math.exp(low + ratio * (high - low))
        width, height = round(math.sqrt(erased * aspect)), round(math.sqrt(erased / aspect))
        if 0 < width < side and 0 < height < side:
            down, across = halves("place", attempt)
            return [down * (side - height + 1) >> 32, across * (side - width + 1) >> 32, height, width]
    return [0, 0, 0, 0]


def test_random_erasing_is_torchvisions_of_our_draws() -> None:
    usual = RandomErasing()
    assert (tuple(usual.scale), tuple(usual.ratio)) == (ERASED_AREA, ERASED_ASPECT)
    boxes = erased_boxes(5, 2, np.arange(300), 32, 1.0)
    assert boxes.T.tolist() == [_scalar_box(5, 2, sample, 32) for sample in range(300)]
    some = erased_boxes(5, 2, np.arange(20_000), 32, 0.25)
    there = some[2] > 0
    assert there.mean() == pytest.approx(0.25, abs=0.015)
    assert np.array_equal(some[:, there], erased_boxes(5, 2, np.arange(20_000), 32, 1.0)[:, there])


def test_an_empty_box_erases_nothing() -> None:
    images = torch.ones(2, 3, 8, 8)
    erase_(images, torch.tensor([[0, 2], [0, 3], [0, 4], [0, 2]]))
    assert images[0].eq(1).all()
    assert (images[1] == 0).nonzero().tolist() == [
        [channel, row, column] for channel in range(3) for row in range(2, 6) for column in range(3, 5)
    ]


def test_mixup_is_the_papers(pictures: AnyPictures) -> None:
    """`lam * x + (1 - lam) * x[index, :]`, of what is erased already."""
    erased = {"cutout": 9, "random_erasing": 0.5}
    plain, mixed = batches(pictures, **erased), batches(pictures, mixup=0.4, **erased)
    shares = []
    for step in range(plain.steps_per_epoch):
        (x, y), share = plain.batch(1, step), mixed.share(1, step)
        index = torch.from_numpy(partners(3, 1, step, len(y)))
        images, labels = mixed.batch(1, step)
        assert torch.equal(images, share * x + (1 - share) * x[index])
        assert torch.equal(labels, torch.stack([y, y[index]], 1))
        assert sorted(index.tolist()) == list(range(len(y)))
        shares.append(share)
    assert len(set(shares)) == len(shares)
    assert plain.share(1, 0) == 1.0
    last = mixed.batch(1, 0, memory_format=torch.channels_last)[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, mixed.batch(1, 0)[0])


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.999, 1.0, 2.5, 100.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    shares = np.array([mixup_share(0, 0, step, alpha) for step in range(4000)])
    drawn = np.round(np.random.default_rng(0).beta(alpha, alpha, 200_000) * 2**24) / 2**24
    assert ((shares >= 0) & (shares <= 1)).all()
    assert (np.float32(shares) == shares).all()
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand times
    for at in np.quantile(drawn, np.linspace(0.01, 0.99, 99)):
        assert abs((shares <= at).mean() - (drawn <= at).mean()) < 1.95 / math.sqrt(4000) + 0.003


def test_known_draws_stay_what_they_are() -> None:
    """A run that is resumed with a later version must see the same pictures."""
    assert cutout_boxes(0, 0, np.arange(3), 32, 8).tolist() == KNOWN_CUTOUT
    assert erased_boxes(0, 0, np.arange(4), 32, 0.5).tolist() == KNOWN_ERASED
    assert partners(0, 0, 0, 6).tolist() == KNOWN_PARTNERS
    assert [round(mixup_share(0, 0, 0, alpha) * 2**24) for alpha in (0.2, 1.0)] == KNOWN_SHARES


KNOWN_CUTOUT = [[2, 21, 24], [11, -2, 0], [8, 8, 8], [8, 8, 8]]
KNOWN_ERASED = [[0, 0, 12, 12], [0, 0, 6, 3], [0, 0, 8, 18], [0, 0, 23, 7]]
KNOWN_PARTNERS = [5, 2, 4, 0, 3, 1]
KNOWN_SHARES = [631001, 15380880]


def test_without_any_of_it_nothing_changes(pictures: AnyPictures) -> None:
    made = batches(pictures)
    images, labels = made.batch(0, 1)
    raw, _ = made.raw_batch(0, 1)
    shift = torch.tensor([255 * one for one in MEAN], dtype=torch.float32).view(3, 1, 1)
    scale = torch.tensor([1 / (255 * one) for one in STD], dtype=torch.float32).view(3, 1, 1)
    assert torch.equal(images, (raw.float() - shift) * scale)
    assert labels.tolist() == epoch_order(3, 0, COUNT)[16:32].tolist()
