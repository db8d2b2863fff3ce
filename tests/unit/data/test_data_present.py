from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError, UsageError
from lowmem.data import Found, downloaded, find_pictures, load
from tests.unit.data.test_data_cifar10 import cifar_root
from tests.unit.data.test_data_fashion import files

__all__ = ["cifar_root"]  # a fixture


def config(source: str, root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source=source, root=str(root), **settings)


def test_shapes_need_no_files(tmp_path: Path) -> None:
    assert find_pictures(config("shapes", tmp_path)) == Found("shapes are drawn, no files needed")


def test_cifar10(cifar_root: Path) -> None:
    assert find_pictures(config("cifar10", cifar_root)) == Found(f"CIFAR-10 in {cifar_root}")
    batch = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2 .*MD5"):
        find_pictures(config("cifar10", cifar_root))
    batch.unlink()
    found = find_pictures(config("cifar10", cifar_root))
    assert found.words == f"CIFAR-10 is not in {cifar_root}: 163 MiB would be downloaded"
    assert found.url is not None
    assert found.url.startswith("https://")
    with pytest.raises(DataError, match="data_batch_2 is missing"):
        find_pictures(config("cifar10", cifar_root, download=False))


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloaded, "DEBIAN_FOLDER", tmp_path / "debian")
    found = find_pictures(config("fashion-mnist", tmp_path))
    assert found.words == f"Fashion-MNIST is not in {tmp_path}: 29 MiB would be downloaded"
    assert found.url is not None
    with pytest.raises(DataError, match=r"data\.download is off"):
        find_pictures(config("fashion-mnist", tmp_path, download=False))
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        with pytest.raises(DataError, match=r"is missing|is not in"):
            find_pictures(config("fashion-mnist", tmp_path, download=False))
        (tmp_path / name).write_bytes(files()[name])
    assert find_pictures(config("fashion-mnist", tmp_path)) == Found(f"Fashion-MNIST in {tmp_path}")
    (tmp_path / names[0]).write_bytes(b"")
    with pytest.raises(DataError, match="it is something else"):
        find_pictures(config("fashion-mnist", tmp_path))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three training pictures and two test pictures of each of two classes."""
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32)).save(tmp_path / "pets" / part / name / f"{number}.png")
    return tmp_path / "pets"


def test_folders_are_looked_through_and_nothing_is_kept(pets: Path, tmp_path: Path) -> None:
    settings = config(f"folder:{pets}", tmp_path, cache=str(tmp_path / "cache"), val_split=2)
    found = find_pictures(settings)
    assert found == Found(f"{pets} has pictures of 2 classes: cat, dog; 4 to train on, 4 to test on, 2 to hold back")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="train is missing"):
        find_pictures(config(f"folder:{pets / 'train'}", tmp_path))


def test_what_training_would_refuse_or_warn_of_is_found(pets: Path, tmp_path: Path) -> None:
    def found(**settings: object) -> Found:
        return find_pictures(config(f"folder:{pets}", tmp_path, cache=str(tmp_path / "cache"), **settings))

    with pytest.raises(UsageError, match="leaves none"):
        found(val_split=6)
    (warning,) = found(val_split=5).warnings
    assert "no picture to train on of 1 of 2 classes" in warning
    (pets / "train" / "cat" / "no-picture.png").write_bytes(b"?")
    with pytest.raises(DataError, match="no-picture"):
        found()
    assert "no-picture" in found(skip_damaged=True).warnings[0]


def test_a_look_has_an_end(pets: Path, tmp_path: Path) -> None:
    settings = config(f"folder:{pets}", tmp_path, cache=str(tmp_path / "cache"))
    found = find_pictures(settings, seconds=0.0)
    assert "10 were not looked at" in found.words
    load(settings, 0)
    assert "not looked at" not in find_pictures(settings, seconds=0.0).words  # they are kept
