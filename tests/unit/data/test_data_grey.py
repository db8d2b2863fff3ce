"""Pictures of one channel: a third of the bytes, the luma of those in colour, and their own caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lowmem.config.sections import DataConfig
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.data import Pictures, TrainBatches, downloaded, eval_batches, held_bytes, load
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import AnyPictures, MappedPictures, statistics
from tests.unit.data.test_data_cifar10 import cifar_root
from tests.unit.data.test_data_fashion import files

__all__ = ["cifar_root"]  # a fixture


def luma(images: Tensor) -> Tensor:
    """By Pillow, uint8 [N, 3, S, S] -> [N, 1, S, S]."""
    grey = [np.asarray(Image.fromarray(one).convert("L")) for one in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(grey)[:, None])


def test_colours_become_pillow_s_luma() -> None:
    noise = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colour = Pictures(noise, torch.arange(5000))
    grey = colour.grey()
    assert torch.equal(grey.images, luma(noise))
    assert (grey.channels, grey.images.nbytes * 3) == (1, noise.nbytes)
    assert torch.equal(grey.labels, colour.labels)
    assert grey.grey() is grey
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(Pictures(levels.expand(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64)).grey().images, levels)


@pytest.mark.parametrize("source", ["shapes", "cifar10"])
def test_a_source_in_colour(source: str, cifar_root: Path) -> None:
    settings: dict[str, Any] = {"source": source, "root": str(cifar_root), "train_subset": 40, "test_subset": 10}
    colour, grey = load(DataConfig(**settings), 0), load(DataConfig(**settings, channels=1), 0)
    assert torch.equal(grey.train.images, luma(colour.train.images))  # type: ignore[union-attr]
    assert torch.equal(grey.test.images, luma(colour.test.images))  # type: ignore[union-attr]
    assert grey.fingerprint != colour.fingerprint
    assert len(grey.mean) == len(grey.std) == len(grey.describe()["mean"]) == 1
    values = grey.train.images.double() / 255  # type: ignore[union-attr]
    assert grey.mean[0] == pytest.approx(float(values.mean()))
    assert grey.std[0] == pytest.approx(float(values.std(correction=0)))
    config = DataConfig(**settings, channels=1)
    assert config.image_shape == (1, 32, 32)
    assert held_bytes(config, 40) == 40 * 32 * 32 == grey.train.images.nbytes  # type: ignore[union-attr]


def test_fashion_mnist_has_one_channel_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloaded, "DEBIAN_FOLDER", tmp_path / "debian")
    for name, data in files().items():
        (tmp_path / name).write_bytes(data)
    settings: dict[str, Any] = {"source": "fashion-mnist", "root": str(tmp_path), "download": False}
    three, one = load(DataConfig(**settings), 0), load(DataConfig(**settings, channels=1), 0)
    assert torch.equal(one.train.images, three.train.images[:, :1])  # type: ignore[union-attr]
    assert (one.mean, one.std) == (three.mean[:1], three.std[:1])


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """In colour and grey, square and not."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / "wide.jpg")
            Image.fromarray(rng.integers(0, 256, (73, 73, 3), dtype=np.uint8)).save(folder / "square.png")
            Image.fromarray(rng.integers(0, 256, (80, 70), dtype=np.uint8)).save(folder / "grey.png")
    return tmp_path / "pets"


def of(pets: Path, **settings: Any) -> DataConfig:
    return DataConfig(source=f"folder:{pets}", cache=str(pets.parent / "cache"), **settings)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_a_folder_in_memory(pets: Path, fit: str) -> None:
    first = load(of(pets, fit=fit), 0)
    grey = load(of(pets, fit=fit, channels=1), 0)
    assert torch.equal(grey.train.images, luma(first.train.images))  # type: ignore[union-attr]


def test_a_folder_comes_from_the_cache_of_its_channels(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [of(pets, channels=channels, image_size=size) for size in (48, 64) for channels in (3, 1)]
    before = [load(config, 0).fingerprint for config in configs]
    assert len({*before}) == 4
    monkeypatch.setattr("lowmem.data.decoding.decode", lambda *how: pytest.fail("decoded again"))
    assert [load(config, 0).fingerprint for config in configs] == before


def stores(folder: Path, side: int, size: int) -> tuple[MappedPictures, MappedPictures]:
    """Grey pictures as one channel, and as three that are equal."""
    pixels, found = np.random.default_rng(0).integers(0, 256, (12, side, side, 1), dtype=np.uint8), []
    keys = [number.to_bytes(16, "big") for number in range(1, 13)]
    for channels in (1, 3):
        store = MappedStore(folder / str(channels), "test", keys, side, channels=channels)
        for number, one in enumerate(pixels):
            store.put(number, np.ascontiguousarray(np.broadcast_to(one, (side, side, channels))))
        store.close()
        again = MappedStore(folder / str(channels), "test", keys, side, channels=channels)
        assert again.there.all()
        assert not MappedStore(folder / str(channels), "test", keys, side, channels=4 - channels).there.any()
        found.append(again.pictures(range(12), torch.arange(12), size))
    return found[0], found[1]


def kept(_: Path, side: int, size: int) -> tuple[Pictures, Pictures]:
    noise = torch.randint(0, 256, (12, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, three = (Pictures(noise.expand(-1, count, -1, -1).contiguous(), torch.arange(12), size) for count in (1, 3))
    return one, three


@pytest.mark.parametrize("made", [kept, stores])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_batches_are_the_first_channel_of_those_of_three(
    tmp_path: Path, made: Any, layout: torch.memory_format
) -> None:
    """Cropped, flipped, resized or enlarged, normalised, and evaluated."""
    side, size = (73, 64) if made is stores else (32, 48)
    one, three = made(tmp_path, side, size)
    means = [statistics(pictures) for pictures in (one, three)]
    assert means[0] == tuple(values[:1] for values in means[1])

    def seen(pictures: AnyPictures, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Tensor]:
        batches = TrainBatches(pictures, seed=3, batch=5, augment=True, mean=mean, std=std, device="cpu")
        of_epoch = [batches.batch(1, step, memory_format=layout)[0] for step in range(batches.steps_per_epoch)]
        return [*of_epoch, *(images for images, _ in eval_batches(pictures, 5, mean, std, "cpu", layout))]

    pairs = list(zip(seen(one, *means[0]), seen(three, *means[1]), strict=True))
    assert len(pairs) == 6
    for grey, colour in pairs:
        assert grey.shape[1:] == (1, size, size)
        assert grey.stride() == torch.empty(grey.shape, memory_format=layout).stride()  # kernels choose by them
        assert torch.equal(grey, colour[:, :1])


def test_two_channels_are_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.channels = 2 \(from --set\): it takes 1 or 3"):
        gather(sets=["data.channels=2"])
