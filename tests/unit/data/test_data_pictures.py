from __future__ import annotations

import numpy as np
import pytest
import torch

from lowmem.data.pictures import Pictures, fingerprint, statistics


def random_pictures(n: int, seed: int = 0, classes: int = 10) -> Pictures:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return Pictures(torch.from_numpy(images), torch.from_numpy(rng.integers(0, classes, n)))


def test_statistics_are_those_of_float64() -> None:
    pictures = random_pictures(50)
    values = pictures.images.double() / 255
    mean, std = statistics(pictures)
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_statistics_do_not_depend_on_order() -> None:
    pictures = random_pictures(50)
    assert statistics(pictures) == statistics(pictures.take(np.arange(50)[::-1]))


def test_a_constant_channel_can_be_divided_by() -> None:
    flat = Pictures(torch.full((4, 3, 32, 32), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert statistics(flat) == ((7 / 255,) * 3, (1 / 255,) * 3)


def test_fingerprint_tells_every_change() -> None:
    a, b = random_pictures(5), random_pictures(5, seed=1)
    pixel = Pictures(a.images.clone(), a.labels)
    pixel.images[4, 2, 31, 31] ^= 1
    label = Pictures(a.images, a.labels.clone())
    label.labels[0] += 1
    prints = [
        fingerprint(a, None, b),
        fingerprint(b, None, a),
        fingerprint(a, b, None),
        fingerprint(pixel, None, b),
        fingerprint(label, None, b),
        fingerprint(a.take(np.arange(4)), None, b),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(a, None, b) == fingerprint(random_pictures(5), None, random_pictures(5, seed=1))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 2, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_pictures_refuse_other_shapes(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="they must be"):
        Pictures(images, labels)
