from __future__ import annotations

import numpy as np
import pytest
import torch

from lowmem.config.sections import DataConfig
from lowmem.core.errors import ExitCode, UsageError
from lowmem.data import load
from lowmem.data import shapes as source


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = source.generate(train=1000, test=200)
    monkeypatch.setattr(source, "generate", lambda: small)


def shapes(seed: int = 0, **settings: int) -> object:
    return load(DataConfig(source="shapes", **settings), seed)  # type: ignore[arg-type]


def test_subsets_and_split_have_the_same_share_of_every_class() -> None:
    data = load(DataConfig(source="shapes", train_subset=500, test_subset=100, val_split=100), 0)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (400, 100, 100)
    for part, each in ((data.train, 40), (data.val, 10), (data.test, 10)):
        assert torch.bincount(part.labels).tolist() == [each] * 10


def test_validation_pictures_are_taken_from_the_training_subset() -> None:
    whole = load(DataConfig(source="shapes", train_subset=300), 4)
    split = load(DataConfig(source="shapes", train_subset=300, val_split=70), 4)
    assert split.val is not None

    def keys(images: torch.Tensor) -> list[bytes]:
        return [image.numpy().tobytes() for image in images]

    assert sorted(keys(split.train.images) + keys(split.val.images)) == sorted(keys(whole.train.images))


def test_the_seed_chooses() -> None:
    config = DataConfig(source="shapes", train_subset=500)
    first, again, other = load(config, 1), load(config, 1), load(config, 2)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert np.array_equal(first.mean, again.mean)
    assert first.mean != other.mean
    assert torch.equal(first.test.images, other.test.images)


def test_a_subset_of_everything_is_everything() -> None:
    whole = load(DataConfig(source="shapes"), 0)
    same = load(DataConfig(source="shapes", train_subset=1000, test_subset=200), 5)
    assert whole.val is None
    assert whole.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"train_subset": 1001}, ("1,001", "1,000")),
        ({"test_subset": 201}, ("201", "200")),
        ({"val_split": 1000}, ("1,000", "1,000")),
        ({"train_subset": 50, "val_split": 60}, ("60", "50")),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(settings: dict[str, int], numbers: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        shapes(**settings)
    message = str(caught.value)
    assert all(number in message for number in numbers)
    assert "\n" not in message
    assert caught.value.exit_code == ExitCode.USAGE
