"""Small pictures made larger: bilinear, the same bytes everywhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowmem.config.sections import DataConfig
from lowmem.data import Pictures, TrainBatches, eval_batches, load
from lowmem.data.enlarging import Enlarger
from lowmem.data.pictures import PerChannel

CPU = torch.device("cpu")
MEAN: PerChannel = (0.5, 0.5, 0.5)


def noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [33, 48, 64, 224])
def test_it_is_bilinear(size: int) -> None:
    images = noise(8)
    ours = Enlarger(32, size, CPU)(images)
    assert ours.dtype == torch.uint8
    assert ours.shape == (8, 3, size, size)
    exact = F.interpolate(images.double(), (size, size), mode="bilinear", align_corners=False)
    # Weights in 1/128, twice, of steps of up to 255 levels, and two roundings.
    assert (ours - exact).abs().max() <= 2 * 255 / 256 + 1
    assert (ours - exact).abs().mean() < 0.6


def test_flat_pictures_stay_flat() -> None:
    for level in (0, 1, 127, 254, 255):
        assert (Enlarger(32, 100, CPU)(torch.full((1, 3, 32, 32), level, dtype=torch.uint8)) == level).all()


def test_of_the_same_size_nothing_is_done() -> None:
    images = noise(2)
    assert Enlarger(32, 32, CPU)(images) is images


def test_every_step_is_exact_in_half_of_float32_s_digits() -> None:
    """So no order of the sums, and no kernel, can change a byte; TF32 has ten."""
    weights = Enlarger(32, 224, CPU)._weights
    assert weights is not None
    assert torch.equal(weights, (weights * 128).round() / 128)
    assert ((weights > 0).sum(1) <= 2).all()
    images = noise(4)
    alone = torch.cat([Enlarger(32, 224, CPU)(one[None]) for one in images])
    assert torch.equal(alone, Enlarger(32, 224, CPU)(images))
    rows = (weights.double() @ images.double() + 0.5).floor()
    assert torch.equal(((rows @ weights.T.double()) + 0.5).floor().to(torch.uint8), alone)


def test_batches_are_cropped_as_ever_and_then_enlarged() -> None:
    own = Pictures(noise(50), torch.arange(50))
    larger = Pictures(own.images, own.labels, enlarged_to=64)
    assert (own.image_size, larger.image_size, larger.side) == (32, 64, 32)
    options = {"seed": 1, "batch": 20, "augment": True, "mean": MEAN, "std": MEAN, "device": "cpu"}
    (small, labels), (large, same) = (
        TrainBatches(one, **options).raw_batch(3, 2)  # type: ignore[arg-type]
        for one in (own, larger)
    )
    assert torch.equal(labels, same)
    assert torch.equal(large, Enlarger(32, 64, CPU)(small))
    images, _ = next(eval_batches(larger.part(10, 14), 8, MEAN, MEAN, "cpu"))
    expected = Enlarger(32, 64, CPU)(own.images[10:14])
    torch.testing.assert_close(images, (expected / 255 - 0.5) / 0.5)


def test_a_source_of_its_own_size_is_enlarged() -> None:
    settings = {"source": "shapes", "train_subset": 20, "test_subset": 10}
    own, larger = (load(DataConfig(**settings, image_size=size), 0) for size in (32, 96))  # type: ignore[arg-type]
    assert isinstance(larger.train, Pictures)
    assert torch.equal(own.train.images, larger.train.images)  # type: ignore[union-attr]
    assert own.fingerprint == larger.fingerprint
    assert not any("32x32" in note for note in own.notes)
    assert "pictures of 32x32 are cropped at their own size and enlarged to 96x96 as a batch" in larger.notes
    assert (own.describe()["image_size"], larger.describe()["image_size"]) == (32, 96)


@pytest.mark.parametrize("source", ["cifar10", "fashion-mnist", "shapes"])
def test_and_not_shrunk(source: str) -> None:
    with pytest.raises(ValueError, match=f"{source} has pictures of 32x32, and image_size 24 is less: raise it to 32"):
        DataConfig(source=source, image_size=24)
    with pytest.raises(ValueError, match="cannot be enlarged to 24"):
        Pictures(noise(1), torch.zeros(1, dtype=torch.int64), enlarged_to=24)
