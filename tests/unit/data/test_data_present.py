from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lowmem.config.schema import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import downloaded, find_pictures
from tests.unit.data.test_data_cifar10 import cifar_root

__all__ = ["cifar_root"]  # a fixture


def config(source: str, root: Path, **settings: bool) -> DataConfig:
    return DataConfig(source=source, root=str(root), **settings)


def test_shapes_need_no_files(tmp_path: Path) -> None:
    assert find_pictures(config("shapes", tmp_path)) == ("shapes are drawn, no files needed", None)


def test_cifar10(cifar_root: Path) -> None:
    assert find_pictures(config("cifar10", cifar_root)) == (f"CIFAR-10 in {cifar_root}", None)
    batch = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2 .*MD5"):
        find_pictures(config("cifar10", cifar_root))
    batch.unlink()
    words, url = find_pictures(config("cifar10", cifar_root))
    assert words == f"CIFAR-10 is not in {cifar_root}: 163 MiB would be downloaded"
    assert url is not None
    assert url.startswith("https://")
    with pytest.raises(DataError, match="data_batch_2 is missing"):
        find_pictures(config("cifar10", cifar_root, download=False))


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloaded, "DEBIAN_FOLDER", tmp_path / "debian")
    words, url = find_pictures(config("fashion-mnist", tmp_path))
    assert words == f"Fashion-MNIST is not in {tmp_path}: 29 MiB would be downloaded"
    assert url is not None
    with pytest.raises(DataError, match=r"data\.download is off"):
        find_pictures(config("fashion-mnist", tmp_path, download=False))
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        with pytest.raises(DataError, match=r"is missing|is not in"):
            find_pictures(config("fashion-mnist", tmp_path, download=False))
        (tmp_path / name).write_bytes(b"")
    assert find_pictures(config("fashion-mnist", tmp_path)) == (f"Fashion-MNIST in {tmp_path}", None)


def test_folders_are_counted_not_decoded(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32)).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "train" / "cat" / "no-picture.png").write_bytes(b"?")
    words, url = find_pictures(config(f"folder:{tmp_path}", tmp_path))
    assert url is None
    assert words.startswith("7 train and 4 test pictures of 2 classes in ")
    with pytest.raises(DataError, match="train is missing"):
        find_pictures(config(f"folder:{tmp_path / 'train'}", tmp_path))
