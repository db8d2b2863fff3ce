from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem.data import Pictures, TrainBatches, eval_batches
from lowmem.data.batches import augmentation, epoch_order
from lowmem.data.pictures import PerChannel, statistics

MEAN: PerChannel = (0.49, 0.48, 0.44)
STD: PerChannel = (0.24, 0.23, 0.26)


def pictures(n: int) -> Pictures:
    """Random pixels; the label is the index, so that a batch tells which samples it holds."""
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return Pictures(images, torch.arange(n))


def batches(data: Pictures, batch: int, *, seed: int = 0, augment: bool = True) -> TrainBatches:
    return TrainBatches(data, seed=seed, batch=batch, augment=augment, mean=MEAN, std=STD, device="cpu")


def epoch(data: Pictures, batch: int, number: int = 0, **options: int | bool) -> tuple[Tensor, Tensor]:
    made = batches(data, batch, **options)  # type: ignore[arg-type]
    parts = [made.batch(number, step) for step in range(made.steps_per_epoch)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def naive(image: Tensor, top: int, left: int, flip: int) -> Tensor:
    """One picture, the plain way: paste on black, cut, mirror."""
    canvas = torch.zeros(3, 40, 40, dtype=torch.uint8)
    canvas[:, 4:36, 4:36] = image
    cut = canvas[:, top : top + 32, left : left + 32]
    return cut.flip(2) if flip else cut


def test_crop_and_flip_are_the_naive_ones() -> None:
    data = pictures(700)
    made = batches(data, 700, seed=3)
    images, labels = made.raw_batch(5, 0)
    tops, lefts, flips = augmentation(3, 5, labels.numpy())
    assert len({(t, x, f) for t, x, f in zip(tops, lefts, flips, strict=True)}) > 150  # of 162
    expected = [
        naive(data.images[label], int(tops[i]), int(lefts[i]), int(flips[i])) for i, label in enumerate(labels.tolist())
    ]
    assert torch.equal(images, torch.stack(expected))


def test_normalisation_is_that_of_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    data = pictures(16)
    ours, _ = next(eval_batches(data, 16, MEAN, STD, "cpu"))
    theirs = transforms.normalize(data.images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.integers(1, 100), st.integers(0, 2**40), st.integers(0, 1000))
def test_every_sample_once_an_epoch(n: int, batch: int, seed: int, number: int) -> None:
    made = batches(pictures(n), batch, seed=seed)
    sizes = [len(made.batch(number, step)[1]) for step in range(made.steps_per_epoch)]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch
    _, labels = epoch(pictures(n), batch, number, seed=seed)
    assert sorted(labels.tolist()) == list(range(n))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 130), st.integers(1, 130))
def test_draws_do_not_depend_on_the_batch(first: int, second: int) -> None:
    data = pictures(130)
    (x, y), (x2, y2) = epoch(data, first, 7), epoch(data, second, 7)
    assert torch.equal(y, y2)
    assert torch.equal(x, x2)


def test_batches_of_32_and_128_see_the_same_pictures() -> None:
    data = pictures(300)
    (x, y), (x2, y2) = epoch(data, 32), epoch(data, 128)
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)


def test_steps_can_be_asked_in_any_order() -> None:
    data = pictures(100)
    forward = [batches(data, 16).batch(e, s) for e in (0, 1) for s in range(7)]
    made = batches(data, 16)
    backward = [made.batch(e, s) for e in (1, 0) for s in reversed(range(7))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forward, backward, strict=True))


def test_a_sample_s_draw_does_not_depend_on_the_others() -> None:
    alone, among = augmentation(1, 2, np.array([77])), augmentation(1, 2, np.arange(100))
    assert alone[:, 0].tolist() == among[:, 77].tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(seed, number, 500).tolist() for seed in (0, 1) for number in (0, 1)]
    tops = [augmentation(seed, number, np.arange(500))[0].tolist() for seed in (0, 1) for number in (0, 1)]
    for found in (orders, tops):
        assert len({tuple(values) for values in found}) == 4


def test_draws_are_uniform_and_independent() -> None:
    top, left, flip = augmentation(0, 0, np.arange(162_000))
    cells = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
    # 162 cells of 1000 on average: chi square of 161 degrees of freedom; 4.5 deviations
    assert abs(((cells - 1000) ** 2 / 1000).sum() - 161) < 4.5 * (2 * 161) ** 0.5


def test_known_draws_stay_what_they_are() -> None:
    """A run that is resumed with a later version must see the same pictures."""
    draws = augmentation(0, 0, np.arange(6))
    assert epoch_order(0, 0, 8).tolist() == KNOWN_ORDER
    assert draws.tolist() == KNOWN_DRAWS


KNOWN_ORDER = [7, 2, 6, 3, 1, 4, 0, 5]
KNOWN_DRAWS = [[5, 4, 7, 4, 5, 0], [2, 7, 4, 6, 4, 3], [0, 1, 0, 0, 0, 1]]


def test_without_augmentation_pictures_are_only_reordered() -> None:
    data = pictures(40)
    images, labels = batches(data, 40, augment=False).raw_batch(0, 0)
    assert torch.equal(images, data.images[labels])
    assert labels.tolist() == epoch_order(0, 0, 40).tolist()


def test_the_source_is_never_written_to() -> None:
    data = pictures(20)
    before = data.images.clone()
    for augment in (True, False):
        epoch(data, 8, augment=augment)
    list(eval_batches(data, 8, MEAN, STD, "cpu"))
    assert torch.equal(data.images, before)


def test_channels_last_changes_only_the_layout() -> None:
    data = pictures(10)
    plain, _ = batches(data, 8).batch(0, 0)
    last, _ = batches(data, 8).batch(0, 0, memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    evaluated, _ = next(eval_batches(data, 8, MEAN, STD, "cpu", torch.channels_last))
    assert evaluated.is_contiguous(memory_format=torch.channels_last)


def test_normalised_training_pictures_are_centred() -> None:
    data = pictures(200)
    mean, std = statistics(data)
    images, _ = next(eval_batches(data, 200, mean, std, "cpu"))
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_evaluation_is_in_order_and_whole() -> None:
    data = pictures(25)
    parts = list(eval_batches(data, 8, MEAN, STD, torch.device("cpu")))
    assert [len(y) for _, y in parts] == [8, 8, 8, 1]
    assert torch.cat([y for _, y in parts]).tolist() == list(range(25))


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_beyond_the_epoch_is_refused(step: int) -> None:
    with pytest.raises(IndexError, match="of an epoch of 3 steps"):
        batches(pictures(20), 8).batch(0, step)


def test_no_pictures_or_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batches(pictures(0), 8)
    with pytest.raises(ValueError, match="at least 1"):
        batches(pictures(5), 0)
    with pytest.raises(ValueError, match="at least 1"):
        next(eval_batches(pictures(5), 0, MEAN, STD, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_pictures_without_waiting() -> None:
    data = pictures(300)
    cpu = batches(data, 128)
    gpu = TrainBatches(data, seed=0, batch=128, augment=True, mean=MEAN, std=STD, device="cuda")
    gpu.batch(2, 0)  # plans the epoch: the one transfer
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [gpu.batch(2, step) for step in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (images, labels) in enumerate(made):
        expected, classes = cpu.batch(2, step)
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), classes)
