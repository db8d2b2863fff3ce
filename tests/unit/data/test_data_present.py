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
    assert find_pictures(config("shapes", tmp_path)).there


def test_cifar10(cifar_root: Path) -> None:
    found = find_pictures(config("cifar10", cifar_root))
    assert (found.there, found.url) == (True, None)
    batch = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2 .*MD5"):
        find_pictures(config("cifar10", cifar_root))
    batch.unlink()
    found = find_pictures(config("cifar10", cifar_root))
    assert (found.there, found.download_bytes) == (False, 170_498_071)
    assert found.url is not None
    assert found.url.startswith("https://")
    with pytest.raises(DataError, match="data_batch_2 is missing"):
        find_pictures(config("cifar10", cifar_root, download=False))


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloaded, "DEBIAN_FOLDER", tmp_path / "debian")
    found = find_pictures(config("fashion-mnist", tmp_path))
    assert (found.there, found.url is not None) == (False, True)
    with pytest.raises(DataError, match=r"data\.download is off"):
        find_pictures(config("fashion-mnist", tmp_path, download=False))
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        with pytest.raises(DataError, match=r"is missing|is not in"):
            find_pictures(config("fashion-mnist", tmp_path, download=False))
        (tmp_path / name).write_bytes(b"")
    assert find_pictures(config("fashion-mnist", tmp_path)).there


def test_folders_are_counted_not_decoded(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32)).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "train" / "cat" / "no-picture.png").write_bytes(b"?")
    found = find_pictures(config(f"folder:{tmp_path}", tmp_path))
    assert found.there
    assert found.words.startswith("7 train and 4 test pictures of 2 classes in ")
    with pytest.raises(DataError, match="train is missing"):
        find_pictures(config(f"folder:{tmp_path / 'train'}", tmp_path))
