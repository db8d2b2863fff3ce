from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowmem import models
from lowmem.config import DataConfig
from lowmem.data import Dataset, TrainBatches, eval_batches, load
from lowmem.data.shapes import draw, generate


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return load(DataConfig(source="shapes"), seed=0)


def test_sizes_and_balance(shapes: Dataset) -> None:
    assert len(shapes.train) == 10_000
    assert len(shapes.test) == 2_000
    assert len(shapes.classes) == 10
    assert torch.bincount(shapes.train.labels).tolist() == [1000] * 10
    assert torch.bincount(shapes.test.labels).tolist() == [200] * 10


def test_pixels_are_the_known_ones() -> None:
    """Bit-identical on every platform: this hash was taken once."""
    digest = hashlib.sha256(draw("train", 40).images.numpy().tobytes()).hexdigest()
    assert digest == KNOWN_PIXELS


KNOWN_PIXELS = "ee0e50042dcf84d94a336c4359720be4680d1d87c9f338d344c56fa67ea876e0"


def test_a_picture_does_not_depend_on_how_many_there_are(shapes: Dataset) -> None:
    few = generate(train=1013, test=11)
    assert torch.equal(few.train.images, shapes.train.images[:1013])
    assert torch.equal(few.test.images, shapes.test.images[:11])


def test_train_and_test_share_no_picture(shapes: Dataset) -> None:
    def hashes(images: torch.Tensor) -> set[bytes]:
        return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images}

    train, test = hashes(shapes.train.images), hashes(shapes.test.images)
    assert len(train) == 10_000
    assert not train & test


def test_a_linear_model_fails(shapes: Dataset) -> None:
    """Ridge regression on pixels, with the best of the strengths 1e1 .. 1e5 on the test pictures themselves."""

    def features(images: torch.Tensor) -> torch.Tensor:
        flat = (images.flatten(1).float() - 127.5) / 64
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)

    train, test = features(shapes.train.images), features(shapes.test.images)
    gram, targets = train.T @ train, train.T @ F.one_hot(shapes.train.labels, 10).float()
    factor = torch.linalg.cholesky(gram + 1e5 * torch.eye(len(gram)))
    weights = torch.cholesky_solve(targets, factor)
    error = ((test @ weights).argmax(1) != shapes.test.labels).float().mean().item()
    print(f"ridge regression on pixels: {100 * error:.1f} % test error")
    assert error > 0.5


@pytest.mark.slow
def test_res20_learns_it_in_three_epochs(shapes: Dataset) -> None:
    torch.manual_seed(0)
    model = models.build("res20", width=16)
    batches = TrainBatches(
        shapes.train, seed=0, batch=128, augment=True, mean=shapes.mean, std=shapes.std, device="cpu"
    )
    steps = 3 * batches.steps_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    started = time.perf_counter()
    for step in range(steps):
        images, labels = batches.batch(*divmod(step, batches.steps_per_epoch))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        wrong = [
            (model(images).argmax(1) != labels).numpy()
            for images, labels in eval_batches(shapes.test, 500, shapes.mean, shapes.std, "cpu")
        ]
    error = float(np.concatenate(wrong).mean())
    print(f"Res20 width 16, 3 epochs: {100 * error:.2f} % test error, {seconds:.0f} s of training")
    assert error < 0.15
